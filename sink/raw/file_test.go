package raw

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
)

const diskSize = 1<<20 + 777

// content is a disk of diskSize bytes with zeros in the middle.
func content() []byte {
	b := bytes.Repeat([]byte("vddkcp "), diskSize/7+1)[:diskSize]
	clear(b[256<<10 : 512<<10])
	return b
}

// fillDisk writes content.
func fillDisk(d sink.Disk) error {
	b := content()
	_, err := d.WriteAt(b[:256<<10], 0)
	if err == nil {
		err = d.ZeroAt(context.Background(), 256<<10, 256<<10)
	}
	if err == nil {
		_, err = d.WriteAt(b[512<<10:], 512<<10)
	}
	return err
}

// copyTo makes a whole disk, and returns the error of the step that failed.
func copyTo(t *testing.T, path string, o Options, sys system) error {
	t.Helper()
	d, err := createFile(t.Context(), path, diskSize, o, sys)
	if err != nil {
		return err
	}
	defer func() {
		if err := d.Abort(); err != nil {
			t.Errorf("Abort: %v", err)
		}
	}()
	if err = fillDisk(d); err == nil {
		err = d.Finish(t.Context())
	}
	if err == nil {
		err = d.Publish(t.Context())
	}
	return err
}

// inFolder fails unless dir holds just these names.
func inFolder(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%s holds %q, want %q", dir, got, want)
	}
}

func hasContent(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes that are not the %d it should have", path, len(got), len(want))
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
		t.Fatal(err)
	}
}

