// Package open turns the address of a target into a [sink.Disk]. [PlaceOf] finds
// out where the target is, [Place.Plan] checks that the target can be written, and
// [Target.Create] creates it. [Create] does all three steps. No other package
// imports the writers of all formats.
package open

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// UsageError says that an address or an option is invalid on every machine,
// whatever files exist.
type UsageError = usage.Error

// Options say how to write a target. The zero value creates a target that must
// not exist yet, in the format that the address implies. The fields without a
// comment are explained in the documentation of raw.Options.
type Options struct {
	sink.Options
	Format        string // "raw", "qcow2" or "vmdk"; "" derives it from the name
	Compress      string // METHOD or METHOD:LEVEL; "" means the format's default
	Force         bool
	DropPartial   bool
	Preallocation raw.Preallocation
	TargetIsZero  bool
	DropCache     bool
	Need          int64 // bytes
	Source        func(os.FileInfo) (path string, ok bool)
	Warn          func(message string)
	Stdout        *os.File       // the file for "-"; nil means os.Stdout
	NBD           client.Options // without Warn, which is the Warn above

	// All fields below this comment are for qcow2 targets. They are explained in the
	// documentation of qcow2.Options.
	ClusterSize                int64 // bytes
	BackingName, BackingFormat string
}

// ofImages returns the first option that is set and that is valid only for image
// formats. It returns "" if no such option is set.
func (o Options) ofImages() string {
	switch {
	case o.Compress != "" && o.Compress != "none":
		return "--compress " + o.Compress
	case o.ClusterSize != 0:
		return "--cluster-size"
	case o.BackingName != "":
		return "--backing"
	}
	return ""
}

func (o Options) raw() raw.Options {
	return raw.Options{
		Options: o.Options, Force: o.Force, DropPartial: o.DropPartial, Preallocation: o.Preallocation, TargetIsZero: o.TargetIsZero,
		DropCache: o.DropCache, Need: o.Need, Source: o.Source, Warn: o.Warn,
	}
}

// Target is the result of Plan: a target that can be written, as far as this can be
// known without creating or changing anything. It is not safe for concurrent use.
type Target struct {
	Place
	Format string // "raw", "qcow2" or "vmdk"
	Zeroed bool   // unwritten ranges of the disk will read as zeros, see sink.Zeroed
	// CloneUnit tells in advance whether the disk can share blocks with a
	// given local file, and with which alignment. It returns what the method
	// CloneUnit of sink.Cloner will return after the disk is created. It is
	// nil if the target cannot share blocks with any file.
	CloneUnit func(*os.File) int64

	options *Options // for create and reserve
	create  func(context.Context) (sink.Disk, error)
	check   func(context.Context) error // nil: Plan has checked everything
	reserve func() error                // checks the room for options.Need bytes; nil: it does not depend on them
}

// String describes the target, for example as "raw file" or "vmdk stream".
func (t *Target) String() string { return t.Format + " " + t.Kind }

// Reserve sets the number of bytes that the whole target will need, including
// the part that an earlier run has written. It returns an error that wraps
// unix.ENOSPC if the file system has less room. The space of an existing
// .partial file counts as room, because the copy resumes or replaces this file.
// Reserve does not allocate the space. It has no effect on targets that are not
// files, and on files whose size is unknown until they are written.
func (t *Target) Reserve(need int64) error {
	if t.reserve == nil {
		return nil
	}
	t.options.Need = need
	return t.reserve()
}

// DropCache has the same effect as the field Options.DropCache: data that were
// written are removed from the page cache.
func (t *Target) DropCache() { t.options.DropCache = true }

// Create makes the target, or opens it to resume it.
func (t *Target) Create(ctx context.Context) (sink.Disk, error) { return t.create(ctx) }

// Check checks whether a target that is an NBD export can be written, without
// opening the export. Plan does not check this for NBD exports. For other targets
// Check does nothing and returns nil. If the NBD server does not support such a
// check, the error wraps errors.ErrUnsupported.
func (t *Target) Check(ctx context.Context) error {
	if t.check == nil {
		return nil
	}
	return t.check(ctx)
}

// Create parses an address, plans the target and creates it.
func Create(ctx context.Context, text string, size int64, o Options) (sink.Disk, error) {
	a, err := address.Parse(text, address.Target)
	if err != nil {
		return nil, err
	}
	t, err := PlaceOf(a).Plan(ctx, size, o)
	if err != nil {
		return nil, err
	}
	return t.Create(ctx)
}

