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
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/sink"
)

// The type place holds the folder and the names of a new file. The folder is kept
// open, so that a place refers to the same folder even if the folder is renamed.
type place struct {
	root          *os.Root
	dir           *os.File
	given         string // the path as the user wrote it
	path          string // the final path, with symbolic links resolved
	name, partial string // names in dir: of the published file and of the .partial file
}

// Partial returns the path of the .partial file: the path that the file of a
// target has until it is published. If the given path of the target is a
// symbolic link, the .partial file is in the folder to which the link leads.
func Partial(path string) (string, error) {
	p, err := openPlace(path)
	if err != nil {
		return "", err
	}
	return p.partialPath(), p.close()
}

// openPlace opens the folder of the file with the given path. It follows
// symbolic links, including those that lead to a file that does not exist yet.
func openPlace(path string) (*place, error) {
	real, name, err := resolve(path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return nil, fmt.Errorf("cannot open the folder of %s: %w", path, err)
	}
	dir, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, fmt.Errorf("cannot open the folder of %s: %w", path, err)
	}
	return &place{root: root, dir: dir, given: path, path: filepath.Join(real, name), name: name, partial: name + ".partial"}, nil
}

// The function resolve follows all symbolic links in a path. It returns the
// folder of the file, as a path without symbolic links, and the name of the file
// in this folder. The file need not exist.
func resolve(given string) (folder, name string, err error) {
	path := given
	for range 40 { // the kernel follows at most 40 symbolic links
		slash := strings.LastIndexByte(path, '/')
		folder, name = path[:slash+1], path[slash+1:]
		if name == "" || name == "." || name == ".." {
			return "", "", fmt.Errorf("%s names a folder, not a file", given)
		}
		if folder == "" {
			folder = "."
		}
		if folder, err = filepath.EvalSymlinks(folder); err != nil {
			return "", "", fmt.Errorf("cannot open the folder of %s: %w", given, err)
		}
		link, err := os.Readlink(filepath.Join(folder, name))
		if err != nil {
			return folder, name, nil
		}
		if !filepath.IsAbs(link) {
			link = folder + "/" + link // not cleaned: x/../y may differ from y if x is a link
		}
		path = link
	}
	return "", "", fmt.Errorf("%s: %w", given, unix.ELOOP)
}

func (p *place) close() error { return errors.Join(p.dir.Close(), p.root.Close()) }

func (p *place) fd() int { return int(p.dir.Fd()) }

func (p *place) partialPath() string { return filepath.Join(filepath.Dir(p.path), p.partial) }

// The method stat returns information about the file with the given name in the
// folder. If the file does not exist, both results are nil.
func (p *place) stat(name string) (os.FileInfo, error) {
	info, err := p.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return info, err
}

// The method holds reports whether the open file f is still in the folder and still
// has the given name.
func (p *place) holds(name string, f *os.File) bool {
	var byName, byFile unix.Stat_t
	return unix.Fstatat(p.fd(), name, &byName, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstat(int(f.Fd()), &byFile) == nil &&
		byName.Dev == byFile.Dev && byName.Ino == byFile.Ino
}

// The method elsewhere checks whether the path that the user gave still leads to the
// published file. If it does not, the error wraps sink.ErrElsewhere. The reason may
// be that the folder was renamed, removed or mounted over, or that a symbolic link
// in the path was changed.
func (p *place) elsewhere() error {
	if err := p.folderElsewhere(); err != nil {
		return err
	}
	folder, name, err := resolve(p.given)
	if err == nil && filepath.Join(folder, name) == p.path {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("the path now leads to %s", filepath.Join(folder, name))
	}
	return fmt.Errorf("a symbolic link in the path %s was changed during the copy (%w); the copied file is now at %s: %w", p.given, err, p.path, sink.ErrElsewhere)
}

func (p *place) folderElsewhere() error {
	folder := filepath.Dir(p.path)
	held, err := p.dir.Stat()
	if err != nil {
		return fmt.Errorf("cannot open the folder of %s: %w", p.path, err)
	}
	now, err := os.Stat(folder)
	if err == nil && os.SameFile(held, now) {
		return nil
	}
	if err == nil {
		err = errors.New("another folder has this path now")
	}
	where := "in the folder that had this path before"
	if real, linkErr := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", p.fd())); linkErr == nil && real != folder {
		where = "at " + filepath.Join(real, p.name)
	} else if linkErr == nil {
		where = "under the file system that was mounted at " + folder + ", which hides it"
	}
	return fmt.Errorf("the folder %s was moved or replaced during the copy (%w), and the target file %s now lies %s: %w", folder, err, p.name, where, sink.ErrElsewhere)
}

