package server

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

// A visit counts what a client does between choosing an export and leaving.
type visit struct {
	since                   time.Time
	requests, read, written atomic.Int64 // read and written: bytes of requests that succeeded
	ended                   string       // how the client has ended its connection; "": it has not
}

// The method add counts a request that was answered.
func (v *visit) add(r nbd.Request, failed bool) {
	v.requests.Add(1)
	switch {
	case failed:
	case r.Type == nbd.CmdRead:
		v.read.Add(int64(r.Len))
	case r.Type == nbd.CmdWrite:
		v.written.Add(int64(r.Len))
	}
}

// logBegin logs that the client has chosen an export.
func (c *conn) logBegin() {
	c.visit.since = time.Now()
	c.s.o.Log.Debug("client connected", "client", clientName(c.base), "export", c.export.Name, "tls", c.net != c.base)
}

// logEnd logs what the client has done. The parameter err is the error of the connection. The
// method does nothing if the client has not chosen an export.
func (c *conn) logEnd(err error) {
	if !c.entered.Load() || !c.s.o.Log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	v := &c.visit
	seconds := float64(time.Since(v.since).Milliseconds()) / 1000
	c.s.o.Log.Debug("client left", "client", clientName(c.base), "export", c.export.Name, "read", v.read.Load(), "written", v.written.Load(),
		"requests", v.requests.Load(), "seconds", seconds, "ended", c.endedBy(err))
}

// disconnects notes that the client has ended its connection, with or without the request DISC.
func (v *visit) disconnects(announced bool) {
	v.ended = "closed"
	if announced {
		v.ended = "disconnect"
	}
}

// endedBy says how a connection has ended: with the request DISC (disconnect), because the client
// closed it without this request (closed), because the network or the client broke it off (reset),
// because the server is ending (shutdown), or because the client broke the protocol or was too slow
// (error).
func (c *conn) endedBy(err error) string {
	switch {
	case c.visit.ended != "":
		return c.visit.ended
	case c.ending.Load() || errors.Is(err, ErrShutdown):
		return "shutdown"
	case errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ETIMEDOUT):
		return "reset"
	}
	return "error"
}

// awaitRate waits until the limit of the server allows the data of a request. It returns errGone if
// the client has left, so that nobody would receive the data or send the rest of them.
func (c *conn) awaitRate(r nbd.Request) error {
	var limit *rateLimit
	switch r.Type {
	case nbd.CmdRead:
		limit = c.s.rates.reads
	case nbd.CmdWrite:
		limit = c.s.rates.writes
	}
	return limit.wait(c.ctx, c.s.stopping, c.holder.peer, int64(r.Len), func() bool {
		c.out.flushReplies()
		return c.hasLeft(r)
	})
}