func TestForceKeepsModeAndOwner(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	put(t, path, "old")
	if err := os.Chmod(path, 0o640|fs.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(path, 4242, 4343); err != nil {
			t.Fatal(err)
		}
	}
	var before, during, after unix.Stat_t
	unix.Stat(path, &before)
	d, err := CreateFile(t.Context(), path, diskSize, Options{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	unix.Stat(path+".partial", &during)
	if err := errors.Join(fillDisk(d), d.Finish(t.Context())); err != nil {
		t.Fatal(err)
	}
	hasContent(t, path, []byte("old"))
	if err := d.Publish(t.Context()); err != nil {
		t.Fatal(err)
	}
	hasContent(t, path, content())
	unix.Stat(path, &after)
	for _, s := range []unix.Stat_t{during, after} {
		if s.Mode != before.Mode || s.Uid != before.Uid || s.Gid != before.Gid {
			t.Errorf("mode %o, owner %d:%d; want %o, %d:%d", s.Mode, s.Uid, s.Gid, before.Mode, before.Uid, before.Gid)
		}
	}
}

func TestNewFileObeysUmask(t *testing.T) {
	if path := os.Getenv("VDDKCP_TEST_UMASK"); path != "" {
		unix.Umask(0o027)
		if err := copyTo(t, path, Options{}, kernel()); err != nil {
			t.Fatal(err)
		}
		return
	}
	path := filepath.Join(t.TempDir(), "disk.raw")
	again := exec.Command(os.Args[0], "-test.run=^TestNewFileObeysUmask$")
	again.Env = append(os.Environ(), "VDDKCP_TEST_UMASK="+path)
	if out, err := again.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v; want mode 0640", info.Mode(), err)
	}
}

// TestFileRefused checks that CheckFile and CreateFile refuse the same targets and
// change nothing.
func TestFileRefused(t *testing.T) {
	const name = "disk.raw"
	isSource := func(path string) func(os.FileInfo) (string, bool) {
		return func(info os.FileInfo) (string, bool) {
			source, err := os.Stat(path)
			return path, err == nil && os.SameFile(source, info)
		}
	}
	at := func(dir string) string { return filepath.Join(dir, name) }
	for _, c := range []struct {
		name  string
		setup func(t *testing.T, dir string, o *Options) (path string)
		want  error
		text  string
	}{
		{"exists", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir), "old")
			return at(dir)
		}, fs.ErrExist, "--force"},
		{"exists behind a link", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir), "old")
			os.Symlink(name, filepath.Join(dir, "link"))
			return filepath.Join(dir, "link")
		}, fs.ErrExist, name},
		{"partial exists", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir)+".partial", "old")
			return at(dir)
		}, fs.ErrExist, "disk.raw.partial: file already exists: it is from a copy"},
		{"partial is no file", func(t *testing.T, dir string, o *Options) string {
			os.Symlink("/etc/passwd", at(dir)+".partial")
			o.Force = true
			return at(dir)
		}, nil, "not a regular file"},
		{"folder", func(t *testing.T, dir string, o *Options) string {
			os.Mkdir(at(dir), 0o777)
			o.Force = true
			return at(dir)
		}, nil, "is a folder"},
		{"name of a folder", func(t *testing.T, dir string, o *Options) string { return at(dir) + "/" }, nil, "names a folder"},
		{"FIFO", func(t *testing.T, dir string, o *Options) string {
			unix.Mkfifo(at(dir), 0o666)
			o.Force = true
			return at(dir)
		}, nil, "not a regular file"},
		{"no such folder", func(t *testing.T, dir string, o *Options) string { return filepath.Join(dir, "none", name) }, fs.ErrNotExist, "the folder of"},
		{"file as a folder", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir), "old")
			return filepath.Join(at(dir), name)
		}, unix.ENOTDIR, "the folder of"},
		{"links in a circle", func(t *testing.T, dir string, o *Options) string {
			os.Symlink("b", filepath.Join(dir, "a"))
			os.Symlink("a", filepath.Join(dir, "b"))
			return filepath.Join(dir, "a")
		}, unix.ELOOP, "a: too many levels of symbolic links"},
		{"source", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir), "old")
			o.Force, o.Source = true, isSource(at(dir))
			return at(dir)
		}, nil, "is the source"},
		{"source by a hard link", func(t *testing.T, dir string, o *Options) string {
			put(t, filepath.Join(dir, "source"), "old")
			os.Link(filepath.Join(dir, "source"), at(dir))
			o.Force, o.Source = true, isSource(filepath.Join(dir, "source"))
			return at(dir)
		}, nil, "a file of the source (the same as"},
		{"source as partial", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir)+".partial", "old")
			o.Force, o.Source = true, isSource(at(dir)+".partial")
			return at(dir)
		}, nil, "disk.raw.partial is the source"},
		{"being written", func(t *testing.T, dir string, o *Options) string {
			d, err := CreateFile(t.Context(), at(dir), 10, Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { d.Abort() })
			o.Force = true
			return at(dir)
		}, nil, "being written by another process"},
		{"too little space", func(t *testing.T, dir string, o *Options) string {
			o.Need = 1 << 60
			return at(dir)
		}, unix.ENOSPC, "needs 1.0 EiB (1152921504606846976 bytes)"},
		{"preallocation", func(t *testing.T, dir string, o *Options) string {
			o.Preallocation = "metadata"
			return at(dir)
		}, nil, `"metadata"`},
		{"nothing to resume", func(t *testing.T, dir string, o *Options) string {
			o.State = state(diskSize)
			return at(dir)
		}, fs.ErrNotExist, "resume"},
		{"too short to resume", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir)+".partial", "old")
			o.State, o.Resume = state(diskSize), 4
			return at(dir)
		}, nil, "has 3 bytes, but the copy had written 4 bytes"},
		{"resume of another size", func(t *testing.T, dir string, o *Options) string {
			put(t, at(dir)+".partial", "old")
			o.State, o.Resume = state(diskSize+1), 1
			return at(dir)
		}, nil, "want \"raw 1049353\" (format of the target"},
		{"resume without a state", func(t *testing.T, dir string, o *Options) string {
			o.Resume = 1
			return at(dir)
		}, nil, "the state of the checkpoint is missing"},
		{"resume what is being written", func(t *testing.T, dir string, o *Options) string {
			d, err := CreateFile(t.Context(), at(dir), diskSize, Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { d.Abort() })
			o.State, o.Resume = state(diskSize), 1
			return at(dir)
		}, nil, "being written by another process"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			var o Options
			path := c.setup(t, dir, &o)
			before := tree(t, dir)
			d, createErr := CreateFile(t.Context(), path, diskSize, o)
			if createErr == nil {
				d.Abort()
			}
			for call, err := range map[string]error{"CheckFile": CheckFile(path, diskSize, o), "CreateFile": createErr} {
				if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("%s: %v; want %v with %q", call, err, c.want, c.text)
				}
			}
			if after := tree(t, dir); after != before {
				t.Errorf("the folder was\n%sand is\n%s", before, after)
			}
		})
	}
}

