package raw

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/sink"
)

// place is where a new file goes: the folder, held open so that it stays the
// same one, the final name and the one until then.
type place struct {
	root          *os.Root
	dir           *os.File
	given         string // the path that the user gave
	path          string // the final one, symbolic links resolved
	name, partial string // in dir
}

// Partial returns the path that a new file has until it is published under the
// name path: beside the file that path resolves to.
func Partial(path string) (string, error) {
	p, err := openPlace(path)
	if err != nil {
		return "", err
	}
	return p.partialPath(), p.close()
}

// openPlace finds the place of a file that path names, following symbolic
// links also where they lead to nothing yet.
func openPlace(path string) (*place, error) {
	real, name, err := resolve(path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return nil, fmt.Errorf("the folder of %s: %w", path, err)
	}
	dir, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("the folder of %s: %w", path, err)
	}
	return &place{root: root, dir: dir, given: path, path: filepath.Join(real, name), name: name, partial: name + ".partial"}, nil
}

// resolve returns the folder, without symbolic links, and the name in it of the
// file that given leads to. That file need not exist.
func resolve(given string) (folder, name string, err error) {
	path := given
	for range 40 { // as many as the kernel follows
		slash := strings.LastIndexByte(path, '/')
		folder, name = path[:slash+1], path[slash+1:]
		if name == "" || name == "." || name == ".." {
			return "", "", fmt.Errorf("%s is the name of a folder, not of a file", given)
		}
		if folder == "" {
			folder = "."
		}
		if folder, err = filepath.EvalSymlinks(folder); err != nil {
			return "", "", fmt.Errorf("the folder of %s: %w", given, err)
		}
		link, err := os.Readlink(filepath.Join(folder, name))
		if err != nil {
			return folder, name, nil
		}
		if !filepath.IsAbs(link) {
			link = folder + "/" + link // not cleaned: x/../y is not y where x is a link
		}
		path = link
	}
	return "", "", fmt.Errorf("%s: %w", given, unix.ELOOP)
}

func (p *place) close() error { return errors.Join(p.dir.Close(), p.root.Close()) }

func (p *place) fd() int { return int(p.dir.Fd()) }

func (p *place) partialPath() string { return filepath.Join(filepath.Dir(p.path), p.partial) }

// stat returns what has the name in the folder: nil, nil where nothing has.
func (p *place) stat(name string) (os.FileInfo, error) {
	info, err := p.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return info, err
}

// holds reports whether name is still the file f.
func (p *place) holds(name string, f *os.File) bool {
	var byName, byFile unix.Stat_t
	return unix.Fstatat(p.fd(), name, &byName, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstat(int(f.Fd()), &byFile) == nil &&
		byName.Dev == byFile.Dev && byName.Ino == byFile.Ino
}

// elsewhere returns an error that wraps sink.ErrElsewhere if the folder is not at
// its path any more (it was renamed or removed, or another one was mounted over it),
// or if a symbolic link of the path that the user gave leads to another place now.
// The file has its final name.
func (p *place) elsewhere() error {
	if err := p.folderElsewhere(); err != nil {
		return err
	}
	folder, name, err := resolve(p.given)
	if err == nil && filepath.Join(folder, name) == p.path {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("it leads to %s now", filepath.Join(folder, name))
	}
	return fmt.Errorf("a symbolic link of %s was changed during the copy (%w): the disk is at %s: %w", p.given, err, p.path, sink.ErrElsewhere)
}

func (p *place) folderElsewhere() error {
	folder := filepath.Dir(p.path)
	held, err := p.dir.Stat()
	if err != nil {
		return fmt.Errorf("the folder of %s: %w", p.path, err)
	}
	now, err := os.Stat(folder)
	if err == nil && os.SameFile(held, now) {
		return nil
	}
	if err == nil {
		err = errors.New("another folder is there")
	}
	where := "in the folder that was there"
	if real, linkErr := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", p.fd())); linkErr == nil && real != folder {
		where = "at " + filepath.Join(real, p.name)
	} else if linkErr == nil {
		where = "under what is mounted at " + folder
	}
	return fmt.Errorf("the folder %s was moved or replaced during the copy (%w): the disk %s is %s: %w", folder, err, p.name, where, sink.ErrElsewhere)
}

