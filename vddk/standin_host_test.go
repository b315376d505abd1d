package vddk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

func TestStandInCapacities(t *testing.T) {
	tib := int64(1) << 40
	for _, size := range []int64{512, 64<<10 - 512, 64 << 10, 64<<10 + 512, 1<<20 + 4096, 1<<20 + 65024, 1<<20 - 512, 32<<30 + 512, 33<<30 + 65024, 53*tib/10&^511 + 512} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			tail := min(size, 70<<10)
			s := newStandIn(t, size, source.Extent{Off: size - tail, Len: tail}, source.Extent{Off: 0, Len: min(size, 4096)})
			d := s.mustOpen(Options{})
			if d.Size() != size {
				t.Fatal(d.Size())
			}
			if err := s.copyAll(d, 4); err != nil {
				t.Fatal(err)
			}
			queries := s.Calls()["QueryAllocatedBlocks"]
			for _, err := range source.Covered(t.Context(), d, 0, size) {
				if err != nil {
					t.Fatal(err)
				}
			}
			if again := s.Calls()["QueryAllocatedBlocks"]; again != queries {
				t.Errorf("a second pass made %d queries more", again-queries)
			}
		})
	}
}

func TestStandInQueriesFail(t *testing.T) {
	for _, test := range []struct {
		name, fault string
		options     []string
		restarts    int64
	}{
		{"missing", "", []string{"--without=QueryAllocatedBlocks"}, 0},
		{"unsupported", "fault QueryAllocatedBlocks do=fail code=6", nil, 0},
		{"always", "fault QueryAllocatedBlocks do=fail code=1", nil, 0},
		{"late", "fault QueryAllocatedBlocks from=2 do=fail code=1", nil, 0},
		{"bad blocks", "fault QueryAllocatedBlocks at=2 do=badblocks", nil, 0},
		{"hang", "fault QueryAllocatedBlocks do=hang", nil, 3},
		{"segv", "fault QueryAllocatedBlocks do=segv", nil, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn(t, 34<<30, source.Extent{Off: 1 << 20, Len: 4 << 20}, source.Extent{Off: 33 << 30, Len: 4 << 20})
			if test.options != nil {
				built := testlib.New(t, test.options...)
				built.AddDisk(standInDisk, s.path)
				s.Library, s.library.Path, s.library.Root, s.library.Dir = built, built.SO(), built.Dir, filepath.Dir(built.SO())
			}
			s.Conf(test.fault)
			timeout := time.Duration(0)
			if test.name == "hang" {
				timeout = time.Second // requests without a fault may take as long on a busy machine
			}
			var warnings []string
			d := s.mustOpen(Options{Timeout: timeout, Retry: fastRetry(-1), Warn: func(text string) { warnings = append(warnings, text) }})
			data := int64(0)
			for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Kind == source.Data {
					data += e.Len
				}
			}
			if data < 1<<30 {
				t.Errorf("only %d bytes are data", data)
			}
			stats := d.Stats()
			if stats.ExtentsSource != "full" || len(warnings) != 1 || stats.Restarts > test.restarts {
				t.Errorf("%+v, %q", stats, warnings)
			}
			b := make([]byte, 1<<20)
			if _, err := d.ReadAt(b, 33<<30); err != nil {
				t.Error(err)
			}
		})
	}
}