// tree lists what is in dir, with inodes and sizes.
func tree(t *testing.T, dir string) string {
	return peer.Run(t, "ls", "-Alin", "--time-style=full-iso", dir)
}

func TestFileThroughLinks(t *testing.T) {
	dir := t.TempDir()
	os.MkdirAll(filepath.Join(dir, "real/sub"), 0o777)
	os.MkdirAll(filepath.Join(dir, "entry"), 0o777)
	os.Symlink("../real/sub", filepath.Join(dir, "entry/sub"))
	// Through entry/sub, ".." is real and not entry.
	os.Symlink("sub/../target", filepath.Join(dir, "entry/link"))
	path := filepath.Join(dir, "entry/link")
	d, err := CreateFile(t.Context(), path, diskSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	inFolder(t, filepath.Join(dir, "real"), "sub", "target.partial")
	if err := errors.Join(fillDisk(d), d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
		t.Fatal(err)
	}
	hasContent(t, filepath.Join(dir, "real/target"), content())
	inFolder(t, filepath.Join(dir, "entry"), "link", "sub")
	if err := copyTo(t, path, Options{Force: true}, kernel()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != fs.ModeSymlink {
		t.Errorf("the link became %v, %v", info, err)
	}
}

func TestForceDropsPartial(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	put(t, path+".partial", "old")
	if err := copyTo(t, path, Options{Force: true}, kernel()); err != nil {
		t.Fatal(err)
	}
	hasContent(t, path, content())
	inFolder(t, dir, "disk.raw")
}

// TestPartialReplaced checks that a file which another process put in place of the
// .partial file is neither published nor removed.
func TestPartialReplaced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	d, err := CreateFile(t.Context(), path, diskSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fillDisk(d), d.Finish(t.Context())); err != nil {
		t.Fatal(err)
	}
	os.Remove(path + ".partial")
	put(t, path+".partial", "not ours")
	if err := d.Publish(t.Context()); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("Publish: %v", err)
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
	hasContent(t, path+".partial", []byte("not ours"))
	inFolder(t, dir, "disk.raw.partial")
}

func TestPartialResized(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	d, err := CreateFile(t.Context(), path, diskSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if err := fillDisk(d); err != nil {
		t.Fatal(err)
	}
	os.Truncate(path+".partial", diskSize-1)
	if err := d.Finish(t.Context()); err == nil || !strings.Contains(err.Error(), "has 1049352 bytes instead of 1049353") {
		t.Errorf("Finish: %v", err)
	}
}

func TestFolderVanishes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	os.Mkdir(dir, 0o777)
	d, err := CreateFile(t.Context(), filepath.Join(dir, "disk.raw"), diskSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(dir)
	if err := errors.Join(fillDisk(d), d.Finish(t.Context())); err != nil {
		t.Fatal(err)
	}
	if err := d.Publish(t.Context()); err == nil {
		t.Error("Publish: no error")
	}
	if err := d.Abort(); err != nil {
		t.Error(err)
	}
}

// Abort leaves a .partial that an earlier run made.
// A file that is not where its name says is no success: its place is told, and it
// stays there.
func TestFolderMoves(t *testing.T) {
	for name, c := range map[string]struct {
		move func(t *testing.T, sub string)
		want func(sub string) string
	}{
		"renamed": {func(t *testing.T, sub string) {
			if err := os.Rename(sub, sub+"2"); err != nil {
				t.Fatal(err)
			}
		}, func(sub string) string {
			return "no such file or directory), and the target file d.raw now lies at " + sub + "2/d.raw"
		}},
		"replaced": {func(t *testing.T, sub string) {
			if err := errors.Join(os.Rename(sub, sub+"2"), os.Mkdir(sub, 0o700)); err != nil {
				t.Fatal(err)
			}
		}, func(sub string) string {
			return "another folder has this path now), and the target file d.raw now lies at " + sub + "2/d.raw"
		}},
		"parent renamed": {func(t *testing.T, sub string) {
			if err := os.Rename(filepath.Dir(sub), filepath.Dir(sub)+"2"); err != nil {
				t.Fatal(err)
			}
		}, func(sub string) string { return "now lies at " + filepath.Dir(sub) + "2/sub/d.raw" }},
		"mounted over": {func(t *testing.T, sub string) {
			peer.NeedRoot(t)
			peer.Run(t, "mount", "-t", "tmpfs", "none", sub)
			t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
		}, func(sub string) string {
			return "now lies under the file system that was mounted at " + sub + ", which hides it"
		}},
	} {
		for _, force := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				root, err := filepath.EvalSymlinks(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				sub := filepath.Join(root, "p", "sub")
				if err := os.MkdirAll(sub, 0o700); err != nil {
					t.Fatal(err)
				}
				held, err := os.OpenRoot(sub)
				if err != nil {
					t.Fatal(err)
				}
				defer held.Close()
				d, err := CreateFile(t.Context(), filepath.Join(sub, "d.raw"), diskSize, Options{Force: force})
				if err != nil {
					t.Fatal(err)
				}
				if err := fillDisk(d); err != nil {
					t.Fatal(err)
				}
				c.move(t, sub)
				if err := d.Finish(t.Context()); err != nil {
					t.Fatal(err)
				}
				back, err := d.(sink.Verifiable).Reopen(t.Context())
				if err != nil {
					t.Fatalf("read back: %v", err)
				}
				back.Close()
				if err := d.Publish(t.Context()); !errors.Is(err, sink.ErrElsewhere) || !strings.Contains(err.Error(), c.want(sub)) {
					t.Errorf("%v, want %q", err, c.want(sub))
				}
				if err := d.Abort(); err != nil {
					t.Errorf("Abort: %v", err)
				}
				if got, err := held.ReadFile("d.raw"); err != nil || !bytes.Equal(got, content()) {
					t.Errorf("the disk is not whole: %v", err)
				}
				if _, err := held.Stat("d.raw.partial"); err == nil {
					t.Error("the .partial is left")
				}
			})
		}
	}
}

