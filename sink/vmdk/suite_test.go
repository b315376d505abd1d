package vmdk

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	rawreader "github.com/vddkcp/vddkcp/source/raw"
	reader "github.com/vddkcp/vddkcp/source/vmdk"
)

// decode returns the content of the image at path.
func decode(t testing.TB, path string) ([]byte, bool) {
	t.Helper()
	f, err := rawreader.Open(t.Context(), path)
	if err != nil {
		return nil, false
	}
	return decodeDisk(t, f)
}

func decodeDisk(t testing.TB, f source.Disk) ([]byte, bool) {
	t.Helper()
	d, err := reader.Open(t.Context(), "decode", f, nothingElse, reader.Options{})
	if err != nil {
		t.Error(err)
		return nil, false
	}
	defer d.Close()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Error(err)
		return nil, false
	}
	return b, true
}

type fileTarget struct {
	t   testing.TB
	dir string
}

func (f fileTarget) path() string { return filepath.Join(f.dir, "disk.vmdk") }

func (f fileTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	out, err := raw.CreateFile(ctx, f.path(), sink.UnknownSize, raw.Options{})
	if err != nil {
		return nil, err
	}
	return Create(ctx, out, f.path(), size, Options{Options: o})
}

func (f fileTarget) Published() ([]byte, bool) { return decode(f.t, f.path()) }

func (f fileTarget) Leftovers() []string {
	var names []string
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		f.t.Error(err)
	}
	for _, e := range entries {
		if e.Name() != "disk.vmdk" {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestFile(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New:      func(t testing.TB) sinktest.Target { return fileTarget{t, t.TempDir()} },
		Unit:     grainSize,
		Multiple: sectorSize,
		Once:     true,
	})
}

// memoryTarget writes at once what it gets, so that a write that fails is seen
// in the call that it belongs to.
type memoryTarget struct {
	t   testing.TB
	m   sinktest.Memory
	err atomic.Pointer[error]
}

func (m *memoryTarget) Break(err error) { m.err.Store(&err) }

func (m *memoryTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	m.m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpWrite {
			if err := m.err.Swap(nil); err != nil {
				return *err
			}
		}
		return nil
	}
	out, err := m.m.Create(ctx, sink.UnknownSize, sink.Options{})
	if err != nil {
		return nil, err
	}
	d, err := create(ctx, out, "memory", size, Options{Options: o})
	if err != nil {
		return nil, err
	}
	if err := d.file.flush(); err != nil {
		return nil, err
	}
	d.file.buf = make([]byte, 0, 1000)
	return verifiable{d}, nil
}

func (m *memoryTarget) Published() ([]byte, bool) {
	b, ok := m.m.Published()
	if !ok {
		return nil, false
	}
	path := filepath.Join(m.t.TempDir(), "published")
	if err := os.WriteFile(path, b, 0o666); err != nil {
		m.t.Fatal(err)
	}
	return decode(m.t, path)
}

func (m *memoryTarget) Leftovers() []string {
	for _, violation := range m.m.Violations() {
		m.t.Error(violation)
	}
	return m.m.Leftovers()
}

func TestMemory(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New:      func(t testing.TB) sinktest.Target { return &memoryTarget{t: t} },
		Unit:     grainSize,
		Multiple: sectorSize,
		Once:     true,
	})
}

// pipeTarget is a pipe whose reader keeps what it gets.
type pipeTarget struct {
	t   testing.TB
	got chan []byte
}

func (p *pipeTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.got = make(chan []byte, 1)
	go func() {
		defer r.Close()
		b, _ := io.ReadAll(r)
		p.got <- b
	}()
	p.t.Cleanup(func() { w.Close() }) // so that the reader ends, too
	out, err := raw.Stream(ctx, w, "-", sink.UnknownSize)
	if err != nil {
		return nil, err
	}
	return Create(ctx, out, "-", size, Options{Options: o})
}

// Published waits for the end of the stream, and may be called once.
func (p *pipeTarget) Published() ([]byte, bool) {
	path := filepath.Join(p.t.TempDir(), "published")
	if err := os.WriteFile(path, <-p.got, 0o666); err != nil {
		p.t.Fatal(err)
	}
	return decode(p.t, path)
}

func (p *pipeTarget) Leftovers() []string { return nil }

func TestPipe(t *testing.T) {
	sinktest.Test(t, sinktest.Config{
		New:      func(t testing.TB) sinktest.Target { return &pipeTarget{t: t} },
		Unit:     grainSize,
		Multiple: sectorSize,
		Stream:   true,
	})
}
