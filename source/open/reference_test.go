package open

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/source/raw"
)

func TestWhereIs(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	path, link := filepath.Join(dir, "disk"), filepath.Join(dir, "link")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("disk", link); err != nil {
		t.Fatal(err)
	}
	f, err := raw.Open(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if real, fi, err := whereIs(f, link); real != path || err != nil || fi.Size() != 7 {
		t.Errorf("%q, %v", real, err)
	}
	moved := filepath.Join(dir, "moved")
	if err := os.Rename(path, moved); err != nil {
		t.Fatal(err)
	}
	if real, _, err := whereIs(f, link); real != moved || err != nil {
		t.Errorf("after a move: %q, %v", real, err)
	}
	if err := os.Remove(moved); err != nil {
		t.Fatal(err)
	}
	if real, _, err := whereIs(f, link); err == nil {
		t.Errorf("a file that was removed is at %q", real)
	}
	// Another file may have the name with the suffix " (deleted)" that the kernel
	// returns for a removed file.
	if err := os.WriteFile(moved+" (deleted)", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if real, _, err := whereIs(f, link); err == nil {
		t.Errorf("a file that was removed is at %q", real)
	}
}
