package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// counted is an image's file whose n-th write fails, and of which each write
// shows whether it is an image already.
type counted struct {
	raw.Image
	path         string
	writes, fail int
	synced       int // writes before the last sync
	failSync     bool
	offsets      []int64
	heads        [][]byte // the first bytes of the file before each write
}

var errBroken = errors.New("the disk is broken")

func (c *counted) WriteAt(p []byte, off int64) (int, error) {
	head := make([]byte, 4)
	c.Image.ReadAt(head, 0)
	c.heads = append(c.heads, head)
	c.offsets = append(c.offsets, off)
	if c.writes++; c.writes == c.fail {
		return 0, fmt.Errorf("write %s.partial at %d: %w", c.path, off, errBroken)
	}
	return c.Image.WriteAt(p, off)
}

func (c *counted) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	state, real, err := c.Image.Checkpoint(off)
	sync := func(ctx context.Context) error {
		c.synced = c.writes
		return real(ctx)
	}
	if c.failSync {
		sync = func(context.Context) error { return fmt.Errorf("fsync %s.partial: %w", c.path, errBroken) }
	}
	return state, sync, err
}

// copyAll makes an image of content through c, with checkpoints.
func copyAll(t *testing.T, path string, content []byte, o Options, c *counted) error {
	t.Helper()
	o, l, err := o.normal(int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	d, err := create(t.Context(), path, l, o, func(o raw.Options) (_ raw.Image, err error) {
		c.path = path
		c.Image, err = raw.CreateImage(t.Context(), path, o)
		return c, err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err := d.Abort(); err != nil {
			t.Errorf("Abort: %v", err)
		}
	}()
	for off, i := int64(0), 0; off < int64(len(content)); i++ {
		end := min(off+64<<10, int64(len(content)))
		if _, err := d.WriteAt(content[off:end], off); err != nil {
			return err
		}
		off = end
		if i%16 == 5 {
			_, sync, err := d.Checkpoint(off)
			if err == nil {
				err = sync(t.Context())
			}
			if err != nil {
				return err
			}
		}
	}
	if err := d.Finish(t.Context()); err != nil {
		return err
	}
	return d.Publish(t.Context())
}

// Each write that fails, of data, an L2 table, a refcount block, the L1 table,
// the refcount table or the header, ends the copy with an error that names the
// target, and leaves nothing behind. Until the last write the file is no image.
func TestEachWriteFails(t *testing.T) {
	content := fragments(40, 3<<20)
	for _, o := range []Options{{ClusterSize: 512}, {ClusterSize: 4096}, {ClusterSize: 4096, Compression: Zlib}} {
		whole := new(counted)
		dir := t.TempDir()
		path := filepath.Join(dir, "disk.qcow2")
		if err := copyAll(t, path, content, o, whole); err != nil {
			t.Fatal(err)
		}
		for i, head := range whole.heads {
			if !bytes.Equal(head, make([]byte, 4)) {
				t.Errorf("before write %d of %d the file begins with %q", i+1, whole.writes, head)
			}
		}
		if last := whole.offsets[len(whole.offsets)-1]; last != 0 {
			t.Errorf("the last write was at %d, want the header", last)
		}
		if whole.synced != whole.writes-1 {
			t.Errorf("the last sync before the end came after %d of %d writes, want all but the header", whole.synced, whole.writes)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		step := 1 + whole.writes/20
		for n := 1; n <= whole.writes; n += step {
			fails(t, path, copyAll(t, path, content, o, &counted{fail: n}), fmt.Sprintf("write %d of %d", n, whole.writes))
		}
		for n := max(1, whole.writes-10); n <= whole.writes; n++ {
			fails(t, path, copyAll(t, path, content, o, &counted{fail: n}), fmt.Sprintf("write %d of %d", n, whole.writes))
		}
		fails(t, path, copyAll(t, path, content, o, &counted{failSync: true}), "sync")
	}
}

func fails(t *testing.T, path string, err error, what string) {
	t.Helper()
	if !errors.Is(err, errBroken) || !strings.Contains(err.Error(), path) {
		t.Errorf("%s: %v, want %v and the path", what, err, errBroken)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) > 0 {
		t.Errorf("%s: left behind: %v, %v", what, entries, err)
	}
}

func TestTargetIsFull(t *testing.T) {
	peer.NeedRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	path := filepath.Join(dir, "disk.qcow2")
	for _, compression := range []Compression{None, Zlib} {
		err := copyAll(t, path, fragments(41, 8<<20), Options{Compression: compression}, new(counted))
		if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "free some space") {
			t.Errorf("%s: %v", compression, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("%s: left behind: %v, %v", compression, entries, err)
		}
	}
}

// TestHeaderOfDeviceGoesFirst checks that the first write to a device destroys the
// header of the image that it contained.
func TestHeaderOfDeviceGoesFirst(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := os.WriteFile(path+".partial", append([]byte("QFI\xfb"), make([]byte, 1<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	o, l, err := Options{}.normal(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	c := new(counted)
	d, err := create(t.Context(), path, l, o, func(o raw.Options) (_ raw.Image, err error) {
		o.State = []byte("raw -1")
		i, err := raw.CreateImage(t.Context(), path, o)
		c.Image = i
		if err == nil {
			_, err = i.WriteAt([]byte("QFI\xfb"), 0)
		}
		return dirty{c}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	head := make([]byte, 4)
	if _, err := c.ReadAt(head, 0); err != nil || string(head) != "\x00\x00\x00\x00" || c.writes == 0 || c.offsets[0] != 0 {
		t.Errorf("the file begins with %q after writes at %d, %v", head, c.offsets, err)
	}
}

// dirty is a file that does not read as zeros, as a device.
type dirty struct{ *counted }

func (dirty) ZeroedFrom(int64) bool { return false }

func TestRefused(t *testing.T) {
	const tib = 1 << 40
	for _, c := range []struct {
		size int64
		o    Options
		want string
	}{
		{8 * tib, Options{ClusterSize: 4 << 10}, ""},
		{8*tib + 512, Options{ClusterSize: 4 << 10}, "clusters of at least 8192 bytes"},
		{128 << 30, Options{ClusterSize: 512}, ""},
		{5 * tib, Options{ClusterSize: 512}, "clusters of at least 4096 bytes"},
		{64 * tib, Options{}, ""},
		{1<<62 + 1<<61, Options{}, "a qcow2 image holds at most"},
		{513, Options{}, "a multiple of 512"},
		{sink.UnknownSize, Options{}, "must be known"},
		{512, Options{ClusterSize: 256}, "from 512 to 2097152"},
		{512, Options{ClusterSize: 4 << 20}, "from 512 to 2097152"},
		{512, Options{ClusterSize: 65537}, "power of two"},
		{512, Options{Compression: "lz4"}, "want none, zlib or zstd"},
		{512, Options{Compression: Zlib, Level: 10}, "levels 1 to 9"},
		{512, Options{Compression: Zstd, Level: -1}, "levels 1 to 22"},
		{512, Options{Level: 1}, "without a compression"},
		{512, Options{BackingName: "base"}, "needs a backing disk and the name of the backing file"},
		{512, Options{BackingName: "base", BackingFormat: "vdi"}, "needs a backing disk and the name of the backing file"},
		{512, backed("base", "vdi"), "want raw, qcow2 or vmdk"},
		{512, backed("base", ""), "want raw, qcow2 or vmdk"},
		{512, backed("a:b", "raw"), "write ./ before"},
		{512, backed("./a:b", "raw"), ""},
		{512, backed(strings.Repeat("a", 1023), "raw"), ""},
		{512, backed(strings.Repeat("a", 1024), "raw"), "at most 1023"},
	} {
		_, _, err := c.o.normal(c.size)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%d, %+v: %v, want %q", c.size, c.o, err, c.want)
		}
	}
	small := backed(strings.Repeat("a", 500), "raw")
	small.ClusterSize = 512
	if _, _, err := small.normal(512); err == nil || !strings.Contains(err.Error(), "does not fit in one cluster of 512") {
		t.Errorf("a header that does not fit its cluster: %v", err)
	}
}

func backed(name, format string) Options {
	o := Options{BackingName: name, BackingFormat: format}
	o.Backing = memory{}
	return o
}