// current returns a path of the file f that is called name in the folder, which
// may have been moved.
func (p *place) current(name string, f *os.File) string {
	path := filepath.Join(filepath.Dir(p.path), name)
	info, err := f.Stat()
	if err != nil {
		return path
	}
	if now, err := os.Lstat(path); err == nil && os.SameFile(info, now) {
		return path
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", p.fd(), name)
}

// open opens a file of the folder.
func (p *place) open(name string, flags int) (*os.File, error) {
	path := filepath.Join(filepath.Dir(p.path), name)
	var fd int
	err := eintr.Retry(func() (err error) {
		fd, err = unix.Openat(p.fd(), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0666)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// check refuses what can be refused before anything is made. It returns what is
// to be replaced and the .partial that is there, nil for neither.
func (p *place) check(size int64, o Options) (old, partial os.FileInfo, err error) {
	if err := o.checkRange(size); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", p.path, err)
	}
	switch o.Preallocation {
	case "", PreallocateOff, PreallocateFalloc, PreallocateFull:
	default:
		return nil, nil, fmt.Errorf("preallocation %q: want off, falloc or full", o.Preallocation)
	}
	if old, err = p.checkOld(o); err != nil {
		return nil, nil, err
	}
	if partial, err = p.checkPartial(o); err != nil {
		return nil, nil, err
	}
	if err := unix.Faccessat(p.fd(), ".", unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return nil, nil, fmt.Errorf("no file can be made in the folder of %s: %w", p.path, err)
	}
	return old, partial, p.checkSpace(size, partial, o)
}

func (p *place) checkOld(o Options) (os.FileInfo, error) {
	old, err := p.stat(p.name)
	if err != nil || old == nil {
		return nil, err
	}
	if old.IsDir() {
		return nil, fmt.Errorf("%s is a folder; name a file in it", p.path)
	}
	if !old.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file (%s) and can't be replaced by one", p.path, old.Mode())
	}
	if err := o.isSource(p.path, old); err != nil {
		return nil, err
	}
	if !o.Force {
		return nil, errExists(p.path)
	}
	return old, nil
}

func errExists(path string) error {
	return fmt.Errorf("%s: %w; --force replaces it", path, fs.ErrExist)
}

func (p *place) checkPartial(o Options) (os.FileInfo, error) {
	path := p.partialPath()
	info, err := p.stat(p.partial)
	if err != nil {
		return nil, err
	}
	if info == nil {
		if o.State != nil {
			return nil, fmt.Errorf("resume: %s: %w", path, fs.ErrNotExist)
		}
		return nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s, where the copy is to be written, is no regular file (%s); remove it", path, info.Mode())
	}
	if err := o.isSource(path, info); err != nil {
		return nil, err
	}
	if f, err := p.open(p.partial, unix.O_RDONLY|unix.O_NONBLOCK); err == nil {
		defer f.Close()
		if err := lock(f); err != nil {
			return nil, err
		}
	}
	if o.State != nil {
		if info.Size() < o.Resume {
			return nil, sink.Unfit(fmt.Errorf("resume: %s has %d bytes, want %d that are done", path, info.Size(), o.Resume))
		}
		return info, nil
	}
	if !o.Force && !o.DropPartial {
		return nil, fmt.Errorf("%s: %w: an earlier copy that did not end left it; go on with it by --resume, or drop it with --force", path, fs.ErrExist)
	}
	return info, nil
}

func (p *place) checkSpace(size int64, partial os.FileInfo, o Options) error {
	need := o.Need
	if o.Preallocation == PreallocateFalloc || o.Preallocation == PreallocateFull {
		need = max(need, size)
	}
	free, known := p.room(partial)
	if known && need > free && unix.Syncfs(p.fd()) == nil {
		// btrfs counts the space of removed files as free after its next commit.
		free, known = p.room(partial)
	}
	if known && need > free {
		return fmt.Errorf("%s: the copy needs %s (%d bytes), and the file system has %s free (%d bytes): %w",
			p.path, bytesize.Format(need), need, bytesize.Format(free), free, unix.ENOSPC)
	}
	return nil
}

// room returns how many bytes the file system has for a copy that drops or goes on
// with partial, where that is not nil.
func (p *place) room(partial os.FileInfo) (n int64, known bool) {
	n, known = freeSpace(p.fd())
	if partial != nil {
		n += allocated(partial)
	}
	return n, known
}

func allocated(info os.FileInfo) int64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return s.Blocks * 512
	}
	return 0
}

// lock takes the lock that a file has while it is written, as long as f is open.
// Where the file system has no locks there is none.
func lock(f *os.File) error {
	err := eintr.Retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s is being written by another process", f.Name())
	}
	if err != nil && !lacking(err) && !errors.Is(err, unix.ENOLCK) {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}
