package nfc_test

import (
	"bytes"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// TestObserver reads a disk whose host has no memory for one request, and then loses the
// connection.
func TestObserver(t *testing.T) {
	content := pattern(8<<20, 80)
	h, ts := newHost(t, content, nfctest.Options{})
	h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.NoMemory, Skip: 1, Times: 1})
	var open, waiting atomic.Int32
	ctx := observer.With(t.Context(), observer.Observer{
		Connections: func(n int) { open.Add(int32(n)) },
		Waiting:     func(n int) { waiting.Add(int32(n)) },
	})
	var log bytes.Buffer
	o := patient()
	o.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	d, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, o)
	if err != nil {
		t.Fatal(err)
	}
	if n := open.Load(); n != 1 {
		t.Errorf("%d connections are open, want 1", n)
	}
	readAll(t, d, content, 1<<20)
	h.Cut()
	readAll(t, d, content, 1<<20)
	if n := open.Load(); n != 1 {
		t.Errorf("%d connections are open after one was lost and replaced, want 1", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if n, w := open.Load(), waiting.Load(); n != 0 || w != 0 {
		t.Errorf("%d connections are open and %d requests wait after the end", n, w)
	}
	if want := "8 requests of 512.0 KiB at a time instead of 16 of 1.0 MiB: the host had no memory for one"; !strings.Contains(log.String(), want) {
		t.Errorf("the log has no line %q:\n%s", want, &log)
	}
}
