package raw_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

func write(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t testing.TB, path string) *raw.Disk {
	t.Helper()
	d, err := raw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(fifo, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path, want string
		is         error
	}{
		{path: dir, want: "is a directory, not a regular file or a block device"},
		{path: fifo, want: "is a FIFO, not"},
		{path: link, want: "is a FIFO, not"},
		{path: os.DevNull, want: "is a character device, not"},
		{path: filepath.Join(dir, "none"), want: "none", is: fs.ErrNotExist},
		{path: "", want: "no such file", is: fs.ErrNotExist},
	} {
		d, err := raw.Open(t.Context(), c.path)
		if err == nil {
			d.Close()
			t.Errorf("Open(%q): no error", c.path)
			continue
		}
		if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.path) || c.is != nil && !errors.Is(err, c.is) {
			t.Errorf("Open(%q): %v, want %q", c.path, err, c.want)
		}
	}
}

func TestOpenAfterCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why")
	cancel(why)
	if _, err := raw.Open(ctx, write(t, nil)); !errors.Is(err, why) {
		t.Errorf("%v, want %v", err, why)
	}
}

func TestShrunk(t *testing.T) {
	content := random(10000)
	path := write(t, content)
	d := open(t, path)
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 1000)
	if n, err := d.ReadAt(p, 4000); n != 1000 || err != nil || !bytes.Equal(p, content[4000:5000]) {
		t.Errorf("below the new end: %d, %v", n, err)
	}
	for _, off := range []int64{4500, 5000, 9000} {
		_, err := d.ReadAt(p, off)
		if !errors.Is(err, io.ErrUnexpectedEOF) || !strings.Contains(err.Error(), "had 10000 bytes when it was opened and has 5000 now") || !strings.Contains(err.Error(), path) {
			t.Errorf("ReadAt(%d): %v", off, err)
		}
	}
	var err error
	for _, err = range d.Extents(t.Context(), 0, d.Size()) {
	}
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Extents: %v", err)
	}
}

func TestGrown(t *testing.T) {
	content := random(10000)
	path := write(t, content)
	d := open(t, path)
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 200)
	if n, err := d.ReadAt(p, 9900); n != 100 || err != io.EOF {
		t.Errorf("ReadAt across the end: %d, %v", n, err)
	}
	for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil || e != (source.Extent{Len: 10000}) {
			t.Errorf("%+v, %v", e, err)
		}
	}
}

func TestIdentity(t *testing.T) {
	path := write(t, []byte("content"))
	d := open(t, path)
	identity := func() string {
		t.Helper()
		id, proof, err := d.Identity(t.Context())
		if err != nil || proof != "mtime" {
			t.Fatalf("%q, %q, %v", id, proof, err)
		}
		return id
	}
	seen := []string{identity()}
	if again := identity(); again != seen[0] {
		t.Errorf("%q, then %q", seen[0], again)
	}
	for _, change := range []func() error{
		func() error { return os.Chtimes(path, stat(t, path).ModTime(), stat(t, path).ModTime().Add(1)) },
		func() error { // changes only the size
			mtime := stat(t, path).ModTime()
			return errors.Join(os.Truncate(path, 3), os.Chtimes(path, mtime, mtime))
		},
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		id := identity()
		if slices.Contains(seen, id) {
			t.Errorf("%q again after a change", id)
		}
		seen = append(seen, id)
	}
}

func stat(t testing.TB, path string) fs.FileInfo {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi
}

// sparse creates a file of the given size with 64 KiB of data at each multiple of step.
func sparse(t testing.TB, size, step int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sparse.img")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	data := random(64 << 10)
	for off := int64(0); off+int64(len(data)) <= size; off += step {
		if _, err := f.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func TestMapAsQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := sparse(t, 3<<20+512, 256<<10)
	var got strings.Builder
	for e, err := range source.Covered(t.Context(), open(t, path), 0, 3<<20+512) {
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&got, "{ \"start\": %d, \"length\": %d, \"depth\": %d, \"present\": %v, \"zero\": %v, \"data\": %v, \"offset\": %d}\n",
			e.Off, e.Len, e.Depth, !e.Absent, e.Kind == source.Zero, e.Kind == source.Data, e.Off)
	}
	want := peer.Run(t, "qemu-img", "map", "--output=json", "-f", "raw", path)
	want = strings.Trim(strings.ReplaceAll(want, "},", "}"), "[]\n") + "\n"
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}
}

