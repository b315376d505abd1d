package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

func (c *conn) requests() error {
	var b [nbd.RequestSize]byte
	for !c.ending.Load() {
		if _, err := io.ReadFull(c.r, b[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("next request: %w", err)
		}
		r, err := nbd.ParseRequest(&b)
		if err != nil {
			return err
		}
		if r.Type == nbd.CmdDisconnect {
			return nil
		}
		if err := c.begin(r); err != nil {
			return err
		}
		if c.r.Buffered() < nbd.RequestSize {
			c.pay()
		}
	}
	return nil
}

// receive returns the next data of a write, of which n bytes at off are left,
// or the first of them. It takes memory when the first of them have come. Where
// they come slowly, it keeps no more of it than the reserve.
func (c *conn) receive(off, n int64) (*buffer, error) {
	c.pay()
	if len(c.carry) == 0 {
		if _, err := c.r.Peek(1); err != nil {
			return nil, err
		}
	}
	most := int64(maxPiece)
	if c.slow {
		most = reserve
	}
	b, err := c.memory(int(min(n, most)))
	if err != nil {
		return nil, err
	}
	have := copy(b.b, c.carry)
	c.carry = nil
	start := time.Now()
	c.receiving.Store(start.UnixNano())
	defer c.receiving.Store(0)
	limited := len(b.b) > reserve && len(b.b)-have > c.r.Buffered()
	if limited {
		c.readBy(start.Add(patience))
	}
	more, err := io.ReadFull(c.r, b.b[have:])
	have += more
	if limited {
		c.readBy(time.Time{})
	}
	switch {
	case err == nil:
		c.slow = c.slow && time.Since(start) > fast
		return b, nil
	case !limited || !errors.Is(err, os.ErrDeadlineExceeded) || c.ending.Load():
		c.s.memory.put(b)
		return nil, err
	}
	c.slow = true
	whole := max(have-int((off+int64(have))%minPiece), 0)
	c.carry = bytes.Clone(b.b[whole:have])
	if b.b = b.b[:whole]; whole > 0 {
		return b, nil
	}
	c.s.memory.put(b)
	return c.receive(off, n)
}

// readBy sets or lifts the deadline for the data of a write.
func (c *conn) readBy(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending.Load() {
		c.base.SetReadDeadline(t)
	}
}

// lost ends the connection because of err, unless the server ends: then there
// are replies to send.
func (c *conn) lost(err error) {
	if !c.ending.Load() {
		c.fail(err)
	}
}

// stalled reports whether the client has moved next to nothing for so long,
// although the server waits for it.
func (c *conn) stalled(after time.Duration) bool {
	since := c.receiving.Load()
	return since != 0 && time.Now().UnixNano()-since >= int64(after) || c.out.stalled(after)
}
