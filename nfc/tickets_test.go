package nfc_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// patient are options with which a disk is opened again several times.
func patient() nfc.Options {
	o := quick()
	o.Retry.Retries = 12
	return o
}

// TestTickets loses the connection several times. Each connection has a ticket of its own.
func TestTickets(t *testing.T) {
	content := pattern(1<<20, 20)
	h, ts := newHost(t, content, nfctest.Options{})
	noLeaks(t, h)
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
	for range 5 {
		h.Cut()
		readAll(t, d, content, 1<<20)
	}
	d.Close()
	if s := h.Stats(); s.Connections != 6 || s.Tickets != 6 || s.UnusedTickets != 0 {
		t.Errorf("%+v", s)
	}
	counted, _ := source.Ability[source.Counted](d)
	if s := counted.Stats(); s.Reopenings != 5 || s.Transport != "nfcssl" || s.Connections != 1 {
		t.Errorf("%+v", s)
	}
}

// TestTicketFailures gives tickets that are no good, at the first connection and at a later one.
func TestTicketFailures(t *testing.T) {
	content := pattern(1<<20, 21)
	failed := errors.New("the server is busy")
	for _, c := range []struct {
		name   string
		before func(h *nfctest.Host, ticket *nfc.Ticket) error
		step   nfc.Step
		text   string
		first  bool // a failure at the first opening is permanent
		later  bool // a failure at a later opening is permanent
	}{
		{name: "temporary", step: nfc.StepTicket, text: "the server is busy",
			before: func(*nfctest.Host, *nfc.Ticket) error { return failed }},
		{name: "permanent", step: nfc.StepTicket, text: "the server is busy", first: true, later: true,
			before: func(*nfctest.Host, *nfc.Ticket) error { return source.Permanent(failed) }},
		{name: "snapshot gone", step: nfc.StepTicket, text: "busy", first: true, later: true,
			before: func(*nfctest.Host, *nfc.Ticket) error {
				return source.Permanent(fmt.Errorf("%w: %w", source.ErrGone, failed))
			}},
		{name: "expired", step: nfc.StepProxy, text: "found 530 Please login",
			before: func(h *nfctest.Host, _ *nfc.Ticket) error { h.ExpireTickets(); return nil }},
		{name: "another secret", step: nfc.StepProxy, text: "expected an answer with the code 200, found 530",
			before: func(h *nfctest.Host, ticket *nfc.Ticket) error {
				h.ExpireTickets()
				ticket.Session = secret.New("5212345678")
				return nil
			}},
		{name: "host that is not there", step: nfc.StepConnect, text: "the ticket of vc1.test",
			before: func(h *nfctest.Host, ticket *nfc.Ticket) error { h.ExpireTickets(); ticket.Port = 1; return nil }},
		{name: "no thumbprint", step: nfc.StepTLS, text: "neither a thumbprint nor a certificate", first: true, later: true,
			before: func(h *nfctest.Host, ticket *nfc.Ticket) error { h.ExpireTickets(); ticket.SHA1 = ""; return nil }},
		{name: "a thumbprint that is none", step: nfc.StepTLS, text: "thumbprint in the ticket", first: true, later: true,
			before: func(h *nfctest.Host, ticket *nfc.Ticket) error { h.ExpireTickets(); ticket.SHA1 = "AB:CD"; return nil }},
		{name: "no PEM", step: nfc.StepTLS, text: "not in the format PEM", first: true, later: true,
			before: func(h *nfctest.Host, ticket *nfc.Ticket) error {
				h.ExpireTickets()
				ticket.SHA1, ticket.Certificate = "", []byte("-----BEGIN NOTHING-----\n")
				return nil
			}},
	} {
		for _, n := range []int{1, 2} {
			t.Run(fmt.Sprintf("%s/%d", c.name, n), func(t *testing.T) {
				h, ts := newHost(t, content, nfctest.Options{})
				noLeaks(t, h)
				ts.before = func(number int, ticket *nfc.Ticket) error {
					if number != n {
						return nil
					}
					err := c.before(h, ticket)
					if err != nil {
						h.ExpireTickets() // the ticket of the helper is not given
					}
					return err
				}
				permanent := c.first
				d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: true}, ts, patient())
				if n == 2 {
					if err != nil {
						t.Fatal(err)
					}
					h.Cut()
					permanent = c.later
					got := make([]byte, len(content))
					_, err = d.ReadAt(got, 0)
					d.Close()
					if !permanent {
						if err != nil || !bytes.Equal(got, content) || ts.count() != 3 {
							t.Errorf("%d tickets, %v", ts.count(), err)
						}
						return
					}
				}
				var e *nfc.Error
				if !errors.As(err, &e) || e.Step != c.step || !strings.Contains(e.Error(), c.text) || source.IsPermanent(err) != permanent {
					t.Errorf("permanent %v: %v", source.IsPermanent(err), err)
				}
				if (errors.Is(err, failed)) != (c.step == nfc.StepTicket) || errors.Is(err, source.ErrGone) != (c.name == "snapshot gone") {
					t.Errorf("the cause is lost: %v", err)
				}
				if ts.count() != n {
					t.Errorf("%d tickets", ts.count())
				}
				if leak := ts.leaks(err.Error()); leak != "" || strings.Contains(err.Error(), "5212345678") {
					t.Errorf("a secret: %s", leak)
				}
			})
		}
	}
}

