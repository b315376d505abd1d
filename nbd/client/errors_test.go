package client

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// plainTarget returns a target that zeroes with WRITE_ZEROES, without the flag FAST_ZERO.
func plainTarget(s *server) *target {
	d := newTarget(s, s.size, SinkOptions{})
	d.noFast.Store(true)
	d.zeroLimit.Store(zeroPiece)
	return d
}

// TestErrorsThatAreNotKnown checks that an unknown error fails only its own request.
func TestErrorsThatAreNotKnown(t *testing.T) {
	for name, c := range map[string]struct {
		reply func(r nbd.Request) []byte
		want  string
	}{
		"type":  {func(r nbd.Request) []byte { return to(r, chunk(1<<15+77, true, uint32(5), uint16(4), "odd!", "more")) }, "(EIO): odd!"},
		"errno": {func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkError, true, uint32(9999), uint16(0))) }, "error 9999"},
		"offset": {func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkData, false, uint64(512), data(512)), chunk(nbd.ChunkErrorOffset, false, uint32(5), uint16(3), "bad", uint64(600)), chunk(nbd.ChunkNone, true))
		}, "(EIO) at 600: bad"},
		"two": {func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkError, false, uint32(5), uint16(5), "first"), chunk(nbd.ChunkError, true, uint32(22), uint16(0)))
		}, "(EIO): first"},
		"text at its longest": {func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkError, true, uint32(5), uint16(4096), strings.Repeat("\x1b", 4096)))
		}, strings.Repeat("?", 4096)},
	} {
		t.Run(name, func(t *testing.T) {
			first := true
			s := play(t, greetingOf(fakeSize, 0), func(r nbd.Request, _ []byte) []byte {
				if first {
					first = false
					return c.reply(r)
				}
				// The client must ignore unknown flags.
				whole := chunk(nbd.ChunkData, true, uint64(r.Off), data(int(r.Len)))
				whole[4] |= 0x80
				return to(r, whole)
			})
			defer s.close()
			p := make([]byte, 1024)
			if err := s.read(p, 0); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "nbd://fake: read [0, 1024)") {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err := s.read(p, 0); err != nil || !bytes.Equal(p, data(1024)) {
				t.Errorf("the read after it: %v", err)
			}
		})
	}
}

// failed returns a structured reply with an error.
func failed(r nbd.Request, e nbd.Errno) []byte {
	return to(r, chunk(nbd.ChunkError, true, uint32(e), uint16(0)))
}

// TestFinalErrors checks which errors of the server lead to a retry of a read.
func TestFinalErrors(t *testing.T) {
	for _, c := range []struct {
		errno nbd.Errno
		final bool
	}{
		{nbd.EPERM, true}, {nbd.EINVAL, true}, {nbd.ENOSPC, true}, {nbd.EOVERFLOW, true}, {nbd.ENOTSUP, true},
		{nbd.EIO, false}, {nbd.ENOMEM, false}, {nbd.ESHUTDOWN, false}, {110, false},
	} {
		t.Run(c.errno.Error(), func(t *testing.T) {
			opened := 0
			d, err := source.Retry(t.Context(), func(context.Context) (source.Disk, error) {
				opened++
				first := true
				s := play(t, greetingOf(fakeSize, 0), func(r nbd.Request, _ []byte) []byte {
					if opened == 1 && first {
						first = false
						return failed(r, c.errno)
					}
					return to(r, chunk(nbd.ChunkData, true, r.Off, data(int(r.Len))))
				})
				return &Disk{server: s.server, size: s.size}, nil
			}, source.RetryOptions{Retries: 3, Backoff: func(int) time.Duration { return 0 }})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			_, err = d.ReadAt(make([]byte, 1024), 4096)
			if !c.final && err != nil {
				t.Errorf("%v, want another try", err)
			}
			if c.final && (!source.IsPermanent(err) || !strings.Contains(err.Error(), "nbd://fake: read [4096, 5120): the server says: "+c.errno.Error()) || opened != 1) {
				t.Errorf("%v, opened %d times, want the end at once", err, opened)
			}
		})
	}
}

// TestStatusShutdown checks that the client does not assume data where a server that shuts
// down refuses to list extents: the next server lists them.
func TestStatusShutdown(t *testing.T) {
	s := play(t, greetingOf(fakeSize, 0), func(r nbd.Request, _ []byte) []byte { return failed(r, nbd.ESHUTDOWN) })
	d := &Disk{server: s.server, size: s.size}
	defer d.Close()
	for e, err := range d.Extents(t.Context(), 0, fakeSize) {
		if !errors.As(err, new(*lostError)) || source.IsPermanent(err) {
			t.Errorf("%+v, %v, want a connection that is lost", e, err)
		}
	}
}

