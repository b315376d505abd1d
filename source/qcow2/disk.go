// Package qcow2 reads qcow2 images, the format of qemu's disks. The source code of qemu
// has the specification in docs/interop/qcow2.txt. [Open] opens an image with all files
// that it names, and returns a [Disk]. [Probe] recognizes an image by its first bytes.
//
// The package reads images of version 2 and 3 with clusters of 512 bytes to 2 MiB. A
// cluster may be stored as it is, be marked as zeros, or be compressed with zlib or
// zstd. Images may have subclusters (extended L2 entries), an external data file, and a
// backing file, which may have a backing file itself.
//
// Ranges that an image does not have are read from its backing file. The image records
// the format of the backing file. If it records none, the backing file is read as raw.
// The format is never derived from the content of that file. If it were, a virtual
// machine could write the header of a qcow2 image to its raw disk, and this header could
// name any file of the machine on which the package runs.
//
// The package refuses encrypted images, images that are marked as corrupt, images with
// unknown incompatible features, and backing and data files that are not local files.
// It ignores refcounts, and can therefore read images that were not closed cleanly. It
// does not read internal snapshots.
//
// Damage is reported when a read reaches it; damaged ranges never read as zeros.
// Together, an image and all its qcow2 backing files keep at most 4 MiB of tables and
// four unpacked clusters in memory. Each concurrent reader of compressed clusters needs
// the memory of about three more clusters.
package qcow2

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// Disk is the disk in a qcow2 image and its backing files. It is safe for concurrent
// use. It has the abilities [source.Identified], [source.Described],
// [source.InFile], [source.Mapped] and [source.Uncached].
type Disk struct {
	ctx      context.Context
	path     string
	file     source.Disk // the image file
	fileSize int64       // bytes
	id       uint64      // number of the file in mem
	data     source.Disk // has the plain clusters: file, or the external data file
	dataPath string
	dataSize int64         // bytes
	backing  source.Disk   // nil: there is none, or it is not opened
	lacks    source.Extent // the kind of ranges that the image does not have, if backing is nil
	*header
	cluster   int64 // bytes in a cluster
	unitShift uint  // base-2 logarithm of the bytes of a unit: a cluster, or a subcluster if there are any
	entryBits uint  // base-2 logarithm of the bytes of an L2 entry
	hasHoles  bool  // plain clusters may lie in holes of the file
	info      source.Info
	warnings  []string
	tables    *image.Places // places of the L2 tables
	mem       *image.Memory
	life      life.Life
}

// Options change how [Open] reads an image. The zero value reads an image with its
// backing files.
type Options struct {
	// SingleLink reads the image without its backing file. That file need not exist.
	// Ranges that the image does not have are [source.Inherited].
	SingleLink bool
}

