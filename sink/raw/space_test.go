package raw

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"vddkcp/internal/peer"
)

// Space that was freed a moment ago counts as free, also on btrfs, which says so
// only after its next commit.
func TestSpaceThatWasJustFreed(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "mkfs.btrfs", "mount")
	image, folder := filepath.Join(t.TempDir(), "image"), t.TempDir()
	peer.Run(t, "truncate", "-s", "256M", image)
	peer.Run(t, "mkfs.btrfs", "-q", image)
	peer.Run(t, "mount", "-o", "loop", image, folder)
	t.Cleanup(func() { unix.Unmount(folder, unix.MNT_DETACH) })
	fill := filepath.Join(folder, "fill")
	f, err := os.Create(fill)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	for {
		if _, err := f.Write(block); err != nil {
			break
		}
	}
	f.Sync()
	f.Close()
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	if err := CheckFile(filepath.Join(folder, "disk"), 100<<20, Options{Need: 100 << 20}); err != nil {
		t.Error(err)
	}
}