// TestFailedQueries checks that a failed query for extents is retried, that after the retries
// only a short range counts as data, and that later answers of the server are used.
func TestFailedQueries(t *testing.T) {
	const size = 4 << 30
	zeros := func(r nbd.Request) []byte {
		return to(r, chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), r.Len, uint32(3)))
	}
	for _, c := range []struct {
		name  string
		fails func(n int, r nbd.Request) nbd.Errno // the n-th query, from 1
		data  int64                                // bytes
		most  int                                  // queries
	}{
		{"once", func(n int, _ nbd.Request) nbd.Errno {
			if n == 2 {
				return nbd.EIO
			}
			return 0
		}, 0, 10},
		{"for a while", func(n int, _ nbd.Request) nbd.Errno {
			if n > 1 && n < 20 {
				return nbd.ENOMEM
			}
			return 0
		}, -1, 64},
		{"in one place", func(_ int, r nbd.Request) nbd.Errno {
			if bad := uint64(1<<30 + 100<<20); r.Off <= bad && bad < r.Off+uint64(r.Len) {
				return nbd.EIO
			}
			return 0
		}, -1, 64},
		{"never", func(int, nbd.Request) nbd.Errno { return nbd.EIO }, size, 160},
		{"for good", func(int, nbd.Request) nbd.Errno { return nbd.EINVAL }, size, 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			var n int
			s := play(t, greetingOf(size, 0), func(r nbd.Request, _ []byte) []byte {
				if r.Type != nbd.CmdBlockStatus {
					return nil
				}
				if n++; c.fails(n, r) != 0 {
					return failed(r, c.fails(n, r))
				}
				return zeros(r)
			})
			defer s.disconnect()
			d := &Disk{server: s.server, size: size}
			found, next := int64(0), int64(0)
			for e, err := range d.Extents(t.Context(), 0, size) {
				if err != nil || e.Off != next {
					t.Fatalf("%+v at %d: %v", e, next, err)
				}
				if next = e.End(); e.Kind == source.Data {
					found += e.Len
				}
			}
			if next != size || c.data >= 0 && found != c.data || c.data < 0 && (found == 0 || found > 1<<30) {
				t.Errorf("%d of %d bytes are data", found, next)
			}
			if got := len(s.requests()); got > c.most {
				t.Errorf("%d queries, want at most %d", got, c.most)
			}
		})
	}
}

// TestListForAHint checks that a wrong list of exports costs only the hint, and no time.
func TestListForAHint(t *testing.T) {
	head := be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3),
		rep(nbd.OptStructuredReply, nbd.RepErrUnsupported, nil),
		rep(nbd.OptGo, nbd.RepErrUnknown, []byte("none\x07 such")))
	entry := func(name string) []byte {
		return rep(nbd.OptList, nbd.RepServer, be(uint32(len(name)), name, "its description"))
	}
	for _, c := range []struct {
		name    string
		replies []byte
		want    string
	}{
		{"some", be(entry("a"), entry("b\x1b[2J"), rep(nbd.OptList, nbd.RepAck, nil)), `the server has "a", "b?[2J"`},
		{"many", be(bytes.Repeat(entry("a"), 200), rep(nbd.OptList, nbd.RepAck, nil)), "and 192 more"},
		{"without end", bytes.Repeat(entry("a"), 1000), "and 248 more"},
		{"none", rep(nbd.OptList, nbd.RepAck, nil), ""},
		{"a secret", rep(nbd.OptList, nbd.RepErrPolicy, nil), ""},
		{"a lie", rep(nbd.OptList, nbd.RepServer, be(uint32(1<<32-1), "x")), ""},
		{"nothing", nil, ""},
	} {
		_, err := open(t, be(head, c.replies), nil)
		var h interface{ Hint() string }
		if hint := ""; err == nil || !strings.Contains(err.Error(), "GO: the server has no export \"\": none? such") {
			t.Errorf("%s: %v", c.name, err)
		} else if errors.As(err, &h) {
			if hint = h.Hint(); c.want == "" || !strings.Contains(hint, c.want) {
				t.Errorf("%s: hint %q, want %q", c.name, hint, c.want)
			}
		} else if c.want != "" {
			t.Errorf("%s: no hint, want %q", c.name, c.want)
		}
	}
}

// TestListedAndNotOpened checks the error for a server that lists an export and does not open
// it.
func TestListedAndNotOpened(t *testing.T) {
	entry := func(name string) []byte {
		return rep(nbd.OptList, nbd.RepServer, be(uint32(len(name)), name))
	}
	for _, c := range []struct{ asked, listed, err, hint string }{
		{"", "", `the server has the export "" and did not open it: broken`, "see the server's log"},
		{"a", "a", `the server has the export "a" and did not open it: broken`, "see the server's log"},
		{"a", "", `the server has no export "a": broken`, "leave the name out"},
		{"", "a", `the server has no export "": broken`, `the server has "a"`},
	} {
		uri, err := nbd.ParseURI("nbd://fake/" + c.asked)
		if err != nil {
			t.Fatal(err)
		}
		f := newFake(be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3),
			rep(nbd.OptStructuredReply, nbd.RepErrUnsupported, nil),
			rep(nbd.OptGo, nbd.RepErrUnknown, []byte("broken")), entry(c.listed), rep(nbd.OptList, nbd.RepAck, nil)), nil)
		_, _, err = negotiate(t.Context(), f, uri, nil, time.Minute)
		var h interface{ Hint() string }
		if err == nil || !strings.Contains(err.Error(), c.err) || !errors.As(err, &h) || !strings.Contains(h.Hint(), c.hint) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
