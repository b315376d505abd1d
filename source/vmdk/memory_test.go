package vmdk_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// TestManyFilesShareMemory opens an image with more extents and parents than the cache
// of tables and grains has slots. They differ only in their content.
func TestManyFilesShareMemory(t *testing.T) {
	dir := t.TempDir()
	text := "# Disk DescriptorFile\nCID=1\n"
	var want []byte
	for i := range int64(40) {
		im := image{capacity: 256, compressed: i%2 == 0, grains: map[int64][]byte{i / 2 % 2: random(uint64(i), 65536)}}
		if i%5 == 0 {
			im.grains[1-i/2%2] = random(uint64(i+100), 65536)
		}
		name := fmt.Sprintf("s%d", i)
		write(t, dir, name, im.build().file)
		text += fmt.Sprintf("RW 256 SPARSE %q\n", name)
		want = append(want, im.content()...)
	}
	write(t, dir, "0.vmdk", []byte(text))
	for i := range 20 {
		im := image{capacity: int64(len(want) / sector), compressed: true, grains: grains(65536, int64(i))}
		im.descriptor = fmt.Sprintf("# Disk DescriptorFile\nCID=1\nparentCID=1\nparentFileNameHint=\"%d.vmdk\"\nRW %%d SPARSE \"x\"\n", i)
		write(t, dir, fmt.Sprintf("%d.vmdk", i+1), im.build().file)
		copy(want[i*65536:], im.grains[int64(i)])
	}
	d := mustOpen(t, filepath.Join(dir, "20.vmdk"))
	if len(d.Info().Chain) != 21 {
		t.Fatalf("%v", d.Info().Chain)
	}
	r := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 3000)
	for range 1500 {
		off := r.Int64N(d.Size() - int64(len(p)))
		if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+int64(len(p))]) {
			t.Fatalf("at %d: another content, %v", off, err)
		}
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	content(t, d)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 8<<20 {
		t.Errorf("%d bytes more are held", n)
	}
}

// TestCloseWaits calls Close during a read of one file. The same read then continues in
// another file.
func TestCloseWaits(t *testing.T) {
	started, release := make(chan bool), make(chan bool)
	slow := &sourcetest.Memory{Bytes: random(1, 10*sector), OnRead: func(int64, int) error {
		close(started)
		<-release
		return nil
	}}
	other := &sourcetest.Memory{Bytes: random(2, 10*sector)}
	text := "# Disk DescriptorFile\nRW 10 FLAT \"other\"\nRW 10 FLAT \"slow\"\nRW 10 FLAT \"other\"\n"
	d, err := vmdk.Open(t.Context(), "x.vmdk", &sourcetest.Memory{Bytes: []byte(text)}, func(_ context.Context, _, name, _ string) (source.Disk, error) {
		if name == "slow" {
			return slow, nil
		}
		return other, nil
	}, vmdk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	read, closed := make(chan error), make(chan error)
	p := make([]byte, 20*sector)
	go func() {
		_, err := d.ReadAt(p, 10*sector)
		read <- err
	}()
	<-started
	go func() { closed <- d.Close() }()
	for range 1000 { // Close has every chance to do it wrong
		runtime.Gosched()
	}
	if other.Closed() {
		t.Error("a file was closed beside the read")
	}
	close(release)
	if err := <-read; err != nil || !bytes.Equal(p, slices.Concat(slow.Bytes, other.Bytes)) {
		t.Errorf("the read beside Close: %v", err)
	}
	if err := <-closed; err != nil || !other.Closed() || !slow.Closed() {
		t.Errorf("Close: %v", err)
	}
}

// TestHugeDisk opens disks of 64 TiB, whose tables are mostly holes, and lists their
// extents. The memory for both must not grow with the size of the disk.
func TestHugeDisk(t *testing.T) {
	const capacity = 64 << 40 / sector
	im := image{capacity: 1, grains: grains(512, 0), descriptor: strings.Replace(monolithic, "%d", fmt.Sprint(int64(capacity)), 1)}
	for _, tables := range []bool{false, true} {
		l := im.build()
		l.put64(12, capacity)
		n := int64(capacity/(512*128) + 1)
		path := filepath.Join(t.TempDir(), "x.vmdk")
		gd := int64(1 << 20)
		l.put64(56, uint64(gd/sector))
		if err := os.WriteFile(path, l.file, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		directory := make([]byte, 4*n)
		dl := layout{file: directory}
		if tables {
			for i := range n {
				dl.put32(i*4, uint32((gd+4*n+sector)/sector+i*4))
			}
		}
		dl.put32(0, uint32(l.tables[0]/sector))
		if _, err := f.WriteAt(directory, gd); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(16 << 30); err != nil {
			t.Fatal(err)
		}
		f.Close()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d := mustOpen(t, path)
		got := extents(t, d)
		want := []source.Extent{{Len: 65536}, {Off: 65536, Len: 64<<40 - 65536, Kind: source.Zero, Absent: true}}
		if !slices.Equal(got, want) {
			t.Errorf("%+v, want %+v", got, want)
		}
		p := make([]byte, 1<<20)
		if _, err := d.ReadAt(p, d.Size()-int64(len(p))); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
			t.Errorf("the end of the disk: %v", err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
			t.Errorf("%d bytes allocated", n)
		}
	}
}
