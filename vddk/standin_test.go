package vddk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"vddkcp/source"
	"vddkcp/source/sourcetest"
	"vddkcp/vddk/testlib"
	"vddkcp/vddk/worker"
	"vddkcp/vddk/worker/workertest"
)

// standIn is a host that our library serves one disk of, to real workers.
type standIn struct {
	*testlib.Library
	t       testing.TB
	program string
	path    string // of the raw file
	library Library
	remote  Params
	mu      sync.Mutex
	pids    []int // of the workers
}

// TestMain gives the worker program a place that outlives the test that needs it
// first.
func TestMain(m *testing.M) {
	code := func() int {
		var err error
		if programDir, err = os.MkdirTemp("", "vddk-test-"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(programDir)
		return m.Run()
	}()
	os.Exit(code)
}

var (
	programDir  string
	programOnce sync.Once
)

// workerProgram is built once.
func workerProgram(t testing.TB) string {
	t.Helper()
	path := filepath.Join(programDir, worker.ProgramName)
	programOnce.Do(func() {
		if err := os.Rename(workertest.Build(t), path); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := os.Stat(path); err != nil {
		t.Skip("the worker could not be built")
	}
	return path
}

const standInDisk = "[ds (1)] it's; a/ü b.vmdk"

// newStandIn serves a sparse disk of size bytes with random content in the
// extents.
func newStandIn(t testing.TB, size int64, data ...source.Extent) *standIn {
	t.Helper()
	s := &standIn{Library: testlib.New(t), t: t, program: workerProgram(t)}
	s.path = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(s.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	r := rand.NewChaCha8([32]byte{2})
	for _, e := range data {
		if _, err := io.CopyN(io.NewOffsetWriter(f, e.Off), r, e.Len); err != nil {
			t.Fatal(err)
		}
	}
	s.AddDisk(standInDisk, s.path)
	s.library = Library{Path: s.SO(), Root: s.Dir, Dir: filepath.Dir(s.SO()), Version: 8}
	s.remote = Params{File: standInDisk, Server: "esxi.example", User: `EXAMPLE\user`, Password: NewSecret("pass; word"), VM: "moref=vm-1", Snapshot: "snapshot-2", Thumbprint: "AA:BB"}
	return s
}

// open opens the disk, and closes it with the test, when no worker may be left.
func (s *standIn) open(ctx context.Context, p Params, o Options) (*Disk, error) {
	d, err := open(ctx, p, s.library, o, p.Thumbprint, func(ctx context.Context, c worker.Config) (process, error) {
		c.Program = s.program
		w, err := worker.Start(ctx, c)
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.pids = append(s.pids, w.PID())
		s.mu.Unlock()
		return w, nil
	})
	s.t.Cleanup(func() {
		if d != nil {
			d.Close()
		}
		s.checkGone()
	})
	return d, err
}

func (s *standIn) mustOpen(o Options) *Disk {
	s.t.Helper()
	d, err := s.open(s.t.Context(), s.remote, o)
	if err != nil {
		s.t.Fatal(err)
	}
	return d
}

// checkGone looks for the workers by their numbers: one that was not waited for
// is still there.
func (s *standIn) checkGone() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pid := range s.pids {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && strings.Contains(string(stat), fmt.Sprintf(") ")) &&
			strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[1] == fmt.Sprint(os.Getpid()) {
			s.t.Errorf("worker %d is still there: %s", pid, stat)
		}
	}
}

// content is what the disk holds.
func (s *standIn) content() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// copyAll reads the disk as a copy does, by its extents, into buffers of its
// own, and compares it with the file. It returns the first error.
func (s *standIn) copyAll(d *Disk, readers int) error {
	file, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer file.Close()
	type piece struct {
		off  int64
		b    []byte
		free func()
	}
	ctx, cancel := context.WithCancelCause(s.t.Context())
	defer cancel(nil)
	work := make(chan piece, 1000)
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for p := range work {
				want := make([]byte, len(p.b))
				_, err := d.ReadAt(p.b, p.off)
				if err == io.EOF && p.off+int64(len(p.b)) == d.Size() {
					err = nil
				}
				if err == nil {
					if _, err = file.ReadAt(want, p.off); err == io.EOF {
						err = nil
					}
				}
				if err == nil && string(want) != string(p.b) {
					err = fmt.Errorf("[%d, +%d) differs", p.off, len(p.b))
				}
				if err != nil {
					cancel(err)
				}
				p.free()
			}
		})
	}
	next := int64(0)
	var buf [64 << 10]byte
	err = func() error {
		for e, err := range d.Extents(ctx, 0, d.Size()) {
			if err != nil {
				return err
			}
			if e.Off != next {
				return fmt.Errorf("extent at %d, want %d", e.Off, next)
			}
			next = e.End()
			if e.Kind != source.Data {
				for off := e.Off; off < min(e.End(), e.Off+1<<20); off += int64(len(buf)) {
					n, _ := file.ReadAt(buf[:min(int64(len(buf)), e.End()-off)], off)
					for _, b := range buf[:n] {
						if b != 0 {
							return fmt.Errorf("hole [%d, %d) is none", e.Off, e.End())
						}
					}
				}
				continue
			}
			for off := e.Off; off < e.End(); {
				n := min(e.End()-off, 1<<20-off%(1<<20))
				b, free, err := d.Buffer(ctx, int(n))
				if err != nil {
					return err
				}
				work <- piece{off, b, free}
				off += n
			}
		}
		if next != d.Size() {
			return fmt.Errorf("extents end at %d of %d", next, d.Size())
		}
		return nil
	}()
	close(work)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

func TestStandInSuite(t *testing.T) {
	s := newStandIn(t, 5<<20+1024, source.Extent{Off: 64 << 10, Len: 1 << 20}, source.Extent{Off: 3 << 20, Len: 2<<20 + 1024})
	sourcetest.Run(t, sourcetest.Config{Content: s.content(), Open: func(ctx context.Context, t testing.TB) source.Disk {
		d, err := s.open(ctx, s.remote, Options{RequestSize: 256 << 10, Connections: 2})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}})
}

func TestStandInCopy(t *testing.T) {
	s := newStandIn(t, 100<<20+512, source.Extent{Off: 1 << 20, Len: 30 << 20}, source.Extent{Off: 90 << 20, Len: 10<<20 + 512})
	d := s.mustOpen(Options{Connections: 2})
	if err := s.copyAll(d, 8); err != nil {
		t.Fatal(err)
	}
	if got := d.Stats(); got.Transport != "nbdssl" || got.Connections != 2 || got.Retries != 0 || got.Restarts != 0 || got.ExtentsSource != "query" {
		t.Errorf("%+v", got)
	}
	if id, proof, err := d.Identity(t.Context()); proof != "snapshot" || !strings.Contains(id, "snapshot-2") || err != nil {
		t.Errorf("%q, %q, %v", id, proof, err)
	}
	if info := d.Info(); info.Format == "" || info.UUID == "" {
		t.Errorf("%+v", info)
	}
	if read := s.Figures()["bytes-read"]; read > 42<<20 {
		t.Errorf("%d bytes were read, 40 MiB are data", read)
	}
}

// fault is a fault of the stand-in's at the k-th call, and what is made of it.
func TestStandInFaults(t *testing.T) {
	const size = 24 << 20
	for _, action := range []string{"abort", "segv", "exit", "kill", "panic", "heap", "closefds", "hang", "drop", "fail code=1", "fail code=2", "fail code=0xE00000001"} {
		for _, sectors := range []string{"first", fmt.Sprint(size / 2 / 512), "last"} {
			t.Run(strings.ReplaceAll(action, " ", "_")+"/"+sectors, func(t *testing.T) {
				t.Parallel()
				s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
				s.Conf(fmt.Sprintf("fault ReadAsync sectors=%s once do=%s", sectors, action))
				var mu sync.Mutex
				var waits []time.Duration
				d := s.mustOpen(Options{Connections: 1, Timeout: 2 * time.Second, Retry: source.RetryOptions{Retries: -1,
					Backoff: func(int) time.Duration { return 10 * time.Millisecond },
					OnRetry: func(err error, wait time.Duration) {
						mu.Lock()
						waits = append(waits, wait)
						mu.Unlock()
					}}})
				if err := s.copyAll(d, 8); err != nil {
					t.Fatal(err)
				}
				stats := d.Stats()
				lost := !strings.HasPrefix(action, "fail")
				if stats.Retries == 0 || lost && stats.Restarts == 0 || !lost && stats.Restarts != 0 {
					t.Errorf("%+v", stats)
				}
				if read := s.Figures()["bytes-read"]; read > size+8<<20 {
					t.Errorf("%d bytes were read of %d: more than were in flight were read again", read, size)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				if cleanups := s.Calls()["Cleanup"]; lost != (cleanups > 0) {
					t.Errorf("%d calls of Cleanup", cleanups)
				}
			})
		}
	}
}

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
		{"hang", "fault QueryAllocatedBlocks do=hang", nil, 2},
		{"segv", "fault QueryAllocatedBlocks do=segv", nil, 2},
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
			var warnings []string
			d := s.mustOpen(Options{Timeout: time.Second, Retry: fastRetry(-1), Warn: func(text string) { warnings = append(warnings, text) }})
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