// Open opens the image in f, and all files that the image names. f has the raw bytes of
// the image file, and path is the name of that file. The Disk takes over f, and closes it
// in Close. If Open returns an error, Open has closed f.
//
// The function open opens the other files. It is called with the name that the image has
// for a file, without a leading "file:", and with the format of the file. The format of a
// data file is "raw". The format of a backing file is the format that the image records,
// or "raw" if the image records none. The function open decides which files may be
// opened, and must return an error for a chain of images that loops.
//
// When ctx ends, the calls of the disk return the error context.Cause(ctx).
func Open(ctx context.Context, path string, f source.Disk, open source.Opener, o Options) (*Disk, error) {
	d := &Disk{
		ctx: ctx, path: path, file: f, fileSize: f.Size(), data: f, dataPath: path, dataSize: f.Size(),
		lacks: source.Extent{Kind: source.Zero, Absent: true}, life: life.Life{Context: ctx, Name: path},
	}
	if err := d.open(open, o); err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

func (d *Disk) open(open source.Opener, o Options) error {
	h, err := readHeader(d.file)
	if err != nil {
		return err
	}
	d.header, d.cluster, d.entryBits = h, 1<<h.clusterShift, h.entryShift()
	d.unitShift = h.clusterShift
	if h.has(featureExtendedL2) {
		d.unitShift -= 5 // 32 subclusters
	}
	if err := d.indexTables(); err != nil {
		return err
	}
	d.share(new(image.Memory))
	if h.has(featureDirty) {
		d.warnings = append(d.warnings, fmt.Sprintf("%s was not closed cleanly, or is in use (its dirty bit is set): the latest writes may be missing", d.path))
	}
	if h.snapshots > 0 {
		d.warnings = append(d.warnings, fmt.Sprintf("%s has %d internal snapshots, which are ignored: the current state of the disk is read", d.path, h.snapshots))
	}
	if err := d.openData(open); err != nil {
		return err
	}
	d.describe()
	if h.backingName == "" {
		return nil
	}
	if o.SingleLink {
		d.lacks = source.Extent{Kind: source.Inherited}
		return nil
	}
	return d.openBacking(open)
}

// openData opens the external data file, if the image has one.
func (d *Disk) openData(open source.Opener) error {
	if !d.has(featureDataFile) {
		return nil
	}
	if d.dataName == "" {
		return errors.New("the clusters are in an external data file (incompatible feature bit 2), but the header extension with the name of that file is missing")
	}
	name, err := localName(d.dataName)
	if err != nil {
		return fmt.Errorf("data file %w", err)
	}
	f, err := open(d.ctx, d.path, name, "raw")
	if err != nil {
		return fmt.Errorf("cannot open data file %s: %w", quote(d.dataName), err)
	}
	d.data, d.dataPath, d.dataSize = f, image.PathOf(f, d.dataName), f.Size()
	return nil
}

// openBacking opens the backing file.
func (d *Disk) openBacking(open source.Opener) error {
	name, err := localName(d.backingName)
	if err != nil {
		return fmt.Errorf("backing file %w", err)
	}
	format := strings.ToLower(d.backingFormat)
	switch format {
	case "":
		format = "raw"
		d.warnings = append(d.warnings, fmt.Sprintf("%s does not record the format of its backing file %s: the file is read as raw (qemu-img rebase -u -F FORMAT records the format)", d.path, quote(d.backingName)))
	case "host_device", "file": // qemu's names for a raw device and a raw file
		format = "raw"
	}
	d.backing, err = open(d.ctx, d.path, name, format)
	if err != nil {
		return fmt.Errorf("cannot open backing file %s: %w", quote(d.backingName), err)
	}
	path := image.PathOf(d.backing, d.backingName)
	if i, ok := source.Ability[source.Described](d.backing); ok {
		d.info.Chain = append(d.info.Chain, i.Info().Chain...)
	} else {
		d.info.Chain = append(d.info.Chain, path)
	}
	if w, ok := source.Ability[interface{ Warnings() []string }](d.backing); ok {
		d.warnings = append(d.warnings, w.Warnings()...)
	}
	if b, ok := source.Ability[*Disk](d.backing); ok {
		b.share(d.mem)
	}
	return nil
}

// The method share makes the image and all its backing files use m, a cache of a fixed
// size. A backing file that was just opened has a cache of its own. The image that opened
// it then calls share of the backing file with the cache of the image, so that the whole
// chain uses only one cache.
func (d *Disk) share(m *image.Memory) {
	d.mem, d.id = m, m.NewFile()
	m.Share(d.tables)
	if d.backing == nil {
		return
	}
	if b, ok := source.Ability[*Disk](d.backing); ok {
		b.share(m)
	}
}

// The regular expression protocol matches the beginning of a name for which qemu does not
// open a local file: the name of a protocol and a colon, as in "nbd:".
var protocol = regexp.MustCompile(`^[^/]*?:`)

// localName returns the path of the local file that qemu would open for a name in an
// image. It returns an error if qemu would not open a local file.
func localName(name string) (string, error) {
	if local, ok := strings.CutPrefix(name, "file:"); ok && local != "" && !strings.HasPrefix(local, "//") {
		return local, nil
	}
	if strings.HasPrefix(name, "json:") {
		return "", fmt.Errorf("%s is a list of options (json:), want the path of a local file (qemu-img rebase -u -b PATH -F FORMAT sets it)", quote(name))
	}
	if p := protocol.FindString(name); p != "" {
		return "", fmt.Errorf("%s uses the protocol %s, which is not supported: want the path of a local file (a path with a colon must begin with ./ or /)", quote(name), quote(p))
	}
	return name, nil
}

// Size implements [source.Disk]. It returns the size of the disk that the header
// records.
func (d *Disk) Size() int64 { return d.size }

// Close implements [source.Disk]. It closes the files of the image and its backing
// files.
func (d *Disk) Close() error {
	return d.life.Close(func() error {
		errs := []error{d.file.Close()}
		if d.data != d.file {
			errs = append(errs, d.data.Close())
		}
		if d.backing != nil {
			errs = append(errs, d.backing.Close())
		}
		return errors.Join(errs...)
	})
}

// ReadAt implements [source.Disk].
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.size, func(p []byte) (n int, err error) {
		err = d.walk(d.ctx, off, off+int64(len(p)), func(r *run, s stretch) error {
			err := d.read(p[n:n+int(s.n)], r, s)
			if err == nil {
				n += int(s.n)
			}
			return err
		})
		return n, err
	})
}

