package raw_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

func openWritable(t testing.TB, path string) *raw.WritableDisk {
	t.Helper()
	d, err := raw.OpenWritable(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestWritableFile(t *testing.T) {
	content := random(3<<20 + 77)
	clear(content[1<<20 : 2<<20])
	path := write(t, content)
	d := openWritable(t, path)
	sourcetest.Writable(t, d, content)
	d.Close()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the file differs from what was read of it (%d bytes, want %d), %v", len(got), len(content), err)
	}
	if _, err := d.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
}

// TestWritableHoles tests that zeros become holes only where the flags allow it.
func TestWritableHoles(t *testing.T) {
	path := write(t, random(4<<20))
	d := openWritable(t, path)
	blocks := func() int64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if err := d.ZeroAt(t.Context(), 0, 1<<20, 0); err != nil {
		t.Fatal(err)
	}
	if n := blocks(); n < 4<<20 {
		t.Errorf("%d bytes are left of what may not be trimmed", n)
	}
	if err := d.ZeroAt(t.Context(), 0, 1<<20, source.MayTrim|source.FastOnly); err != nil {
		t.Fatal(err)
	}
	if err := d.Trim(t.Context(), 1<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	if n := blocks(); n > 2<<20+64<<10 {
		t.Errorf("%d bytes are left, want half of 4 MiB", n)
	}
	if d.Size() != 4<<20 {
		t.Errorf("size %d", d.Size())
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 4<<20 {
		t.Errorf("%v, %v", st.Size(), err)
	}
}

func TestWritableDevice(t *testing.T) {
	content := random(2<<20 + 512)
	path := write(t, content)
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", path))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	d := openWritable(t, device)
	sourcetest.Writable(t, d, content)
	if _, err := raw.OpenWritable(t.Context(), device); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second writer of a device: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(device); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the device differs, %v", err)
	}
	// The kernel refuses writes to this device.
	peer.Run(t, "blockdev", "--setro", device)
	defer peer.Run(t, "blockdev", "--setrw", device) // a loop device stays read-only for its next user
	if _, err := raw.OpenWritable(t.Context(), device); err == nil {
		t.Error("a read-only device was opened")
	}
}

func TestWritableRefuses(t *testing.T) {
	path := write(t, random(4096))
	d := openWritable(t, path)
	if _, err := raw.OpenWritable(t.Context(), path); err == nil || !strings.Contains(err.Error(), "being written by another process") {
		t.Errorf("a second writer: %v", err)
	}
	if r, err := raw.Open(t.Context(), path); err != nil {
		t.Errorf("a reader beside the writer: %v", err)
	} else {
		if _, ok := source.Ability[source.Writable](r); ok {
			t.Error("a disk that was opened for reading is Writable")
		}
		r.Close()
	}
	d.Close()
	openWritable(t, path).Close()
	if _, err := raw.OpenWritable(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := raw.OpenWritable(t.Context(), t.TempDir()); err == nil {
		t.Error("a folder was opened")
	}
}

func TestWritableEndOfContext(t *testing.T) {
	path := write(t, random(4096))
	why := errors.New("stopped")
	ctx, stop := context.WithCancelCause(t.Context())
	d, err := raw.OpenWritable(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	stop(why)
	_, err = d.WriteAt([]byte{1}, 0)
	for what, err := range map[string]error{
		"write": err, "zero": d.ZeroAt(t.Context(), 0, 1, source.MayTrim), "trim": d.Trim(t.Context(), 0, 1), "flush": d.Flush(t.Context()),
	} {
		if !errors.Is(err, why) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A lack of space is an error, and later writes succeed when there is space.
func TestWritableFull(t *testing.T) {
	peer.NeedRoot(t)
	dir := t.TempDir()
	peer.Run(t, "mount", "-t", "tmpfs", "-o", "size=1m", "none", dir)
	t.Cleanup(func() { peer.Run(t, "umount", dir) })
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 4<<20); err != nil {
		t.Fatal(err)
	}
	d := openWritable(t, path)
	if _, err := d.WriteAt(random(2<<20), 0); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("write to a full file system: %v", err)
	}
	if err := d.ZeroAt(t.Context(), 0, 4<<20, source.MayTrim|source.FastOnly); err != nil {
		t.Fatal(err)
	}
	// tmpfs does not support ZERO_RANGE, so that zeros are written unless they may be
	// trimmed.
	if err := d.ZeroAt(t.Context(), 0, 1<<20, source.FastOnly); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("zeros that would have to be written: %v", err)
	}
	if err := d.ZeroAt(t.Context(), 0, 512<<10, 0); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt(random(4096), 3<<20); err != nil {
		t.Errorf("there is room again: %v", err)
	}
}
