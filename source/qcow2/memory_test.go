package qcow2_test

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
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/qcow2"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestChainSharesMemory opens a chain with more images than the cache of tables and
// clusters has slots. The images differ only in their content.
func TestChainSharesMemory(t *testing.T) {
	const images = 40
	dir := t.TempDir()
	want := make([]byte, images<<16)
	for i := range int64(images) {
		im := image{size: images << 16, packed: "zlib", clusters: some(65536, i)}
		if i > 0 {
			im.backing, im.format = fmt.Sprint(i-1), "qcow2"
		}
		write(t, dir, fmt.Sprint(i), im.build().file)
		copy(want[i<<16:], im.clusters[i])
	}
	d := mustOpen(t, filepath.Join(dir, fmt.Sprint(images-1)))
	if len(d.Info().Chain) != images {
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

// TestHugeDisk opens a disk of 2 EiB, the largest possible, and asks for its
// allocation. At most a few pages of its L1 table of 32 MiB may be in memory.
func TestHugeDisk(t *testing.T) {
	const size = 1 << 61
	l := image{size: 1 << 21, bits: 21, clusters: some(2<<20, 0)}.build()
	l.put64(24, size)
	l.put32(36, 4<<20)
	l1 := int64(64 << 20)
	l.put64(40, uint64(l1))
	entry := l.file[l.l1 : l.l1+8]
	path := write(t, t.TempDir(), "x.qcow2", l.file)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 32<<20 - 8} {
		if _, err := f.WriteAt(entry, l1+at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(l1 + 32<<20); err != nil {
		t.Fatal(err)
	}
	f.Close()
	d := mustOpen(t, path)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	last := int64(size - 1<<39)
	want := []source.Extent{
		{Len: 2 << 20}, {Off: 2 << 20, Len: last - 2<<20, Kind: source.Zero, Absent: true},
		{Off: last, Len: 2 << 20}, {Off: last + 2<<20, Len: 1<<39 - 2<<20, Kind: source.Zero, Absent: true},
	}
	if got := extents(t, d); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	p := make([]byte, 1<<20)
	if _, err := d.ReadAt(p, size-int64(len(p))); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
		t.Errorf("the end of the disk: %v", err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 48<<20 {
		t.Errorf("%d bytes allocated", n)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 6<<20 {
		t.Errorf("%d bytes are held", n)
	}
	if _, err := d.ReadAt(p, 0); err != nil { // d is held
		t.Error(err)
	}
}

// TestReadsTogether counts the reads of the file for clusters that are next to each
// other in the file.
func TestReadsTogether(t *testing.T) {
	for _, packed := range []string{"", "zlib", "zstd"} {
		reads, most := 0, 0
		im := image{size: 4 << 16, packed: packed, clusters: some(65536, 0, 1, 2, 3)}
		f := &sourcetest.Memory{Bytes: im.build().file, OnRead: func(_ int64, n int) error { reads, most = reads+1, max(most, n); return nil }}
		d, err := qcow2.Open(t.Context(), "x", f, nil, qcow2.Options{})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, im.size)
		if _, err := d.ReadAt(p[:1], 0); err != nil { // the tables are known then
			t.Fatal(err)
		}
		reads = 0
		if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, im.content()) {
			t.Fatalf("%s: another content, %v", packed, err)
		}
		if reads != 1 {
			t.Errorf("%q: %d reads, want 1", packed, reads)
		}
		// A read of one compressed cluster reads hardly more than its compressed bytes.
		most = 0
		if _, err := d.ReadAt(p[:65536], 0); err != nil || packed != "" && most > 30<<10 {
			t.Errorf("%q: %d bytes read, %v", packed, most, err)
		}
		d.Close()
	}
}

// TestCloseWaits calls Close while a read of the file is in progress.
func TestCloseWaits(t *testing.T) {
	started, release := make(chan bool), make(chan bool)
	slow := &sourcetest.Memory{Bytes: random(1, 65536), OnRead: func(int64, int) error {
		close(started)
		<-release
		return nil
	}}
	f := &sourcetest.Memory{Bytes: image{size: 65536, backing: "slow", format: "raw"}.build().file}
	d, err := qcow2.Open(t.Context(), "x", f, func(context.Context, string, string, string) (source.Disk, error) { return slow, nil }, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	read, closed := make(chan error), make(chan error)
	p := make([]byte, 65536)
	go func() {
		_, err := d.ReadAt(p, 0)
		read <- err
	}()
	<-started
	go func() { closed <- d.Close() }()
	for range 1000 { // Close has every chance to do it wrong
		runtime.Gosched()
	}
	if f.Closed() {
		t.Error("the file was closed beside the read")
	}
	close(release)
	if err := <-read; err != nil || !bytes.Equal(p, slow.Bytes) {
		t.Errorf("the read beside Close: %v", err)
	}
	if err := <-closed; err != nil || !f.Closed() || !slow.Closed() {
		t.Errorf("Close: %v", err)
	}
}