// Whatever ends a disk, all its file descriptors and memory mappings are freed.
func TestStandInLeavesNothing(t *testing.T) {
	s := newStandIn(t, 4<<20, source.Extent{Off: 0, Len: 4 << 20})
	s.Conf("fault ReadAsync at=3 once do=abort")
	left := func() (fds int, mappings int) {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries), strings.Count(string(maps), "memfd:")
	}
	fds, mappings := 0, 0
	for i := range 8 {
		ctx, cancel := context.WithCancel(t.Context())
		d, err := s.open(ctx, s.remote, Options{Connections: 1 + i%3, Retry: fastRetry(-1)})
		if err != nil {
			t.Fatal(err)
		}
		b, free, err := d.Buffer(ctx, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(b, 0); err != nil {
			t.Error(err)
		}
		if err := s.copyAll(d, 4); err != nil {
			t.Error(err)
		}
		if i%2 == 1 {
			cancel()
		}
		d.Close()
		free()
		cancel()
		if i == 1 { // the first round opens the files that the test process keeps
			fds, mappings = left()
		}
	}
	if f, m := left(); f > fds || m > mappings {
		t.Errorf("%d descriptors and %d mappings, and before %d and %d", f, m, fds, mappings)
	}
}

func TestStandInContextKills(t *testing.T) {
	s := newStandIn(t, 4<<20, source.Extent{Off: 0, Len: 4 << 20})
	s.Conf("fault ReadAsync do=drop")
	ctx, cancel := context.WithCancelCause(t.Context())
	d, err := s.open(ctx, s.remote, Options{Connections: 2})
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("the operator said stop")
	got := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(make([]byte, 1<<20), 0)
		got <- err
	}()
	cancel(why)
	if err := <-got; !errors.Is(err, why) {
		t.Error(err)
	}
	d.Close()
	s.checkGone()
}

// Disks with alternating chunks and with long runs of chunks are reported exactly.
func TestStandInLayouts(t *testing.T) {
	var board []source.Extent
	for off := int64(0); off < 64<<20; off += 128 << 10 {
		board = append(board, source.Extent{Off: off, Len: 64 << 10})
	}
	s := newStandIn(t, 64<<20, board...)
	d := s.mustOpen(Options{})
	n := 0
	for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil || e.Len != 64<<10 || (e.Kind == source.Data) != (e.Off%(128<<10) == 0) {
			t.Fatalf("%+v, %v", e, err)
		}
		n++
	}
	if n != 1024 {
		t.Errorf("%d extents", n)
	}
	if err := s.copyAll(d, 8); err != nil {
		t.Error(err)
	}

	// The queries report 5 GiB as allocated, but the file stays sparse, because it would need
	// that space otherwise.
	s = newStandIn(t, 6<<30+512, source.Extent{Off: 5<<30 - 4096, Len: 4096})
	s.Conf("fault QueryAllocatedBlocks do=fail code=6")
	d = s.mustOpen(Options{})
	n = 0
	for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil || e.Kind != source.Data || e.Len != d.Size() {
			t.Fatalf("%+v, %v", e, err)
		}
	}
	b, want := make([]byte, 8192), make([]byte, 8192)
	f, err := os.Open(s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []int64{5<<30 - 4096, 2<<30 - 4096, 4<<30 - 4096, 6<<30 + 512 - 8192} {
		if _, err := f.ReadAt(want, off); err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(b, off); err != nil && err != io.EOF || string(b) != string(want) {
			t.Errorf("at %d: %v", off, err)
		}
	}
}

