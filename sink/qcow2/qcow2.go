// Package qcow2 writes qcow2 images of version 3 (docs/interop/qcow2.txt of
// qemu): clusters of 512 bytes to 2 MiB, plain or compressed with zlib or zstd,
// and overlays.
//
// Everything is written in ascending order, but for the tables of checkpoints
// and refcount blocks, and the header last: until then the file begins with
// zeros and is no image. Compressed clusters lie one right behind the other,
// whatever sectors and clusters of the file they begin and end in. In memory are
// the L1 table, one L2 table, one refcount block and 1 MiB of what is to be
// written: 4 MiB with clusters of 64 KiB, whatever the size of the disk, and 37
// at most.
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

// Options are those of Create. The zero value makes a new image with clusters
// of 64 KiB that are not compressed, and replaces nothing. Of raw.Options,
// Preallocation and TargetIsZero do not apply.
type Options struct {
	raw.Options
	ClusterSize int64       // bytes, a power of two from 512 to 2 MiB; 0: 64 KiB
	Compression Compression // "": None
	Level       int         // see Levels; 0: the usual one
	// BackingName makes the image an overlay of the disk that Options.Backing
	// is: clusters that have the same content there are left to it. The name is
	// recorded as it is: relative ones start from the image's folder. So is its
	// format, "raw", "qcow2" or "vmdk", which no reader has to guess then.
	BackingName, BackingFormat string
}

// OptionError says that options make no sense, or not for a disk of that size.
type OptionError struct{ Err error }

func (e *OptionError) Error() string { return e.Err.Error() }
func (e *OptionError) Unwrap() error { return e.Err }

// protocol is what begins a name that readers take for no local file.
var protocol = regexp.MustCompile(`^[^/]*?:`)

