package open

import (
	"context"
	"fmt"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk"
)

// VDDK is how disks are opened through VMware's library.
type VDDK struct {
	// Params returns the parameters of the disk at file: a datastore path,
	// or a path. It may ask for a password, so it is called for disks that are
	// to be opened only.
	Params func(ctx context.Context, file string) (vddk.Params, error)
	// Options tune the reading. Their Retry and Writable are the Opener's.
	Options vddk.Options
	// Open replaces vddk.Open in tests; nil: that.
	Open func(context.Context, vddk.Params, vddk.Library, vddk.Options) (source.Disk, error)
}

// ThroughVDDK is the ability of a disk to tell how VDDK came to it.
type ThroughVDDK interface {
	Library() vddk.Library
	Params() vddk.Params
}

// maxVDDKRequest bounds one request, in bytes: NFC fails under load with more.
const maxVDDKRequest = 2 << 20

// openVDDK refuses what it can before it looks for the library. What the server
// shows vddk.Open looks at before the library sees a secret.
func (o *Opener) openVDDK(ctx context.Context, a address.Address, format string) (source.Disk, error) {
	if format != "" && format != "raw" {
		return nil, usage.Errorf("%s as %s: what VDDK opens is taken as a raw disk", a, format)
	}
	if o.VDDK == nil {
		return nil, fmt.Errorf("%s: %w", a, ErrNotRead)
	}
	if n := o.VDDK.Options.RequestSize; n > maxVDDKRequest {
		return nil, usage.Errorf("%s: requests of %d bytes: want at most 2MiB for VDDK, hosts fail with more", a, n)
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
		return nil, fmt.Errorf("%s: %w", a, err)
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

// vddkDisk knows where the disk came from.
type vddkDisk struct {
	source.Disk
	library vddk.Library
	params  vddk.Params
}

// Unwrap implements source.Wrapper.
func (d *vddkDisk) Unwrap() source.Disk { return d.Disk }

// Library implements ThroughVDDK.
func (d *vddkDisk) Library() vddk.Library { return d.library }

// Params implements ThroughVDDK.
func (d *vddkDisk) Params() vddk.Params { return d.params }
