// Package open turns the address of a source into a source.Disk. It is the one
// place that knows all readers, and that decides which files an image may name.
package open

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/qcow2"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// ErrNotRead says that the address or the format means something that vddkcp
// knows and can't read yet.
var ErrNotRead error = notReadError{}

type notReadError struct{}

func (notReadError) Error() string   { return "this version does not read it" }
func (notReadError) ExitStatus() int { return exit.Usage }

// UsageError is an address, a format or an option that makes no sense whatever
// the files hold.
type UsageError = usage.Error

// Opener opens sources, and keeps a list of the local files that they consist
// of. It is safe for concurrent use.
type Opener struct {
	// AllowPath are folders that an image may name files in, and below them,
	// beside its own folder.
	AllowPath []string
	// SingleLink opens images without their parents: what they lack is Inherited.
	SingleLink bool
	// Writable opens disks that are source.Writable; what can't be one is a
	// *UsageError.
	Writable bool
	// NBD tunes the connections to NBD servers.
	NBD client.Options
	// VDDK opens disks through VMware's library; nil: they are not read.
	VDDK *VDDK
	// Retry says how reads from an NBD server or through VDDK are repeated, over
	// new connections too. The zero value repeats nothing.
	Retry source.RetryOptions

	mu    sync.Mutex
	files []File
}

// File is a local file or block device that was opened.
type File struct {
	Path string
	Info os.FileInfo
}

// Open opens the disk at the address text: a local file or block device, whose
// format is found out from its content where format is empty, else "raw",
// "vmdk" or "qcow2"; an NBD URI, whose export is taken as it is, so that format
// may be empty or "raw"; "[DATASTORE] DIR/DISK.vmdk" or "vddk:PATH", which VDDK
// opens, as VDDK.Params say, raw too; or, where format is empty, PATH.ova or PATH.ovf, the disk of an
// appliance, with #NUMBER or #NAME after it where it has several. The disk lives
// under ctx. That of an appliance is Manifest and Warned besides.
//
// An appliance whose disk is not picked is a *ChoiceError. An address or a
// format that means something else is an ErrNotRead, and one that means nothing
// a *UsageError.
func (o *Opener) Open(ctx context.Context, text, format string) (source.Disk, error) {
	if err := checkFormat(format); err != nil {
		return nil, err
	}
	a, err := address.Parse(text, address.Disk)
	if err != nil {
		return nil, err
	}
	return o.OpenAddress(ctx, a, format)
}

// OpenAddress does what Open does, for an address that was parsed with the role
// address.Disk.
func (o *Opener) OpenAddress(ctx context.Context, a address.Address, format string) (source.Disk, error) {
	if err := checkFormat(format); err != nil {
		return nil, err
	}
	switch a := a.(type) {
	case address.NBD:
		d, err := o.openNBD(ctx, a.URI, format)
		return notEmpty(d, a, format, err)
	case address.Datastore, address.VDDK:
		d, err := o.openVDDK(ctx, a, format)
		return notEmpty(d, a, format, err)
	case address.Path, address.Appliance:
		return o.openLocal(ctx, a, format)
	}
	return nil, fmt.Errorf("%s: %w", a, ErrNotRead)
}

// openLocal opens a file, or a disk of an appliance.
func (o *Opener) openLocal(ctx context.Context, a address.Address, format string) (source.Disk, error) {
	for _, dir := range o.AllowPath {
		if fi, err := os.Stat(dir); err != nil {
			return nil, usage.Errorf("--allow-path: %v", err)
		} else if !fi.IsDir() {
			return nil, usage.Errorf("--allow-path: %s is not a folder", dir)
		}
	}
	appliance, ok := a.(address.Appliance)
	ok = ok && format == "" // with a format, the file itself is meant
	path := a.String()
	switch {
	case ok && o.Writable:
		return nil, notWritable("%s is an appliance", path)
	case o.Writable:
		return o.openWritable(ctx, path, format)
	case ok:
		return o.openAppliance(ctx, appliance)
	}
	f, err := o.openFile(ctx, path)
	if err != nil {
		return nil, err
	}
	if format == "" && f.Size() == 0 {
		// Nearly always what is left of a failed transfer.
		f.Close()
		return nil, &emptyError{path: path}
	}
	return o.openFormat(ctx, f, path, format, nil)
}

func (o *Opener) openNBD(ctx context.Context, uri *nbd.URI, format string) (source.Disk, error) {
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s as %s: what an NBD server exports is taken as a raw disk", uri, format)
	}
	return source.Retry(ctx, func(ctx context.Context) (source.Disk, error) {
		if o.Writable {
			d, err := client.OpenWritable(ctx, uri, o.NBD)
			if errors.Is(err, client.ErrReadOnly) {
				return nil, source.Permanent(notWritable("%v", err))
			}
			if err != nil {
				return nil, err
			}
			return d, nil
		}
		d, err := client.Open(ctx, uri, o.NBD)
		if err != nil {
			return nil, err
		}
		return d, nil
	}, o.Retry)
}