// normal fills in what is left out and refuses what makes no sense.
func (o Options) normal(size int64) (Options, layout, error) {
	o.ClusterSize = cmp.Or(o.ClusterSize, DefaultClusterSize)
	o.Compression = cmp.Or(o.Compression, None)
	least, most, usual := Levels(o.Compression)
	switch {
	case usual > 0:
		if o.Level = cmp.Or(o.Level, usual); o.Level < least || o.Level > most {
			return o, layout{}, fmt.Errorf("compression %s has the levels %d to %d, not %d", o.Compression, least, most, o.Level)
		}
	case o.Compression != None:
		return o, layout{}, fmt.Errorf("compression %q: want none, zlib or zstd", o.Compression)
	case o.Level != 0:
		return o, layout{}, fmt.Errorf("level %d without a compression", o.Level)
	}
	if (o.Backing == nil) != (o.BackingName == "") {
		return o, layout{}, errors.New("an overlay needs the disk of its backing file and the name of it")
	}
	if protocol.MatchString(o.BackingName) {
		return o, layout{}, fmt.Errorf("the backing file's name %q: qemu takes %q for a protocol; begin it with ./", o.BackingName, protocol.FindString(o.BackingName))
	}
	switch o.BackingFormat {
	case "raw", "qcow2", "vmdk":
	default:
		if o.BackingName != "" {
			return o, layout{}, fmt.Errorf("backing format %q: want raw, qcow2 or vmdk", o.BackingFormat)
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

// Check says why Create would refuse the target, as far as that can be known
// without making anything.
func Check(address string, size int64, o Options) error {
	o, l, err := o.normal(size)
	if err != nil {
		return &OptionError{fmt.Errorf("%s: %w", address, err)}
	}
	_, fileOptions, err := o.resumed(l)
	if err != nil {
		return fmt.Errorf("resume %s: %w", address, err)
	}
	return raw.CheckImage(address, fileOptions)
}

// resumed returns the state to go on with, empty for a new image, and the
// options of its file.
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

// Create makes an image of a disk of size bytes, a multiple of 512, in a new
// file or on a block device, by the rules of raw.CreateFile and raw.OpenDevice.
// What a device has behind the image stays. A size that clusters of that size
// can't reach is an error that says which can.
//
// The disk is sequential, and what is passed over reads as zeros, in an overlay
// as the backing. It is a sink.Encoder, Zeroed without a backing, Verifiable
// and, in files and without compression or backing, a sink.Cloner.
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
		return nil, fmt.Errorf("resume %s: %w", address, err)
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
	zeroed bool  // the file reads as zeros where nothing was written
	at     int64 // where the disk goes on, bytes

	encodings []*encoding // of WriteAt
	jobs      []job       // of WriteAt
}

func (d *disk) begin(s state) error {
	if d.o.State == nil && d.zeroed {
		return d.tables.begin()
	}
	// Before anything is written: the file or device may be another one.
	if d.o.State != nil {
		d.at = d.o.Resume
		if err := d.restore(s, d.o.Resume); err != nil {
			return err
		}
	}
	// What an image is known by goes first, lest a crash leave the header of
	// another one. A file that is resumed may have been finished.
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

// withAbilities leaves away those that d does not have.
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

// zeroedDisk is a disk without a backing.
type zeroedDisk struct{ *disk }

// ZeroedFrom is true also after a resume, which clears the tables.
func (zeroedDisk) ZeroedFrom(int64) bool { return true }

func (d *disk) Unit() int64 { return d.cluster }

// Identity is that of the file or device.
func (d *disk) Identity() (string, error) { return sink.IdentityOf(d.file) }

// beginCall begins a call on [off, off+n), which is not before what was written.
func (d *disk) beginCall(ctx context.Context, off, n int64) error {
	if err := d.life.Begin(ctx, off, n); err != nil {
		return err
	}
	if off < d.at {
		defer d.life.Done()
		return d.life.Fail(fmt.Errorf("%s: the image is written in order: it goes on at %d, not at %d", d.address, d.at, off))
	}
	return nil
}

// endCall ends it.
func (d *disk) endCall(off, n int64, err error) error {
	defer d.life.Done()
	if err != nil {
		return d.life.Fail(d.named(err))
	}
	d.at = off + n
	return nil
}

// named names the target in an error, where its file has not.
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
		return fmt.Errorf("the cluster at %d is encoded in %d bytes, want 1 to %d", off, len(enc), d.cluster-1)
	case !plain:
		return d.pack(off>>d.shift, enc)
	case int64(len(enc)) != n:
		return fmt.Errorf("the cluster at %d has %d bytes, want %d", off, len(enc), n)
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
		return d.endCall(off, n, fmt.Errorf("[%d, %d) is to stay as in the backing, and there is none", off, off+n))
	}
	return d.endCall(off, n, nil)
}

// syncFile makes durable what was written to the file.
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
	// The header is the last to become durable.
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
	return qcow2.Open(ctx, d.address, f, func(context.Context, string, string, string) (source.Disk, error) {
		return borrowed{d.o.Backing}, nil
	}, qcow2.Options{})
}

// borrowed is a disk that another closes.
type borrowed struct{ source.Disk }

func (borrowed) Close() error { return nil }

func (d *disk) Publish(ctx context.Context) error {
	return d.life.Advance(ctx, lifecycle.Finished, func() error { return d.file.Publish(ctx) })
}

func (d *disk) Suspend() error { return d.life.End(d.file.Suspend) }
func (d *disk) Abort() error   { return d.life.Abort(d.file.Abort) }

// cloning is a disk whose clusters can be shared with other files.
type cloning struct {
	zeroedDisk
	file sink.Cloner
}

// CloneUnit is 0 where the clusters are smaller than what can be shared.
func (d cloning) CloneUnit(f *os.File) int64 { return cloneUnit(d.cluster, d.file.CloneUnit(f)) }

// CloneUnit is sink.Cloner's for an image that need not be there yet.
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
		return fmt.Errorf("%s: [%d, %d) ends within a cluster and can't be shared: %w", d.address, off, off+n, errors.ErrUnsupported)
	}
	done, err := d.share(d.file, f, pos, off>>d.shift, n>>d.shift)
	if errors.Is(err, errors.ErrUnsupported) {
		if done == 0 {
			d.life.Done()
			return err
		}
		err = fmt.Errorf("after a part of it: %v", err)
	}
	return d.endCall(off, n, err)
}
