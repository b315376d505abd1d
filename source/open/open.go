// Package open opens disks: it turns the address of a disk into a [source.Disk]. The
// fields of an [Opener] are the options, and its methods [Opener.Open] and
// [Opener.OpenAddress] open a disk.
//
// This package is the only one that knows the readers of all formats and protocols. It
// recognizes the format of a local file, opens the disks of appliances, decides which
// files an image may name, and detects chains of images that loop. [RawStream] checks a
// raw disk that is read from a stream.
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

// ErrNotRead means that vddkcp recognizes an address or a format, but cannot read disks
// at such an address or of such a format.
var ErrNotRead error = notReadError{}

type notReadError struct{}

func (notReadError) Error() string   { return "not supported by this version" }
func (notReadError) ExitStatus() int { return exit.Usage }

// UsageError reports a mistake of the user: an address, a format or an option that is
// wrong regardless of the content of the files.
type UsageError = usage.Error

// Opener opens sources and records the local files that they consist of. Its fields
// are set before the first call. It is safe for concurrent use. The zero value opens
// local files and NBD exports.
type Opener struct {
	// AllowPath lists folders. An image may name files in these folders and below
	// them, in addition to its own folder.
	AllowPath []string
	// If SingleLink is true, images are opened without their parents. Ranges that an
	// image does not have are then [source.Inherited].
	SingleLink bool
	// If Writable is true, disks are opened for reading and writing, and have the
	// ability [source.Writable]. For a disk that cannot be written to, Open returns a
	// *UsageError.
	Writable bool
	// NBD has the options of the connections to NBD servers.
	NBD client.Options
	// VDDK has the options for disks that are opened through VMware's library. If it is
	// nil, opening such a disk returns an ErrNotRead.
	VDDK *VDDK
	// Datastore opens a disk in a datastore of a server. If it is nil, such a disk is opened
	// through VDDK.
	Datastore func(context.Context, address.Datastore) (source.Disk, error)
	// VM opens a disk of a VM that is named. If it is nil, opening such a disk returns an
	// ErrNotRead.
	VM func(context.Context, address.VM) (source.Disk, error)
	// Retry says how failed reads from an NBD server or through VDDK are repeated, if
	// necessary over new connections. The zero value repeats nothing.
	Retry source.RetryOptions

	mu    sync.Mutex
	files []File
}

// File is a local file or block device that was opened.
type File struct {
	Path string
	Info os.FileInfo
}

// Open opens the disk at an address in the given format. The address is one of these:
//
//   - the path of a local file or block device. format is "raw", "vmdk" or "qcow2". If
//     format is empty, the content of the file decides;
//   - PATH.ova or PATH.ovf, an appliance, if format is empty. #NUMBER or #NAME after
//     the path selects one of several disks;
//   - an NBD URI. format is empty or "raw";
//   - "[DATASTORE] DIR/DISK.vmdk", which Datastore opens if it is set. Otherwise VDDK
//     opens the disk as the next one. format is empty or "raw";
//   - "vddk:PATH", which VDDK opens with the parameters that VDDK.Params returns. format
//     is empty or "raw".
//
// When ctx ends, the calls of the disk fail with the error context.Cause(ctx). A disk
// of an appliance also has the abilities [Manifest] and [Warned].
//
// Open returns a *ChoiceError if the address of an appliance does not select one of its
// disks, a *ForeignError if the content of the file is no disk that this package can
// read, a *UsageError if the address or the format is wrong, and an error that wraps
// ErrNotRead if this program cannot read disks at such an address or of such a format.
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
	case address.Datastore:
		d, err := o.openDatastore(ctx, a, format)
		return notEmpty(d, a, format, err)
	case address.VDDK:
		d, err := o.openVDDK(ctx, a, format)
		return notEmpty(d, a, format, err)
	case address.VM:
		if o.VM != nil {
			d, err := o.openVM(ctx, a, format)
			return notEmpty(d, a, format, err)
		}
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
		return nil, notWritable("cannot write to %s, which is an appliance", path)
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
		// An empty file is refused, because it is nearly always left over from a failed
		// transfer.
		f.Close()
		return nil, &emptyError{path: path}
	}
	return o.openFormat(ctx, f, path, format, nil)
}

