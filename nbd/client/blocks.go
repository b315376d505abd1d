package client

import "github.com/vddkcp/vddkcp/nbd"

// The method read fills p with the bytes of the export that begin at the given offset.
// The offset and the length may have any alignment, but the range must lie in the
// export.
func (s *server) read(p []byte, off int64) error {
	return s.doBlocks(nbd.CmdRead, p, off, s.readPart)
}

// The method write writes p to the export at the given offset. The offset and the
// length may have any alignment. If p covers only a part of a block, the rest of the
// block is read and written back.
func (s *server) write(p []byte, off int64) error {
	return s.doBlocks(nbd.CmdWrite, p, off, s.writePart)
}

// doBlocks reads bytes of the export into the buffer p, or writes p to the export, as
// the given command says. The range begins at the given offset. doBlocks sends requests
// for the blocks that the range covers completely. The blocks at the beginning and at
// the end of the range may be covered only in part. For such a part, doBlocks calls the
// function readPart or writePart, which the caller passes as the last argument.
func (s *server) doBlocks(cmd nbd.Command, p []byte, off int64, part func(p []byte, off int64) error) error {
	head, whole := s.splitBlocks(off, int64(len(p)))
	if head > 0 {
		if err := part(p[:head], off); err != nil {
			return err
		}
	}
	p, off = p[head:], off+head
	tail, end := p[whole:], off+whole
	p = p[:whole]
	k, err := s.doAll(s.life.Context, func() *call {
		if len(p) == 0 {
			return nil
		}
		n := min(len(p), s.maxPayload())
		k := &call{cmd: cmd, off: off, n: int64(n), data: p[:n:n]}
		p, off = p[n:], off+int64(n)
		return k
	})
	if err != nil {
		return s.wrap(k, err)
	}
	if len(tail) > 0 {
		return part(tail, end)
	}
	return nil
}

// readPart fills p with the bytes of the export that begin at the given offset. The
// range must lie inside one block. (A block has the minimum block size of the
// server.)
func (s *server) readPart(p []byte, off int64) error {
	k, err := s.readBlock(off)
	if err != nil {
		return err
	}
	copy(p, k.data[off-k.off:])
	return nil
}

// readBlock reads the whole block that contains the given offset. It returns the call
// that has read the block. The field off of this call holds the offset of the block in
// the export, and the field data holds the bytes of the block.
func (s *server) readBlock(off int64) (*call, error) {
	block := int64(s.sizes.Min)
	start := off - off%block
	n := min(block, s.size-start)
	k := &call{cmd: nbd.CmdRead, off: start, n: n, data: make([]byte, n)}
	if err := s.do(s.life.Context, s.pick(), k); err != nil {
		return nil, s.wrap(k, err)
	}
	return k, nil
}

// maxPayload returns the maximum length of the data in one request, in bytes. It is a
// multiple of the minimum block size of the server.
func (s *server) maxPayload() int {
	most := min(s.sizes.Max, nbd.MaxPayload)
	return int(most - most%s.sizes.Min)
}

// writePart writes p to a range inside one block, at the given offset. It reads the
// block, changes the range and writes the block back. Only one call of writePart does
// this at a time, because two concurrent calls for the same block would overwrite each
// other's change.
func (s *server) writePart(p []byte, off int64) error {
	s.partial.Lock()
	defer s.partial.Unlock()
	old, err := s.readBlock(off)
	if err != nil {
		return err
	}
	copy(old.data[off-old.off:], p)
	k := &call{cmd: nbd.CmdWrite, off: old.off, n: old.n, data: old.data}
	if err := s.do(s.life.Context, s.pick(), k); err != nil {
		return s.wrap(k, err)
	}
	return nil
}

// splitBlocks divides a range of n bytes, which begins at the given offset, into three
// parts. head is the length of the part before the first block boundary. It is 0 if the
// range begins at a block boundary. whole is the length of the part that consists of
// complete blocks. The third part is what remains: the beginning of another block. A
// short block at the end of the export counts as a complete block.
func (s *server) splitBlocks(off, n int64) (head, whole int64) {
	block := int64(s.sizes.Min)
	if in := off % block; in > 0 {
		head = min(block-in, n)
	}
	whole = n - head
	if off+n < s.size && whole > 0 {
		whole -= (off + n) % block
	}
	return head, whole
}
