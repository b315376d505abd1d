package raw

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// CheckFile returns the error that CreateFile would return for the same arguments,
// as far as that can be known without making anything.
func CheckFile(path string, size int64, o Options) error {
	p, err := openPlace(path)
	if err != nil {
		return err
	}
	defer p.close()
	_, _, err = p.check(size, o)
	return err
}

// CheckSpace returns an error that wraps unix.ENOSPC if the file system has too
// little free space for a file at the given path. The needed space depends on
// Options.Need and Options.Preallocation. CheckFile includes this check.
func CheckSpace(path string, size int64, o Options) error {
	p, err := openPlace(path)
	if err != nil {
		return err
	}
	defer p.close()
	partial, err := p.stat(p.partial)
	if err != nil {
		return err
	}
	return p.checkSpace(size, partial, o)
}

// CreateFile makes a file of exactly the given size. After Publish the file is at
// the given path, or, if this path is a symbolic link, at the path to which the
// link leads. Until then the file is in the same folder, has .partial after its
// name, and is locked with flock.
//
// With Options.State, CreateFile opens the .partial file of an earlier run
// instead. It truncates this file at Options.Resume, so that everything after
// that offset reads as zeros. Abort does not remove a file that was resumed.
//
// The error wraps fs.ErrExist if a file with the final name, or a .partial file of
// an earlier run, exists already and the options do not allow replacing it. The
// error wraps unix.ENOSPC if there is too little space.
//
// The returned disk has the ability sink.Parallel, but its MaxParallel is 1: it takes
// calls in any order, one at a time. It also has the abilities sink.Sizer and
// sink.Verifiable, and sink.Zeroed unless Preallocation is full.
func CreateFile(ctx context.Context, path string, size int64, o Options) (sink.Disk, error) {
	return createFile(ctx, path, size, o, kernel())
}

type file struct {
	life
	w     writer
	place *place
	o     Options
	old   os.FileInfo // the file that Publish replaces; nil: none
	made  bool        // this run made the .partial file, so Abort removes it
	named atomic.Bool // the name of the .partial file is durable
}

func createFile(ctx context.Context, path string, size int64, o Options, sys system) (_ sink.Disk, err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	p, err := openPlace(path)
	if err != nil {
		return nil, err
	}
	old, partial, err := p.check(size, o)
	if err != nil {
		p.close()
		return nil, err
	}
	d := &file{
		life:  newLife(ctx, p.path, size),
		w:     writer{sys: sys, name: p.partialPath(), drop: o.DropCache},
		place: p, o: o, old: old,
	}
	d.resumable = o.image
	if err := d.open(partial != nil); err != nil {
		p.close()
		return nil, err
	}
	if err := d.prepare(); err != nil {
		return nil, errors.Join(err, d.Abort())
	}
	return d, nil
}

// The method open makes or opens the .partial file and locks it. If open fails,
// it does not remove a file that existed before.
func (d *file) open(exists bool) error {
	p := d.place
	if d.o.State != nil {
		f, err := p.open(p.partial, unix.O_RDWR|unix.O_NONBLOCK)
		if err != nil {
			return err
		}
		if err := errors.Join(onlyName(f), d.acquire(f)); err != nil {
			durable.CloseLocked(f)
			return err
		}
		d.w.f = f
		return nil
	}
	if exists {
		if err := d.drop(); err != nil {
			return err
		}
	}
	f, err := p.open(p.partial, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	if err := d.acquire(f); err != nil {
		f.Close() // another process has taken the file, so do not remove it
		return err
	}
	d.w.f, d.made = f, true
	return nil
}

// onlyName returns an error if f has more than one name (hard links), since
// resuming would change the file under all its names.
func onlyName(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
		return fmt.Errorf("cannot resume: %s has %d names (hard links), and resuming would change the file under all these names: replace it by a copy of itself, which has only one name", f.Name(), st.Nlink)
	}
	return nil
}

// The method drop removes the .partial file of an earlier run.
func (d *file) drop() error {
	p := d.place
	f, err := p.open(p.partial, unix.O_RDONLY|unix.O_NONBLOCK)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer durable.CloseLocked(f)
	if err := d.acquire(f); err != nil {
		return err
	}
	if err := d.w.sys.unlink(p.fd(), p.partial); err != nil {
		return fmt.Errorf("cannot remove %s: %w", p.partialPath(), err)
	}
	return nil
}

// The method acquire locks the open file f. It returns an error if f no longer has
// the name of the .partial file.
func (d *file) acquire(f *os.File) error {
	if err := lock(f); err != nil {
		return err
	}
	if !d.place.holds(d.place.partial, f) {
		return fmt.Errorf("another process replaced %s while vddkcp opened it", f.Name())
	}
	return nil
}

