package raw

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/sink"
)

// Each system call that fails ends the copy with an error that names the file,
// and nothing is left behind.
func TestFileFaults(t *testing.T) {
	for _, c := range []struct {
		name    string
		o       Options
		fault   func(*system)
		want    error
		message string
	}{
		{"write", Options{}, func(s *system) { failWrites(s, unix.EIO) }, unix.EIO, "disk.raw.partial at offset 0: input/output error"},
		{"no space", Options{}, func(s *system) { failWrites(s, unix.ENOSPC) }, unix.ENOSPC, "iB free): free some space"},
		{"quota", Options{}, func(s *system) { failWrites(s, unix.EDQUOT) }, unix.EDQUOT, "quota"},
		{"too big", Options{}, func(s *system) { failWrites(s, unix.EFBIG) }, unix.EFBIG, "ulimit -f"},
		{"write of nothing", Options{}, func(s *system) {
			s.pwriteUncache = func(int, []byte, int64) (int, error) { return 0, nil }
		}, nil, "short write"},
		{"write zeros", Options{Preallocation: PreallocateFull}, func(s *system) {
			real := s.pwriteUncache
			s.pwriteUncache = func(fd int, p []byte, off int64) (int, error) {
				if off == 256<<10 {
					return 0, unix.EIO
				}
				return real(fd, p, off)
			}
			s.pwrite = s.pwriteUncache
		}, unix.EIO, "at offset 262144"},
		{"fsync", Options{}, func(s *system) { s.fsync = func(int) error { return unix.EIO } }, unix.EIO, "fsync"},
		{"fsync is short of space", Options{}, func(s *system) { s.fsync = func(int) error { return unix.ENOSPC } }, unix.ENOSPC, "free some space"},
		{"ftruncate", Options{}, func(s *system) { s.ftruncate = func(int, int64) error { return unix.EFBIG } }, unix.EFBIG, "set the size of"},
		{"fallocate", Options{Preallocation: PreallocateFalloc}, func(s *system) {
			s.fallocate = func(int, uint32, int64, int64) error { return unix.ENOSPC }
		}, unix.ENOSPC, "reserve bytes [0, 1049353)"},
		{"no fallocate", Options{Preallocation: PreallocateFalloc}, func(s *system) {
			s.fallocate = func(int, uint32, int64, int64) error { return unix.EOPNOTSUPP }
		}, errors.ErrUnsupported, "--preallocation off or full"},
		{"rename", Options{}, func(s *system) {
			s.rename = func(int, string, string, uint) error { return unix.EIO }
		}, unix.EIO, "rename"},
		{"link", Options{}, func(s *system) {
			s.rename = func(int, string, string, uint) error { return unix.EINVAL }
			s.link = func(int, string, string) error { return unix.EIO }
		}, unix.EIO, "rename"},
		{"fsync of the folder", Options{}, func(s *system) { s.fsyncDir = func(int) error { return unix.EIO } }, unix.EIO, "fsync"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			sys := kernel()
			c.fault(&sys)
			err := copyTo(t, filepath.Join(dir, "disk.raw"), c.o, sys)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.message) || !strings.Contains(err.Error(), dir) {
				t.Errorf("error %v; want %v with %q and the path", err, c.want, c.message)
			}
			inFolder(t, dir)
		})
	}
}

func failWrites(s *system, err error) {
	s.pwrite = func(int, []byte, int64) (int, error) { return 0, err }
	s.pwriteUncache = s.pwrite
}

// TestFileDegrades has calls that the kernel does not support, interrupts or
// completes partially: the copy succeeds anyway.
func TestFileDegrades(t *testing.T) {
	for _, c := range []struct {
		name  string
		fault func(*system)
	}{
		{"short writes", func(s *system) {
			s.pwriteUncache = func(fd int, p []byte, off int64) (int, error) { return unix.Pwrite(fd, p[:min(len(p), 1000)], off) }
		}},
		{"signals", func(s *system) {
			var n atomic.Int32
			s.pwriteUncache = func(fd int, p []byte, off int64) (int, error) {
				if n.Add(1)%2 == 1 {
					return 0, unix.EINTR
				}
				return unix.Pwrite(fd, p, off)
			}
			s.fsync = func(fd int) error {
				if n.Add(1)%2 == 1 {
					return unix.EINTR
				}
				return unix.Fsync(fd)
			}
		}},
		{"no RENAME_NOREPLACE", func(s *system) { onlyPlainRename(s) }},
		{"neither that nor links", func(s *system) {
			onlyPlainRename(s)
			s.link = func(int, string, string) error { return unix.EPERM }
		}},
		{"folders can't be synced", func(s *system) { s.fsyncDir = func(int) error { return unix.EINVAL } }},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			sys := kernel()
			c.fault(&sys)
			path := filepath.Join(dir, "disk.raw")
			if err := copyTo(t, path, Options{}, sys); err != nil {
				t.Fatal(err)
			}
			hasContent(t, path, content())
			inFolder(t, dir, "disk.raw")

			// A file that comes up meanwhile is not replaced, either.
			d, err := createFile(t.Context(), filepath.Join(dir, "other"), diskSize, Options{}, sys)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(fillDisk(d), d.Finish(t.Context())); err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(dir, "other"), "not ours")
			if err := d.Publish(t.Context()); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "--force") {
				t.Errorf("Publish over a file that came up meanwhile: %v", err)
			}
			if err := d.Abort(); err != nil {
				t.Error(err)
			}
			hasContent(t, filepath.Join(dir, "other"), []byte("not ours"))
			inFolder(t, dir, "disk.raw", "other")
		})
	}
}

