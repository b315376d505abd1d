// Package qcow2 writes qcow2 images of version 3 (docs/interop/qcow2.txt of qemu)
// with [Create]. Clusters have 512 bytes to 2 MiB. They can be compressed with
// zlib or zstd. An image can be an overlay over a backing file.
//
// The file of an image is written in ascending order. Exceptions are the refcount
// blocks, and the tables that a checkpoint writes. The header is written last:
// until then the file begins with zeros and is not an image. Compressed data are
// stored directly after other compressed data. They may begin within a sector of
// the file, and may reach from one cluster of the file into the next. The L1
// table, one L2 table, one refcount block and 1 MiB of data are held in memory.
// With clusters of 64 KiB that is at most 4 MiB, whatever the size of the disk;
// with other cluster sizes it is at most 37 MiB.
package qcow2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/qcow2"
)

// Options are the options of Create. The zero value creates a new image with
// clusters of 64 KiB without compression, and does not replace an existing file.
// Preallocation and TargetIsZero of raw.Options have no effect.
type Options struct {
	raw.Options
	ClusterSize int64       // bytes, a power of two from 512 to 2 MiB; 0: 64 KiB
	Compression Compression // "": None
	Level       int         // one of Levels; 0: the default
	// BackingName makes the image an overlay of the disk Options.Backing: clusters
	// with the same content as the backing disk are not stored. The image records
	// BackingName unchanged. Readers take a relative name as relative to the
	// folder of the image. BackingFormat is recorded as well, so that readers need
	// not guess the format. It is "raw", "qcow2" or "vmdk".
	BackingName, BackingFormat string
}

// OptionError reports options that are invalid, either for every disk or for a disk
// of the requested size.
type OptionError struct{ Err error }

func (e *OptionError) Error() string { return e.Err.Error() }
func (e *OptionError) Unwrap() error { return e.Err }

// The regular expression protocol matches names of backing files that readers of
// qcow2 do not take for local files, because the beginning of the name looks like a
// protocol.
var protocol = regexp.MustCompile(`^[^/]*?:`)

// The method normal returns the options with all defaults filled in, and the layout
// of the image. It fails for invalid options.
func (o Options) normal(size int64) (Options, layout, error) {
	o.ClusterSize = cmp.Or(o.ClusterSize, DefaultClusterSize)
	o.Compression = cmp.Or(o.Compression, None)
	least, most, usual := Levels(o.Compression)
	switch {
	case usual > 0:
		if o.Level = cmp.Or(o.Level, usual); o.Level < least || o.Level > most {
			return o, layout{}, fmt.Errorf("compression level %[4]d is invalid: %[1]s has levels %[2]d to %[3]d", o.Compression, least, most, o.Level)
		}
	case o.Compression != None:
		return o, layout{}, fmt.Errorf("invalid compression method %q: want none, zlib or zstd", o.Compression)
	case o.Level != 0:
		return o, layout{}, fmt.Errorf("compression level %d without a compression method: want zlib or zstd as the method", o.Level)
	}
	if (o.Backing == nil) != (o.BackingName == "") {
		return o, layout{}, errors.New("an overlay needs a backing disk and the name of the backing file, but only one of the two was given")
	}
	if protocol.MatchString(o.BackingName) {
		return o, layout{}, fmt.Errorf("backing file name %q: qemu takes %q for a protocol; write ./ before the name", o.BackingName, protocol.FindString(o.BackingName))
	}
	switch o.BackingFormat {
	case "raw", "qcow2", "vmdk":
	default:
		if o.BackingName != "" {
			return o, layout{}, fmt.Errorf("invalid backing format %q: want raw, qcow2 or vmdk", o.BackingFormat)
		}
	}
	if size == sink.UnknownSize {
		return o, layout{}, errors.New("the size of a qcow2 disk must be known before it is written")
	}
	l, err := newLayout(size, o.ClusterSize)
	if err == nil {
		_, err = l.header(o, 0, 0)
	}
	return o, l, err
}

