package cow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// memory returns a disk of size bytes other than zero.
func memory(size int) *sourcetest.Memory {
	return &sourcetest.Memory{Bytes: bytes.Repeat([]byte{0xB5}, size), ID: "disk 1", Proof: "mtime"}
}

func make1(t *testing.T, base source.Disk, o Options) *Disk {
	t.Helper()
	d, err := New(t.Context(), base, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func read(t *testing.T, d source.Disk, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if _, err := d.ReadAt(p, off); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return p
}

// TestFailedFlush tests that after a failed flush all later flushes fail, and that
// reads are still correct.
func TestFailedFlush(t *testing.T) {
	var broken, asked atomic.Int64
	sys := kernel()
	sync := sys.fdatasync
	sys.fdatasync = func(f *os.File) error {
		asked.Add(1)
		if broken.Load() > 0 {
			return unix.EIO
		}
		return sync(f)
	}
	path := filepath.Join(t.TempDir(), "x.cow")
	d, err := newDisk(t.Context(), memory(1<<20), Options{File: path}, sys)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("kept"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("lost"), 1<<19); err != nil {
		t.Fatal(err)
	}
	broken.Store(1)
	if err := d.Flush(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("Flush: %v", err)
	}
	broken.Store(0)
	before := asked.Load()
	if err := d.Flush(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("the second Flush: %v", err)
	}
	if _, err := d.WriteAt([]byte("more"), 0); !errors.Is(err, unix.EIO) {
		t.Errorf("WriteAt after it: %v", err)
	}
	if got := read(t, d, 1<<19, 4); string(got) != "lost" {
		t.Errorf("it holds %q", got)
	}
	if err := d.Close(); !errors.Is(err, unix.EIO) {
		t.Errorf("Close: %v", err)
	}
	if asked.Load() != before {
		t.Error("fdatasync was asked again")
	}
	d = make1(t, memory(1<<20), Options{File: path})
	if got := read(t, d, 0, 4); string(got) != "kept" {
		t.Errorf("opened again it holds %q", got)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("Flush after opening again: %v", err)
	}
}

// TestTemporary tests that a temporary layer leaves no file, and that its Flush makes
// no system call.
func TestTemporary(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	sys := kernel()
	sys.fdatasync = func(*os.File) error { t.Error("fdatasync"); return nil }
	d, err := newDisk(t.Context(), memory(1<<20), Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	d.WriteAt([]byte("x"), 5)
	if err := d.Flush(t.Context()); err != nil {
		t.Error(err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("there is %v", entries)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestTooLargeForOneFile tests a file system that does not support a file of the size
// of the disk. A temporary layer then consists of several files, and a named layer is
// refused and not left behind.
func TestTooLargeForOneFile(t *testing.T) {
	sys := kernel()
	sys.maxFile = 15 << 40
	const size = 20<<40 + 512
	base := func() *sourcetest.Memory {
		return sourcetest.Pattern(size, source.Extent{Off: maxPart - 1<<20, Len: 2 << 20})
	}
	path := filepath.Join(t.TempDir(), "x.cow")
	_, err := newDisk(t.Context(), base(), Options{File: path}, sys)
	if err == nil || !strings.Contains(err.Error(), "which this file system does not support (file too large); put the layer on XFS or btrfs") || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the file is there")
	}
	d, err := newDisk(t.Context(), base(), Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if len(d.store.files) != 3 {
		t.Errorf("%d files", len(d.store.files))
	}
	want := make([]byte, 2<<20)
	d.ReadAt(want, maxPart-1<<20)
	for _, r := range []struct{ from, n int }{{1<<20 - 100, 200}, {1<<20 - 1<<17, 1 << 18}, {0, 70000}} {
		part := want[r.from : r.from+r.n]
		for i := range part {
			part[i] ^= 0x55
		}
		if _, err := d.WriteAt(part, maxPart-1<<20+int64(r.from)); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, d, maxPart-1<<20, 2<<20); !bytes.Equal(got, want) {
		t.Error("the border of two files differs")
	}
	if _, _, n, ok := d.InFile(maxPart - 1<<16); !ok || n != 1<<16 {
		t.Errorf("InFile before the border: %d, %v", n, ok)
	}
	if err := d.ZeroAt(t.Context(), maxPart-1<<20, 2<<20, 0); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt(want[:512], size-512); err != nil {
		t.Error(err)
	}
	if got := read(t, d, size-512, 512); !bytes.Equal(got, want[:512]) {
		t.Error("the end differs")
	}
}

// TestMemoryOfALargeDisk tests that memory is bounded for the largest disks, even if
// the writes are scattered.
func TestMemoryOfALargeDisk(t *testing.T) {
	const size = 64 << 40
	heap := func() int64 { // may shrink when memory of earlier tests is freed
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	d := make1(t, sourcetest.Pattern(size), Options{})
	const step = pageBlocks * DefaultBlockSize / 5
	var most int64
	for off, i := int64(0), 0; off < size; off, i = off+step, i+1 {
		var err error
		if i%200 == 0 {
			_, err = d.WriteAt([]byte{1, 2, 3}, off+1000)
		} else {
			err = d.ZeroAt(t.Context(), off/DefaultBlockSize*DefaultBlockSize, DefaultBlockSize, source.MayTrim)
		}
		if err != nil {
			t.Fatal(err)
		}
		if i%100_000 == 0 {
			most = max(most, heap()-before)
		}
	}
	n := 0
	for _, err := range source.Covered(t.Context(), d, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	most = max(most, heap()-before)
	t.Logf("%d extents, %d pages in memory, at most %d KiB of heap", n, len(d.table.clock), most>>10)
	if len(d.table.clock) > maxResident || most > 32<<20 {
		t.Errorf("%d pages, %d bytes in memory, want at most 32 MiB", len(d.table.clock), most)
	}
	if want := size / step; n < want {
		t.Errorf("%d extents, want at least %d", n, want)
	}
	for off, i := int64(0), 0; off < size; off, i = off+step*1000, i+1000 {
		if i%200 != 0 {
			continue
		}
		if got := read(t, d, off+1000, 4); !bytes.Equal(got, []byte{1, 2, 3, 0}) {
			t.Fatalf("at %d it holds %v", off, got)
		}
	}
}

// TestNoSpace tests that writes fail with ENOSPC when the file system of the layer is
// full, and that the earlier writes are still there.
func TestNoSpace(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "mount", "umount")
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=2m", "none", dir).CombinedOutput(); err != nil {
		t.Skipf("mount: %v %s", err, out)
	}
	t.Cleanup(func() { peer.Run(t, "umount", dir) })
	t.Setenv("TMPDIR", dir)
	for _, name := range []string{"", filepath.Join(dir, "x.cow")} {
		d := make1(t, memory(8<<20), Options{File: name, OnRead: true})
		written := int64(0)
		for ; ; written += 100 << 10 {
			if _, err := d.WriteAt(bytes.Repeat([]byte{7}, 100<<10), written); errors.Is(err, unix.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if written > 4<<20 {
				t.Fatal("4 MiB fit in 2")
			}
		}
		if err := d.ZeroAt(t.Context(), 4<<20, 4<<20, 0); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("space for zeros: %v", err)
		}
		// Blocks that are read cannot be copied into the layer, but are read correctly.
		if got := read(t, d, 4<<20, 4<<20); !bytes.Equal(got, bytes.Repeat([]byte{0xB5}, 4<<20)) {
			t.Error("what is read from below differs")
		}
		if d.copyOnRead.Load() {
			t.Error("blocks are still kept")
		}
		if got := read(t, d, 0, int(written)); !bytes.Equal(got, bytes.Repeat([]byte{7}, int(written))) {
			t.Error("what was written before differs")
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Error(err)
		}
		// A trim frees space.
		if err := d.Trim(t.Context(), 0, 1<<20); err != nil {
			t.Error(err)
		}
		if _, err := d.WriteAt(bytes.Repeat([]byte{9}, 200<<10), 6<<20); err != nil {
			t.Errorf("after a trim: %v", err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestOnRead tests that several readers of one absent block read it from the base only
// once, and that the copy in the layer stays correct when the base fails later.
func TestOnRead(t *testing.T) {
	base := memory(2<<20 + 512)
	clear(base.Bytes[1<<20 : 1<<20+200<<10])
	var reads, bytesRead atomic.Int64
	gate := make(chan struct{})
	base.OnRead = func(_ int64, n int) error {
		<-gate
		reads.Add(1)
		bytesRead.Add(int64(n))
		return nil
	}
	want := bytes.Clone(base.Bytes)
	path := filepath.Join(t.TempDir(), "x.cow")
	d := make1(t, base, Options{File: path, OnRead: true})
	var wg sync.WaitGroup
	for i := range 32 {
		wg.Go(func() {
			p := make([]byte, 5000)
			off := int64(1000 + i*100)
			if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:off+5000]) {
				t.Errorf("read at %d: %v", off, err)
			}
		})
	}
	close(gate)
	wg.Wait()
	if reads.Load() != 1 || bytesRead.Load() != DefaultBlockSize {
		t.Errorf("%d reads of %d bytes, want 1 of %d", reads.Load(), bytesRead.Load(), DefaultBlockSize)
	}
	read(t, d, 70_000, 2<<20)
	if got := bytesRead.Load(); got != int64(len(want)) {
		t.Errorf("%d bytes were read, want %d", got, len(want))
	}
	base.OnRead = func(int64, int) error { return errors.New("read twice") }
	if got := read(t, d, 0, len(want)); !bytes.Equal(got, want) {
		t.Error("what is kept differs")
	}
	zeros := false
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil || e.Depth != 0 {
			t.Errorf("%+v, %v", e, err)
		}
		zeros = zeros || e.Kind == source.Zero
	}
	if !zeros {
		t.Error("blocks of zeros are kept as data")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	again := memory(2<<20 + 512)
	again.OnRead = base.OnRead
	d = make1(t, again, Options{File: path})
	if got := read(t, d, 0, len(want)); !bytes.Equal(got, want) {
		t.Error("what is kept differs after opening again")
	}
}

// TestReadsForWrites tests that a write of a part of a block reads the rest of it from
// the base, that a write of whole blocks reads nothing, and that an error of the base
// changes nothing.
func TestReadsForWrites(t *testing.T) {
	base := memory(1<<20 + 512)
	var reads atomic.Int64
	base.OnRead = func(int64, int) error { reads.Add(1); return nil }
	d := make1(t, base, Options{})
	for _, c := range []struct {
		off, n, want int64
	}{{0, 65536, 0}, {65536, 3 * 65536, 0}, {262144 + 512, 512, 1}, {262144, 512, 0}, {1<<20 - 65536, 65536 + 512, 0}, {1 << 20, 512, 0}, {327680 + 1, 2*65536 - 2, 2}} {
		reads.Store(0)
		if _, err := d.WriteAt(make([]byte, c.n), c.off); err != nil {
			t.Fatal(err)
		}
		if reads.Load() != c.want {
			t.Errorf("a write of %d at %d read %d times, want %d", c.n, c.off, reads.Load(), c.want)
		}
	}
	why := errors.New("lost")
	base.OnRead = func(int64, int) error { return why }
	if _, err := d.WriteAt([]byte{1}, 512<<10); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
	base.OnRead = nil
	if got := read(t, d, 512<<10, 1); got[0] != 0xB5 {
		t.Errorf("a failed write left %#x", got)
	}
}

// TestHereWhenWritten tests that a block becomes present only after all of it was
// written: until then, and if the write fails, it reads as before.
func TestHereWhenWritten(t *testing.T) {
	sys := kernel()
	var d *Disk
	looked, full := 0, false
	pwrite := sys.pwrite
	sys.pwrite = func(f *os.File, p []byte, off int64) (int, error) {
		if d != nil {
			looked++
			if got := read(t, d, off-d.store.data, len(p)); !bytes.Equal(got, bytes.Repeat([]byte{0xB5}, len(p))) {
				t.Errorf("while [%d, %d) is written it holds others", off, off+int64(len(p)))
			}
		}
		if full {
			n, _ := pwrite(f, p[:len(p)/2], off)
			return n, unix.ENOSPC
		}
		return pwrite(f, p, off)
	}
	disk, err := newDisk(t.Context(), memory(1<<20), Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	d = disk
	for i, n := range []int{100, DefaultBlockSize, 3 * DefaultBlockSize} {
		off := int64(i) * 4 * DefaultBlockSize
		full = true
		if _, err := d.WriteAt(make([]byte, n), off); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("a write that fails: %v", err)
		}
		full = false
		if got := read(t, d, off, n); !bytes.Equal(got, bytes.Repeat([]byte{0xB5}, n)) {
			t.Error("a write that failed changed what is read")
		}
		if _, err := d.WriteAt(make([]byte, n), off); err != nil {
			t.Error(err)
		}
		if got := read(t, d, off, n); !bytes.Equal(got, make([]byte, n)) {
			t.Error("what was written is not there")
		}
	}
	if looked != 6 {
		t.Errorf("%d writes were looked at", looked)
	}
}

func TestOutside(t *testing.T) {
	d := make1(t, memory(100_000), Options{})
	ctx := t.Context()
	for name, err := range map[string]error{
		"past the end": func() error { _, err := d.WriteAt(make([]byte, 2), 99_999); return err }(),
		"negative":     func() error { _, err := d.WriteAt(make([]byte, 2), -1); return err }(),
		"zero":         d.ZeroAt(ctx, 99_999, 2, source.MayTrim),
		"zero all":     d.ZeroAt(ctx, 1, 1<<63-1, source.MayTrim),
		"trim":         d.Trim(ctx, -5, 10),
		"less":         d.Trim(ctx, 5, -1),
	} {
		if err == nil || !strings.Contains(err.Error(), "outside the disk of 100000 bytes") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := d.ZeroAt(ctx, 10, 100, source.MayTrim|source.FastOnly); err != errors.ErrUnsupported {
		t.Errorf("a fast zero of a part: %v", err)
	}
	if got := read(t, d, 10, 100); got[5] != 0xB5 {
		t.Error("it was done all the same")
	}
	if err := d.ZeroAt(ctx, 10, 99_990, source.MayTrim|source.FastOnly); err != nil {
		t.Errorf("a fast zero: %v", err)
	}
	if err := d.ZeroAt(ctx, 65536, 100_000-65536, source.FastOnly); err != nil {
		t.Errorf("a fast zero to the end: %v", err)
	}
	if got := read(t, d, 9, 99_991); got[0] != 0xB5 || !bytes.Equal(got[1:], make([]byte, 99_990)) {
		t.Error("it is not zero")
	}
	canceled, cancel := context.WithCancelCause(ctx)
	why := errors.New("stop")
	cancel(why)
	if err := d.Flush(canceled); !errors.Is(err, why) {
		t.Errorf("Flush: %v", err)
	}
	d.Close()
	if _, err := d.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// TestWarning tests that continuing a layer over a base without a proof logs a warning.
func TestWarning(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.cow")
	for i := range 2 {
		var log strings.Builder
		m := memory(1 << 20)
		m.Proof = "none"
		d := make1(t, m, Options{File: path, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if warned := strings.Contains(log.String(), "nothing proves"); warned != (i == 1) {
			t.Errorf("opening %d: %s", i, log.String())
		}
		d.Close()
	}
}

// inFile is a disk that is source.InFile for all of its bytes.
type inFile struct {
	*sourcetest.Memory
	f *os.File
}

func (d inFile) InFile(off int64) (*os.File, int64, int64, bool) {
	return d.f, off, d.Size() - off, true
}

// TestInFile tests that InFile returns the places of the base for absent blocks, of the
// layer for present ones, and none for zeroed ones. With OnRead it returns none for
// absent blocks, because reads from those places would not be copied.
func TestInFile(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, onRead := range []bool{false, true} {
		d := make1(t, inFile{memory(1 << 20), f}, Options{OnRead: onRead})
		const b = DefaultBlockSize
		if _, err := d.WriteAt(make([]byte, 2*b), 2*b); err != nil {
			t.Fatal(err)
		}
		if err := d.ZeroAt(t.Context(), 6*b, b, source.MayTrim); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			off  int64
			file *os.File
			n    int64
		}{{100, f, 2*b - 100}, {2*b + 5, d.store.files[0], 2*b - 5}, {4 * b, f, 2 * b}, {6 * b, nil, 0}, {7 * b, f, 9 * b}} {
			file, pos, n, ok := d.InFile(c.off)
			if onRead && c.file == f {
				c.file, c.n = nil, 0
			}
			if file != c.file || n != c.n || ok != (c.file != nil) || file == f && pos != c.off {
				t.Errorf("onRead %v: InFile(%d) is %v, %d, %d, %v, want %v, %d", onRead, c.off, file, pos, n, ok, c.file, c.n)
			}
		}
	}
}

func TestAbilities(t *testing.T) {
	m := memory(1 << 20)
	m.Description = source.Info{Format: "vmdk", LogicalSector: 512, Chain: []string{"/a.vmdk"}}
	d := make1(t, m, Options{})
	id, proof, err := d.Identity(t.Context())
	if id != "cow:disk 1" || proof != "none" || err != nil {
		t.Errorf("Identity %q, %q, %v", id, proof, err)
	}
	if info := d.Info(); info.Format != "vmdk" || info.ClusterSize != DefaultBlockSize || len(info.Chain) != 2 || info.Chain[1] != "/a.vmdk" {
		t.Errorf("Info %+v", info)
	}
	if _, ok := source.Ability[source.Writable](d); !ok {
		t.Error("not Writable")
	}
	if info := make1(t, &sourcetest.Memory{Bytes: m.Bytes}, Options{}).Info(); len(info.Chain) != 2 {
		t.Errorf("Info %+v", info)
	}
	if err := d.Close(); err != nil || !m.Closed() {
		t.Errorf("Close: %v; below closed: %v", err, m.Closed())
	}
}
