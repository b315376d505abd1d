package client

import (
	"bytes"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/nbd"
)

// TestObserver opens an export whose server accepts one connection only, or promises nothing about
// several connections.
func TestObserver(t *testing.T) {
	greeting := func(flags nbd.TransmissionFlags) []byte {
		return be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(nbd.FixedNewstyle|nbd.NoZeroes),
			rep(nbd.OptStructuredReply, nbd.RepErrUnsupported, nil),
			rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoExport), uint64(1<<20), uint16(flags))),
			rep(nbd.OptGo, nbd.RepAck, nil))
	}
	for _, test := range []struct {
		flags nbd.TransmissionFlags
		want  string
	}{
		{nbd.HasFlags, "using 1 instead of 4 connections: the server does not promise"},
		{nbd.HasFlags | nbd.CanMultiConn, "using 1 instead of 4 connections: "},
	} {
		var open atomic.Int32
		ctx := observer.With(t.Context(), observer.Observer{Connections: func(n int) { open.Add(int32(n)) }})
		var log bytes.Buffer
		uri := serveGreetings(t, greeting(test.flags), be(uint64(0), uint64(0), uint16(0)))
		s, err := dial(ctx, uri, Options{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
		if err != nil {
			t.Fatal(err)
		}
		if n := open.Load(); n != 1 {
			t.Errorf("%d connections are open, want 1", n)
		}
		if err := s.close(); err != nil {
			t.Error(err)
		}
		if n := open.Load(); n != 0 {
			t.Errorf("%d connections are open after the end, want 0", n)
		}
		if !strings.Contains(log.String(), test.want) {
			t.Errorf("the log has no %q: %s", test.want, &log)
		}
	}
}