// Check returns the error that Create would return for the target, as far as that
// can be known without making anything.
func Check(address string, size int64, o Options) error {
	o, l, err := o.normal(size)
	if err != nil {
		return &OptionError{fmt.Errorf("%s: %w", address, err)}
	}
	_, fileOptions, err := o.resumed(l)
	if err != nil {
		return fmt.Errorf("cannot resume %s: %w", address, err)
	}
	return raw.CheckImage(address, fileOptions)
}

// The method resumed returns the state of the checkpoint from which a resumed copy
// continues, and the options for the file of the image. For a new image the state is
// empty.
func (o Options) resumed(l layout) (s state, file raw.Options, err error) {
	file = o.Options
	if o.State == nil {
		return s, file, nil
	}
	if s, err = parseState(o.State); err == nil {
		err = s.fits(l, o)
	}
	if err != nil {
		err = sink.Unfit(err)
	}
	file.State, file.Resume = s.file, s.next<<l.shift
	return s, file, err
}

// Create makes an image of a disk of the given size, a multiple of 512 bytes, in
// a new file or on a block device. The rules of raw.CreateFile and raw.OpenDevice
// apply. On a device, the content after the image is not changed. If the disk is
// too large for the cluster size, the error names a cluster size that is large
// enough.
//
// The returned disk is sequential. Ranges that are skipped read as zeros or, in
// an overlay, as the backing disk. The disk has the abilities sink.Encoder and
// sink.Verifiable. Without a backing disk it also has sink.Zeroed. If the image
// is in a file, and has neither compression nor a backing disk, the disk also
// has sink.Cloner.
func Create(ctx context.Context, address string, size int64, o Options) (sink.Disk, error) {
	o, l, err := o.normal(size)
	if err != nil {
		return nil, &OptionError{fmt.Errorf("%s: %w", address, err)}
	}
	return create(ctx, address, l, o, func(o raw.Options) (raw.Image, error) { return raw.CreateImage(ctx, address, o) })
}

func create(ctx context.Context, address string, l layout, o Options, open func(raw.Options) (raw.Image, error)) (_ sink.Disk, err error) {
	s, fileOptions, err := o.resumed(l)
	if err != nil {
		return nil, fmt.Errorf("cannot resume %s: %w", address, err)
	}
	f, err := open(fileOptions)
	if err != nil {
		return nil, err
	}
	d := &disk{
		life: lifecycle.Target{Context: ctx, Name: address, Size: l.size, Unit: l.cluster},
		file: f, o: o, address: address, tables: newTables(l, run{file: f, size: runSize}),
		zeroed: o.State == nil && f.ZeroedFrom(0),
	}
	if err := d.begin(s); err != nil {
		return nil, errors.Join(d.named(err), f.Abort())
	}
	return d.withAbilities(), nil
}

type disk struct {
	life    lifecycle.Target
	file    raw.Image
	o       Options
	address string
	*tables
	zeroed bool  // unwritten ranges of the file read as zeros
	at     int64 // offset in the disk of the next write, bytes

	encodings []*encoding // used by WriteAt
	jobs      []job       // used by WriteAt
}

func (d *disk) begin(s state) error {
	if d.o.State == nil && d.zeroed {
		return d.tables.begin()
	}
	// The method restore also checks that the checkpoint belongs to this file or
	// device. It is therefore called before anything is written.
	if d.o.State != nil {
		d.at = d.o.Resume
		if err := d.restore(s, d.o.Resume); err != nil {
			return err
		}
	}
	// The bytes of the header are cleared first. Otherwise the header of an image that
	// was in the file or device before would stay in front of the new content, and
	// after a crash the target would begin with this old header. A resumed image, too,
	// has a header if the earlier run has finished the image.
	if _, err := d.file.WriteAt(make([]byte, min(d.cluster, 4096)), 0); err != nil {
		return err
	}
	if err := d.syncFile(d.life.Context); err != nil {
		return err
	}
	if d.o.State == nil {
		return d.tables.begin()
	}
	return nil
}

