package nfctest

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

// use does everything that a client does with a host.
func use(ticket Ticket, w way, content []byte, compression uint32) error {
	c, err := connect(ticket, w)
	if err != nil {
		return err
	}
	defer c.conn.Close()
	if uuid, err := c.ddb("uuid"); err != nil || uuid != "60 00 c2" {
		return fmt.Errorf("uuid %q, %w", uuid, err)
	}
	for range 2 { // the second time, surplus answers to the first time come
		got, err := c.read(compression, 0, c.size, 192<<10)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, content) {
			return errors.New("other content")
		}
	}
	return c.close()
}

// Every kind of fault at every step makes the client fail, and leaves neither a connection nor a
// goroutine. Close would wait for the goroutine.
func TestFaults(t *testing.T) {
	content := testContent(400 << 10)
	for _, step := range Steps() {
		for kind := Nothing; kind < lastKind; kind++ {
			if !possible(step, kind) {
				continue
			}
			t.Run(fmt.Sprintf("%s/%v", step, kind), func(t *testing.T) {
				t.Parallel()
				h := newHost(t, Options{AllowViolations: true, Shuffle: kind%2 == 0}, content)
				f := Fault{Step: step, Kind: kind, Times: 1, Fragment: 1}
				if kind == Line {
					f.Text = "530 no"
				}
				rule := h.On(f)
				harmless := kind == Nothing || kind == OtherCertificate && step == StepSecondTLS || kind == Line && step == StepBanner
				watch := func(conn net.Conn) {
					go func() {
						if <-rule.Arrived(); !harmless {
							conn.SetDeadline(time.Now().Add(60 * time.Millisecond))
						}
					}()
				}
				compression := uint32(kind) % 2 * 3
				err := use(h.Ticket(), way{dialed: watch}, content, compression)
				if rule.Hits() != 1 {
					t.Errorf("the fault happened %d times", rule.Hits())
				}
				// The client of this test may take the close-notify together with the answer before it.
				if (err == nil) != harmless && kind != CloseNotify {
					t.Errorf("the client returned %v", err)
				}
				if !h.AwaitClosed(5 * time.Second) {
					t.Errorf("a connection is open")
				}
				if err := use(h.Ticket(), way{}, content, compression); err != nil {
					t.Errorf("after the fault: %v", err)
				}
			})
		}
	}
}

// An answer that waits does not delay other answers, and comes after Release.
func TestSilence(t *testing.T) {
	content := testContent(1 << 20)
	h := newHost(t, Options{RecordReads: true}, content)
	rule := h.On(Fault{Step: StepRead, Kind: Silence, Where: func(r Read) bool { return r.Offset == 0 }})
	stall := h.On(Fault{Step: StepRead, Kind: Stall, Skip: 15, Times: 1})
	c := mustConnect(t, h.Ticket(), way{})
	go func() {
		<-rule.Arrived()
		<-stall.Arrived()
		stall.Release()
		rule.Release()
	}()
	got, err := c.read(withSkipZ, 0, c.size, 64<<10)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("other content, %v", err)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
	if n := len(h.Stats().Reads); n != 16 {
		t.Errorf("%d reads", n)
	}
}

// A close-notify of the host ends the first TLS session.
func TestCloseNotify(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		h := newHost(t, Options{MaxTLS: version}, nil)
		h.On(Fault{Step: StepProxy, Kind: CloseNotify})
		var err error
		connect(h.Ticket(), way{tls1: func(c *client, t *tls.Conn) {
			_, err = t.Read(make([]byte, 1))
			c.conn.Close()
		}})
		if err != io.EOF {
			t.Errorf("%x: %v", version, err)
		}
	}
}

// received is a connection with bytes that have arrived already.
type received struct {
	net.Conn
	bytes.Buffer
}

func (r *received) Read(p []byte) (int, error)  { return r.Buffer.Read(p) }
func (r *received) Write(p []byte) (int, error) { return len(p), nil }

// A Read of oneRecord ends at the end of a record, even if more bytes have arrived.
func TestOneRecord(t *testing.T) {
	first, second := append([]byte{0x17, 3, 3, 1, 44}, make([]byte, 300)...), []byte{0x15, 3, 3, 0, 2, 1, 0}
	conn := new(received)
	conn.Buffer.Write(slices.Concat(first, second))
	o := &oneRecord{Conn: conn}
	for _, want := range [][]byte{first[:5], first[5:], second[:5], second[5:]} {
		p := make([]byte, 4096)
		if n, err := o.Read(p); err != nil || !bytes.Equal(p[:n], want) {
			t.Errorf("% x, %v, want % x", p[:n], err, want)
		}
	}
}

func TestErrors(t *testing.T) {
	h := newHost(t, Options{}, testContent(1<<20))
	h.On(Fault{Step: StepRead, Kind: NoMemory, Times: 1})
	h.On(Fault{Step: StepRead, Kind: Status, Code: 77, Skip: 1, Times: 1})
	c := mustConnect(t, h.Ticket(), way{})
	refusal := new(answerError)
	c.ask(0, 0, 1<<20)
	if _, _, _, err := c.receive(); !errors.As(err, &refusal) || refusal.code != 5 || refusal.text != "Failed to allocate the requested 1048600 bytes" {
		t.Error(err)
	}
	if kind, op, p, err := c.receive(); kind != 7 || op != 4 || !bytes.Equal(p, make([]byte, 44)) || err != nil {
		t.Error(kind, op, p, err)
	}
	c.ask(0, 0, 1<<20)
	if kind, _, p, err := c.receive(); kind != 7 || le.Uint64(p) != 77 || le.Uint32(p[36:]) != 0 || err != nil {
		t.Error(kind, p, err)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
}

func TestCut(t *testing.T) {
	h := newHost(t, Options{}, testContent(1<<20))
	c, d := mustConnect(t, h.Ticket(), way{}), mustConnect(t, h.Ticket(), way{clear: true})
	h.Cut()
	if _, _, _, err := c.receive(); err == nil {
		t.Error("the connection is open")
	}
	if _, _, _, err := d.receive(); err == nil {
		t.Error("the connection is open")
	}
}

func TestOnPanics(t *testing.T) {
	h := newHost(t, Options{}, nil)
	defer func() {
		if recover() == nil {
			t.Error("a fault that is not possible was accepted")
		}
	}()
	h.On(Fault{Step: StepBanner, Kind: Overlap})
}
