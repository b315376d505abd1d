package nfc_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

const short = patience * 100 * time.Millisecond

// checkTimeout checks the error of a read that was given up.
func checkTimeout(t *testing.T, err error, began time.Time) {
	t.Helper()
	var e *nfc.Error
	if !errors.As(err, &e) || e.Step != nfc.StepRead || !errors.Is(err, os.ErrDeadlineExceeded) || source.IsPermanent(err) {
		t.Errorf("%v", err)
	}
	if took := time.Since(began); took < short || took > 40*short {
		t.Errorf("it took %v with a timeout of %v", took, short)
	}
}

// TestTimeouts reads from hosts that are silent in the middle of an answer, or do not answer.
func TestTimeouts(t *testing.T) {
	content := pattern(1<<20, 90)
	for _, kind := range []nfctest.Kind{nfctest.Silence, nfctest.Stall, nfctest.Missing, nfctest.WrongPacked} {
		t.Run(kind.String(), func(t *testing.T) {
			t.Parallel()
			h, ts := newHost(t, content, nfctest.Options{})
			t.Cleanup(func() { left(t, h, nfctest.StepRead) })
			d := openWithin(t, ts, nfc.Params{Name: file}, nfc.Options{Timeout: short, Compression: "none"})
			h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: kind})
			began := time.Now()
			_, err := d.ReadAt(make([]byte, 1<<20), 0)
			if kind == nfctest.WrongPacked && err != nil && strings.Contains(err.Error(), "expected an uncompressed fragment") {
				return
			}
			checkTimeout(t, err, began)
		})
	}
}

// TestTimeoutOfMany has more reads than requests may be in flight, on a host that answers none of them.
func TestTimeoutOfMany(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 91), nfctest.Options{})
	noLeaks(t, h)
	d := openWithin(t, ts, nfc.Params{Name: file}, nfc.Options{Timeout: short, Depth: 2, RequestSize: 64 << 10})
	h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.Silence})
	began := time.Now()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			_, err := d.ReadAt(make([]byte, 200<<10), int64(i)*512)
			checkTimeout(t, err, began)
		})
	}
	wg.Wait()
	d.Close()
}

// A relay passes connections on to a host.
type relay struct{ listener net.Listener }

// newRelay starts a relay that calls toClient before it passes n bytes on to the client, and toHost
// before it passes n bytes on to the host.
func newRelay(t *testing.T, port int, toClient, toHost func(n int)) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	pass := func(to, from net.Conn, before func(int)) {
		defer to.(*net.TCPConn).CloseWrite()
		b := make([]byte, 16<<10)
		for {
			n, err := from.Read(b)
			if err != nil {
				return
			}
			before(n)
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer client.Close()
				host, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
				if err != nil {
					return
				}
				defer host.Close()
				done := make(chan bool)
				go func() {
					defer close(done)
					pass(client, host, toClient)
				}()
				pass(host, client, toHost)
				<-done
			})
		}
	})
	return &relay{listener: l}
}

func (r *relay) port() int { return r.listener.Addr().(*net.TCPAddr).Port }

// TestSlowHost reads from a host whose answers arrive slowly, but arrive: each read takes longer
// than the timeout, and no fragment does.
func TestSlowHost(t *testing.T) {
	content := pattern(1<<20, 92)
	h, ts := newHost(t, content, nfctest.Options{Fragment: 64 << 10})
	noLeaks(t, h)
	slow := make(chan bool)
	r := newRelay(t, h.Port(), func(n int) {
		select {
		case <-slow:
			time.Sleep(short / 12 * time.Duration(n) / (16 << 10)) // this is the line's speed, no synchronisation
		default:
		}
	}, func(int) {})
	ts.before = func(_ int, ticket *nfc.Ticket) error { ticket.Port = r.port(); return nil }
	d := openWithin(t, ts, nfc.Params{Name: file}, nfc.Options{Timeout: 3 * short, Compression: "none"})
	close(slow)
	began := time.Now()
	readAll(t, d, content, 1<<20)
	if took := time.Since(began); took < 3*short {
		t.Errorf("it took %v: the line is not slow", took)
	}
	d.Close()
}

// TestHostDoesNotRead has a host that takes nothing more from the connection.
func TestHostDoesNotRead(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 93), nfctest.Options{})
	noLeaks(t, h)
	blocked, ended := make(chan bool), make(chan bool)
	r := newRelay(t, h.Port(), func(int) {}, func(int) {
		select {
		case <-blocked:
			<-ended
		default:
		}
	})
	ts.before = func(_ int, ticket *nfc.Ticket) error { ticket.Port = r.port(); return nil }
	d := openWithin(t, ts, nfc.Params{Name: file}, nfc.Options{Timeout: short, RequestSize: 512, Depth: 32})
	close(blocked)
	began := time.Now()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := d.ReadAt(make([]byte, 1<<20), 0)
			if errors.Is(err, io.EOF) {
				t.Error(err)
			}
			checkTimeout(t, err, began)
		})
	}
	wg.Wait()
	close(ended)
	d.Close()
}