// withAbilities returns the disk d as a sink.Disk whose type implements the
// interface of an ability (see package sink) only if d has this ability.
func (d *disk) withAbilities() sink.Disk {
	cloner, ok := sink.Ability[sink.Cloner](d.file)
	switch {
	case d.o.Backing != nil:
		return d
	case ok && d.o.Compression == None:
		return cloning{zeroedDisk{d}, cloner}
	}
	return zeroedDisk{d}
}

// zeroedDisk is a disk without a backing file.
type zeroedDisk struct{ *disk }

// ZeroedFrom returns true even for a resumed image, because restore has cleared
// the entries of all clusters that the earlier run wrote after the checkpoint.
func (zeroedDisk) ZeroedFrom(int64) bool { return true }

func (d *disk) Unit() int64 { return d.cluster }

// Identity returns the identity of the file or device.
func (d *disk) Identity() (string, error) { return sink.IdentityOf(d.file) }

// beginCall is called at the beginning of every method that writes a range. It
// returns an error if the method must not write [off, off+n) now, for example
// because the previous write ended at an offset above off.
func (d *disk) beginCall(ctx context.Context, off, n int64) error {
	if err := d.life.Begin(ctx, off, n); err != nil {
		return err
	}
	if off < d.at {
		defer d.life.Done()
		return d.life.Fail(fmt.Errorf("%s: the image is written in order: the next write must be at offset %d or above, not at %d", d.address, d.at, off))
	}
	return nil
}

// endCall is called at the end of every method that has called beginCall, for
// example WriteAt. The parameter err is the error of the write, or nil. The result
// of endCall is the error that WriteAt or the other method must return.
func (d *disk) endCall(off, n int64, err error) error {
	defer d.life.Done()
	if err != nil {
		return d.life.Fail(d.named(err))
	}
	d.at = off + n
	return nil
}

