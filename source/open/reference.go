package open

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
)

// OutsideError reports an image that names a file outside of the folders where it may
// name files.
type OutsideError struct {
	Image  string // path of the image
	Name   string // the name that is written in the image
	Target string // the path that the name leads to
	Folder string // folder of the image
}

func (e *OutsideError) Error() string {
	return fmt.Sprintf("%s names %q, which leads to %s, outside of its folder %s", e.Image, e.Name, e.Target, e.Folder)
}

// Hint returns the option that permits the file.
func (e *OutsideError) Hint() string {
	return fmt.Sprintf("if you trust the image, --allow-path %s permits the folder", filepath.Dir(e.Target))
}

// references returns the Opener for the files that the image in f names, which was
// opened as path. children are the images above this one in the chain.
//
// Whether a name may be followed is decided by the file that was opened, so
// replacing a symbolic link meanwhile gains nothing. It is also checked before
// opening, so that files outside of the permitted folders are normally not even
// opened.
func (o *Opener) references(f *raw.Disk, path string, children chain) (source.Opener, error) {
	real, fi, err := whereIs(f, path)
	if err != nil {
		return nil, err
	}
	images, err := children.extend(path, link{file: fi})
	if err != nil {
		return nil, err
	}
	folder := filepath.Dir(real)

	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		f, target, fi, err := o.openNamed(ctx, folder, from, name)
		if err != nil {
			return nil, err
		}
		o.list(target, fi)
		return o.openFormat(ctx, f, target, format, images)
	}, nil
}

// openNamed opens the file to which the image with the path from refers by name. folder
// is the folder of the image. openNamed also returns the path of the file. It does not
// add the file to the list that Files returns.
func (o *Opener) openNamed(ctx context.Context, folder, from, name string) (f *raw.Disk, target string, fi os.FileInfo, err error) {
	target = name
	if !filepath.IsAbs(name) {
		target = filepath.Join(folder, name)
	}
	outside := func(target string) error {
		return &OutsideError{Image: from, Name: name, Target: target, Folder: folder}
	}
	resolved, err := filepath.EvalSymlinks(target)
	if err != nil {
		// err says whether the file exists. That must not be revealed about files
		// outside of the permitted folders.
		if o.permits(folder, filepath.Clean(target)) {
			return nil, "", nil, openError(target, err)
		}
		return nil, "", nil, outside(filepath.Clean(target))
	}
	if !o.permits(folder, resolved) {
		return nil, "", nil, outside(resolved)
	}
	f, err = raw.Open(ctx, target)
	if err != nil {
		return nil, "", nil, err
	}
	real, fi, err := whereIs(f, target)
	if err == nil && !o.permits(folder, real) {
		err = outside(real)
	}
	if err != nil {
		f.Close()
		return nil, "", nil, err
	}
	return f, target, fi, nil
}

// openError returns the error of opening path, with the cause that err has.
func openError(path string, err error) error {
	var cause *fs.PathError
	if errors.As(err, &cause) { // it may name a link on the way
		err = cause.Err
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

// permits reports whether an image in folder may name the file at path. Both paths are
// absolute and have no symbolic links.
func (o *Opener) permits(folder, path string) bool {
	if isBelow(folder, path) {
		return true
	}
	for _, dir := range o.AllowPath {
		dir, err := filepath.Abs(dir)
		if err == nil {
			dir, err = filepath.EvalSymlinks(dir)
		}
		if err == nil && isBelow(dir, path) {
			return true
		}
	}
	return false
}

// isBelow reports whether path is in the folder or in a folder below it.
func isBelow(folder, path string) bool {
	rel, err := filepath.Rel(folder, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// whereIs returns the path of the open file f without symbolic links. It asks the
// kernel for the path of the open file, because another file may be at path by now.
func whereIs(f *raw.Disk, path string) (real string, fi os.FileInfo, err error) {
	if fi, err = f.File().Stat(); err != nil {
		return "", nil, err
	}
	real, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.File().Fd()))
	if err != nil { // no /proc
		if real, err = filepath.Abs(path); err == nil {
			real, err = filepath.EvalSymlinks(real)
		}
	}
	if err != nil {
		return "", nil, fmt.Errorf("cannot find the folder of %s: %w", path, err)
	}
	// If the file was removed, the kernel returns its former path.
	now, err := os.Lstat(real)
	if err != nil || !same(now, fi) {
		return "", nil, fmt.Errorf("cannot find the folder of %s: the file was moved, replaced or removed while it was opened", path)
	}
	return real, fi, nil
}

// same reports whether a and b describe the same file or the same block device. A block
// device may have several device files.
func same(a, b os.FileInfo) bool {
	if os.SameFile(a, b) {
		return true
	}
	x, ok := a.Sys().(*syscall.Stat_t)
	y, ok2 := b.Sys().(*syscall.Stat_t)
	return ok && ok2 && x.Mode&syscall.S_IFMT == syscall.S_IFBLK && y.Mode&syscall.S_IFMT == syscall.S_IFBLK && x.Rdev == y.Rdev
}
