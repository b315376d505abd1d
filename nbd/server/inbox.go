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
	// maxDiscard is the maximum length, in bytes, of the data of a refused write
	// that the server reads and discards. If the data are longer, the server ends
	// the connection.
	maxDiscard = 2 * nbd.MaxPayload
	// readBuffer is the size, in bytes, of the buffer for the requests of a
	// connection. Most of the data of long writes do not go through this buffer.
	readBuffer = 4 << 10
	// The constant fast is a time limit for a client that counts as slow. Such a
	// client only gets buffers of up to 16 KiB (the constant reserve). If it fills one
	// of them within the time limit, it no longer counts as slow.
	fast = 100 * time.Millisecond
)

// An inbox reads what a client sends in the transmission phase: requests and the data
// of writes. All methods except stalled are called only by the goroutine that reads
// requests.
type inbox struct {
	c      *conn
	r      *bufio.Reader
	header [nbd.RequestSize]byte // buffer of next, kept here because next would allocate it for each request

	carry []byte // received data of a write that belong to the next buffer
	slow  bool   // the client sends slowly, and gets only buffers of up to 16 KiB (the constant reserve)

	receiving atomic.Int64 // when the current call of receive began to read data, in Unix nanoseconds; 0: there is none
}

func (in *inbox) init(c *conn, r net.Conn) { in.c, in.r = c, bufio.NewReaderSize(r, readBuffer) }

// The method next returns the next request. It returns io.EOF if the client closed the
// connection between two requests.
func (in *inbox) next() (nbd.Request, error) {
	if _, err := io.ReadFull(in.r, in.header[:]); err == io.EOF {
		return nbd.Request{}, err
	} else if err != nil {
		return nbd.Request{}, fmt.Errorf("cannot read the next request: %w", err)
	}
	return nbd.ParseRequest(&in.header)
}

// hasRequest reports whether a complete request is in the buffer, so that the method
// next need not read from the connection.
func (in *inbox) hasRequest() bool { return in.r.Buffered() >= nbd.RequestSize }

// The method discard skips the n bytes of data of a refused write.
func (in *inbox) discard(n uint32) error {
	if n > maxDiscard {
		return fmt.Errorf("a write request has %d bytes of data, want at most %d bytes", n, nbd.MaxPayload)
	}
	if _, err := io.CopyN(io.Discard, in.r, int64(n)); err != nil {
		return fmt.Errorf("cannot read the data of a write request: %w", err)
	}
	return nil
}

// receive reads the next data of a write and returns them in a buffer. The caller passes
// the length of the data that are still missing, and their offset in the disk. receive
// allocates the buffer only after the first byte has arrived.
//
// Other connections may need the memory of a buffer that is larger than 16 KiB (the
// constant reserve). Therefore the client must fill such a buffer within half a second
// (the constant patience). If the client is slower, receive returns the complete blocks
// that have arrived, if any. From then on it uses only buffers of up to 16 KiB, until the
// client counts as fast again.
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
	// Return the data up to the last offset in the disk that is a multiple of
	// minPiece, so that no block of the disk is written in two parts. The rest of
	// the data stays in in.carry for the next call of receive.
	whole := max(have-int((off+int64(have))%minPiece), 0)
	in.carry = bytes.Clone(b.b[whole:have])
	if b.b = b.b[:whole]; whole > 0 {
		return b, nil
	}
	c.s.memory.release(b)
	return in.receive(off, n)
}

// The method stalled reports whether receive has waited for the data of one buffer for
// at least the given time limit. It is safe for concurrent use.
func (in *inbox) stalled(limit time.Duration) bool {
	since := in.receiving.Load()
	return since != 0 && time.Now().UnixNano()-since >= int64(limit)
}
