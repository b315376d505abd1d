// Package vmdk writes streamOptimized VMDK images ("Virtual Disk Format 5.0" by
// VMware, Stream-Optimized Compressed Sparse Extents) with [Create]. An image is
// one file with compressed grains. It is written from beginning to end, so that it
// can go into a pipe. vSphere imports VMDKs of this kind.
package vmdk

import (
	"context"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	reader "github.com/vddkcp/vddkcp/source/vmdk"
)

// MaxSize is the size of the largest disk that Create accepts, in bytes. The grain
// directory of the image of such a disk takes 8 MiB of memory. vSphere's own limit
// is 62 TiB.
const MaxSize = 64 << 40

// These are compression levels, as zlib numbers them. At DefaultLevel the image
// of a real file system has as many bytes as at zlib's own default level, but
// compressing it takes a fifth of the time. The measurements are in
// bench_test.go.
const (
	MinLevel     = 1
	MaxLevel     = 9
	DefaultLevel = 6
)

// Options are for Create. The descriptor records some fields of Options.Info, if
// they are set and valid: AdapterType, HWVersion, ToolsVersion, UUID, CID,
// Geometry and the guest's sector sizes.
type Options struct {
	sink.Options
	Level int // level of compression, MinLevel to MaxLevel; 0: DefaultLevel
}

// CheckSize returns an error if an image cannot contain a disk of the given size.
func CheckSize(size int64) error {
	switch {
	case size == sink.UnknownSize:
		return errors.New("a VMDK begins with the size of its disk, which is not known: give it with --size")
	case size <= 0:
		return fmt.Errorf("a disk of %d bytes cannot be a VMDK: want at least one sector of %d bytes", size, sectorSize)
	case size%sectorSize != 0:
		return fmt.Errorf("a disk of %d bytes cannot be a VMDK, which has whole sectors: want a multiple of %d bytes; a raw target (--format raw) keeps the size", size, sectorSize)
	case size > MaxSize:
		return fmt.Errorf("a disk of %d bytes cannot be a VMDK: want at most %d bytes (64 TiB)", size, int64(MaxSize))
	}
	return nil
}

// Create makes an image of a disk of the given size (in bytes). It writes the
// image to the given sink.Disk out, such as a raw file or a stream. This
// sink.Disk must be new, must be a sink.Sizer, and must have been created with
// sink.UnknownSize. Messages and the descriptor call the image by the given name.
// The returned disk owns out: its methods Publish, Suspend and Abort call the
// methods of out that have the same names. If Create returns an error, it has
// called the method Abort of out.
//
// The returned disk is sequential, with units of 64 KiB. It has the abilities
// sink.Zeroed and sink.Encoder. It is sink.Verifiable if out is. It cannot be
// checkpointed or resumed. Writing fails when the file of the image reaches 2
// TiB, because the format has no sector numbers for longer files.
func Create(ctx context.Context, out sink.Disk, name string, size int64, o Options) (sink.Disk, error) {
	d, err := create(ctx, out, name, size, o)
	if err != nil {
		return nil, errors.Join(err, out.Abort())
	}
	if _, ok := sink.Ability[sink.Verifiable](out); ok {
		return verifiable{d}, nil
	}
	return d, nil
}

func create(ctx context.Context, out sink.Disk, name string, size int64, o Options) (*disk, error) {
	if err := CheckSize(size); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if o.State != nil || o.Resume != 0 {
		return nil, fmt.Errorf("%s: %w", name, errNoResume)
	}
	if o.Backing != nil {
		return nil, fmt.Errorf("%s: a streamOptimized VMDK cannot have a backing disk", name)
	}
	if o.Level == 0 {
		o.Level = DefaultLevel
	}
	if o.Level < MinLevel || o.Level > MaxLevel {
		return nil, fmt.Errorf("%s: invalid compression level %d: want %d to %d", name, o.Level, MinLevel, MaxLevel)
	}
	sizer, ok := sink.Ability[sink.Sizer](out)
	if !ok {
		return nil, fmt.Errorf("%s: a streamOptimized VMDK can only be written to a file or a stream, because the size of the image is known only at the end", name)
	}
	text := newDescriptor(name, size, o.Info).text()
	if len(text) > descriptorSectors*sectorSize {
		return nil, fmt.Errorf("%s: the descriptor has %d bytes: want at most %d bytes", name, len(text), descriptorSectors*sectorSize)
	}
	d := &disk{
		Target: lifecycle.Target{Context: ctx, Name: name, Size: size, Unit: grainSize},
		level:  o.Level, out: out, sizer: sizer, file: newFile(out, size),
	}
	return d, d.file.begin(text)
}

var errNoResume = fmt.Errorf("a streamOptimized VMDK cannot be resumed: %w", errors.ErrUnsupported)

type disk struct {
	lifecycle.Target
	level int
	out   sink.Disk
	sizer sink.Sizer
	file  *file
	next  int64     // everything below this offset is written, bytes
	own   *encoding // used by WriteAt
}

