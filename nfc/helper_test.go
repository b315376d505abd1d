package nfc_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

const file = "[ds1] web01/web01.vmdk"

// tickets gives tickets of a host. Its field before, if set, is called before each ticket and may
// change it or return an error.
type tickets struct {
	host   *nfctest.Host
	before func(n int, t *nfc.Ticket) error

	mu      sync.Mutex
	given   int
	secrets []string
}

func (t *tickets) Ticket(ctx context.Context) (nfc.Ticket, error) {
	t.mu.Lock()
	t.given++
	n := t.given
	t.mu.Unlock()
	h := t.host.Ticket()
	t.mu.Lock()
	t.secrets = append(t.secrets, h.Session)
	t.mu.Unlock()
	ticket := nfc.Ticket{
		File: file, Host: h.Host, Port: h.Port, Service: h.Service, Session: secret.New(h.Session), SHA1: h.SHA1,
		Certificate: h.Certificate, Giver: "vc1.test",
	}
	if t.before != nil {
		if err := t.before(n, &ticket); err != nil {
			return nfc.Ticket{}, err
		}
	}
	return ticket, nil
}

func (t *tickets) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.given
}

// leaks returns where a text has the secret of a ticket; "" if it has none.
func (t *tickets) leaks(text string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range t.secrets {
		if at := strings.Index(text, s); at >= 0 {
			return text[max(at-100, 0):min(at+len(s)+20, len(text))]
		}
	}
	return ""
}

// pattern returns random data with runs of zeros of different lengths.
func pattern(size int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	p := make([]byte, size)
	for off := 0; off < size; {
		n := min(1+r.IntN(200<<10), size-off)
		switch r.IntN(3) {
		case 0: // zeros
		case 1:
			for i := 0; i < n; i += 8 {
				copy(p[off+i:off+n], binary.LittleEndian.AppendUint64(nil, r.Uint64()))
			}
		case 2: // compressible
			copy(p[off:off+n], bytes.Repeat([]byte("the quick brown fox "), n/20+1))
		}
		off += n
	}
	return p
}

// newHost starts a host with one disk.
func newHost(t testing.TB, content []byte, o nfctest.Options) (*nfctest.Host, *tickets) {
	t.Helper()
	h := nfctest.New(t, o)
	h.AddDisk(file, nfctest.Disk{Content: bytes.NewReader(content), Size: int64(len(content)), DDB: ddb("1")})
	return h, &tickets{host: h}
}

func ddb(id string) map[string]string {
	return map[string]string{"uuid": "60 00 C2 9e 0" + id, "adapterType": "lsilogic", "longContentID": "abcdef0" + id}
}

// open opens the disk of a host for a test.
func open(t testing.TB, ts nfc.Tickets, p nfc.Params, o nfc.Options) source.Disk {
	t.Helper()
	d, err := nfc.Open(t.Context(), p, ts, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// openWithin opens a disk with a time limit that a busy machine may not keep. It tries again then.
func openWithin(t testing.TB, ts nfc.Tickets, p nfc.Params, o nfc.Options) source.Disk {
	t.Helper()
	for n := 0; ; n++ {
		d, err := nfc.Open(t.Context(), p, ts, o)
		if err == nil {
			t.Cleanup(func() { d.Close() })
			return d
		}
		if n == 10 {
			t.Fatal(err)
		}
	}
}

// quick are options with which failures are noticed and retried at once.
func quick() nfc.Options {
	return nfc.Options{Timeout: 2 * time.Second, Retry: source.RetryOptions{Retries: 3, Backoff: func(int) time.Duration { return time.Millisecond }}}
}

// readAll reads the whole disk in reads of the given size and compares it.
func readAll(t testing.TB, d source.Disk, want []byte, size int) {
	t.Helper()
	if d.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", d.Size(), len(want))
	}
	got := make([]byte, len(want))
	for off := 0; off < len(got); off += size {
		n := min(size, len(got)-off)
		if _, err := d.ReadAt(got[off:off+n], int64(off)); err != nil && err != io.EOF {
			t.Fatalf("read at %d: %v", off, err)
		}
	}
	if !bytes.Equal(got, want) {
		a, b := sha256.Sum256(got), sha256.Sum256(want)
		t.Fatalf("the content differs: %s, want %s", hex.EncodeToString(a[:4]), hex.EncodeToString(b[:4]))
	}
}

// noLeaks fails the test if goroutines of package nfc or sockets are left at its end.
func noLeaks(t *testing.T, h *nfctest.Host) {
	t.Helper()
	t.Cleanup(func() {
		deadline := time.Now().Add(10 * time.Second)
		for {
			left := goroutines()
			if left == "" && h.Stats().Open == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left open: %d connections, goroutines:\n%s", h.Stats().Open, left)
				return
			}
			time.Sleep(time.Millisecond)
		}
	})
}

// goroutines returns the stacks of goroutines that run code of package nfc.
func goroutines() string {
	buffer := make([]byte, 1<<20)
	buffer = buffer[:runtime.Stack(buffer, true)]
	var left []string
	for _, g := range strings.Split(string(buffer), "\n\n") {
		if strings.Contains(g, "vddkcp/nfc.(") || strings.Contains(g, "vddkcp/nfc.Open") {
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}