// The method read fills p with the content of the stretch s, a range whose content is of
// one kind. The run r has the table entries of this range.
func (d *Disk) read(p []byte, r *run, s stretch) error {
	switch s.kind {
	case absent:
		return image.ReadParent(d.backing, p, s.off)
	case zeros:
		clear(p)
		return nil
	case packed:
		return d.unpackAt(p, s.off, r)
	case bad:
		return d.badEntry(r, s.off)
	}
	if end := s.pos + s.n; end > d.dataSize {
		c := max(s.off, s.off+d.dataSize-s.pos) >> d.clusterShift // the first cluster past the end of the file
		start := max(s.off, c<<d.clusterShift)
		return d.errorAt(c, "the cluster is at offset %d of %s, which has %d bytes: that file is truncated, or the L2 table is damaged", s.pos+start-s.off, d.dataPath, d.dataSize)
	}
	if err := image.ReadFull(d.data, p, s.pos); err != nil {
		return d.errorAt(s.off>>d.clusterShift, "%w", err)
	}
	return nil
}

// Extents implements [source.Disk]. It reads the tables, but no data. Clusters that the
// tables mark as zeros are reported as [source.Zero], with the field Absent set to false.
// Some clusters are not marked as zeros, but lie in a hole of the file. These clusters
// are reported in the same way. Images with preallocated metadata have such clusters.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.path, d.size, off, length, func(out *image.Merger) error {
		return d.scan(ctx, off, off+length, func(s stretch) error { return d.emit(ctx, out, s) })
	})
}

// The method scan divides the bytes [off, end) of the disk into stretches, and passes
// each of them to the function emit. The content of a stretch is of one kind: for
// example, it is stored uncompressed, or absent. scan does not look into the backing
// files.
//
// If uncompressed clusters lie in a hole of the file, scan passes them as a stretch of
// the kind zeros. The field pos of this stretch is nevertheless its offset in the file.
func (d *Disk) scan(ctx context.Context, off, end int64, emit func(s stretch) error) error {
	if err := d.life.Check(ctx); err != nil {
		return err
	}
	return d.walk(ctx, off, end, func(_ *run, s stretch) error {
		if err := d.life.Check(ctx); err != nil {
			return err
		}
		if s.kind == plain && d.hasHoles && s.pos+s.n <= d.dataSize {
			return d.splitHoles(ctx, s, emit)
		}
		return emit(s)
	})
}

// splitHoles splits s, a range that the file stores uncompressed, into pieces that are
// either data or a hole of the file. It passes each piece to the function emit.
func (d *Disk) splitHoles(ctx context.Context, s stretch, emit func(s stretch) error) error {
	for e, err := range d.data.Extents(ctx, s.pos, s.n) {
		if err != nil {
			return err
		}
		piece := stretch{kind: plain, off: s.off + e.Off - s.pos, n: e.Len, pos: e.Off}
		if e.Kind == source.Zero {
			piece.kind = zeros
		}
		if err := emit(piece); err != nil {
			return err
		}
	}
	return nil
}

// The method emit adds the range s to out, which collects the extents of the disk. If the
// image does not have the range, the method adds the extents that the backing file has
// for this range.
func (d *Disk) emit(ctx context.Context, out *image.Merger, s stretch) error {
	e := source.Extent{Off: s.off, Len: s.n}
	switch {
	case s.kind == zeros:
		e.Kind = source.Zero
	case s.kind != absent:
	case d.backing != nil:
		return out.AddParent(ctx, d.backing, s.off, s.n)
	default:
		e.Kind, e.Absent = d.lacks.Kind, d.lacks.Absent
	}
	return out.Add(e)
}