// Copies that share a budget never use more memory than the host has.
func TestStandInBudget(t *testing.T) {
	s := newStandIn(t, 8<<20, source.Extent{Off: 0, Len: 8 << 20})
	s.Conf("host-memory 8", "transport nbd", "latency read 500")
	budget := nfcbudget.New(8 << 20)
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() {
			d, err := s.open(t.Context(), s.remote, Options{Budget: budget})
			if err != nil {
				t.Error(err)
				return
			}
			if err := s.copyAll(d, 4); err != nil {
				t.Error(err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if f := s.Figures(); f["max-reserved"] > 8<<20 || f["max-handles"] != 2 || f["alloc-failures"] != 0 {
		t.Errorf("%v", f)
	}
}

// Without a budget, the disk uses fewer connections or smaller requests if the host refuses more.
func TestStandInHostIsFull(t *testing.T) {
	for _, test := range []struct {
		conf        []string
		connections int
		warnings    int
	}{
		{[]string{"host-memory 3"}, 1, 0},               // the first connection gets smaller buffers
		{[]string{"host-memory 9"}, 2, 1},               // two of four connections
		{[]string{"host-connections 3"}, 3, 1},          // three of four connections
		{[]string{"in-flight-requests 3"}, 4, 0},        // of all connections together
		{[]string{"in-flight-bytes 300000"}, 4, 0},      // smaller than one request of the default size
		{[]string{"in-flight-bytes 70000"}, 4, 0},       // one request of the smallest size
		{[]string{"session-memory 1"}, 4, 0},            // every connection gets smaller buffers
		{[]string{"host-memory 4", "linger 300"}, 1, 1}, // with a crash
	} {
		t.Run(strings.Join(test.conf, ","), func(t *testing.T) {
			t.Parallel()
			s := newStandIn(t, 16<<20, source.Extent{Off: 0, Len: 16 << 20})
			s.Conf(append(test.conf, "transport nbdssl")...)
			crash := strings.Contains(test.conf[len(test.conf)-1], "linger")
			if crash {
				s.Conf("fault ReadAsync sectors=middle once do=abort")
			}
			var mu sync.Mutex
			var warnings []string
			d := s.mustOpen(Options{Connections: max(4, test.connections), Retry: source.RetryOptions{Retries: -1, Backoff: func(n int) time.Duration { return 50 * time.Millisecond }},
				Warn: func(text string) {
					mu.Lock()
					defer mu.Unlock()
					warnings = append(warnings, text)
				}})
			d.pool.mu.Lock()
			for d.pool.growth.opening {
				d.pool.changed.Wait()
			}
			d.pool.mu.Unlock()
			if err := s.copyAll(d, 16); err != nil {
				t.Fatal(err)
			}
			d.Close()
			if got := d.Stats().Connections; got > test.connections && test.warnings > 0 {
				t.Errorf("%d connections, want %d", got, test.connections)
			}
			if len(warnings) > 1 || test.warnings == 1 && len(warnings) == 0 {
				t.Errorf("%q", warnings)
			}
			if crash != (d.Stats().Restarts > 0) {
				t.Errorf("%+v", d.Stats())
			}
		})
	}
}

func TestStandInPrepareAccess(t *testing.T) {
	for _, fault := range []string{"", "fault ReadAsync once do=segv", "fault ReadAsync do=abort", "fault Open do=segv", "fault Close do=abort"} {
		t.Run(fault, func(t *testing.T) {
			s := newStandIn(t, 4<<20, source.Extent{Off: 0, Len: 4 << 20})
			s.Conf(fault)
			p := s.remote
			p.PrepareAccess = true
			d, err := s.open(t.Context(), p, Options{Connections: 1, Retry: fastRetry(2)})
			if err == nil {
				s.copyAll(d, 4)
				d.Close()
			}
			calls := s.Calls()
			if calls["PrepareForAccess"] == 0 || calls["PrepareForAccess"] > calls["EndAccess"] {
				t.Errorf("%d times prepared, %d times ended", calls["PrepareForAccess"], calls["EndAccess"])
			}
		})
	}
}

func TestStandInWrite(t *testing.T) {
	s := newStandIn(t, 4<<20+512, source.Extent{Off: 0, Len: 4 << 20})
	want := s.content()
	p := Params{File: s.path} // a local disk
	d, err := s.open(t.Context(), p, Options{Writable: true, RequestSize: 256 << 10, Retry: fastRetry(-1)})
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(4, 2))
	for i := range 100 {
		off := r.IntN(len(want))
		n := r.IntN(min(len(want)-off, 700_000))
		for i := range want[off : off+n] {
			want[off+i] = byte(i * off)
		}
		if _, err := d.WriteAt(want[off:off+n], int64(off)); err != nil {
			t.Fatal(err)
		}
		if i%30 == 0 {
			if err := d.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF || string(got) != string(want) {
		t.Errorf("what was written reads otherwise (%v)", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if string(s.content()) != string(want) {
		t.Error("the file has another content")
	}
	calls := s.Calls()
	if calls["Flush"] < 4 || calls["QueryAllocatedBlocks"] != 0 {
		t.Errorf("%v", calls)
	}
}

func TestStandInWriteWithoutFlush(t *testing.T) {
	s := newStandIn(t, 1<<20)
	old := testlib.New(t, "--version=5")
	s.library = Library{Path: old.SO(), Root: old.Dir, Dir: filepath.Dir(old.SO()), Version: 5}
	d, err := s.open(t.Context(), Params{File: s.path}, Options{Writable: true})
	if d != nil || err == nil || !strings.Contains(err.Error(), "no VixDiskLib_Flush") {
		t.Errorf("%v", err)
	}
	d, err = s.open(t.Context(), Params{File: s.path}, Options{}) // this library has only synchronous reads
	if err != nil {
		t.Fatal(err)
	}
	if err := s.copyAll(d, 4); err != nil {
		t.Error(err)
	}
}

func TestStandInErrors(t *testing.T) {
	for _, test := range []struct {
		conf, want, hint string
		permanent        bool
	}{
		{"thumbprint 11:22:33", "has the thumbprint 11:22:33, expected AA:BB", "--thumbprint", false},
		{"password another", "error 3014", "--user", true},
		{"snapshot another", "error 13003", "", false},
		{"server another", "error 18000", "", false},
		{"fault InitEx do=fail code=3", "error 3", "", false},
	} {
		s := newStandIn(t, 1<<20)
		s.Conf(test.conf)
		_, err := s.open(t.Context(), s.remote, Options{Retry: fastRetry(-1)})
		if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(hintOf(err), test.hint) || source.IsPermanent(err) != test.permanent {
			t.Errorf("%s: %v; hint %q; permanent %v", test.conf, err, hintOf(err), source.IsPermanent(err))
		}
		if err != nil && strings.Contains(err.Error(), "pass; word") {
			t.Errorf("%s: the password is in %v", test.conf, err)
		}
	}
	s := newStandIn(t, 1<<20)
	p := s.remote
	p.File = "[ds (1)] it's; a/none.vmdk"
	if _, err := s.open(t.Context(), p, Options{}); err == nil || !strings.Contains(err.Error(), "error 4") || !source.IsPermanent(err) {
		t.Error(err)
	}
}

// Whatever the library logs, and however much, the disk can be read, and each message of the log is
// one line.
func TestStandInLogs(t *testing.T) {
	t.Run("hostile", func(t *testing.T) {
		testLogs(t, []string{"hostile-log", "log-reads", "fault ReadAsync at=2 once do=log log=login with pass; word\\n\\e[31mand %s%n"},
			"vddk: disk", "capacity=8388608", "vddk: closed", "login with ***", "VDDK function stats", "  ReadAsync  ", "  InitEx  ")
	})
	t.Run("flood", func(t *testing.T) { testLogs(t, []string{"log-flood 3000 4"}, "vddk: closed") })
}

func testLogs(t *testing.T, conf []string, want ...string) {
	s := newStandIn(t, 8<<20, source.Extent{Off: 0, Len: 8 << 20})
	s.Conf(conf...)
	var out strings.Builder // the handler of slog locks it
	d := s.mustOpen(Options{Connections: 2, Log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: levelNoise})),
		Debug: map[string]bool{"diskinfo": true, "stats": true}})
	if err := s.copyAll(d, 8); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	text := out.String()
	if !utf8.ValidString(text) || strings.ContainsAny(text, "\x1b\x00\r") || strings.Contains(text, "pass; word") {
		t.Error("the log holds control characters or a secret")
	}
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "time=") || len(line) > 3*maxLine {
			t.Fatalf("a line of the log: %.200q", line)
		}
	}
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("the log has no %q", w)
		}
	}
}
