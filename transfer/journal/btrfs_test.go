package journal_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// TestFullFileSystem checks that a checkpoint fits into the journal on a file system
// that is full, with and without copy on write.
func TestFullFileSystem(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "mke2fs", "mkfs.btrfs", "mount")
	for _, mkfs := range [][]string{{"mke2fs", "-q", "-t", "ext4"}, {"mkfs.btrfs", "-q"}, {"mkfs.btrfs", "-q", "--mixed"}} {
		t.Run(mkfs[0]+" "+mkfs[len(mkfs)-1], func(t *testing.T) {
			image, folder := filepath.Join(t.TempDir(), "image"), t.TempDir()
			peer.Run(t, "truncate", "-s", "128M", image)
			peer.Run(t, mkfs[0], append(mkfs[1:], image)...)
			peer.Run(t, "mount", "-o", "loop", image, folder)
			t.Cleanup(func() { unix.Unmount(folder, unix.MNT_DETACH) })
			path := filepath.Join(folder, "d.partial.journal")
			j, _ := open(t, path)
			fill(t, filepath.Join(folder, "d.partial"))
			for off := int64(1); off < 8; off++ {
				if err := j.Write(entry(off)); err != nil {
					t.Fatalf("checkpoint %d: %v", off, err)
				}
			}
			if err := j.Close(); err != nil {
				t.Fatal(err)
			}
			if _, entries := open(t, path); !equal(offsets(entries), 7, 6) {
				t.Errorf("the journal holds %v, want 7 and 6", offsets(entries))
			}
		})
	}
}

// fill writes a file until the file system has no space left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size >= 4096; size /= 2 {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(i * size)
		}
		for err = nil; err == nil; {
			if _, err = f.Write(b); err == nil && size < 1<<20 {
				err = f.Sync()
			}
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		f.Sync() // it may find out that it has no space either
	}
}
