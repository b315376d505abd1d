package qcow2

import "io"

// runSize is the usual size of a write to the file, in bytes.
const runSize = 1 << 20

// The type run collects pieces of data that follow each other in the file, and
// writes many of them to the file at once.
type run struct {
	file  io.WriterAt
	size  int64  // size of a write, which ends at a multiple of size
	start int64  // offset of buf in the file
	buf   []byte // data that is not written yet
}

var zeros [64 << 10]byte

// The method end returns the offset in the file at which the next call of add will
// write.
func (r *run) end() int64 { return r.start + int64(len(r.buf)) }

// The method add appends p to the data of earlier calls. The offset of p in the
// file is the one that the method end returns before the call.
func (r *run) add(p []byte) error {
	for len(p) > 0 {
		// A long piece that begins at a multiple of 4096 bytes in the file is written
		// without copying it to the buffer.
		if r.end()%4096 == 0 && int64(len(p)) >= r.size/2 {
			n := len(p) &^ 4095
			if err := r.flush(); err != nil {
				return err
			}
			if _, err := r.file.WriteAt(p[:n], r.start); err != nil {
				return err
			}
			r.start, p = r.start+int64(n), p[n:]
			continue
		}
		room := int(r.size - r.end()%r.size)
		n := min(room, len(p))
		if r.buf == nil {
			r.buf = make([]byte, 0, r.size)
		}
		r.buf, p = append(r.buf, p[:n]...), p[n:]
		if n == room {
			if err := r.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// addZeros appends zeros up to the given offset in the file.
func (r *run) addZeros(end int64) error {
	for r.end() < end {
		if err := r.add(zeros[:min(int64(len(zeros)), end-r.end())]); err != nil {
			return err
		}
	}
	return nil
}

// The method patch overwrites data that the method add has appended before. The new
// bytes p are for the range of the file that begins at the given offset.
func (r *run) patch(p []byte, off int64) error {
	if n := min(int64(len(p)), r.start-off); n > 0 {
		if _, err := r.file.WriteAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	if len(p) > 0 {
		copy(r.buf[off-r.start:], p)
	}
	return nil
}

// The method flush writes the buffer to the file.
func (r *run) flush() error {
	if len(r.buf) == 0 {
		return nil
	}
	if _, err := r.file.WriteAt(r.buf, r.start); err != nil {
		return err
	}
	r.start, r.buf = r.end(), r.buf[:0]
	return nil
}