func onlyPlainRename(s *system) {
	s.rename = func(dir int, from, to string, flags uint) error {
		if flags != 0 {
			return unix.EINVAL
		}
		return unix.Renameat2(dir, from, dir, to, 0)
	}
}

func TestUncachedWritesAreAskedForOnce(t *testing.T) {
	for _, lacks := range []error{unix.EOPNOTSUPP, unix.EINVAL, unix.ENOSYS} {
		sys := kernel()
		asked, pushed := 0, atomic.Int32{}
		sys.pwriteUncache = func(int, []byte, int64) (int, error) { asked++; return 0, lacks }
		sys.syncRange = func(fd int, off, n int64, flags int) error { pushed.Add(1); return nil }
		path := filepath.Join(t.TempDir(), "disk.raw")
		d, err := createFile(t.Context(), path, 4*pushStep, Options{}, sys)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		for off := int64(0); off < 4*pushStep; off += 1 << 20 {
			if _, err := d.WriteAt(zeros[:], off); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		d.Abort() // joins the write-back
		if asked != 1 || pushed.Load() == 0 {
			t.Errorf("%v: asked %d times, write-back started %d times; want 1, and 1 or more", lacks, asked, pushed.Load())
		}
	}
}

// The kernel tells of a lost write once. If write-back got to hear it, the disk
// must not be finished.
func TestWriteBackError(t *testing.T) {
	for _, drop := range []bool{false, true} {
		sys := kernel()
		told := make(chan struct{})
		sys.pwriteUncache = func(int, []byte, int64) (int, error) { return 0, unix.EOPNOTSUPP }
		sys.syncRange = func(int, int64, int64, int) error { close(told); return unix.EIO }
		dir := t.TempDir()
		d, err := createFile(t.Context(), filepath.Join(dir, "disk.raw"), pushStep, Options{DropCache: drop}, sys)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(make([]byte, pushStep), 0); err != nil {
			t.Fatal(err)
		}
		<-told
		d.(*file).w.pushes.Wait()
		if err := d.Finish(t.Context()); !errors.Is(err, unix.EIO) {
			t.Errorf("Finish: %v, want EIO", err)
		}
		d.Abort()
		inFolder(t, dir)
	}
}

func TestFsyncIsNotAskedAgain(t *testing.T) {
	asked := 0
	sys := kernel()
	sys.fsync = func(int) error {
		asked++
		if asked > 1 {
			return nil // the kernel has forgotten
		}
		return unix.EIO
	}
	d, err := createFile(t.Context(), filepath.Join(t.TempDir(), "disk.raw"), diskSize, Options{}, sys)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if err := fillDisk(d); err != nil {
		t.Fatal(err)
	}
	_, sync, err := d.Checkpoint(diskSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := sync(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("sync: %v", err)
	}
	if err := d.Finish(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("Finish: %v", err)
	}
	if err := d.Publish(t.Context()); !errors.Is(err, unix.EIO) {
		t.Errorf("Publish: %v", err)
	}
	if asked != 1 {
		t.Errorf("fsync was asked %d times", asked)
	}
}

// An existing file that was replaced is gone, so the new one stays.
func TestForceWhereFolderCantBeSynced(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk.raw")
	put(t, path, "old")
	sys := kernel()
	sys.fsyncDir = func(int) error { return unix.EIO }
	if err := copyTo(t, path, Options{Force: true}, sys); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "may not survive a crash") {
		t.Errorf("error %v", err)
	}
	hasContent(t, path, content())
	inFolder(t, dir, "disk.raw")
}

// TestWholeFileWhereFolderCantBeSynced checks that a complete file is not removed
// when the fsync of its folder fails: it gets the name of the .partial file again
// or, if that is impossible, keeps its final name.
func TestWholeFileWhereFolderCantBeSynced(t *testing.T) {
	for _, c := range []struct {
		name   string
		rename error // of NOREPLACE
		link   bool  // there are links
		want   string
	}{
		{"rename", nil, true, "disk.raw.partial"},
		{"link", unix.EINVAL, true, "disk.raw.partial"},
		{"no way back", unix.EINVAL, false, "disk.raw"},
		{"failing", unix.EIO, true, "disk.raw"},
	} {
		dir := t.TempDir()
		sys := kernel()
		sys.fsyncDir = func(int) error { return unix.EIO }
		rename, link := sys.rename, sys.link
		sys.rename = func(dir int, from, to string, flags uint) error {
			if flags != 0 && c.rename != nil && (from == "disk.raw" || c.rename == unix.EINVAL) {
				return c.rename
			}
			return rename(dir, from, to, flags)
		}
		sys.link = func(dir int, from, to string) error {
			if !c.link {
				return unix.EPERM
			}
			return link(dir, from, to)
		}
		d, err := createFile(t.Context(), filepath.Join(dir, "disk.raw"), 512, Options{}, sys)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		err = d.Publish(t.Context())
		if !errors.Is(err, unix.EIO) || errors.Is(err, sink.ErrUnsynced) != (c.want == "disk.raw") {
			t.Errorf("%s: %v", c.name, err)
		}
		inFolder(t, dir, c.want)
		d.Suspend()
	}
}
