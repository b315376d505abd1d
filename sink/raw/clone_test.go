package raw

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
)

// sharing mounts a file system whose files can share blocks.
func sharing(t *testing.T, kind string) string {
	t.Helper()
	peer.NeedRoot(t)
	peer.Need(t, "mkfs."+kind)
	device, folder := filepath.Join(t.TempDir(), "device"), t.TempDir()
	put(t, device, "")
	if err := os.Truncate(device, 400<<20); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "mkfs."+kind, "-q", device)
	peer.Run(t, "mount", "-o", "loop", device, folder)
	t.Cleanup(func() { peer.Run(t, "umount", folder) })
	return folder
}

// sourceFile makes a file of n random-looking bytes.
func sourceFile(t *testing.T, path string, n int) (*os.File, []byte) {
	t.Helper()
	b := bytes.Repeat([]byte("0123456789abcdef!"), n/17+1)[:n]
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, b
}

func TestCloneFrom(t *testing.T) {
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := sharing(t, kind)
			src, b := sourceFile(t, filepath.Join(dir, "src"), 1<<20)
			path := filepath.Join(dir, "disk.raw")
			if got := CloneUnit(path, src); got != 4096 {
				t.Fatalf("CloneUnit before the file is there: %d, want 4096", got)
			}
			d, err := CreateFile(t.Context(), path, 1<<20+100, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Abort()
			c, ok := sink.Ability[sink.Cloner](d)
			if !ok || c.CloneUnit(src) != 4096 {
				t.Fatal("no Cloner of 4096 bytes")
			}
			if err := c.CloneFrom(src, 64<<10, 0, 512<<10); err != nil {
				t.Fatal(err)
			}
			if err := c.CloneFrom(src, 0, 512<<10, 0); err != nil {
				t.Fatal(err)
			}
			// Refused by the file system, and the disk goes on.
			if err := c.CloneFrom(src, 1, 512<<10, 4096); !errors.Is(err, errors.ErrUnsupported) {
				t.Errorf("not aligned: %v", err)
			}
			if _, err := d.WriteAt([]byte("after"), 512<<10); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
				t.Fatal(err)
			}
			want := make([]byte, 1<<20+100)
			copy(want, b[64<<10:][:512<<10])
			copy(want[512<<10:], "after")
			hasContent(t, path, want)
		})
	}
}

// TestCloneFromOutside shares blocks outside the bounds of the disk, which would
// change its size.
func TestCloneFromOutside(t *testing.T) {
	dir := sharing(t, "xfs")
	src, _ := sourceFile(t, filepath.Join(dir, "src"), 1<<20)
	d, err := CreateFile(t.Context(), filepath.Join(dir, "disk.raw"), 64<<10, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	c, _ := sink.Ability[sink.Cloner](d)
	if err := c.CloneFrom(src, 0, 0, 128<<10); err == nil || errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("error %v, want one that ends the disk", err)
	}
	if err := d.Finish(t.Context()); err == nil {
		t.Error("the disk was finished after an error")
	}
}

func TestCloneUnitIsNone(t *testing.T) {
	xfs := sharing(t, "xfs")
	src, _ := sourceFile(t, filepath.Join(xfs, "src"), 1<<20)
	tiny, _ := sourceFile(t, filepath.Join(xfs, "tiny"), 100)
	elsewhere, _ := sourceFile(t, filepath.Join(t.TempDir(), "src"), 1<<20)
	path := filepath.Join(xfs, "disk.raw")
	for name, got := range map[string]int64{
		"another file system":   CloneUnit(path, elsewhere),
		"to another one":        CloneUnit(filepath.Join(mount(t, "size=2m"), "disk.raw"), src),
		"less than a block":     CloneUnit(path, tiny),
		"no such folder":        CloneUnit(filepath.Join(xfs, "none", "disk.raw"), src),
		"space that is claimed": unitWith(t, path, src, Options{Preallocation: PreallocateFalloc}),
	} {
		if got != 0 {
			t.Errorf("%s: %d, want 0", name, got)
		}
	}
}

func unitWith(t *testing.T, path string, src *os.File, o Options) int64 {
	t.Helper()
	d, err := CreateFile(t.Context(), path, 1<<20, o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	c, _ := sink.Ability[sink.Cloner](d)
	return c.CloneUnit(src)
}

// Callers use errors.ErrUnsupported to decide whether they write the data instead.
func TestCloneErrors(t *testing.T) {
	for _, c := range []struct {
		errno       unix.Errno
		unsupported bool
	}{
		{unix.EXDEV, true}, {unix.EINVAL, true}, {unix.EOPNOTSUPP, true}, {unix.ENOTTY, true}, {unix.EPERM, true}, {unix.ETXTBSY, true},
		{unix.EIO, false}, {unix.ENOSPC, false},
	} {
		dir := t.TempDir()
		src, _ := sourceFile(t, filepath.Join(dir, "src"), 1<<20)
		sys := kernel()
		sys.cloneRange = func(int, int, int64, int64, int64) error { return c.errno }
		d, err := createFile(t.Context(), filepath.Join(dir, "disk.raw"), 1<<20, Options{}, sys)
		if err != nil {
			t.Fatal(err)
		}
		cl, _ := sink.Ability[sink.Cloner](d)
		err = cl.CloneFrom(src, 0, 0, 4096)
		if !errors.Is(err, c.errno) || errors.Is(err, errors.ErrUnsupported) != c.unsupported || !strings.Contains(err.Error(), "cannot share blocks of the file src (bytes [0, 4096)) with the new file ") || !strings.Contains(err.Error(), "disk.raw.partial (bytes [0, 4096))") {
			t.Errorf("%v: %v", c.errno, err)
		}
		if _, err := d.WriteAt(make([]byte, 10), 0); (err == nil) != c.unsupported {
			t.Errorf("%v: then a write gives %v", c.errno, err)
		}
		if err := d.Abort(); err != nil {
			t.Error(err)
		}
	}
}

// A signal in the midst of it must not end the copy.
func TestCloneIsRepeated(t *testing.T) {
	dir := t.TempDir()
	src, _ := sourceFile(t, filepath.Join(dir, "src"), 1<<20)
	calls := 0
	sys := kernel()
	sys.cloneRange = func(fd, from int, pos, n, off int64) error {
		if calls++; calls == 1 {
			return unix.EINTR
		}
		p := make([]byte, n)
		if _, err := unix.Pread(from, p, pos); err != nil && err != io.EOF {
			return err
		}
		_, err := unix.Pwrite(fd, p, off)
		return err
	}
	d, err := createFile(t.Context(), filepath.Join(dir, "disk.raw"), 1<<20, Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	c, _ := sink.Ability[sink.Cloner](d)
	if err := c.CloneFrom(src, 0, 0, 4096); err != nil || calls != 2 {
		t.Errorf("%d calls, %v", calls, err)
	}
}
