package nfc

import "github.com/vddkcp/vddkcp/nfc/wire"

// newRead returns a request that reads len(p) bytes into p.
func newRead(handle uint64, p []byte, off int64, c wire.Compression) *request {
	return &request{
		kind: wire.IO, p: p, left: len(p),
		read: wire.Read{Handle: handle, Off: off, Len: len(p), Compression: c},
	}
}

// The method read reads len(p) bytes at the given offset, in requests of the size that the limits
// allow. Both numbers are multiples of a sector. It returns when no request uses p any more. The result
// empty says that p consists of zeros. If it is false, p may still do so.
func (c *conn) read(handle uint64, p []byte, off int64, compression wire.Compression) (empty bool, err error) {
	size, _, changes := c.limits.get()
	requests := make([]*request, 0, (len(p)+size-1)/size)
	for len(p) > 0 && err == nil {
		n := min(len(p), size)
		r := newRead(handle, p[:n:n], off, compression)
		r.changes = changes
		if err = c.start(r); err == nil {
			requests = append(requests, r)
		}
		p, off = p[n:], off+int64(n)
	}
	empty = err == nil
	for _, r := range requests {
		if failed := c.wait(r); failed != nil && err == nil {
			err = failed
		}
		if r.blank {
			clear(r.p)
		}
		empty = empty && err == nil && r.blank
	}
	return empty, err
}