func TestResumeOfHardLink(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := errors.Join(os.WriteFile(victim, make([]byte, 4096), 0o600), os.Link(victim, filepath.Join(dir, "d.raw.partial"))); err != nil {
		t.Fatal(err)
	}
	_, err := CreateFile(t.Context(), filepath.Join(dir, "d.raw"), diskSize, Options{Options: sink.Options{State: state(diskSize), Resume: 1024}})
	if err == nil || !strings.Contains(err.Error(), "d.raw.partial has 2 names (hard links)") {
		t.Errorf("%v", err)
	}
	if info, _ := os.Stat(victim); info.Size() != 4096 {
		t.Errorf("the victim has %d bytes", info.Size())
	}
}

func TestAbortAfterResume(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	d, err := CreateFile(t.Context(), path, diskSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fillDisk(d), d.Suspend()); err != nil {
		t.Fatal(err)
	}
	d, err = CreateFile(t.Context(), path, diskSize, Options{Options: sink.Options{State: state(diskSize), Resume: 4096}})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, diskSize)
	copy(want[:4096], content())
	hasContent(t, path+".partial", want)
	inFolder(t, dir, "disk.raw.partial")
}

// TestLinkChanged has symbolic links to DST or to its folder that lead to another
// place when the disk is published.
func TestLinkChanged(t *testing.T) {
	for name, c := range map[string]struct{ link, first, second string }{
		"of the file":   {"cur.raw", "v1/d.raw", "v2/d.raw"},
		"of the folder": {"cur", "v1", "v2"},
		"removed":       {"cur", "v1", ""},
	} {
		t.Run(name, func(t *testing.T) {
			root, err := filepath.EvalSymlinks(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			link := filepath.Join(root, c.link)
			if err := errors.Join(os.Mkdir(root+"/v1", 0o700), os.Mkdir(root+"/v2", 0o700), os.Symlink(c.first, link)); err != nil {
				t.Fatal(err)
			}
			path := link
			if c.first == "v1" {
				path = link + "/d.raw"
			}
			d, err := CreateFile(t.Context(), path, diskSize, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Abort()
			if err := errors.Join(fillDisk(d), os.Remove(link), d.Finish(t.Context())); err != nil {
				t.Fatal(err)
			}
			if c.second != "" {
				if err := os.Symlink(c.second, link); err != nil {
					t.Fatal(err)
				}
			}
			err = d.Publish(t.Context())
			if want := "the copied file is now at " + root + "/v1/d.raw"; !errors.Is(err, sink.ErrElsewhere) || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
			if got, err := os.ReadFile(root + "/v1/d.raw"); err != nil || !bytes.Equal(got, content()) {
				t.Errorf("the disk is not whole: %v", err)
			}
		})
	}
}
