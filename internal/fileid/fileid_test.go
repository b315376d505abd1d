package fileid

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	write(t, a, "1")
	f, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := Of(int(f.Fd()))
	if err != nil || id == "" || id != MarkOf(a) {
		t.Fatalf("identity %q, by path %q, %v", id, MarkOf(a), err)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, a, 0, unix.STATX_BTIME, &st); err != nil || st.Mask&unix.STATX_BTIME == 0 {
		t.Skipf("this file system has no times of birth: %v", err)
	}
	write(t, a, "12")
	if err := os.Rename(a, b); err != nil {
		t.Fatal(err)
	}
	if got := MarkOf(b); got != id {
		t.Errorf("after a write and a rename: %q, want %q", got, id)
	}
	// A later file, which often gets the same inode number, must have another identity.
	for range 20 {
		if err := os.Remove(b); err != nil {
			t.Fatal(err)
		}
		write(t, b, "12")
		if got := MarkOf(b); got == id {
			t.Fatalf("another file has the identity %q, too", got)
		}
	}
	if MarkOf(a) != "" || MarkOf(dir) != "" {
		t.Error("what is no regular file has an identity")
	}
}

// TestIdentityWithoutBirth tests that a change of a file without a birth time changes
// its mark.
func TestIdentityWithoutBirth(t *testing.T) {
	st := unix.Statx_t{Ino: 7, Size: 100, Mtime: unix.StatxTimestamp{Sec: 5}}
	id, before := identity(&st), mark(&st)
	st.Mtime.Nsec = 1
	if mark(&st) == before {
		t.Errorf("%q is also the mark after a change", before)
	}
	if identity(&st) != id {
		t.Errorf("the identity %q changed to %q by a write", id, identity(&st))
	}
}