// The method named adds the address of the target to an error, unless the text of
// the error contains it already.
func (d *disk) named(err error) error {
	if strings.Contains(err.Error(), d.address) {
		return err
	}
	return fmt.Errorf("%s: %w", d.address, err)
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.beginCall(d.life.Context, off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := d.endCall(off, int64(len(p)), d.store(p, off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Place implements sink.Encoder.
func (d *disk) Place(off int64, enc []byte, plain bool) error {
	n := min(d.cluster, d.size-off)
	if err := d.beginCall(d.life.Context, off, n); err != nil {
		return err
	}
	return d.endCall(off, n, d.place(off, enc, plain, n))
}

func (d *disk) place(off int64, enc []byte, plain bool, n int64) error {
	switch {
	case !plain && (len(enc) == 0 || int64(len(enc)) >= d.cluster):
		return fmt.Errorf("the encoded cluster at offset %d has %d bytes, want 1 to %d bytes", off, len(enc), d.cluster-1)
	case !plain:
		return d.pack(off>>d.shift, enc)
	case int64(len(enc)) != n:
		return fmt.Errorf("the cluster at offset %d has %d bytes, want %d bytes", off, len(enc), n)
	}
	return d.add(off>>d.shift, enc)
}

func (d *disk) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.beginCall(ctx, off, n); err != nil {
		return err
	}
	if d.o.Backing == nil {
		return d.endCall(off, n, nil)
	}
	return d.endCall(off, n, d.hide(ctx, off, n))
}

func (d *disk) SameAt(ctx context.Context, off, n int64) error {
	if err := d.beginCall(ctx, off, n); err != nil {
		return err
	}
	if d.o.Backing == nil {
		return d.endCall(off, n, fmt.Errorf("cannot take bytes [%d, %d) from a backing disk: the image has no backing disk", off, off+n))
	}
	return d.endCall(off, n, nil)
}

// syncFile makes everything that was written to the image's file durable.
func (d *disk) syncFile(ctx context.Context) error {
	_, sync, err := d.file.Checkpoint(0)
	if err != nil {
		return err
	}
	return sync(ctx)
}

func (d *disk) Finish(ctx context.Context) error {
	return d.life.Advance(ctx, lifecycle.Writing, func() error {
		if err := d.finish(ctx); err != nil {
			return d.named(err)
		}
		return nil
	})
}

func (d *disk) finish(ctx context.Context) error {
	refTable, clusters, err := d.tables.finish(d.zeroed)
	if err != nil {
		return err
	}
	if err := d.file.SetSize(d.tables.next << d.shift); err != nil {
		return err
	}
	header, err := d.header(d.o, refTable, clusters)
	if err != nil {
		return err
	}
	// The header is written only after everything else is durable.
	if err := d.syncFile(ctx); err != nil {
		return err
	}
	if _, err := d.file.WriteAt(header, 0); err != nil {
		return err
	}
	return d.file.Finish(ctx)
}

// Reopen implements sink.Verifiable.
func (d *disk) Reopen(ctx context.Context) (source.Disk, error) {
	if err := d.life.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer d.life.Done()
	f, err := d.file.Reopen(ctx)
	if err != nil {
		return nil, err
	}
	return d.openImage(ctx, f)
}

// openImage opens the image that d writes, for reading. The parameter f is the file of
// this image. If the image has a backing disk, closing the image leaves the backing
// disk open.
func (d *disk) openImage(ctx context.Context, f source.Disk) (*qcow2.Disk, error) {
	backing := func(context.Context, string, string, string) (source.Disk, error) { return borrowed{d.o.Backing}, nil }
	return qcow2.Open(ctx, d.address, f, backing, qcow2.Options{})
}

// The type borrowed is a disk that another part of the program owns and closes. Its
// Close therefore does nothing.
type borrowed struct{ source.Disk }

func (borrowed) Close() error { return nil }

func (d *disk) Publish(ctx context.Context) error {
	return d.life.Advance(ctx, lifecycle.Finished, func() error { return d.file.Publish(ctx) })
}

func (d *disk) Suspend() error { return d.life.End(d.file.Suspend) }
func (d *disk) Abort() error   { return d.life.Abort(d.file.Abort) }

// The type cloning is a disk that can share its clusters with other files.
type cloning struct {
	zeroedDisk
	file sink.Cloner
}

// CloneUnit implements sink.Cloner. It returns 0 if the cluster size is not a
// multiple of the size of the blocks that can be shared.
func (d cloning) CloneUnit(f *os.File) int64 { return cloneUnit(d.cluster, d.file.CloneUnit(f)) }

// CloneUnit tells whether an image that is created at the given address could
// share blocks with the file f, and with which alignment. The result is the one
// that the method CloneUnit of sink.Cloner would return after the image is
// created.
func CloneUnit(address string, f *os.File, o Options) int64 {
	if o.Backing != nil || cmp.Or(o.Compression, None) != None {
		return 0
	}
	return cloneUnit(cmp.Or(o.ClusterSize, DefaultClusterSize), raw.CloneUnit(address, f))
}

func cloneUnit(cluster, unit int64) int64 {
	if unit == 0 || cluster%unit != 0 {
		return 0
	}
	return cluster
}

func (d cloning) CloneFrom(f *os.File, pos, off, n int64) error {
	if err := d.beginCall(d.life.Context, off, n); err != nil {
		return err
	}
	if n%d.cluster != 0 {
		d.life.Done()
		return fmt.Errorf("%s: cannot share blocks for bytes [%d, %d), because this range ends within a cluster: %w", d.address, off, off+n, errors.ErrUnsupported)
	}
	done, err := d.share(d.file, f, pos, off>>d.shift, n>>d.shift)
	if errors.Is(err, errors.ErrUnsupported) {
		if done == 0 {
			d.life.Done()
			return err
		}
		err = fmt.Errorf("cannot share blocks for bytes [%d, %d): only the first %d bytes share blocks now: %v", off, off+n, done<<d.shift, err)
	}
	return d.endCall(off, n, err)
}
