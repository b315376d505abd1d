package nfctest

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"
)

// testContent returns the content of a disk: data, text, holes, and blocks with few bytes.
func testContent(size int) []byte {
	b := make([]byte, size)
	random := rand.New(rand.NewPCG(1, 2))
	for at := 0; at < size; at += 10000 {
		block := b[at:min(at+10000, size)]
		switch random.IntN(5) {
		case 0, 1:
			for i := range block {
				block[i] = byte(random.Uint32())
			}
		case 2:
			for i := range block {
				block[i] = "many words "[i%11]
			}
		case 3:
			block[random.IntN(len(block))] = 7
		}
	}
	return b
}

// newHost returns a host with a disk.
func newHost(t *testing.T, o Options, content []byte) *Host {
	t.Helper()
	h := New(t, o)
	h.AddDisk(diskFile, Disk{Content: bytes.NewReader(content), Size: int64(len(content)), DDB: map[string]string{"uuid": "60 00 c2"}})
	return h
}

func TestRead(t *testing.T) {
	content := testContent(1<<20 + 512)
	for _, profile := range []Profile{ESXi8, ESXi703, ESXi70NoSHA256, ESXi67} {
		for _, o := range []Options{
			{},
			{MaxTLS: tls.VersionTLS12, Service: "vpxa-nfc"},
			{Shuffle: true, Seed: 1, Fragment: 24 << 10},
			{Fragment: 5000, Latency: time.Millisecond, PEM: true, Piece: 777},
		} {
			for _, w := range []way{{}, {clear: true}, {buffer: 1 << 20, count: 4}} {
				if profile != ESXi8 && w.buffer > 0 {
					continue
				}
				o.Profile = profile
				name := fmt.Sprintf("%v/%s,%x,%d,shuffle=%v/clear=%v,%d", profile, o.Service, o.MaxTLS, o.Fragment, o.Shuffle, w.clear, w.buffer)
				t.Run(name, func(t *testing.T) {
					h := newHost(t, o, content)
					c := mustConnect(t, h.Ticket(), w)
					if c.size != int64(len(content)) {
						t.Errorf("the disk has %d bytes", c.size)
					}
					if uuid, err := c.ddb("uuid"); uuid != "60 00 c2" || err != nil {
						t.Errorf("uuid %q, %v", uuid, err)
					}
					if text, err := c.ddb("geometry.heads"); text != "" || err != nil {
						t.Errorf("a missing key has %q, %v", text, err)
					}
					for compression := range uint32(4) {
						got, err := c.read(compression, 0, c.size, 192<<10)
						if err != nil || !bytes.Equal(got, content) {
							t.Errorf("compression %d: other content, %v", compression, err)
						}
					}
					if err := c.close(); err != nil {
						t.Error(err)
					}
					if !h.AwaitClosed(5 * time.Second) {
						t.Error("a connection is open")
					}
					if s := h.Stats(); s.Connections != 1 || s.Memory != 0 || s.MostMemory == 0 || s.CloseHandshakes != 1 || s.UnusedTickets != 0 || s.Ends != 1 || s.InFlight < 2 {
						t.Errorf("%+v", s)
					}
				})
			}
		}
	}
}

// Zeros cost nothing on the wire with SkipZ, and an odd size is filled up to a sector.
func TestHoles(t *testing.T) {
	h := newHost(t, Options{}, make([]byte, 8<<20-100))
	c := mustConnect(t, h.Ticket(), way{})
	before := h.Stats().Sent
	got, err := c.read(withSkipZ, 0, c.size, 1<<20)
	if err != nil || len(got) != 8<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := h.Stats().Sent - before; n > 20000 {
		t.Errorf("8 MiB of zeros took %d bytes", n)
	}
	c.close()
}

func TestTooOld(t *testing.T) {
	h := newHost(t, Options{Profile: ESXi60}, nil)
	if _, err := connect(h.Ticket(), way{}); err == nil || err.Error() != "too old" {
		t.Error(err)
	}
}

func TestTickets(t *testing.T) {
	h := newHost(t, Options{}, testContent(1<<20))
	refused := func(ticket Ticket) {
		t.Helper()
		if _, err := connect(ticket, way{}); err == nil || !strings.Contains(err.Error(), pleaseLogin) {
			t.Error(err)
		}
	}
	ticket := h.Ticket()
	if err := mustConnect(t, ticket, way{}).close(); err != nil {
		t.Error(err)
	}
	refused(ticket)
	ticket.Session = "wrong"
	refused(ticket)
	ticket = h.Ticket()
	h.ExpireTickets()
	refused(ticket)
	ticket = h.Ticket()
	h.RenewCertificate()
	if _, err := connect(ticket, way{}); err == nil || err.Error() != "wrong certificate" {
		t.Error(err)
	}
	refusal := new(answerError)
	if _, err := connect(h.Ticket(), way{file: "[ds1] other.vmdk"}); !errors.As(err, &refusal) || refusal.code == 11 || !strings.Contains(refusal.text, "not find") {
		t.Error(err)
	}
	only := h.TicketFor(func(file string) bool { return file == "[ds1] mine.vmdk" })
	if _, err := connect(only, way{}); !errors.As(err, &refusal) || refusal.code != 11 {
		t.Error(err)
	}
}