// openNBD opens an export of an NBD server.
func (o *Opener) openNBD(ctx context.Context, uri *nbd.URI, format string) (source.Disk, error) {
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s cannot be read as %s: an export of an NBD server is always read as a raw disk", uri, format)
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
		return nil, notWritable("cannot write to %s, which is a %s image", path, format)
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

// notWritable returns a usage error for a disk that cannot be written to. The given
// text names the disk and its format, or says why it cannot be written to.
func notWritable(format string, args ...any) error {
	return usage.Errorf("%s: only raw files, block devices, writable NBD exports and disks that VDDK opens can be written to", fmt.Sprintf(format, args...))
}

// notEmpty gets the two results of opening the disk at the address a: the disk d and an
// error. It normally returns both unchanged. If the disk has 0 bytes and the user gave
// no format, it closes the disk and returns an error, because the server or library
// most likely opened an empty file that is not a disk.
func notEmpty(d source.Disk, a address.Address, format string, err error) (source.Disk, error) {
	if err != nil || format != "" || d.Size() > 0 {
		return d, err
	}
	return nil, errors.Join(&emptyError{a.String(), true}, d.Close())
}

// emptyError reports a source of 0 bytes.
type emptyError struct {
	path   string
	opened bool // a server or a library opened the disk, which may be no file
}

func (e *emptyError) Error() string {
	if e.opened {
		return e.path + ": the disk is empty (0 bytes)"
	}
	return e.path + ": the file is empty (0 bytes), want a disk image"
}

func (e *emptyError) Hint() string {
	return "to use a disk of 0 bytes nevertheless, add --source-format raw"
}

func checkFormat(format string) error {
	switch format {
	case "", "raw", "vmdk", "qcow2":
	default:
		return usage.Errorf("source format %q: want raw, vmdk or qcow2", format)
	}
	return nil
}

// openFile opens a file and adds it to the list that Files returns.
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

// The method list adds a file to the list that Files returns, unless the file is in
// this list already.
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

// openFormat opens the image in the local file f, which was opened under the given
// path. It takes over f, and closes f if it returns an error. The parameter children is
// the chain of images that led to this image: first the image that was opened directly,
// and last the image that names this one. It is empty if this image was opened
// directly.
func (o *Opener) openFormat(ctx context.Context, f *raw.Disk, path, format string, children chain) (source.Disk, error) {
	return o.openImage(ctx, f, path, format, func() (source.Opener, error) { return o.references(f, path, children) })
}

// openImage does the work of openFormat. It can also open an image that is a file in an
// archive. The parameter f has the raw bytes of the image. The given function
// references returns the source.Opener for the files that the image names. openImage
// calls this function only if images of the format of this image can name files.
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
	return nil, fmt.Errorf("%s is a %s image: %w", path, format, ErrNotRead)
}

// The function inspect returns the format of f, which was opened under the given path,
// and warnings about its content. If the given format is not empty, inspect returns
// that format. Otherwise it recognizes the format by the content. It returns a
// *ForeignError if the content has a known format that this package cannot read, unless
// the given format is "raw".
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
		return format, nil, nil // if the content has another format, its reader returns an error
	}
	if probed == "raw" && c.isLUKS() {
		warnings = append(warnings, path+" is encrypted (LUKS): it is read as it is, and the copy needs the same passphrase")
	}
	return probed, warnings, nil
}

// warnedDisk adds warnings to a disk.
type warnedDisk struct {
	source.Disk
	warnings []string
}

// Unwrap implements [source.Wrapper].
func (d *warnedDisk) Unwrap() source.Disk { return d.Disk }

// Warnings implements [Warned].
func (d *warnedDisk) Warnings() []string { return d.warnings }

// Files returns the files that were opened so far. A file that was opened under several
// names is in the list only once.
func (o *Opener) Files() []File {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]File(nil), o.files...)
}

// Uses reports whether the Opener has opened the file or block device that the given
// FileInfo describes. It returns the path by which the file was opened, which may be
// another name of the file.
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
