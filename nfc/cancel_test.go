package nfc_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

var errStop = errors.New("the operator said stop")

// soon fails the test if a call has not returned a second after its context ended.
func soon(t *testing.T, since time.Time, what string) {
	t.Helper()
	if took := time.Since(since); took > patience*time.Second {
		t.Errorf("%s: %v after the end of the context", what, took)
	}
}

// steps are the steps at which a host can be silent, in a connection that is opened.
func steps() []nfctest.Step {
	all := nfctest.Steps()
	return all[:len(all)-1] // without StepClose
}

// TestCancelOpen ends the context while the host is silent at a step of the opening.
func TestCancelOpen(t *testing.T) {
	content := pattern(1<<20, 50)
	for _, step := range steps() {
		for _, kind := range []nfctest.Kind{nfctest.Silence, nfctest.Stall} {
			if kind == nfctest.Stall && (step == nfctest.StepConnect || step == nfctest.StepTLS || step == nfctest.StepSecondTLS) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", step, kind), func(t *testing.T) {
				h, ts := newHost(t, content, nfctest.Options{})
				noLeaks(t, h)
				budget := nfcbudget.New(4 << 20)
				rule := h.On(nfctest.Fault{Step: step, Kind: kind})
				ctx, cancel := context.WithCancelCause(t.Context())
				var since time.Time
				go func() {
					<-rule.Arrived()
					since = time.Now()
					cancel(errStop)
				}()
				_, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{Budget: only(budget)})
				soon(t, since, "Open")
				if !errors.Is(err, errStop) {
					t.Errorf("%v", err)
				}
				if _, ok := budget.TryAcquire(4 << 20); !ok {
					t.Error("the share of the budget was not given back")
				}
				if n := ts.count(); n != 1 {
					t.Errorf("%d tickets", n)
				}
				left(t, h, step)
			})
		}
	}
}

// only returns a budget for Options.Budget.
func only(b *nfcbudget.Budget) func(context.Context) (*nfcbudget.Budget, error) {
	return func(context.Context) (*nfcbudget.Budget, error) { return b, nil }
}

// TestCancelTicket ends the context while the server gives a ticket, or while the disk waits for
// memory.
func TestCancelTicket(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	waits := nfc.TicketsFunc(func(ctx context.Context) (nfc.Ticket, error) {
		cancel(errStop)
		<-ctx.Done()
		return nfc.Ticket{}, ctx.Err()
	})
	if _, err := nfc.Open(ctx, nfc.Params{Name: file}, waits, nfc.Options{}); !errors.Is(err, errStop) {
		t.Error(err)
	}
	budget := nfcbudget.New(1 << 20)
	release, _ := budget.Acquire(t.Context(), 1<<20)
	defer release()
	ctx, cancel = context.WithCancelCause(t.Context())
	time.AfterFunc(time.Millisecond, func() { cancel(errStop) })
	if _, err := nfc.Open(ctx, nfc.Params{Name: file}, waits, nfc.Options{Budget: only(budget)}); !errors.Is(err, errStop) {
		t.Error(err)
	}
}

// TestCancelFailedOpen ends the context while the host is silent at the end of a session in which
// it has refused to open the file.
func TestCancelFailedOpen(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 50), nfctest.Options{})
	noLeaks(t, h)
	h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros})
	rule := h.On(nfctest.Fault{Step: nfctest.StepClose, Kind: nfctest.Silence})
	ctx, cancel := context.WithCancelCause(t.Context())
	var since time.Time
	go func() {
		<-rule.Arrived()
		since = time.Now()
		cancel(errStop)
	}()
	_, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{})
	soon(t, since, "Open")
	if err == nil {
		t.Error("no error")
	}
}