// TestMigration gives the file another name with the third ticket, as after a storage vMotion. The old
// name then belongs to another disk.
func TestMigration(t *testing.T) {
	content := pattern(1<<20, 22)
	h, ts := newHost(t, content, nfctest.Options{})
	noLeaks(t, h)
	const moved = "[ds2] web01/wéb01 (1).vmdk"
	ts.before = func(n int, ticket *nfc.Ticket) error {
		if n >= 3 {
			ticket.File = moved
		}
		return nil
	}
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
	h.Cut()
	readAll(t, d, content, 1<<20)
	h.AddDisk(moved, nfctest.Disk{Content: bytes.NewReader(content), Size: int64(len(content)), DDB: ddb("1")})
	h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(pattern(1<<20, 23)), Size: int64(len(content)), DDB: ddb("1")})
	h.Cut()
	readAll(t, d, content, 1<<20)
}

// TestOtherDisk puts another disk behind the second connection. No byte of it is given out.
func TestOtherDisk(t *testing.T) {
	size := 1 << 20
	content := pattern(size, 24)
	tail := append(content[:size-100_000:size-100_000], pattern(100_000, 99)...)
	other := func(changes map[string]string) map[string]string {
		d := ddb("1")
		for k, v := range changes {
			d[k] = v
		}
		return d
	}
	for _, c := range []struct {
		name    string
		content []byte
		ddb     map[string]string
		frozen  []bool // values of Params.Frozen with which the disk is another one
		text    string
	}{
		{"content", pattern(size, 25), ddb("1"), []bool{true, false}, ""},
		{"end of the content", tail, ddb("1"), []bool{true, false}, ""},
		{"capacity", append(content[:size:size], make([]byte, 512)...), ddb("1"), []bool{true, false}, "1049088 bytes, but it had 1048576"},
		{"smaller", content[:size-512], ddb("1"), []bool{true, false}, "1048064 bytes"},
		{"uuid", content, other(map[string]string{"uuid": "60 00 C2 9e ff"}), []bool{true, false}, "UUID 60 00 C2 9e ff, but it had 60 00 C2 9e 01"},
		{"content ID", content, other(map[string]string{"longContentID": "ff"}), []bool{true}, "content ID ff"},
		{"nothing", content, ddb("1"), nil, ""},
		{"no uuid", content, map[string]string{"adapterType": "lsilogic"}, nil, ""},
	} {
		for _, frozen := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/frozen=%v", c.name, frozen), func(t *testing.T) {
				h, ts := newHost(t, content, nfctest.Options{})
				noLeaks(t, h)
				d := open(t, ts, nfc.Params{Name: file, Frozen: frozen}, patient())
				for off := 0; off < size; off += 256 << 10 {
					if _, err := d.ReadAt(make([]byte, 256<<10), int64(off)); err != nil {
						t.Fatal(err)
					}
				}
				// The last read is at the end of the disk, and is remembered in any case.
				if _, err := d.ReadAt(make([]byte, 50_000), int64(size-50_000)); err != nil {
					t.Fatal(err)
				}
				h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(c.content), Size: int64(len(c.content)), DDB: c.ddb})
				h.Cut()
				p := bytes.Repeat([]byte{0xa5}, 1000)
				_, err := d.ReadAt(p, 0)
				changed := false
				for _, f := range c.frozen {
					changed = changed || f == frozen
				}
				if !changed {
					if err != nil || !bytes.Equal(p, content[:1000]) {
						t.Errorf("%v", err)
					}
					return
				}
				if !errors.Is(err, source.ErrChanged) || !source.IsPermanent(err) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("permanent %v: %v", source.IsPermanent(err), err)
				}
				if !bytes.Equal(p, bytes.Repeat([]byte{0xa5}, 1000)) {
					t.Error("bytes were given out")
				}
				if n := ts.count(); n != 2 {
					t.Errorf("%d tickets", n)
				}
				if _, err := d.ReadAt(p, 0); !errors.Is(err, source.ErrChanged) {
					t.Errorf("a later read: %v", err)
				}
			})
		}
	}
}

// TestOtherDiskUnread puts another disk behind the second connection before a byte was read.
func TestOtherDiskUnread(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 24), nfctest.Options{})
	noLeaks(t, h)
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
	h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(pattern(1<<20, 25)), Size: 1 << 20, DDB: ddb("1")})
	h.Cut()
	if _, err := d.ReadAt(make([]byte, 512), 512<<10); !errors.Is(err, source.ErrChanged) || !strings.Contains(err.Error(), "the first 65536 bytes") {
		t.Error(err)
	}
}

// TestInventory opens a disk whose capacity is not that in the inventory.
func TestInventory(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 26), nfctest.Options{})
	noLeaks(t, h)
	_, err := nfc.Open(t.Context(), nfc.Params{Name: file, Capacity: 2 << 20}, ts, quick())
	if !source.IsPermanent(err) || !strings.Contains(err.Error(), "a disk of 1048576 bytes, but the server says that the disk has 2097152 bytes") {
		t.Error(err)
	}
	if ts.count() != 1 || h.Stats().CloseHandshakes != 1 {
		t.Errorf("%d tickets, %+v", ts.count(), h.Stats())
	}
}

// TestRefusedEntries opens a disk again on a host that no longer tells its UUID.
func TestRefusedEntries(t *testing.T) {
	content := pattern(1<<20, 27)
	for _, skip := range []int{0, 3} {
		h, ts := newHost(t, content, nfctest.Options{})
		noLeaks(t, h)
		h.On(nfctest.Fault{Step: nfctest.StepDDB, Kind: nfctest.ErrorThenZeros, Skip: skip, Times: 3})
		d := open(t, ts, nfc.Params{Name: file, Frozen: true}, patient())
		i, _ := source.Ability[source.Identified](d)
		id, _, _ := i.Identity(t.Context())
		for range 3 {
			h.Cut()
			readAll(t, d, content, 1<<20)
		}
		if after, _, err := i.Identity(t.Context()); after != id || err != nil {
			t.Errorf("the identity %q, and before %q, %v", after, id, err)
		}
		d.Close()
	}
}