// The method prepare sets the owner, the mode and the size of the .partial file.
func (d *file) prepare() error {
	if d.old != nil {
		// The new file gets the mode of the file that it will replace before any data are
		// written. Otherwise users who must not read the old file could read the new
		// data.
		if err := d.inherit(d.old); err != nil {
			return err
		}
	}
	for _, size := range []int64{d.o.Resume, d.Size} {
		if size == sink.UnknownSize {
			continue
		}
		if err := d.truncate(size); err != nil {
			return err
		}
	}
	if d.o.Preallocation == PreallocateFalloc {
		return d.reserve()
	}
	return nil
}

func (d *file) truncate(size int64) error {
	fd := int(d.w.f.Fd())
	if err := eintr.Retry(func() error { return d.w.sys.ftruncate(fd, size) }); err != nil {
		return fmt.Errorf("cannot set the size of %s to %d bytes: %w", d.w.name, size, explain(fd, err))
	}
	return nil
}

// The method inherit gives the new file the owner and the mode of the old file,
// which the new file will replace.
func (d *file) inherit(old os.FileInfo) error {
	now, err := d.w.f.Stat()
	if err != nil {
		return err
	}
	was, is := old.Sys().(*syscall.Stat_t), now.Sys().(*syscall.Stat_t)
	if was.Uid != is.Uid || was.Gid != is.Gid {
		if err := d.w.f.Chown(int(was.Uid), int(was.Gid)); err != nil {
			return fmt.Errorf("cannot change the owner of the new file to user %d and group %d, the owner of the old file %s (remove the old file first if the new file need not have the same owner): %w", was.Uid, was.Gid, d.Name, err)
		}
	}
	// The mode is set after the owner, since a change of the owner clears the
	// set-id bits.
	if err := eintr.Retry(func() error { return unix.Fchmod(int(d.w.f.Fd()), was.Mode&0o7777) }); err != nil {
		return fmt.Errorf("cannot set the mode of %s to the mode of the old file %s: %w", d.w.name, d.Name, err)
	}
	return nil
}

// The method reserve allocates the space for the part of the file that is not
// written yet. It allocates in pieces, so that it soon notices when the context
// ends.
func (d *file) reserve() error {
	const piece = 16 << 30
	fd := int(d.w.f.Fd())
	for off := d.o.Resume; off < d.Size; off += piece {
		if d.Context.Err() != nil {
			return context.Cause(d.Context)
		}
		n := min(piece, d.Size-off)
		err := eintr.Retry(func() error { return d.w.sys.fallocate(fd, 0, off, n) })
		if errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("the file system of %s (%s) cannot reserve space: use --preallocation off or full: %w", d.Name, fileSystem(fd), err)
		}
		if err != nil {
			return fmt.Errorf("cannot reserve bytes [%d, %d) of %s: %w", off, off+n, d.w.name, explain(fd, err))
		}
	}
	return nil
}

func (d *file) MaxParallel() int { return 1 }

// Identity implements sink.Identified. The result does not depend on the name of
// the file.
func (d *file) Identity() (string, error) {
	id, err := fileid.Of(int(d.w.f.Fd()))
	if err != nil {
		return "", fmt.Errorf("cannot determine the identity of %s: %w", d.w.name, err)
	}
	return id, nil
}

// ZeroedFrom returns true unless Preallocation is full. This is right even for a
// resumed file, because everything after Options.Resume was cut off when the file
// was opened.
func (d *file) ZeroedFrom(int64) bool { return d.o.Preallocation != PreallocateFull }

func (d *file) WriteAt(p []byte, off int64) (int, error) { return d.writeAt(p, off, d.w.write) }

func (d *file) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.Begin(ctx, off, n); err != nil {
		return err
	}
	defer d.Done()
	if d.ZeroedFrom(off) {
		return nil
	}
	if err := d.w.writeZeros(func() error { return d.Stopped(ctx) }, off, n); err != nil {
		return d.Fail(err)
	}
	return nil
}

func (d *file) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	return d.checkpoint(off, func() error {
		if err := d.w.sync(); err != nil {
			return err
		}
		return d.syncPartial()
	})
}

// syncPartial makes the name of the .partial file durable, unless it is durable already.
func (d *file) syncPartial() error {
	if d.named.Load() {
		return nil
	}
	if err := d.syncDir(); err != nil {
		return err
	}
	d.named.Store(true)
	return nil
}

func (d *file) SetSize(n int64) error {
	return d.life.SetSize(n, func() error { return d.truncate(n) })
}

func (d *file) Finish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Writing, func() error {
		if err := d.w.sync(); err != nil {
			return err
		}
		info, err := d.w.f.Stat()
		if err != nil {
			return err
		}
		if info.Size() != d.Size {
			return fmt.Errorf("%s has %d bytes instead of %d bytes: another process has changed the file", d.w.name, info.Size(), d.Size)
		}
		return nil
	})
}

