package raw

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/sink"
)

// held writes a whole disk that keeps its .partial name, and returns its identity.
func held(t *testing.T, path string, o Options, sys system) (mark string) {
	t.Helper()
	d, err := createFile(t.Context(), path, diskSize, o, sys)
	if err == nil {
		err = fillDisk(d)
	}
	if err == nil {
		err = d.Finish(t.Context())
	}
	if err == nil {
		err = d.Suspend()
	}
	if err != nil {
		t.Fatal(err)
	}
	return fileid.MarkOf(path + ".partial")
}

// TestPublishHeld checks what PublishHeld does with what it finds in the folder.
func TestPublishHeld(t *testing.T) {
	noReplace := func(s *system) { // of a file system whose rename has no flags
		s.rename = func(int, string, string, uint) error { return unix.EINVAL }
	}
	for _, c := range []struct {
		name    string
		change  func(t *testing.T, path string)
		force   bool
		fault   func(*system)
		want    error  // nil and no message: success
		message string // part of the error
		left    []string
	}{
		{"held", nil, false, nil, nil, "", []string{"disk.raw"}},
		{"published already", func(t *testing.T, path string) { rename(t, path+".partial", path) }, false, nil, nil, "", []string{"disk.raw"}},
		{"both names", func(t *testing.T, path string) { link(t, path+".partial", path) }, false, nil, nil, "", []string{"disk.raw"}},
		{"both names, no flags of rename", func(t *testing.T, path string) { link(t, path+".partial", path) }, false, noReplace, nil, "", []string{"disk.raw"}},
		{"no flags of rename", nil, false, noReplace, nil, "", []string{"disk.raw"}},
		{"published, and a new copy has begun", func(t *testing.T, path string) {
			rename(t, path+".partial", path)
			put(t, path+".partial", "new")
		}, false, nil, nil, "", []string{"disk.raw", "disk.raw.partial"}},
		{"another file is there", func(t *testing.T, path string) { put(t, path, "old") }, false, nil, fs.ErrExist, "--force", []string{"disk.raw", "disk.raw.partial"}},
		{"another file is replaced", func(t *testing.T, path string) { put(t, path, "old") }, true, nil, nil, "", []string{"disk.raw"}},
		{"gone", func(t *testing.T, path string) { remove(t, path+".partial") }, false, nil, fs.ErrNotExist, "disk.raw", nil},
		{"another .partial file", func(t *testing.T, path string) {
			rename(t, path+".partial", path+".kept")
			put(t, path+".partial", "new")
		}, true, nil, nil, "is not the file that the copy wrote", []string{"disk.raw.kept", "disk.raw.partial"}},
		{"a link", func(t *testing.T, path string) {
			rename(t, path+".partial", path+".kept")
			if err := os.Symlink(path+".kept", path+".partial"); err != nil {
				t.Fatal(err)
			}
		}, false, nil, unix.ELOOP, "disk.raw", []string{"disk.raw.kept", "disk.raw.partial"}},
		{"the name is not durable", nil, false, func(s *system) {
			s.fsyncDir = func(int) error { return unix.EIO }
		}, unix.EIO, "fsync", []string{"disk.raw.partial"}},
		{"the name is not durable again", func(t *testing.T, path string) { rename(t, path+".partial", path) }, false, func(s *system) {
			s.fsyncDir = func(int) error { return unix.EIO }
		}, sink.ErrUnsynced, "fsync", []string{"disk.raw"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk.raw")
			mark := held(t, path, Options{}, kernel())
			if c.change != nil {
				c.change(t, path)
			}
			sys := kernel()
			if c.fault != nil {
				c.fault(&sys)
			}
			err := publishHeld(t.Context(), path, mark, c.force, sys)
			if c.want == nil && c.message == "" {
				if err != nil || fileid.MarkOf(path) != mark {
					t.Errorf("error %v, the file is %q, want %q", err, fileid.MarkOf(path), mark)
				}
			} else if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.message) {
				t.Errorf("error %v, want %v with %q", err, c.want, c.message)
			}
			inFolder(t, dir, c.left...)
		})
	}
}

// TestPublishHeldRefuses checks calls that are refused whatever the folder holds.
func TestPublishHeldRefuses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	mark := held(t, path, Options{}, kernel())
	ended, end := context.WithCancel(t.Context())
	end()
	if err := PublishHeld(ended, path, mark, false); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := PublishHeld(t.Context(), path, "", true); err == nil {
		t.Error("a file without identity was published")
	}
	f, err := os.Open(path + ".partial")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := lock(f); err != nil {
		t.Fatal(err)
	}
	if err := PublishHeld(t.Context(), path, mark, false); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a file that is being written: %v", err)
	}
	inFolder(t, dir, "disk.raw.partial")
}

// TestSuspendKeepsTheName checks that Suspend makes the name of the .partial file durable, and
// says so if it cannot.
func TestSuspendKeepsTheName(t *testing.T) {
	sys := kernel()
	synced := 0
	sys.fsyncDir = func(int) error { synced++; return nil }
	held(t, filepath.Join(t.TempDir(), "disk.raw"), Options{}, sys)
	if synced != 1 {
		t.Errorf("the folder was synced %d times", synced)
	}
	sys.fsyncDir = func(int) error { return unix.EIO }
	d, err := createFile(t.Context(), filepath.Join(t.TempDir(), "disk.raw"), diskSize, Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Suspend(); !errors.Is(err, unix.EIO) {
		t.Error(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Link(from, to); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// TestLockOfChild checks that a file which is closed is not locked any more, although a child
// process still has the file open. A child process has all files open until it executes its program.
func TestLockOfChild(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	d, err := createFile(t.Context(), path, diskSize, Options{}, kernel())
	if err != nil {
		t.Fatal(err)
	}
	child, err := unix.Dup(int(d.(*file).w.f.Fd())) // the same open file, as after a fork
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(child)
	if err := fillDisk(d); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.Finish(t.Context()), d.Suspend()); err != nil {
		t.Fatal(err)
	}
	if err := publishHeld(t.Context(), path, fileid.MarkOf(path+".partial"), false, kernel()); err != nil {
		t.Error(err)
	}
}
