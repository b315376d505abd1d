package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	sourceqcow2 "github.com/vddkcp/vddkcp/source/qcow2"
	sourceraw "github.com/vddkcp/vddkcp/source/raw"
)

// faulty is an image's file whose next write fails with the error that was put
// in.
type faulty struct {
	raw.Image
	t *imageTarget
}

func (f faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := f.t.fault; err != nil {
		f.t.fault = nil
		return 0, err
	}
	return f.Image.WriteAt(p, off)
}

// imageTarget is an image in a folder of its own.
type imageTarget struct {
	dir   string
	o     Options
	fault error
	t     testing.TB
	last  *disk
}

func (f *imageTarget) path() string { return filepath.Join(f.dir, "disk.qcow2") }

// Break also ends that writes are gathered.
func (f *imageTarget) Break(err error) { f.last.out.size, f.fault = 512, err }

func (f *imageTarget) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	options := f.o
	options.Options.Options = o
	if o.Backing != nil {
		options.BackingName, options.BackingFormat = "backing", "raw"
	}
	options, l, err := options.normal(size)
	if err != nil {
		return nil, err
	}
	d, err := create(ctx, f.path(), l, options, func(o raw.Options) (raw.Image, error) {
		i, err := raw.CreateImage(ctx, f.path(), o)
		if err != nil {
			return nil, err
		}
		return faulty{i, f}, nil
	})
	if err == nil {
		f.last = inner(d)
	}
	return d, err
}

// inner is the disk without its abilities.
func inner(d sink.Disk) *disk {
	switch d := d.(type) {
	case zeroedDisk:
		return d.disk
	case cloning:
		return d.disk
	}
	return d.(*disk)
}

func (f *imageTarget) Published() ([]byte, bool) {
	if _, err := os.Stat(f.path()); err != nil {
		return nil, false
	}
	return read(f.t, f.path(), f.last.o.Backing), true
}

// read reads an image back.
func read(t testing.TB, path string, backing source.Disk) []byte {
	t.Helper()
	file, err := sourceraw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := sourceqcow2.Open(t.Context(), path, file, func(context.Context, string, string, string) (source.Disk, error) {
		return borrowed{backing}, nil
	}, sourceqcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(b)
}

func (f *imageTarget) Leftovers() []string {
	var names []string
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return []string{err.Error()}
	}
	for _, e := range entries {
		if e.Name() != "disk.qcow2" {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestSuite(t *testing.T) {
	for _, cluster := range []int64{512, 4 << 10, 64 << 10, 2 << 20} {
		for _, compression := range []Compression{None, Zlib, Zstd} {
			if compression != None && (cluster == 4<<10 || cluster == 2<<20) || compression == Zstd && cluster == 512 {
				continue // they show no more than the others
			}
			t.Run(fmt.Sprintf("%d %s", cluster, compression), func(t *testing.T) {
				sinktest.Test(t, sinktest.Config{
					New: func(t testing.TB) sinktest.Target {
						return &imageTarget{dir: t.TempDir(), o: Options{ClusterSize: cluster, Compression: compression}, t: t}
					},
					Unit: cluster, Multiple: 512, Backing: true,
				})
			})
		}
	}
}