func (d *file) Reopen(ctx context.Context) (source.Disk, error) {
	if err := d.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer d.Done()
	d.w.forget()
	return reopen(ctx, d.place.current(d.place.partial, d.w.f), d.Size)
}

func (d *file) Publish(ctx context.Context) error {
	err := d.Advance(ctx, lifecycle.Finished, d.publish)
	if err != nil {
		return err
	}
	// The file is durable and published, so errors of closing it do not
	// matter.
	d.w.close()
	d.place.close()
	return nil
}

func (d *file) publish() error {
	p := d.place
	if !p.holds(p.partial, d.w.f) {
		return fmt.Errorf("%s was removed or replaced by another process", p.partialPath())
	}
	replaced := false
	if d.o.Force {
		old, err := p.checkOld(d.o)
		if err != nil {
			return err
		}
		if replaced = old != nil; replaced {
			if err := d.inherit(old); err != nil {
				return err
			}
		}
	}
	killpoint.At("rename")
	if err := d.rename(); err != nil {
		return err
	}
	killpoint.At("renamed")
	if err := d.syncDir(); err != nil {
		if replaced || !d.unpublish() {
			return fmt.Errorf("%s: %w: %w", p.path, sink.ErrUnsynced, err)
		}
		return err
	}
	return p.elsewhere()
}

// The method rename gives the file its final name. If another file has this name,
// rename replaces that file only if Options.Force is set.
func (d *file) rename() error {
	p, fd := d.place, d.place.fd()
	flags := uint(unix.RENAME_NOREPLACE)
	if d.o.Force {
		flags = 0
	}
	err := eintr.Retry(func() error { return d.w.sys.rename(fd, p.partial, p.name, flags) })
	if flags != 0 && err != nil && lacking(err) {
		// Some file systems do not support flags of rename. In this case a hard link is
		// made. A hard link does not replace an existing file either.
		if err = eintr.Retry(func() error { return d.w.sys.link(fd, p.partial, p.name) }); err == nil {
			if err = d.w.sys.unlink(fd, p.partial); err != nil {
				err = errors.Join(err, d.w.sys.unlink(fd, p.name))
			}
		} else if lacking(err) || errors.Is(err, unix.EPERM) {
			if old, statErr := p.stat(p.name); old != nil || statErr != nil {
				return errors.Join(errExists(p.path), statErr)
			}
			err = eintr.Retry(func() error { return d.w.sys.rename(fd, p.partial, p.name, 0) })
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("another process created the target file during the copy: %w", errExists(p.path))
	}
	if err != nil {
		return fmt.Errorf("cannot rename %s to %s: %w", p.partialPath(), p.name, err)
	}
	return nil
}

// The method unpublish renames the file back to its .partial name, so that a
// later run can resume it. It is called if the published file could not be made
// durable. It returns true if the file no longer has its final name.
func (d *file) unpublish() bool {
	p, fd := d.place, d.place.fd()
	if !p.holds(p.name, d.w.f) {
		return true // another process has renamed or removed the file
	}
	err := eintr.Retry(func() error { return d.w.sys.rename(fd, p.name, p.partial, unix.RENAME_NOREPLACE) })
	if err != nil && lacking(err) {
		if err = eintr.Retry(func() error { return d.w.sys.link(fd, p.name, p.partial) }); err == nil {
			err = eintr.Retry(func() error { return d.w.sys.unlink(fd, p.name) })
		}
	}
	return err == nil
}

// syncDir makes the names of the files in the folder durable.
func (d *file) syncDir() error {
	err := eintr.Retry(func() error { return d.w.sys.fsyncDir(d.place.fd()) })
	if err != nil && !lacking(err) { // some network file systems do not support fsync of folders
		return fmt.Errorf("fsync %s: %w", filepath.Dir(d.place.path), err)
	}
	return nil
}

// Suspend also makes the name of the .partial file durable, because a complete file may keep this
// name until a later run calls PublishHeld.
func (d *file) Suspend() error {
	return d.End(func() error { return errors.Join(d.syncPartial(), d.w.close(), d.place.close()) })
}

func (d *file) Abort() error {
	return d.life.Abort(func() error {
		p := d.place
		var err error
		// This run removes only its own .partial file. A file that another process has
		// put in its place is not removed.
		if d.made && p.holds(p.partial, d.w.f) {
			if err = d.w.sys.unlink(p.fd(), p.partial); err != nil {
				err = fmt.Errorf("cannot remove %s: %w", p.partialPath(), err)
			}
		}
		d.w.close() // an error does not matter: the file is removed
		return errors.Join(err, p.close())
	})
}
