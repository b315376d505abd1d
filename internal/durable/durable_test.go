package durable

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestReplace(t *testing.T) {
	for name, replace := range map[string]func(path string) error{
		"Replace":   func(path string) error { return Replace(path, []byte("new"), 0o640) },
		"ReplaceBy": func(path string) error { return ReplaceBy(path+".new", path, []byte("new"), 0o640) },
		"Write":     func(path string) error { return Write(path, []byte("new"), 0o640) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			victim, link, path := filepath.Join(dir, "victim"), filepath.Join(dir, "link"), filepath.Join(dir, "f")
			for _, f := range []string{victim, path} {
				if err := os.WriteFile(f, []byte("old"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, err := range []error{os.Symlink("victim", link), os.Symlink("victim", link+".new"), os.Link(victim, path+".new")} {
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, p := range []string{path, link, filepath.Join(dir, "fresh"), filepath.Join(dir, strings.Repeat("n", 251))} {
				if err := replace(p); err != nil {
					t.Fatal(err)
				}
				info, err := os.Lstat(p)
				if err != nil || info.Mode() != 0o640 || read(t, p) != "new" {
					t.Errorf("%s: %v, %v", p, info.Mode(), err)
				}
			}
			if got := read(t, victim); got != "old" {
				t.Errorf("the file that a link leads to became %q", got)
			}
			for _, n := range names(t, dir) {
				if strings.HasPrefix(n, ".") {
					t.Errorf("%s is left", n)
				}
			}
			if err := replace(filepath.Join(dir, "none", "f")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("no such folder: %v", err)
			}
		})
	}
}

func TestWriteInPlace(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(fifo, []byte("text"), 0o644); err == nil || !strings.Contains(err.Error(), "no process reads from the FIFO") {
		t.Errorf("a FIFO without a reader: %v", err)
	}
	r, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := Write(fifo, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(r); string(got) != "text" || err != nil {
		t.Errorf("the FIFO's reader got %q, %v", got, err)
	}
	if err := Write("/dev/full", []byte("text"), 0o644); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("/dev/full: %v", err)
	}
	if err := Write(dir, []byte("text"), 0o644); err == nil {
		t.Error("a folder was written")
	}
	// An open descriptor is written at its current offset, and its name in /dev is not
	// replaced.
	path := filepath.Join(dir, "open")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.WriteString("before ")
	for _, folder := range []string{"/dev/fd/", "/proc/self/fd/"} {
		if err := Write(folder+strconv.Itoa(int(f.Fd())), []byte("text "), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, path); got != "before text text " {
		t.Errorf("the open file has %q", got)
	}
}

func TestOpenRefusesForeignFiles(t *testing.T) {
	for name, c := range map[string]struct {
		plant func(victim, path string) error
		want  string
	}{
		"symbolic link":             {os.Symlink, "a symbolic link"},
		"dangling symbolic link":    {func(_, path string) error { return os.Symlink("nothing", path) }, "a symbolic link"},
		"hard link":                 {os.Link, "2 names"},
		"FIFO":                      {func(_, path string) error { return unix.Mkfifo(path, 0o600) }, "a FIFO"},
		"folder":                    {func(_, path string) error { return os.Mkdir(path, 0o700) }, "a folder"},
		"symbolic link to a device": {func(_, path string) error { return os.Symlink("/dev/null", path) }, "a symbolic link"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			victim, path := filepath.Join(dir, "victim"), filepath.Join(dir, "f")
			if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := c.plant(victim, path); err != nil {
				t.Fatal(err)
			}
			for _, flags := range []int{os.O_RDONLY, os.O_WRONLY | os.O_CREATE | os.O_TRUNC, os.O_RDWR | os.O_CREATE} {
				f, err := Open(path, flags, 0o600)
				if err == nil {
					f.Close()
				}
				if !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), c.want) && flags == os.O_RDONLY {
					t.Errorf("flags %#x: %v", flags, err)
				}
			}
			if got := read(t, victim); got != "precious" {
				t.Errorf("the victim became %q", got)
			}
			if _, err := os.Stat(filepath.Join(dir, "nothing")); err == nil {
				t.Error("a file was made through the link")
			}
		})
	}
	if _, err := ReadFile(t.TempDir()); err == nil {
		t.Error("a folder was read")
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFile(fifo); err == nil || !strings.Contains(err.Error(), "the file is a FIFO, want a regular file") {
		t.Errorf("ReadFile of a FIFO: %v", err)
	}
	path := filepath.Join(t.TempDir(), "own")
	for _, want := range []string{"", "text"} {
		f, err := Open(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(f); string(got) != want || err != nil {
			t.Errorf("%q, %v", got, err)
		}
		f.WriteAt([]byte("text"), 0)
		f.Close()
	}
	f, err := Open(path, os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if got := read(t, path); got != "" {
		t.Errorf("not truncated: %q", got)
	}
	if _, err := Open(path+".none", os.O_RDONLY, 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}