// Plan checks a target for a disk of the given size (in bytes), without creating
// or changing anything. It fails if vddkcp cannot write the format, if the
// target exists, is too small, is in use or is the source, or if there is too
// little space.
//
// The size may be sink.UnknownSize for raw targets that are not NBD exports.
// The created disk is then a sink.Sizer.
//
// If the target is an NBD export, Plan does not connect to the server, because
// some servers serve only one client. Instead Create checks the export, and
// passes the warnings of this check to Options.Warn. For all other targets, only
// Plan calls Options.Warn.
func (p Place) Plan(ctx context.Context, size int64, o Options) (*Target, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if size < 0 && size != sink.UnknownSize {
		return nil, fmt.Errorf("%s: invalid disk size of %d bytes", p.Address, size)
	}
	switch o.Format {
	case "", "raw", "qcow2", "vmdk":
	default:
		return nil, usage.Errorf("invalid format %q: want raw, qcow2 or vmdk", o.Format)
	}
	switch p.Format(o.Format) {
	case "vmdk":
		return p.planVMDK(size, o)
	case "qcow2":
		return p.planQcow2(size, o)
	}
	if option := o.ofImages(); option != "" {
		return nil, usage.Errorf("%s: the option %s is not valid for raw disks", p.Address, option)
	}
	return p.planRaw(size, o)
}

func (p Place) planRaw(size int64, o Options) (*Target, error) {
	switch a := p.Address.(type) {
	case address.Null:
		return &Target{Place: p, Format: "raw", Zeroed: true, options: &o, create: func(ctx context.Context) (sink.Disk, error) {
			return raw.Null(ctx, size), nil
		}}, nil
	case address.Stream:
		return p.planStdout(size, o)
	case address.NBD:
		return p.planNBD(a.URI, size, o)
	case address.Path:
		switch p.Kind {
		case "block device":
			return p.planDevice(string(a), size, o)
		case "stream":
			return p.planStream(string(a), size, o)
		}
		return p.planFile(string(a), size, o)
	}
	return nil, usage.Errorf("%s: vddkcp cannot write to this kind of address: want a path, an NBD URI, \"-\" for standard output, or \"null:\" to write nothing", p.Address)
}

func (p Place) planFile(path string, size int64, o Options) (*Target, error) {
	if o.Format == "" {
		switch ext := strings.ToLower(filepath.Ext(path)); ext {
		case ".qcow", ".qed", ".vdi", ".vhd", ".vhdx", ".ova", ".ovf":
			return nil, usage.Errorf("%s: vddkcp does not write the format %s: choose another name, or give the format with --format", path, ext[1:])
		}
	}
	if err := raw.CheckFile(path, size, o.raw()); err != nil {
		return nil, err
	}
	t := &Target{Place: p, Format: "raw", Zeroed: o.Preallocation != raw.PreallocateFull, options: &o}
	t.create = func(ctx context.Context) (sink.Disk, error) {
		o.Warn = nil // Plan has warned already
		return raw.CreateFile(ctx, path, size, o.raw())
	}
	t.reserve = func() error { return raw.CheckSpace(path, size, o.raw()) }
	if o.Preallocation == raw.PreallocateOff || o.Preallocation == "" {
		t.CloneUnit = func(f *os.File) int64 { return raw.CloneUnit(path, f) }
	}
	return t, nil
}

func (p Place) planDevice(path string, size int64, o Options) (*Target, error) {
	if err := raw.CheckDevice(path, size, o.raw()); err != nil {
		return nil, err
	}
	return &Target{Place: p, Format: "raw", Zeroed: o.TargetIsZero && o.State == nil, options: &o, create: func(ctx context.Context) (sink.Disk, error) {
		o.Warn = nil // Plan has warned already
		return raw.OpenDevice(ctx, path, size, o.raw())
	}}, nil
}

func (p Place) planNBD(uri *nbd.URI, size int64, o Options) (*Target, error) {
	if size == sink.UnknownSize {
		return nil, usage.Errorf("%s: a disk of unknown size cannot be written to an NBD server: give the size with --size", uri)
	}
	options := client.SinkOptions{
		Options: o.Options, Client: o.NBD, TargetIsZero: o.TargetIsZero,
		NoHole: o.Preallocation == raw.PreallocateFalloc || o.Preallocation == raw.PreallocateFull,
	}
	options.Client.Warn = o.Warn
	return &Target{
		Place: p, Format: "raw", Zeroed: o.TargetIsZero && o.State == nil, options: &o,
		check:  func(ctx context.Context) error { return client.Check(ctx, uri, size, o.NBD) },
		create: func(ctx context.Context) (sink.Disk, error) { return client.Create(ctx, uri, size, options) },
	}, nil
}
