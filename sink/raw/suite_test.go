package raw

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
)

// breaker is a system whose next write fails with the error that was put in.
type breaker struct {
	err atomic.Pointer[error]
}

func (b *breaker) Break(err error) { b.err.Store(&err) }

func (b *breaker) system() system {
	sys := kernel()
	take := func() error {
		if err := b.err.Swap(nil); err != nil {
			return *err
		}
		return nil
	}
	real := sys
	sys.pwrite = func(fd int, p []byte, off int64) (int, error) {
		if err := take(); err != nil {
			return 0, err
		}
		return real.pwrite(fd, p, off)
	}
	sys.pwriteUncache = func(fd int, p []byte, off int64) (int, error) {
		if err := take(); err != nil {
			return 0, err
		}
		return real.pwriteUncache(fd, p, off)
	}
	return sys
}

// fileTarget is a file in a folder of its own.
type fileTarget struct {
	breaker
	dir string
	o   Options
}

func (f *fileTarget) path() string { return filepath.Join(f.dir, "disk.raw") }

func (f *fileTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	options := f.o
	options.Options = o
	return createFile(ctx, f.path(), size, options, f.system())
}

func (f *fileTarget) Published() ([]byte, bool) {
	b, err := os.ReadFile(f.path())
	return b, err == nil
}

func (f *fileTarget) Leftovers() []string {
	var names []string
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		if e.Name() != "disk.raw" {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestFile(t *testing.T) {
	for _, o := range []Options{
		{}, {DropCache: true}, {Preallocation: PreallocateFalloc}, {Preallocation: PreallocateFull},
	} {
		t.Run(fmt.Sprintf("preallocation %q drop %v", o.Preallocation, o.DropCache), func(t *testing.T) {
			sinktest.Test(t, sinktest.Config{
				New:  func(t testing.TB) sinktest.Target { return &fileTarget{dir: t.TempDir(), o: o} },
				Unit: 1,
			})
		})
	}
}

// On tmpfs the kernel knows neither RWF_DONTCACHE nor write-back.
func TestFileTmpfs(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New: func(t testing.TB) sinktest.Target {
			dir, err := os.MkdirTemp("/dev/shm", "vddkcp")
			if err != nil {
				t.Skip(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			return &fileTarget{dir: dir}
		},
		Unit: 1,
	})
}

// loop makes a block device of size bytes, full of 0xAA.
func loop(t testing.TB, size int64, options ...string) (device string) {
	t.Helper()
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	backing := filepath.Join(t.TempDir(), "device")
	f, err := os.Create(backing)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, fill(0xAA), size); err != nil {
		t.Fatal(err)
	}
	device = strings.TrimSpace(peer.Run(t, "losetup", append(options, "--find", "--show", backing)...))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	return device
}

// fill is a reader of one byte, over and over.
type fill byte

func (b fill) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(b)
	}
	return len(p), nil
}

// deviceTarget is a block device. Lacks names the methods of zeroing that fail.
type deviceTarget struct {
	breaker
	path  string
	size  int64 // of the device
	lacks []int
	calls atomic.Int32 // of methods that fail
	t     testing.TB
}

func (d *deviceTarget) system() system {
	sys := d.breaker.system()
	real := sys
	refuse := func(method int) error {
		if err := d.err.Swap(nil); err != nil { // a break is no lack: it must not be passed over
			d.Break(*err)
			return unix.EIO
		}
		if slices.Contains(d.lacks, method) {
			d.calls.Add(1)
			return unix.EOPNOTSUPP
		}
		return nil
	}
	sys.zeroOut = func(fd int, off, n int64) error {
		if err := refuse(0); err != nil {
			return err
		}
		return real.zeroOut(fd, off, n)
	}
	sys.fallocate = func(fd int, mode uint32, off, n int64) error {
		method := 2
		if mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
			method = 1
		}
		if err := refuse(method); err != nil {
			return err
		}
		return real.fallocate(fd, mode, off, n)
	}
	return sys
}

func (d *deviceTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	return createDevice(ctx, d.path, size, Options{Options: o}, d.system())
}

// Published also sees that what lies past the disk was left alone.
func (d *deviceTarget) Published() ([]byte, bool) {
	b, err := os.ReadFile(d.path)
	if err != nil || int64(len(b)) != d.size {
		d.t.Fatalf("%d bytes, %v", len(b), err)
	}
	for i := len(b) - 4096; i < len(b); i++ {
		if b[i] != 0xAA {
			d.t.Fatalf("byte %d of the device was changed to %#x", i, b[i])
		}
	}
	return b, true
}

