package server

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxDiscard is the length, in bytes, of the longest write whose data are skipped
	// after the request was refused. A longer write ends the connection.
	maxDiscard = 2 * nbd.MaxPayload
	// readBuffer is the size of a connection's buffer for requests, in bytes. Longer
	// data of a write go directly into memory for them.
	readBuffer = 4 << 10
	// fast is a time limit for a client that counts as slow. If the client sends
	// reserve bytes within this time, it no longer counts as slow.
	fast = 100 * time.Millisecond
)

// inbox reads what a client sends in the transmission phase: requests and the
// data of writes. Only the goroutine that reads requests uses it, except for
// stalled.
type inbox struct {
	c      *conn
	r      *bufio.Reader
	header [nbd.RequestSize]byte // buffer of next, kept here because next would allocate it for each request

	carry []byte // received data of a write that belong to the next buffer
	slow  bool   // the client sends slowly, and gets only buffers of reserve bytes

	receiving atomic.Int64 // when the current call of receive began to read data, in Unix nanoseconds; 0: there is none
}

func (in *inbox) init(c *conn, r net.Conn) { in.c, in.r = c, bufio.NewReaderSize(r, readBuffer) }

// next returns the next request. It returns io.EOF if the client closed the connection
// between two requests.
func (in *inbox) next() (nbd.Request, error) {
	if _, err := io.ReadFull(in.r, in.header[:]); err == io.EOF {
		return nbd.Request{}, err
	} else if err != nil {
		return nbd.Request{}, fmt.Errorf("cannot read the next request: %w", err)
	}
	return nbd.ParseRequest(&in.header)
}

// hasRequest reports whether next returns a request without reading from the
// connection.
func (in *inbox) hasRequest() bool { return in.r.Buffered() >= nbd.RequestSize }

// discard skips the n bytes of data of a refused write.
func (in *inbox) discard(n uint32) error {
	if n > maxDiscard {
		return fmt.Errorf("a write has %d bytes of data, want at most %d bytes", n, nbd.MaxPayload)
	}
	if _, err := io.CopyN(io.Discard, in.r, int64(n)); err != nil {
		return fmt.Errorf("cannot read the data of a write: %w", err)
	}
	return nil
}

// receive returns a buffer with the next data of a write, whose n bytes from offset off on
// have not been returned yet. It allocates the buffer after the first byte has arrived. If
// the client does not fill the buffer within the duration patience, receive releases shared
// memory and continues with buffers of reserve bytes.
func (in *inbox) receive(off, n int64) (*buffer, error) {
	c := in.c
	c.out.flushReplies()
	if len(in.carry) == 0 {
		if _, err := in.r.Peek(1); err != nil {
			return nil, err
		}
	}
	most := int64(maxPiece)
	if in.slow {
		most = reserve
	}
	b, err := c.allocate(int(min(n, most)))
	if err != nil {
		return nil, err
	}
	have := copy(b.b, in.carry)
	in.carry = nil
	start := time.Now()
	in.receiving.Store(start.UnixNano())
	defer in.receiving.Store(0)
	limited := len(b.b) > reserve && len(b.b)-have > in.r.Buffered()
	if limited {
		c.setReadDeadline(start.Add(patience))
	}
	more, err := io.ReadFull(in.r, b.b[have:])
	have += more
	if limited {
		c.setReadDeadline(time.Time{})
	}
	switch {
	case err == nil:
		in.slow = in.slow && time.Since(start) > fast
		return b, nil
	case !limited || !errors.Is(err, os.ErrDeadlineExceeded) || c.ending.Load():
		c.s.memory.release(b)
		return nil, err
	}
	in.slow = true
	// Return the data up to a multiple of minPiece, and carry the rest to the next call.
	whole := max(have-int((off+int64(have))%minPiece), 0)
	in.carry = bytes.Clone(b.b[whole:have])
	if b.b = b.b[:whole]; whole > 0 {
		return b, nil
	}
	c.s.memory.release(b)
	return in.receive(off, n)
}

// stalled reports whether receive has waited for the data of one buffer for longer than the
// duration after. It is safe for concurrent use.
func (in *inbox) stalled(after time.Duration) bool {
	since := in.receiving.Load()
	return since != 0 && time.Now().UnixNano()-since >= int64(after)
}
