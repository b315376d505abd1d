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

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
)

// OutsideError reports an image that refers to a file which it may not use, because the
// file is neither in the folder of the image nor in a folder that the user has
// permitted.
type OutsideError struct {
	Image  string // path of the image
	Name   string // the name that is written in the image
	Target string // the path that the name leads to
	Folder string // folder of the image
}

func (e *OutsideError) Error() string {
	return fmt.Sprintf("%s refers to the file %q, which leads to %s, outside of the image's folder %s", e.Image, e.Name, e.Target, e.Folder)
}

// Hint returns the command-line option with which the user can permit the file.
func (e *OutsideError) Hint() string {
	return fmt.Sprintf("if you trust the image, add --allow-path %s to permit images to use the files in this folder", printable.Word(filepath.Dir(e.Target)))
}

// The method references returns the source.Opener for the files that an image names, a
// function that opens a file by its name in the image. The parameter f is the file of
// the image, which was opened under the given path. The parameter children is the chain
// of images that led to this image: first the image that was opened directly, and last
// the image that names this one. It is empty if this image was opened directly.
//
// The returned function checks each path twice. Before it opens a file, it checks the
// path, so that files outside of the permitted folders are normally not opened.
// Afterwards it checks the path of the file that is open, because an attacker may have
// replaced a symbolic link in between.
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

// openNamed opens the file with the given name, to which an image refers. The parameter
// from is the path of the image, and folder is the folder of the image. openNamed also
// returns the path of the opened file. It does not add the file to the list that Files
// returns.
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
		// The error in err shows whether the file at the path exists. The user must not
		// learn this about files outside of the permitted folders. For such a file, the
		// returned error says only that the file is outside of them.
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

// openError returns an error that says that the file at the given path cannot be
// opened, and why. The reason is taken from err. The path in err is not used, because
// it may be the path of a symbolic link that leads to the file.
func openError(path string, err error) error {
	var cause *fs.PathError
	if errors.As(err, &cause) { // it may name a link on the way
		err = cause.Err
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

// permits reports whether an image in the given folder may name the file at the given
// path. Both the folder and the path are absolute. permits compares them as they are,
// and does not follow symbolic links in them.
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

// isBelow reports whether the given path is that of the folder itself or of anything
// below it.
func isBelow(folder, path string) bool {
	rel, err := filepath.Rel(folder, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// whereIs returns the path of the open file f without symbolic links. It asks the
// kernel for this path. The path under which f was opened may lead to another file by
// now.
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
	// If the file was removed, the kernel still returns a path, but the file is not
	// there.
	now, err := os.Lstat(real)
	if err != nil || !same(now, fi) {
		return "", nil, fmt.Errorf("cannot find the folder of %s: the file was moved, replaced or removed while it was opened", path)
	}
	return real, fi, nil
}

// The function same reports whether a and b describe the same file or the same block
// device. A block device may have several device files.
func same(a, b os.FileInfo) bool {
	if os.SameFile(a, b) {
		return true
	}
	x, ok := a.Sys().(*syscall.Stat_t)
	y, ok2 := b.Sys().(*syscall.Stat_t)
	return ok && ok2 && x.Mode&syscall.S_IFMT == syscall.S_IFBLK && y.Mode&syscall.S_IFMT == syscall.S_IFBLK && x.Rdev == y.Rdev
}