func (d *disk) Unit() int64 { return grainSize }

// ZeroedFrom always returns true, because grains that are not written read as
// zeros.
func (d *disk) ZeroedFrom(int64) bool { return true }

// The method call runs the function do, which writes the range [off, off+n). If
// this range must not be written now, it returns an error and does not run do.
// For example, the range must not begin before the end of a range that was
// written earlier.
func (d *disk) call(ctx context.Context, off, n int64, do func() error) error {
	if err := d.Begin(ctx, off, n); err != nil {
		return err
	}
	defer d.Done()
	if off < d.next {
		return d.Fail(fmt.Errorf("%s is written in order: the next write must be at offset %d or above, but %d bytes came at offset %d", d.Name, d.next, n, off))
	}
	if err := do(); err != nil {
		return d.Fail(err)
	}
	return nil
}

// WriteAt encodes grains and writes them. Callers that encode grains themselves
// use NewEncoding and Place instead.
func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	err := d.call(d.Context, off, int64(len(p)), func() error { return d.write(p, off) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *disk) write(p []byte, off int64) error {
	if d.own == nil {
		d.own = newEncoding(d.level)
	}
	for len(p) > 0 {
		unit := p[:min(grainSize, len(p))]
		enc, _, err := d.own.Encode(d.own.scratch[:0], unit, off)
		if err != nil {
			return fmt.Errorf("%s: %w", d.Name, err)
		}
		d.own.scratch = enc
		if err := d.place(off, enc); err != nil {
			return err
		}
		p, off = p[len(unit):], off+int64(len(unit))
	}
	return nil
}

func (d *disk) ZeroAt(ctx context.Context, off, n int64) error {
	return d.call(ctx, off, n, func() error {
		d.next = off + n
		return nil
	})
}

func (d *disk) SameAt(ctx context.Context, off, n int64) error {
	return d.call(ctx, off, n, func() error {
		return fmt.Errorf("%s: cannot take bytes [%d, %d) from a backing disk: a streamOptimized VMDK has no backing disk", d.Name, off, off+n)
	})
}

// NewEncoding implements sink.Encoder. Its Encode never asks the caller to store a
// unit plain (uncompressed), because a grain of this format is always a zlib stream.
func (d *disk) NewEncoding() sink.Encoding { return newEncoding(d.level) }

// Place implements sink.Encoder.
func (d *disk) Place(off int64, enc []byte, plain bool) error {
	return d.call(d.Context, off, max(min(grainSize, d.Size-off), 1), func() error {
		if plain {
			return fmt.Errorf("%s: cannot store the grain at offset %d: found an uncompressed grain, want a compressed grain", d.Name, off)
		}
		if len(enc) == 0 || len(enc) > maxPacked {
			return fmt.Errorf("%s: cannot store the grain at offset %d: found %d bytes of compressed data, want 1 to %d bytes", d.Name, off, len(enc), maxPacked)
		}
		return d.place(off, enc)
	})
}

// The method place writes one encoded grain.
func (d *disk) place(off int64, enc []byte) error {
	if err := d.file.grain(off/grainSize, enc); err != nil {
		return d.explain(err)
	}
	d.next = min(off+grainSize, d.Size)
	return nil
}

func (d *disk) explain(err error) error {
	if errors.Is(err, errTooLong) {
		return fmt.Errorf("%s: %w", d.Name, err)
	}
	return err // errors of out have its name
}

func (d *disk) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	if err := d.Begin(d.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer d.Done()
	return nil, nil, d.Fail(fmt.Errorf("%s: %w", d.Name, errNoResume))
}

func (d *disk) Finish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Writing, func() error {
		if err := d.file.end(); err != nil {
			return d.explain(err)
		}
		if err := d.sizer.SetSize(d.file.pos); err != nil {
			return err
		}
		return d.out.Finish(ctx)
	})
}

func (d *disk) Publish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Finished, func() error { return d.out.Publish(ctx) })
}

// Suspend keeps the unfinished file for inspection. The file cannot be resumed.
func (d *disk) Suspend() error { return d.End(d.out.Suspend) }

func (d *disk) Abort() error { return d.Target.Abort(d.out.Abort) }

// verifiable is a disk whose file can be read back.
type verifiable struct{ *disk }

func (d verifiable) Reopen(ctx context.Context) (source.Disk, error) {
	if err := d.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer d.Done()
	v, _ := sink.Ability[sink.Verifiable](d.out)
	f, err := v.Reopen(ctx)
	if err != nil {
		return nil, err
	}
	return reader.Open(ctx, d.Name, f, nothingElse, reader.Options{})
}

// nothingElse is the source.Opener that is used when an image is read back. The
// reader of the image calls it to open further files of the image. It always
// returns an error, because an image of this package must consist of a single
// file.
func nothingElse(_ context.Context, from, name, _ string) (source.Disk, error) {
	return nil, fmt.Errorf("%s refers to the file %q, but a streamOptimized VMDK must be a single file", from, name)
}
