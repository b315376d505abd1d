package client

import "github.com/vddkcp/vddkcp/nbd"

// read fills p with the bytes at offset off of the export. The offset and the length
// may have any alignment, but the range must lie in the export.
func (s *server) read(p []byte, off int64) error {
	block := int64(s.sizes.Min)
	if head := off % block; head > 0 && len(p) > 0 {
		n := min(block-head, int64(len(p)))
		if err := s.readPart(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	var tail []byte
	if end := off + int64(len(p)); end%block > 0 && end < s.size {
		n := max(int64(len(p))-end%block, 0)
		p, tail = p[:n], p[n:]
	}
	end := off + int64(len(p))
	k, err := s.doAll(s.life.Context, func() *call {
		if len(p) == 0 {
			return nil
		}
		n := min(len(p), s.maxPayload())
		k := &call{cmd: nbd.CmdRead, off: off, n: int64(n), data: p[:n:n]}
		p, off = p[n:], off+int64(n)
		return k
	})
	if err != nil {
		return s.wrap(k, err)
	}
	if len(tail) > 0 {
		return s.readPart(tail, end)
	}
	return nil
}

// readPart fills p with the bytes of a range that lies inside one block. (A block has
// the minimum block size of the server.) It reads the whole block and copies the range.
func (s *server) readPart(p []byte, off int64) error {
	block := int64(s.sizes.Min)
	head := off % block
	buf := make([]byte, min(block, s.size-off+head))
	k := &call{cmd: nbd.CmdRead, off: off - head, n: int64(len(buf)), data: buf}
	if err := s.do(s.life.Context, s.pick(), k); err != nil {
		return s.wrap(k, err)
	}
	copy(p, buf[head:])
	return nil
}

// maxPayload returns the maximum length of the data in one request, in bytes. It is a
// multiple of the minimum block size of the server.
func (s *server) maxPayload() int {
	most := min(s.sizes.Max, nbd.MaxPayload)
	return int(most - most%s.sizes.Min)
}

// write writes p at offset off. Neither the offset nor the length need be aligned. If p
// covers only a part of a block, the rest of the block is read and written back.
func (s *server) write(p []byte, off int64) error {
	head, whole := s.splitBlocks(off, int64(len(p)))
	if head > 0 {
		if err := s.writePart(p[:head], off); err != nil {
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
		k := &call{cmd: nbd.CmdWrite, off: off, n: int64(n), data: p[:n:n]}
		p, off = p[n:], off+int64(n)
		return k
	})
	if err != nil {
		return s.wrap(k, err)
	}
	if len(tail) > 0 {
		return s.writePart(tail, end)
	}
	return nil
}

// writePart writes a range inside one block. It reads the block, changes the range and
// writes the block back. Only one call does this at a time: of two concurrent calls for
// the same block, one would undo the change of the other.
func (s *server) writePart(p []byte, off int64) error {
	s.partial.Lock()
	defer s.partial.Unlock()
	block := int64(s.sizes.Min)
	head := off % block
	buf := make([]byte, min(block, s.size-off+head))
	if err := s.read(buf, off-head); err != nil {
		return err
	}
	copy(buf[head:], p)
	k := &call{cmd: nbd.CmdWrite, off: off - head, n: int64(len(buf)), data: buf}
	if err := s.do(s.life.Context, s.pick(), k); err != nil {
		return s.wrap(k, err)
	}
	return nil
}

// splitBlocks divides the range of n bytes at offset off into three parts. head is the
// length of the part before the first block boundary, or 0 if off is a block boundary.
// whole is the length of the part that consists of complete blocks. The rest is a part
// of a block. A short block at the end of the export counts as a complete block.
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
