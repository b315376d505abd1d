package nfc_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// TestRefusedReads refuses reads in each form that a refusal may have. A refusal that the host
// answers with zeros or not at all costs nothing more than the request. After other answers, the
// connection ends.
func TestRefusedReads(t *testing.T) {
	content := pattern(2<<20, 11)
	for _, c := range []struct {
		kind        nfctest.Kind
		connections int
	}{
		{nfctest.ErrorAlone, 1}, {nfctest.ErrorThenZeros, 1}, {nfctest.Status, 1}, {nfctest.NoMemory, 1},
		{nfctest.ErrorThenData, 2}, {nfctest.ErrorTwice, 2},
	} {
		t.Run(c.kind.String(), func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{})
			noLeaks(t, h)
			d := open(t, ts, nfc.Params{Name: file, Frozen: true}, quick())
			rule := h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: c.kind, Code: 77, Times: 1})
			readAll(t, d, content, 1<<20)
			d.Close()
			if n := h.Stats().Connections; n != c.connections || rule.Hits() != 1 {
				t.Errorf("%d connections, want %d; %d hits", n, c.connections, rule.Hits())
			}
		})
	}
}

// TestAnswersToRefusedReads answers a read that was refused. The next read fails, because the
// connection has ended for this reason.
func TestAnswersToRefusedReads(t *testing.T) {
	for kind, text := range map[nfctest.Kind]string{
		nfctest.ErrorThenData: "expected an empty answer to a refused request, found an answer with",
		nfctest.ErrorTwice:    "expected an answer to a request that waits for one",
	} {
		h, ts := newHost(t, pattern(1<<20, 11), nfctest.Options{})
		d := open(t, ts, nfc.Params{Name: file}, nfc.Options{Compression: "none"})
		h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: kind, Code: 77, Times: 1})
		if _, err := d.ReadAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), "error 77") {
			t.Errorf("%v: %v", kind, err)
		}
		if !h.AwaitClosed(5 * time.Second) {
			t.Errorf("%v: the connection is open", kind)
		}
		if _, err := d.ReadAt(make([]byte, 512), 0); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v: %v", kind, err)
		}
	}
}

// TestRefusalText reads with a refusal that does not end. The error has the code and the text of
// the host.
func TestRefusalText(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 11), nfctest.Options{})
	d := open(t, ts, nfc.Params{Name: file}, quick())
	h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.ErrorThenZeros, Code: 77, Text: "no \x1b[31mcolour\x00\n"})
	_, err := d.ReadAt(make([]byte, 512), 0)
	var e *nfc.Error
	if !errors.As(err, &e) || e.Step != nfc.StepRead || !strings.Contains(err.Error(), `error 77: no \x1b[31mcolour`) {
		t.Error(err)
	}
}

// TestManyRefusals refuses all reads of a connection and never answers them. The client does not
// remember more and more of them.
func TestManyRefusals(t *testing.T) {
	h, ts := newHost(t, pattern(1<<20, 11), nfctest.Options{})
	d := open(t, ts, nfc.Params{Name: file}, nfc.Options{})
	rule := h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.ErrorAlone})
	var err error
	for h.Stats().Open > 0 && rule.Hits() < 5000 {
		_, err = d.ReadAt(make([]byte, 512), 0)
	}
	if rule.Hits() > 4100 || err == nil {
		t.Errorf("%d refusals, %v", rule.Hits(), err)
	}
}

// TestMemoryOfReads refuses all reads of more than 128 KiB, as a host does whose memory is used up.
// The requests become smaller and fewer, and stay so.
func TestMemoryOfReads(t *testing.T) {
	content := pattern(4<<20, 12)
	h, ts := newHost(t, content, nfctest.Options{RecordReads: true})
	noLeaks(t, h)
	o := quick()
	o.Retry.Retries = 10
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
	h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.NoMemory, Where: func(r nfctest.Read) bool { return r.Length > 128<<10 }})
	readAll(t, d, content, 4<<20) // four requests of 1 MiB at first, whose refusals count as one
	refused := len(h.Stats().Reads)
	readAll(t, d, content, 2<<20)
	d.Close()
	reads := h.Stats().Reads
	for _, r := range reads[refused:] {
		if r.Length > 128<<10 {
			t.Errorf("a read of %d bytes after the refusals", r.Length)
		}
	}
	sizes := map[int64]bool{}
	for _, r := range reads {
		sizes[r.Length] = true
	}
	for _, size := range []int64{1 << 20, 512 << 10, 256 << 10, 128 << 10} {
		if !sizes[size] {
			t.Errorf("no read of %d bytes", size)
		}
	}
	if sizes[64<<10] && !slices.ContainsFunc(reads[:1], func(r nfctest.Read) bool { return r.Length == 64<<10 }) {
		t.Error("a read of 64 KiB was not necessary")
	}
}

