package nfc_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

func rereadable(t *testing.T, d source.Disk) source.Rereadable {
	t.Helper()
	r, ok := source.Ability[source.Rereadable](d)
	if !ok {
		t.Fatal("the disk cannot be opened again")
	}
	return r
}

// TestOpenAgain reads a disk a second time over a connection of its own.
func TestOpenAgain(t *testing.T) {
	content := pattern(2<<20+512, 70)
	h, ts := newHost(t, content, nfctest.Options{RecordReads: true, Memory: 4 << 20})
	noLeaks(t, h)
	closed := 0 // connections that were ended properly before the second ticket was given
	ts.before = func(n int, _ *nfc.Ticket) error {
		if n != 2 {
			return nil
		}
		h.AwaitClosed(5 * time.Second)
		closed = h.Stats().Ends
		return nil
	}
	o := patient()
	o.Budget = only(nfcbudget.New(4 << 20))
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
	for off := 0; off < len(content); off += 256 << 10 { // one request in flight
		d.ReadAt(make([]byte, min(256<<10, len(content)-off)), int64(off))
	}
	again, err := rereadable(t, d).OpenAgain(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	readAll(t, again, content, 1<<20)
	if s := h.Stats(); s.InFlight != 1 || s.MostOpen != 1 || s.Connections != 2 || closed != 1 {
		t.Errorf("%+v, %d closed", s, closed)
	}
	if err := again.Close(); err != nil {
		t.Error(err)
	}
	readAll(t, d, content, 1<<20)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	h.AwaitClosed(5 * time.Second)
	s := h.Stats()
	if s.Connections != 3 || s.CloseHandshakes != 3 || s.Ends != 3 || s.UnusedTickets != 0 {
		t.Errorf("%+v", s)
	}
	for _, r := range s.Reads {
		if (r.Compression == 0) != (r.Connection == 2) || r.Connection == 2 && r.Length > 64<<10 {
			t.Errorf("%+v", r)
		}
	}
}

// TestOpenAgainFails opens a disk again although something fails.
func TestOpenAgainFails(t *testing.T) {
	content := pattern(1<<20, 71)
	for _, c := range []struct {
		name   string
		break_ func(h *nfctest.Host, ts *tickets)
		failed error // of OpenAgain
	}{
		{"a ticket", func(_ *nfctest.Host, ts *tickets) {
			given := 0
			ts.before = func(int, *nfc.Ticket) error {
				if given++; given <= 2 {
					ts.host.ExpireTickets()
					return errors.New("the server is busy")
				}
				return nil
			}
		}, nil},
		{"a locked file", func(h *nfctest.Host, _ *tickets) {
			h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros, Times: 2})
		}, nil},
		{"a lost connection", func(h *nfctest.Host, _ *tickets) {
			h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.Reset, Skip: 4, Times: 1})
		}, nil},
		{"the end of the session", func(h *nfctest.Host, _ *tickets) {
			h.On(nfctest.Fault{Step: nfctest.StepClose, Kind: nfctest.Reset, Times: 1})
		}, nil},
		{"a gone snapshot", func(_ *nfctest.Host, ts *tickets) {
			ts.before = func(int, *nfc.Ticket) error { ts.host.ExpireTickets(); return source.Permanent(source.ErrGone) }
		}, source.ErrGone},
		{"another disk", func(h *nfctest.Host, _ *tickets) {
			h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(pattern(1<<20, 72)), Size: 1 << 20, DDB: ddb("1")})
		}, source.ErrChanged},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{})
			noLeaks(t, h)
			d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
			c.break_(h, ts)
			again, err := rereadable(t, d).OpenAgain(t.Context())
			if c.failed != nil {
				if !errors.Is(err, c.failed) {
					t.Errorf("%v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			readAll(t, again, content, 1<<20)
			again.Close()
			readAll(t, d, content, 1<<20)
		})
	}
	// Without retries, the first failure counts.
	h, ts := newHost(t, content, nfctest.Options{})
	noLeaks(t, h)
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, nfc.Options{})
	h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros})
	if _, err := rereadable(t, d).OpenAgain(t.Context()); err == nil || !strings.Contains(err.Error(), "error 11") {
		t.Error(err)
	}
}

// TestOpenAgainCancelled ends the context of OpenAgain while the host is silent.
func TestOpenAgainCancelled(t *testing.T) {
	content := pattern(1<<20, 73)
	for _, step := range []nfctest.Step{nfctest.StepClose, nfctest.StepProxy, nfctest.StepRead} {
		t.Run(string(step), func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{})
			noLeaks(t, h)
			d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
			rule := h.On(nfctest.Fault{Step: step, Kind: nfctest.Silence})
			ctx, cancel := context.WithCancelCause(t.Context())
			var since time.Time
			go func() {
				<-rule.Arrived()
				since = time.Now()
				cancel(errStop)
			}()
			_, err := rereadable(t, d).OpenAgain(ctx)
			soon(t, since, "OpenAgain")
			if !errors.Is(err, errStop) {
				t.Error(err)
			}
			rule.Remove()
			readAll(t, d, content, 1<<20)
		})
	}
}
