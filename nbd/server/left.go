package server

import (
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxPeek is how many unread bytes of a client hasLeft looks at.
	maxPeek = 64 << 10
	// maxHeldByTLS is more than TLS holds of data that it has received and not returned.
	maxHeldByTLS = 64 << 10
)

// hasLeft reports whether it is useless to carry out the given request, because its client has
// closed the connection. This is so for a read whose reply nobody receives, and for a write whose
// data are not complete. Only the goroutine that reads requests calls hasLeft, after it has read
// the request and before it reads the data of a write.
//
// A client may shut down its side of the connection after the request DISC and still receive
// replies. That client has not left. With TLS, a client that does so shuts down only TLS, and not
// the socket.
func (c *conn) hasLeft(r nbd.Request) (left bool) {
	raw := socket(c.base)
	if raw == nil {
		return false
	}
	encrypted := c.net != c.base
	err := raw.Control(func(fd uintptr) {
		state := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		if _, err := unix.Poll(state, 0); err != nil {
			return
		}
		is := state[0].Revents
		if left = is&unix.POLLERR != 0; left || is&(unix.POLLHUP|unix.POLLRDHUP) == 0 {
			return
		}
		unread, err := unix.IoctlGetInt(int(fd), unix.TIOCINQ)
		switch {
		case err != nil:
		case r.Type == nbd.CmdWrite:
			received := int64(c.in.r.Buffered() + unread)
			if encrypted {
				received += maxHeldByTLS
			}
			left = received < int64(r.Len)
		default:
			left = is&unix.POLLHUP != 0 || encrypted || !c.announced(int(fd), unread)
		}
	})
	return left && err == nil
}

// announced reports whether the last request that a client has sent is DISC. The parameter unread
// is how many bytes of the client the socket fd holds. If they are too many to look at, the result
// is true.
func (c *conn) announced(fd, unread int) bool {
	if unread > maxPeek {
		return true
	}
	sent, err := c.in.r.Peek(c.in.r.Buffered())
	if err != nil {
		return true
	}
	sent = append(make([]byte, 0, len(sent)+unread), sent...)
	if unread > 0 {
		n, _, err := unix.Recvfrom(fd, sent[len(sent):cap(sent)], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		if err != nil {
			return true
		}
		sent = sent[:len(sent)+n]
	}
	if len(sent) < nbd.RequestSize {
		return false
	}
	last, err := nbd.ParseRequest((*[nbd.RequestSize]byte)(sent[len(sent)-nbd.RequestSize:]))
	return err == nil && last.Type == nbd.CmdDisconnect
}
