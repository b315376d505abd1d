package vddk

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/vddk/testlib"
	"github.com/vddkcp/vddkcp/vddk/worker"
	"github.com/vddkcp/vddkcp/vddk/worker/workertest"
)

// standIn is a host with one disk, simulated by testlib's library in real workers.
type standIn struct {
	*testlib.Library
	t       testing.TB
	program string
	path    string // path of the raw file
	library Library
	remote  Params
	mu      sync.Mutex
	pids    []int // process IDs of the workers
}

// TestMain makes a folder for the worker program that exists until all tests have ended.
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

// workerProgram returns the path of the worker program, which is built once.
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

// newStandIn returns a host with a sparse disk of size bytes, which has random data in the given
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

// open opens the disk. At the end of the test, it closes the disk and checks that no worker is left.
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

// checkGone checks that no process has the ID of a worker. A process that was not waited for still
// exists.
func (s *standIn) checkGone() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pid := range s.pids {
		if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && strings.Contains(string(stat), ") ") &&
			strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))[1] == fmt.Sprint(os.Getpid()) {
			s.t.Errorf("worker %d is still there: %s", pid, stat)
		}
	}
}

// content returns the content of the disk.
func (s *standIn) content() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// copyAll reads the disk by its extents into its buffers, as a copy does, and compares it with the
// file. It returns the first error.
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
	for d.Stats().Connections < 2 { // the second connection is opened in the background
		time.Sleep(time.Millisecond)
	}
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

// Each fault of the library at one call is repaired, and the data that was read is right.
func TestStandInFaults(t *testing.T) {
	const size = 24 << 20
	for _, action := range []string{"abort", "segv", "exit", "kill", "panic", "heap", "closefds", "hang", "drop", "fail code=1", "fail code=2", "fail code=0xE00000001"} {
		for _, sectors := range []string{"first", fmt.Sprint(size / 2 / 512), "last"} {
			t.Run(strings.ReplaceAll(action, " ", "_")+"/"+sectors, func(t *testing.T) {
				t.Parallel()
				s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
				s.Conf(fmt.Sprintf("fault ReadAsync sectors=%s once do=%s", sectors, action))
				timeout := time.Duration(0)
				if action == "hang" || action == "drop" {
					timeout = 2 * time.Second // requests without a fault may take as long on a busy machine
				}
				var mu sync.Mutex
				var waits []time.Duration
				d := s.mustOpen(Options{Connections: 1, Timeout: timeout, Retry: source.RetryOptions{Retries: -1,
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

// A library that writes outside of its buffer never damages the data of other requests: its worker
// crashes and is replaced.
func TestStandInOverrun(t *testing.T) {
	const size = 24 << 20
	for _, action := range []string{"overrun", "underrun"} {
		for _, test := range []struct {
			name, fault string
			request     int
			restarts    bool
		}{
			{name: "now and then", fault: "every=7 times=3", restarts: true},
			{name: "short requests", fault: "every=3 times=20", request: 4096 * 3},
		} {
			t.Run(action+" "+test.name, func(t *testing.T) {
				t.Parallel()
				s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
				s.Conf("fault ReadAsync "+test.fault+" do="+action, "latency read 500")
				d := s.mustOpen(Options{Connections: 3, RequestSize: test.request, Retry: fastRetry(-1)})
				if err := s.copyAll(d, 12); err != nil {
					t.Fatal(err)
				}
				if stats := d.Stats(); test.restarts && stats.Restarts == 0 {
					t.Errorf("%+v: no worker was replaced", stats)
				}
			})
		}
	}
}

// If a buffer is read in parts, an overrun of one part does not damage the others.
func TestStandInOverrunWithinABuffer(t *testing.T) {
	const size = 1 << 20
	s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
	s.Conf("fault ReadAsync do=overrun")
	d := s.mustOpen(Options{Connections: 1, Retry: fastRetry(-1)})
	b, free, err := d.Buffer(t.Context(), size)
	if err != nil {
		t.Fatal(err)
	}
	defer free()
	for _, off := range []int64{size / 2, 0} {
		if _, err := d.ReadAt(b[off:off+size/2], off); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(b, s.content()) {
		t.Error("what was read first was overwritten")
	}
}