// TestMemoryOfDepth refuses one read. The connection stays, with half as many requests in flight.
func TestMemoryOfDepth(t *testing.T) {
	const size = 8 << 20
	h := nfctest.New(t, nfctest.Options{})
	h.AddDisk(file, nfctest.Disk{Content: sparse{}, Size: size})
	noLeaks(t, h)
	d := open(t, &tickets{host: h}, nfc.Params{Name: file}, quick())
	h.On(nfctest.Fault{Step: nfctest.StepRead, Kind: nfctest.NoMemory, Times: 1})
	p := make([]byte, size)
	if _, err := d.ReadAt(p[:1<<20], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(p, 0); err != nil { // 16 requests
		t.Fatal(err)
	}
	d.Close()
	if s := h.Stats(); s.Connections != 1 || s.InFlight > nfc.DefaultDepth/2 {
		t.Errorf("%+v", s)
	}
}

// TestMemoryOfSession opens a disk on a host that has less memory than the session asks for.
func TestMemoryOfSession(t *testing.T) {
	content := pattern(1<<20, 13)
	for _, c := range []struct {
		name        string
		memory      int64
		refusals    int // of OPEN_SESSION, besides those because of the memory
		buffers     nfcbudget.Buffers
		connections int
		used        int64
	}{
		{name: "enough", memory: 4 << 20, connections: 1, used: 4 << 20},
		{name: "small buffers", memory: 4<<20 - 1, connections: 2, used: 256 << 10},
		{name: "defaults", memory: 4 << 20, refusals: 2, connections: 3, used: 256 << 10},
		{name: "too large", buffers: nfcbudget.Buffers{Size: 2 << 20, Count: 9}, connections: 2, used: 256 << 10},
		{name: "small from the start", buffers: nfcbudget.Buffers{Size: 64 << 10, Count: 2}, refusals: 1, connections: 2, used: 256 << 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{Memory: c.memory})
			noLeaks(t, h)
			if c.refusals > 0 {
				h.On(nfctest.Fault{Step: nfctest.StepOpenSession, Kind: nfctest.NoMemory, Times: c.refusals})
			}
			o := quick()
			o.Buffers = c.buffers
			d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
			readAll(t, d, content, 1<<20)
			d.Close()
			if s := h.Stats(); s.Connections != c.connections || s.MostMemory != c.used || s.UnusedTickets != 0 || ts.count() != c.connections {
				t.Errorf("%+v", s)
			}
		})
	}
	h, ts := newHost(t, content, nfctest.Options{Memory: 100 << 10})
	noLeaks(t, h)
	_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, quick())
	var e interface{ Hint() string }
	if err == nil || source.IsPermanent(err) || !strings.Contains(err.Error(), "Failed to allocate") || !errors.As(err, &e) || !strings.Contains(e.Hint(), "no memory left") {
		t.Error(err)
	}
	if n := h.Stats().Connections; n != 3 {
		t.Errorf("%d connections", n)
	}
}

// TestRefusedFile refuses to open the file.
func TestRefusedFile(t *testing.T) {
	content := pattern(1<<20, 14)
	for _, kind := range []nfctest.Kind{nfctest.ErrorAlone, nfctest.ErrorThenZeros, nfctest.Status} {
		t.Run(kind.String(), func(t *testing.T) {
			h, ts := newHost(t, content, nfctest.Options{})
			noLeaks(t, h)
			rule := h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: kind})
			_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, quick())
			if !source.IsPermanent(err) || ts.count() != 1 {
				t.Errorf("%d tickets: %v", ts.count(), err)
			}
			var e interface{ Hint() string }
			if !errors.As(err, &e) || !strings.Contains(e.Hint(), "snapshot") || !strings.Contains(fmt.Sprint(err), "error 11") {
				t.Errorf("%v", err)
			}
			rule.Remove()
			// After the disk was open, a migration may have locked the file for a while.
			o := quick()
			o.Retry.Retries = 8
			d := open(t, ts, nfc.Params{Name: file}, o)
			h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: kind, Times: 2})
			h.Cut()
			readAll(t, d, content, 1<<20)
			d.Close()
			if s := h.Stats(); s.Connections != 5 || s.Tickets != 5 || s.UnusedTickets != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestMissingFile opens a file that the host does not have.
func TestMissingFile(t *testing.T) {
	content := pattern(1<<20, 14)
	h, ts := newHost(t, content, nfctest.Options{})
	h.RemoveDisk(file)
	if _, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, quick()); !source.IsPermanent(err) || !strings.Contains(err.Error(), "could not find") {
		t.Error(err)
	}
}