// The method current returns a path that leads to the file f, which has the given
// name in the folder. The path is right even if the folder has been moved.
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

// The method open opens a file in the folder.
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

// The method check returns an error if the file cannot be created, as far as that
// can be known before anything is made. It also returns information about the file
// that will be replaced and about the existing .partial file. These results are nil
// if there is no such file.
func (p *place) check(size int64, o Options) (old, partial os.FileInfo, err error) {
	if err := o.checkRange(size); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", p.path, err)
	}
	switch o.Preallocation {
	case "", PreallocateOff, PreallocateFalloc, PreallocateFull:
	default:
		return nil, nil, fmt.Errorf("invalid preallocation %q: want off, falloc or full", o.Preallocation)
	}
	if old, err = p.checkOld(o); err != nil {
		return nil, nil, err
	}
	if partial, err = p.checkPartial(o); err != nil {
		return nil, nil, err
	}
	if err := unix.Faccessat(p.fd(), ".", unix.W_OK|unix.X_OK, unix.AT_EACCESS); err != nil {
		return nil, nil, fmt.Errorf("cannot create files in the folder of %s: %w", p.path, err)
	}
	return old, partial, p.checkSpace(size, partial, o)
}

func (p *place) checkOld(o Options) (os.FileInfo, error) {
	old, err := p.stat(p.name)
	if err != nil || old == nil {
		return nil, err
	}
	if old.IsDir() {
		return nil, fmt.Errorf("%s is a folder: name a file in it", p.path)
	}
	if !old.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file (%s), and a copy can replace only regular files", p.path, old.Mode())
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
			return nil, fmt.Errorf("cannot resume: %s: %w", path, fs.ErrNotExist)
		}
		return nil, nil
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("cannot write the copy to %s, because it is not a regular file (%s): remove it", path, info.Mode())
	}
	if err := o.isSource(path, info); err != nil {
		return nil, err
	}
	if f, err := p.open(p.partial, unix.O_RDONLY|unix.O_NONBLOCK); err == nil {
		defer durable.CloseLocked(f)
		if err := lock(f); err != nil {
			return nil, err
		}
	}
	if o.State != nil {
		if info.Size() < o.Resume {
			return nil, sink.Unfit(fmt.Errorf("cannot resume: %s has %d bytes, but the copy had written %d bytes when it stopped", path, info.Size(), o.Resume))
		}
		return info, nil
	}
	if !o.Force && !o.DropPartial {
		return nil, fmt.Errorf("%s: %w: it is from a copy that did not finish; --resume continues that copy, --force drops it", path, fs.ErrExist)
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
		// btrfs counts the space of removed files as free only after its
		// next commit, so the free space is determined again after
		// syncfs.
		free, known = p.room(partial)
	}
	if known && need > free {
		return fmt.Errorf("%s: the copy needs %s (%d bytes), but the file system has only %s free (%d bytes): %w",
			p.path, bytesize.Format(need), need, bytesize.Format(free), free, unix.ENOSPC)
	}
	return nil
}

// The method room returns how many bytes are free for a copy. The space of an
// existing .partial file counts as free, because the copy replaces or resumes this
// file. The parameter partial describes this file, and is nil if it does not exist.
// The result known is false if the file system does not report its free space.
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

// The function lock locks the file f with flock. durable.CloseLocked releases the lock.
// On file systems without locks, the function lock does nothing.
func lock(f *os.File) error {
	err := eintr.Retry(func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s is being written by another process", f.Name())
	}
	if err != nil && !lacking(err) && !errors.Is(err, unix.ENOLCK) {
		return fmt.Errorf("cannot lock %s: %w", f.Name(), err)
	}
	return nil
}
