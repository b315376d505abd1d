package open

import (
	"context"
	"fmt"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk"
)

// VDDK has the options for opening disks through VMware's library.
type VDDK struct {
	// Params returns the parameters with which VDDK opens the disk at the given path,
	// normally a path in a datastore of the server. It may ask the user for a password.
	// Therefore it is called only when a disk is opened through VDDK.
	Params func(ctx context.Context, file string) (vddk.Params, error)
	// Options are the options of the connection. Their fields Retry and Writable are
	// ignored, and the fields of the same name in the Opener are used.
	Options vddk.Options
	// Open, if it is not nil, is called instead of [vddk.Open]. Only tests set it.
	Open func(context.Context, vddk.Params, vddk.Library, vddk.Options) (source.Disk, error)
}

// ThroughVDDK is the ability of a disk to return the library and the parameters with
// which VDDK opened it.
type ThroughVDDK interface {
	Library() vddk.Library
	Params() vddk.Params
}

// maxVDDKRequest is the largest size of a read or write request in bytes. VDDK reads
// from an ESXi host with the protocol NFC. In this protocol, larger requests fail when
// the ESXi host is under load.
const maxVDDKRequest = 2 << 20

// openDatastore opens a disk in a datastore of a server.
func (o *Opener) openDatastore(ctx context.Context, a address.Datastore, format string) (source.Disk, error) {
	if o.Datastore == nil {
		return o.openVDDK(ctx, a, format)
	}
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s cannot be read as %s: a disk on a server is read as a raw disk", a, format)
	}
	if o.Writable {
		return nil, usage.New(fmt.Sprintf("%s cannot be written to, because only VDDK can write disks on a server", a), "read the disk through VDDK (--via vddk), or use --cow, which keeps what clients write in another file")
	}
	d, err := o.Datastore(ctx, a)
	if err != nil && !strings.Contains(err.Error(), a.String()) {
		err = fmt.Errorf("%s: %w", a, err)
	}
	return d, err
}

// withoutLibrary adds to the hint of err, which says that no library was found, that a disk in a
// datastore can also be read without the library.
func (o *Opener) withoutLibrary(err error, a address.Address) error {
	if _, ok := a.(address.Datastore); !ok || o.Writable {
		return err
	}
	return hinted.Error(err, hinted.Of(err)+"; or add --via nfc (experimental), which reads disks on a server without this library")
}

// openVDDK opens a disk through VDDK. It checks all parameters before it loads the
// library, so that mistakes are reported even if the library is missing. vddk.Open
// checks the server's certificate before the library gets a password.
func (o *Opener) openVDDK(ctx context.Context, a address.Address, format string) (source.Disk, error) {
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s cannot be read as %s: a disk that VDDK opens is read as a raw disk", a, format)
	}
	if o.VDDK == nil {
		return nil, fmt.Errorf("%s: %w", a, ErrNotRead)
	}
	if n := o.VDDK.Options.RequestSize; n > maxVDDKRequest {
		return nil, usage.Errorf("%s: the request size is %d bytes, want at most 2MiB for VDDK, because larger requests fail on hosts under load", a, n)
	}
	file, _ := address.VDDKFile(a)
	params, err := o.VDDK.Params(ctx, file)
	if err == nil {
		err = params.Validate()
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	library, err := vddk.FindLibrary(params.LibDir)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a, o.withoutLibrary(err, a))
	}
	openDisk := o.VDDK.Open
	if openDisk == nil {
		openDisk = func(ctx context.Context, p vddk.Params, l vddk.Library, o vddk.Options) (source.Disk, error) {
			d, err := vddk.Open(ctx, p, l, o)
			if err != nil {
				return nil, err // not a nil *vddk.Disk
			}
			return d, nil
		}
	}
	options := o.VDDK.Options
	options.Retry, options.Writable = o.Retry, o.Writable
	d, err := openDisk(ctx, params, library, options)
	if err != nil {
		if !strings.Contains(err.Error(), params.File) { // most errors name the disk
			err = fmt.Errorf("%s: %w", a, err)
		}
		return nil, err
	}
	return &vddkDisk{d, library, params}, nil
}

// openVM opens a disk of a VM.
func (o *Opener) openVM(ctx context.Context, a address.VM, format string) (source.Disk, error) {
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s cannot be read as %s: a disk of a VM is read as a raw disk", a, format)
	}
	if o.Writable {
		return nil, usage.New(fmt.Sprintf("%s cannot be written to, because a snapshot of it is read", a), "use --cow, which keeps what clients write in another file")
	}
	return o.VM(ctx, a)
}

// vddkDisk adds the ability ThroughVDDK to a disk.
type vddkDisk struct {
	source.Disk
	library vddk.Library
	params  vddk.Params
}

// Unwrap implements [source.Wrapper].
func (d *vddkDisk) Unwrap() source.Disk { return d.Disk }

// Library implements [ThroughVDDK].
func (d *vddkDisk) Library() vddk.Library { return d.library }

// Params implements [ThroughVDDK].
func (d *vddkDisk) Params() vddk.Params { return d.params }