// openWritable opens a raw file or a block device for writing.
func (o *Opener) openWritable(ctx context.Context, path, format string) (source.Disk, error) {
	f, err := o.openFile(ctx, path)
	if err != nil {
		return nil, err
	}
	if format == "" && f.Size() == 0 {
		f.Close()
		return nil, &emptyError{path: path}
	}
	format, warnings, err := inspect(f, path, format)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	if format != "raw" {
		return nil, notWritable("%s is a %s image", path, format)
	}
	d, err := raw.OpenWritable(ctx, path)
	if err != nil {
		return nil, err
	}
	if len(warnings) > 0 {
		return &warnedDisk{d, warnings}, nil
	}
	return d, nil
}

// notWritable is a usage error of a disk that can't be written to.
func notWritable(format string, args ...any) error {
	return usage.Errorf("%s: what can be written to are raw files, block devices, NBD servers that allow it, and disks that VDDK opens", fmt.Sprintf(format, args...))
}

// notEmpty refuses a disk of 0 bytes that a server or a library opened: most likely
// they have an empty file, and a copy of it would be no copy of a disk.
func notEmpty(d source.Disk, a address.Address, format string, err error) (source.Disk, error) {
	if err != nil || format != "" || d.Size() > 0 {
		return d, err
	}
	return nil, errors.Join(&emptyError{a.String(), true}, d.Close())
}

// emptyError is a source of 0 bytes.
type emptyError struct {
	path   string
	opened bool // by a server or a library
}

func (e *emptyError) Error() string {
	if e.opened {
		return e.path + ": the disk is empty (0 bytes)"
	}
	return e.path + ": the file is empty (0 bytes), want a disk image"
}

func (e *emptyError) Hint() string { return "--source-format raw takes it for a disk of 0 bytes" }

func checkFormat(format string) error {
	switch format {
	case "", "raw", "vmdk", "qcow2":
	default:
		return usage.Errorf("source format %q: want raw, vmdk or qcow2", format)
	}
	return nil
}

// openFile opens and lists a file.
func (o *Opener) openFile(ctx context.Context, path string) (*raw.Disk, error) {
	f, err := raw.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	fi, err := f.File().Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	o.list(path, fi)
	return f, nil
}

func (o *Opener) list(path string, fi os.FileInfo) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, have := range o.files {
		if same(have.Info, fi) {
			return
		}
	}
	o.files = append(o.files, File{path, fi})
}

// openFormat opens the image in the local file f, which was opened as path. It
// takes over f and closes it on error. children are the images that led to this
// one.
func (o *Opener) openFormat(ctx context.Context, f *raw.Disk, path, format string, children chain) (source.Disk, error) {
	return o.openImage(ctx, f, path, format, func() (source.Opener, error) { return o.references(f, path, children) })
}

// openImage opens the image whose bytes are f, as openFormat does. The function
// references returns the Opener for the files that the image names. It is called
// only if the format can name files.
func (o *Opener) openImage(ctx context.Context, f source.Disk, path, format string, references func() (source.Opener, error)) (source.Disk, error) {
	format, warnings, err := inspect(f, path, format)
	if err != nil {
		f.Close()
		return nil, err
	}
	switch format {
	case "raw":
		if len(warnings) > 0 {
			return &warnedDisk{f, warnings}, nil
		}
		return f, nil
	case "vmdk":
		opener, err := references()
		if err != nil {
			f.Close()
			return nil, err
		}
		d, err := vmdk.Open(ctx, path, f, opener, vmdk.Options{SingleLink: o.SingleLink, Folder: o.folderOf(f, path)})
		if err != nil {
			return nil, err
		}
		return d, nil
	case "qcow2":
		opener, err := references()
		if err != nil {
			f.Close()
			return nil, err
		}
		d, err := qcow2.Open(ctx, path, f, opener, qcow2.Options{SingleLink: o.SingleLink})
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	f.Close()
	return nil, fmt.Errorf("%s, a %s image: %w", path, format, ErrNotRead)
}

// inspect returns the format of f, which path names: format itself, or what the
// content tells where format is empty. Content that is foreign to the format is a
// *ForeignError, unless the format is raw.
func inspect(f source.Disk, path, format string) (_ string, warnings []string, err error) {
	if format == "raw" {
		return format, nil, nil
	}
	c, err := contentOf(f)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", path, err)
	}
	probed, err := c.probe(path)
	if err != nil {
		return "", nil, err
	}
	if format != "" {
		return format, nil, nil // its reader says what does not fit
	}
	if probed == "raw" && c.isLUKS() {
		warnings = append(warnings, path+" is encrypted (LUKS): it is taken as it is, and only its passphrase opens the copy")
	}
	return probed, warnings, nil
}

// warnedDisk is a disk that there is something to say about.
type warnedDisk struct {
	source.Disk
	warnings []string
}

// Unwrap implements source.Wrapper.
func (d *warnedDisk) Unwrap() source.Disk { return d.Disk }

// Warnings implements Warned.
func (d *warnedDisk) Warnings() []string { return d.warnings }

// Files returns the files that were opened so far, each once.
func (o *Opener) Files() []File {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]File(nil), o.files...)
}

// Uses reports whether fi is of a file or block device that was opened, under
// whatever name, and under which it was.
func (o *Opener) Uses(fi os.FileInfo) (path string, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, f := range o.files {
		if same(f.Info, fi) {
			return f.Path, true
		}
	}
	return "", false
}
