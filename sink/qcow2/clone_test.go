package qcow2

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/transfer"
)

// Clusters that lie in a file of the same file system are shared, not copied.
func TestShared(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "mkfs.xfs", "qemu-img")
	device, dir := filepath.Join(t.TempDir(), "device"), t.TempDir()
	peer.Run(t, "truncate", "-s", "400M", device)
	peer.Run(t, "mkfs.xfs", "-q", device)
	peer.Run(t, "mount", "-o", "loop", device, dir)
	t.Cleanup(func() { peer.Run(t, "umount", dir) })
	free := func() int64 {
		unix.Sync()
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil {
			t.Fatal(err)
		}
		return int64(s.Bfree) * s.Bsize
	}

	const mib = 1 << 20
	made := rawFile(t, 100*mib+512, map[int64][]byte{0: fragments(50, 30*mib), 99 * mib: fragments(51, mib+512)})
	from := filepath.Join(dir, "disk.raw")
	peer.Run(t, "cp", "--sparse=always", made, from)
	before := free()
	src := openRaw(t, from)
	plan, err := transfer.NewPlan(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "disk.qcow2")
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for want, o := range map[int64]Options{
		64 << 10: {}, 4 << 10: {ClusterSize: 4 << 10}, 0: {Compression: Zlib},
	} {
		if got := CloneUnit(path, f, o); got != want {
			t.Errorf("CloneUnit with %+v: %d, want %d", o, got, want)
		}
	}
	if got := CloneUnit(path, f, Options{ClusterSize: 512}); got != 0 {
		t.Errorf("CloneUnit with clusters of 512 bytes: %d", got)
	}
	d, err := Create(t.Context(), path, src.Size(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := transfer.Copy(t.Context(), src, d, plan, transfer.Options{Reflink: transfer.ReflinkAuto}); err != nil {
		t.Fatal(err)
	}
	verify(t, from, path)
	if took := before - free(); took > 3*mib {
		t.Errorf("the image took %d bytes", took)
	}
}

// TestNotShared checks that a failed attempt to share blocks changes nothing, and
// that the image can still be written.
func TestNotShared(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	content := fragments(52, 1<<20)
	from := rawFile(t, 1<<20, map[int64][]byte{0: content})
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d, err := Create(t.Context(), path, 1<<20, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	c, ok := sink.Ability[sink.Cloner](d)
	if !ok {
		t.Fatal("no Cloner")
	}
	if c.CloneUnit(f) != 0 {
		t.Skip("the folder for temporary files can share blocks")
	}
	if err := c.CloneFrom(f, 0, 0, 64<<10); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("CloneFrom: %v", err)
	}
	if _, err := d.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
		t.Fatal(err)
	}
	verify(t, from, path)
}

// A disk of 64 TiB takes no more memory than the tables of where it stands.
func TestMemory(t *testing.T) {
	const tib = 1 << 40
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	data := fragments(53, 1<<20)
	allocated := testing.Benchmark(func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			d, err := Create(b.Context(), path, 64*tib, Options{})
			if err != nil {
				b.Fatal(err)
			}
			for off := int64(0); off < 64*tib; off += tib / 16 {
				if _, err := d.WriteAt(data, off); err != nil {
					b.Fatal(err)
				}
				if _, _, err := d.Checkpoint(off + 1<<20); err != nil {
					b.Fatal(err)
				}
			}
			if err := d.Finish(b.Context()); err != nil {
				b.Fatal(err)
			}
			d.Abort()
		}
	}).AllocedBytesPerOp()
	if allocated > 4<<20 {
		t.Errorf("%d bytes were allocated, want at most 4 MiB", allocated)
	}
}
