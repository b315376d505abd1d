package client

import (
	"testing"

	"github.com/vddkcp/vddkcp/internal/flush/flushtest"
	"github.com/vddkcp/vddkcp/nbd"
)

func TestFlushes(t *testing.T) {
	flushtest.Run(t, func(t *testing.T, flush func() error) flushtest.Disk {
		s := play(t, greetingOf(fakeSize, nbd.SendFlush), func(r nbd.Request, _ []byte) []byte {
			switch {
			case r.Type != nbd.CmdFlush:
				return nil
			case flush() != nil:
				return to(r, chunk(nbd.ChunkError, true, uint32(5), uint16(0)))
			}
			return to(r, chunk(nbd.ChunkNone, true))
		})
		d := &WritableDisk{Disk: &Disk{server: s.server, size: fakeSize}, target: plainTarget(s.server)}
		t.Cleanup(func() { d.Close() })
		return flushtest.Disk{Flush: d.Flush, Calls: d.flushes.Calls, EIO: nbd.EIO}
	})
}
