package raw

import (
	"os"
	"path/filepath"
	"testing"
)

// Space that was freed a moment ago counts as free, also on btrfs, which says so
// only after its next commit.
func TestSpaceThatWasJustFreed(t *testing.T) {
	folder := sharing(t, "btrfs")
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