// TestCancelReopening ends the context while the host is silent at a step of the second opening.
func TestCancelReopening(t *testing.T) {
	content := pattern(1<<20, 51)
	for _, step := range steps() {
		t.Run(string(step), func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{})
			noLeaks(t, h)
			budget := nfcbudget.New(4 << 20)
			ctx, cancel := context.WithCancelCause(t.Context())
			o := patient()
			o.Timeout, o.Budget = time.Minute, only(budget)
			d, err := nfc.Open(ctx, nfc.Params{Name: file, Frozen: true}, ts, o)
			if err != nil {
				t.Fatal(err)
			}
			rule := h.On(nfctest.Fault{Step: step, Kind: nfctest.Silence, Connection: 2})
			h.Cut()
			var since time.Time
			go func() {
				<-rule.Arrived()
				since = time.Now()
				cancel(errStop)
			}()
			_, err = d.ReadAt(make([]byte, 512), 0)
			soon(t, since, "ReadAt")
			if !errors.Is(err, errStop) {
				t.Errorf("%v", err)
			}
			if _, ok := budget.TryAcquire(1); ok {
				t.Error("the share of the budget was given back before Close")
			}
			since = time.Now()
			d.Close()
			soon(t, since, "Close")
			if _, ok := budget.TryAcquire(4 << 20); !ok {
				t.Error("the share of the budget was not given back")
			}
		})
	}
}

// TestCancelReads ends the context of a disk during many reads that the host does not answer.
func TestCancelReads(t *testing.T) {
	content := pattern(2<<20, 52)
	h, ts := newHost(t, content, nfctest.Options{})
	noLeaks(t, h)
	ctx, cancel := context.WithCancelCause(t.Context())
	d, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{Depth: 4, RequestSize: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	rule := h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.Stall, Times: 4})
	var wg sync.WaitGroup
	for range 10 { // more than requests in flight
		wg.Go(func() {
			_, err := d.ReadAt(make([]byte, 2<<20), 0)
			if !errors.Is(err, errStop) {
				t.Errorf("%v", err)
			}
		})
	}
	<-rule.Arrived()
	since := time.Now()
	cancel(errStop)
	wg.Wait()
	soon(t, since, "ReadAt")
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, errStop) {
		t.Errorf("%v", err)
	}
	d.Close()
	soon(t, since, "Close")
}

// TestCloseDuringReads closes a disk during reads. They end well or with os.ErrClosed, and the session
// is ended without a request in flight.
func TestCloseDuringReads(t *testing.T) {
	content := pattern(2<<20, 53)
	for range 4 {
		h, ts := newHost(t, content, nfctest.Options{Shuffle: true})
		noLeaks(t, h)
		d := open(t, ts, nfc.Params{Name: file}, nfc.Options{RequestSize: 128 << 10})
		begun := make(chan bool, 8)
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				p := make([]byte, 1<<19)
				for n := 0; ; n++ {
					off := int64(i+n) % 4 << 19
					_, err := d.ReadAt(p, off)
					if errors.Is(err, os.ErrClosed) {
						return
					}
					if err != nil && err != io.EOF || !bytes.Equal(p, content[off:off+1<<19]) {
						t.Errorf("%v", err)
						return
					}
					if n == 2 {
						begun <- true
					}
				}
			})
		}
		<-begun
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if s := h.Stats(); s.CloseHandshakes != 1 || s.Connections != 1 {
			t.Errorf("%+v", s)
		}
		if err := d.Close(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("the second Close: %v", err)
		}
	}
}

// TestCancelClose ends the context of a disk while the host is silent at its end.
func TestCancelClose(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 54), nfctest.Options{})
	noLeaks(t, h)
	ctx, cancel := context.WithCancelCause(t.Context())
	d, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{})
	if err != nil {
		t.Fatal(err)
	}
	rule := h.On(nfctest.Fault{Step: nfctest.StepClose, Kind: nfctest.Silence})
	var since time.Time
	go func() {
		<-rule.Arrived()
		since = time.Now()
		cancel(errStop)
	}()
	d.Close()
	soon(t, since, "Close")
}

// TestCloseWhileOpening closes a disk while it is opened again.
func TestCloseWhileOpening(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 55), nfctest.Options{})
	noLeaks(t, h)
	d, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, patient())
	if err != nil {
		t.Fatal(err)
	}
	rule := h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.Silence})
	h.Cut()
	read := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(make([]byte, 512), 0)
		read <- err
	}()
	<-rule.Arrived()
	since := time.Now()
	d.Close()
	soon(t, since, "Close")
	if err := <-read; !errors.Is(err, source.ErrReopen) && !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
}