func TestUncached(t *testing.T) {
	content := random(3<<20 + 17)
	for _, dir := range []string{"", "/dev/shm"} { // tmpfs lacks RWF_DONTCACHE
		if dir != "" {
			if _, err := os.Stat(dir); err != nil {
				continue
			}
		}
		f, err := os.CreateTemp(dir, "vddkcp-raw-*")
		if err != nil {
			t.Fatal(err)
		}
		defer os.Remove(f.Name())
		if _, err := f.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		d := open(t, f.Name())
		d.ReadUncached()
		for range 2 {
			p := make([]byte, len(content)+1)
			n, err := d.ReadAt(p, 0)
			if n != len(content) || err != io.EOF || !bytes.Equal(p[:n], content) {
				t.Errorf("%s: %d, %v", f.Name(), n, err)
			}
		}
		if err := os.Truncate(f.Name(), 100); err != nil {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(make([]byte, 10), 95); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s shrunk: %v", f.Name(), err)
		}
	}
}

// loop returns a read-only loop device for a file.
func loop(t *testing.T, path string) string {
	t.Helper()
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", "--read-only", path))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	return device
}

func TestBlockDevice(t *testing.T) {
	content := random(1<<20 + 512)
	device := loop(t, write(t, content))
	d := open(t, device)
	if d.Size() != int64(len(content)) {
		t.Fatalf("size %d", d.Size())
	}
	if i := d.Info(); i.LogicalSector != 512 || i.Allocated != d.Size() || i.Format != "raw" {
		t.Errorf("%+v", i)
	}
	if id, proof, err := d.Identity(t.Context()); proof != "none" || err != nil || !strings.HasSuffix(id, fmt.Sprint(":", len(content))) {
		t.Errorf("%q, %q, %v", id, proof, err)
	}
	for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil || e != (source.Extent{Len: d.Size()}) {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestSuite(t *testing.T) {
	sparseFile := sparse(t, 2<<20+700, 300_000)
	sparseContent, err := os.ReadFile(sparseFile)
	if err != nil {
		t.Fatal(err)
	}
	dense := random(200_001)
	for _, c := range []struct {
		name, path string
		content    []byte
	}{
		{"Sparse", sparseFile, sparseContent},
		{"Dense", write(t, dense), dense},
		{"Hole", sparse(t, 5000, 1), make([]byte, 5000)},
		{"Empty", write(t, nil), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			sourcetest.Run(t, sourcetest.Config{
				Content: c.content,
				Open: func(ctx context.Context, t testing.TB) source.Disk {
					d, err := raw.Open(ctx, c.path)
					if err != nil {
						t.Fatal(err)
					}
					return d
				},
			})
		})
	}
}

func TestSuiteBlockDevice(t *testing.T) {
	content := random(1<<20 + 512)
	device := loop(t, write(t, content))
	sourcetest.Run(t, sourcetest.Config{
		Content: content,
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			d, err := raw.Open(ctx, device)
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
	})
}

func BenchmarkReadAt(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.img")
	if err := os.WriteFile(path, random(64<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, cached := range []bool{true, false} {
		b.Run(fmt.Sprintf("cached=%v", cached), func(b *testing.B) {
			d := open(b, path)
			if !cached {
				d.ReadUncached()
			}
			p := make([]byte, 1<<20)
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			off := int64(0)
			for b.Loop() {
				if _, err := d.ReadAt(p, off); err != nil {
					b.Fatal(err)
				}
				off = (off + int64(len(p))) % d.Size()
			}
		})
	}
}

func BenchmarkExtents(b *testing.B) {
	const size = 256 << 20
	path := sparse(b, size, 128<<10) // every other 64 KiB is a hole
	d := open(b, path)
	b.ReportAllocs()
	for b.Loop() {
		n := 0
		for _, err := range d.Extents(b.Context(), 0, size) {
			if err != nil {
				b.Fatal(err)
			}
			n++
		}
		if n != size/(64<<10) {
			b.Fatalf("%d extents", n)
		}
		b.ReportMetric(float64(n), "extents/op")
	}
}
