package raw

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/eintr"
)

// CloneUnit tells whether a file that is created at the given path could share
// blocks with the file f, and with which alignment. The result is the one that
// the method CloneUnit of sink.Cloner would return after the file is created.
//
// Mount options, attributes of the folder or different file systems may prevent
// sharing. To find this out, CloneUnit tries to share a block of f with an
// unnamed temporary file in the folder of the given path.
func CloneUnit(path string, f *os.File) int64 {
	p, err := openPlace(path)
	if err != nil {
		return 0
	}
	defer p.close()
	return cloneUnit(p, f, kernel())
}

func cloneUnit(p *place, f *os.File, sys system) int64 {
	var folder unix.Statfs_t
	if err := eintr.Retry(func() error { return unix.Fstatfs(p.fd(), &folder) }); err != nil {
		return 0
	}
	unit := folder.Bsize
	info, err := f.Stat()
	if err != nil || unit <= 0 || bits.OnesCount64(uint64(unit)) != 1 || info.Mode().Type() != 0 {
		return 0
	}
	var probe int
	err = eintr.Retry(func() (err error) {
		probe, err = unix.Openat(p.fd(), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err != nil {
		return 0
	}
	defer unix.Close(probe)
	if err := eintr.Retry(func() error { return sys.cloneRange(probe, int(f.Fd()), 0, unit, 0) }); err != nil {
		return 0
	}
	return unit
}

// CloneUnit implements sink.Cloner. If space is preallocated, it returns 0,
// because shared blocks would replace the preallocated ones.
func (d *file) CloneUnit(f *os.File) int64 {
	if d.o.Preallocation != PreallocateOff && d.o.Preallocation != "" {
		return 0
	}
	return cloneUnit(d.place, f, d.w.sys)
}

func (d *file) CloneFrom(f *os.File, pos, off, n int64) error {
	if err := d.Begin(d.Context, off, n); err != nil {
		return err
	}
	defer d.Done()
	if n == 0 {
		return nil // for the kernel, 0 means everything up to the end of the file
	}
	err := eintr.Retry(func() error { return d.w.sys.cloneRange(int(d.w.f.Fd()), int(f.Fd()), pos, n, off) })
	if err == nil {
		return nil
	}
	err = fmt.Errorf("cannot share blocks of the file %s (bytes [%d, %d)) with the new file %s (bytes [%d, %d)): %w", filepath.Base(f.Name()), pos, pos+n, d.w.name, off, off+n, explain(int(d.w.f.Fd()), err))
	if lacking(err) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ETXTBSY) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (%w)", err, errors.ErrUnsupported)
	}
	return d.Fail(err)
}