func TestLimits(t *testing.T) {
	h := newHost(t, Options{Memory: 6 << 20, Connections: 2}, testContent(1<<20))
	refusal := new(answerError)
	c := mustConnect(t, h.Ticket(), way{buffer: 1 << 20, count: 4})
	if _, err := connect(h.Ticket(), way{buffer: 1 << 20, count: 4}); !errors.As(err, &refusal) || refusal.code != 5 || refusal.text != "Failed to allocate the requested 4194328 bytes" {
		t.Error(err)
	}
	if _, err := connect(h.Ticket(), way{buffer: 2<<20 + 1, count: 1}); !errors.As(err, &refusal) || refusal.code == 5 {
		t.Error(err)
	}
	d := mustConnect(t, h.Ticket(), way{})
	if _, err := connect(h.Ticket(), way{}); err == nil || errors.As(err, &refusal) {
		t.Error(err)
	}
	c.close()
	mustConnect(t, h.Ticket(), way{buffer: 1 << 20, count: 4}).close()
	d.close()
	if s := h.Stats(); s.MostMemory != 4<<20+256<<10 || s.Connections != 6 {
		t.Errorf("%+v", s)
	}
}

func TestViolations(t *testing.T) {
	content := testContent(4 << 20)
	message2 := func(c *client, kinds ...uint32) {
		var b []byte
		for _, k := range kinds {
			b = append(b, message(k, 4, 0)...)
		}
		c.nfc.Write(b)
	}
	for name, test := range map[string]struct {
		way  way
		do   func(c *client)
		want string
	}{
		"opId":         {do: func(c *client) { c.op++; c.read(0, 0, 512, 512) }, want: "has opId 5 in place of 4"},
		"in flight":    {do: func(c *client) { c.ask(0, 0, 1<<20); c.send(5, le.AppendUint64(nil, c.handle), "") }, want: "reads in flight"},
		"after end":    {do: func(c *client) { c.finish(); message2(c, 4, 4) }, want: "after message 4"},
		"after end 2":  {do: func(c *client) { c.finish(); c.ask(0, 0, 512) }, want: "after CLOSE_SESSION"},
		"early end":    {do: func(c *client) { message2(c, 4) }, want: "message 4 came before CLOSE_SESSION"},
		"unaligned":    {do: func(c *client) { c.ask(0, 5, 512) }, want: "whole sectors"},
		"past the end": {do: func(c *client) { c.ask(0, 4<<20, 512) }, want: "not inside the disk"},
		"too long":     {do: func(c *client) { c.ask(0, 0, 2<<20) }, want: "more than 1 MiB"},
		"compression":  {do: func(c *client) { c.ask(9, 0, 512) }, want: "unknown compression 9"},
		"type":         {do: func(c *client) { c.send(77, make([]byte, 4), "") }, want: "unknown type 77"},
		"allocation":   {do: func(c *client) { c.send(13, make([]byte, 48), "") }, want: "allocation query"},
		"handle":       {do: func(c *client) { c.handle++; c.ask(0, 0, 512) }, want: "which is not open"},
		"shared frame": {do: func(c *client) {
			p := append(le.AppendUint64(nil, c.handle), numbers(1, 0)...)
			c.nfc.Write(append(newFrame(11, 4, p, []byte("a")), newFrame(11, 5, p, []byte("b"))...))
			c.receive()
			c.receive()
		}, want: "shares a TLS record"},
		"close-notify": {way: way{tls1: func(_ *client, t *tls.Conn) { t.CloseWrite() }}, want: "close-notify"},
		"late line":    {way: way{tls1: func(_ *client, t *tls.Conn) { t.Write([]byte("USER root\r\n")) }}, want: "first session came after PROXY"},
		"user":         {way: way{tls0: func(t *tls.Conn) { t.Write([]byte("USER root\r\n")) }}, want: "USER was sent"},
		"two lines":    {way: way{tls0: func(t *tls.Conn) { t.Write([]byte("BANNER \r\nBANNER \r\n")); readLine(t) }}, want: "two lines"},
		"clear":        {way: way{dialed: func(conn net.Conn) { readLine(conn); conn.Write([]byte("USER root\r\n")) }}, want: "in clear before TLS"},
		"no TLS":       {way: way{tls1: func(c *client, _ *tls.Conn) { c.nfc = c.conn }}, want: "came in clear"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, Options{AllowViolations: true, Latency: time.Millisecond}, content)
			c, err := connect(h.Ticket(), test.way)
			if test.do == nil && err == nil {
				t.Error("the host accepted it")
			}
			if test.do != nil {
				if err != nil {
					t.Fatal(err)
				}
				test.do(c)
				c.conn.(interface{ CloseWrite() error }).CloseWrite()
				io.Copy(io.Discard, c.conn)
				c.conn.Close()
			}
			h.AwaitClosed(5 * time.Second)
			if got := strings.Join(h.Violations(), "\n"); !strings.Contains(got, test.want) {
				t.Errorf("violations %q, want %q", got, test.want)
			}
		})
	}
}

// The host does not see a message that shares a TLS record with another one, until more comes.
func TestSharedRecord(t *testing.T) {
	h := newHost(t, Options{AllowViolations: true}, nil)
	connect(h.Ticket(), way{tls1: func(c *client, _ *tls.Conn) {
		defer c.conn.Close()
		c.nfc.Write(append(tokenMessage(), message(33, 4, 0)...))
		answer := make(chan error)
		go func() {
			_, err := c.expect(36)
			answer <- err
		}()
		select {
		case err := <-answer:
			t.Errorf("the host saw the second message; %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		c.nfc.Write(message(51, 4, 11))
		if err := <-answer; err != nil {
			t.Error(err)
		}
	}})
	if v := h.Violations(); len(v) != 1 {
		t.Errorf("violations %q", v)
	}
}