func (d *deviceTarget) Leftovers() []string { return nil }

func TestDevice(t *testing.T) {
	peer.NeedRoot(t)
	const size = 1 << 20
	for sector, lackings := range map[string][][]int{"512": {nil, {0}, {0, 1}, {0, 1, 2}}, "4096": {nil}} {
		for _, lacks := range lackings {
			t.Run(fmt.Sprintf("sector %s lacks %v", sector, lacks), func(t *testing.T) {
				path := loop(t, size, "--sector-size", sector)
				sinktest.Test(t, sinktest.Config{
					New: func(t testing.TB) sinktest.Target {
						if err := os.WriteFile(path, bytes.Repeat([]byte{0xAA}, size), 0); err != nil {
							t.Fatal(err)
						}
						d := &deviceTarget{path: path, size: size, lacks: lacks, t: t}
						t.Cleanup(func() {
							if n := int(d.calls.Load()); n > 2*len(lacks) { // twice where the disk was resumed
								t.Errorf("%d calls of the methods %v, which fail", n, lacks)
							}
						})
						return d
					},
					Unit:    1,
					InPlace: true,
				})
			})
		}
	}
}

// pipeTarget is a pipe whose reader keeps what it gets.
type pipeTarget struct {
	open func() (r, w *os.File, err error)
	t    testing.TB
	got  chan []byte
}

func (p *pipeTarget) Create(ctx context.Context, size int64, _ sink.Options) (sink.Disk, error) {
	r, w, err := p.open()
	if err != nil {
		return nil, err
	}
	p.got = make(chan []byte, 1)
	go func() {
		defer r.Close()
		b, _ := io.ReadAll(r)
		p.got <- b
	}()
	d, err := Stream(ctx, w, "-", size)
	p.t.Cleanup(func() { w.Close() }) // so that the reader ends, too
	return d, err
}

// Published waits for the end of the stream, and may be called once.
func (p *pipeTarget) Published() ([]byte, bool) {
	if p.got == nil {
		return nil, false
	}
	return <-p.got, true
}

func (p *pipeTarget) Leftovers() []string { return nil }

// blocking makes a file of the runtime out of descriptors that it can't wait for.
func blocking(fds [2]int, err error) (r, w *os.File, _ error) {
	return os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer"), err
}

func blockingPipe() (r, w *os.File, err error) {
	var fds [2]int
	err = unix.Pipe2(fds[:], unix.O_CLOEXEC)
	return blocking(fds, err)
}

func blockingSocket() (r, w *os.File, err error) {
	return blocking(unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0))
}

var pipes = map[string]func() (r, w *os.File, err error){
	"pipe": os.Pipe, "blocking pipe": blockingPipe, "blocking socket": blockingSocket,
}

func TestStream(t *testing.T) {
	for name, open := range pipes {
		t.Run(name, func(t *testing.T) {
			sinktest.Test(t, sinktest.Config{
				New:    func(t testing.TB) sinktest.Target { return &pipeTarget{open: open, t: t} },
				Unit:   1,
				Stream: true,
			})
		})
	}
}

// regularTarget is a stream that the shell redirected to a file, from 3 bytes on.
type regularTarget struct {
	path string
}

func (r *regularTarget) Create(ctx context.Context, size int64, _ sink.Options) (sink.Disk, error) {
	if err := os.WriteFile(r.path, []byte("abc"), 0666); err != nil {
		return nil, err
	}
	w, err := os.OpenFile(r.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	return Stream(ctx, w, "-", size)
}

func (r *regularTarget) Published() ([]byte, bool) {
	b, err := os.ReadFile(r.path)
	if err != nil || !strings.HasPrefix(string(b), "abc") {
		return nil, false
	}
	return b[3:], true
}

func (r *regularTarget) Leftovers() []string { return nil }

func TestStreamToFile(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New:    func(t testing.TB) sinktest.Target { return &regularTarget{filepath.Join(t.TempDir(), "out")} },
		Unit:   1,
		Stream: true,
	})
}

type nullTarget struct{}

func (nullTarget) Create(ctx context.Context, size int64, _ sink.Options) (sink.Disk, error) {
	return Null(ctx, size), nil
}
func (nullTarget) Published() ([]byte, bool) { return nil, false }
func (nullTarget) Leftovers() []string       { return nil }

func TestNull(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New:      func(testing.TB) sinktest.Target { return nullTarget{} },
		Unit:     1,
		Discards: true,
	})
}
