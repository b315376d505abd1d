// Package qcow2 reads qcow2 images of version 2 and 3 (docs/interop/qcow2.txt
// of qemu): clusters of 512 bytes to 2 MiB, plain, of zeros, or compressed with
// zlib or zstd, also with subclusters (extended L2 entries) and in an external
// data file, and chains of backing files.
//
// What an image lacks is its backing file's, whose format is the one that the
// image records. Where it records none it is raw and never probed, since a guest
// that writes to a raw disk can make that look like an image that names files of
// the host. Encrypted images are refused by name, and so are those marked as
// corrupt, those with incompatible features that are not known, and backing and
// data files that are no local files. Refcounts are not looked at, so an image
// that was not closed cleanly reads as it is. Internal snapshots are left out.
//
// What is damaged is an error when it is come to, never zeros. An image takes
// at most 4 MiB for its tables, with all its backing images of this format, and
// four clusters for reads of pieces of compressed ones; each reader of these
// about three clusters more.
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

// Disk is a disk in a qcow2 image and the images that it is backed by. Beside
// source.Disk it is Identified, Described, InFile, Mapped and Uncached.
type Disk struct {
	ctx      context.Context
	path     string
	file     source.Disk // the image
	fileSize int64
	id       uint64      // of the file, in memory
	data     source.Disk // that has the plain clusters: file, or the external data file
	dataPath string
	dataSize int64
	backing  source.Disk   // nil: none, or not opened
	lacks    source.Extent // what a range is that the image lacks, where there is no backing file
	*header
	cluster   int64 // bytes
	unitShift uint  // of what is allocated at once: a cluster or a subcluster
	entryBits uint  // of the bytes of an L2 entry
	hasHoles  bool  // plain clusters may be holes of the file
	info      source.Info
	warnings  []string
	tables    *image.Places // L2 tables
	mem       *image.Memory
	life      life.Life
}

// Options say how an image is read. The zero value reads it with its backing
// files.
type Options struct {
	// SingleLink reads the image without its backing file, which need not be
	// there: what it lacks is Inherited.
	SingleLink bool
}

// Open opens the image whose file is at path, and all that it names. F holds
// the raw bytes of that file; the Disk owns it, and Open closes it where it
// returns an error. A data file is opened by open with the format "raw", a
// backing file with the format that the image records, else "raw", and their
// own names as the image has them, but for a leading "file:"; open decides which
// names it follows, and ends chains that loop. The disk lives under ctx.
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
		d.warnings = append(d.warnings, fmt.Sprintf("%s was not closed cleanly, or is in use (its dirty bit is set): what was written last may be missing", d.path))
	}
	if h.snapshots > 0 {
		d.warnings = append(d.warnings, fmt.Sprintf("%s has %d internal snapshots, which are left out: the disk is read as it is now", d.path, h.snapshots))
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

// openData opens the external data file, where there is one.
func (d *Disk) openData(open source.Opener) error {
	if !d.has(featureDataFile) {
		return nil
	}
	if d.dataName == "" {
		return errors.New("its clusters are in an external data file (incompatible feature bit 2), and the header extension that names it is missing")
	}
	name, err := localName(d.dataName)
	if err != nil {
		return fmt.Errorf("data file %w", err)
	}
	f, err := open(d.ctx, d.path, name, "raw")
	if err != nil {
		return fmt.Errorf("data file %s: %w", quote(d.dataName), err)
	}
	d.data, d.dataPath, d.dataSize = f, image.PathOf(f, d.dataName), f.Size()
	return nil
}

func (d *Disk) openBacking(open source.Opener) error {
	name, err := localName(d.backingName)
	if err != nil {
		return fmt.Errorf("backing file %w", err)
	}
	format := strings.ToLower(d.backingFormat)
	switch format {
	case "":
		format = "raw"
		d.warnings = append(d.warnings, fmt.Sprintf("%s does not record the format of its backing file %s: it is taken for raw (qemu-img rebase -u -F FORMAT records it)", d.path, quote(d.backingName)))
	case "host_device", "file": // what qemu calls a raw device and a raw file
		format = "raw"
	}
	d.backing, err = open(d.ctx, d.path, name, format)
	if err != nil {
		return fmt.Errorf("backing file %s: %w", quote(d.backingName), err)
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

// share makes the image and its backing images use the memory of an overlay, so
// that a chain takes no more than one image.
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

// protocol is what begins a name that qemu takes for no local file.
var protocol = regexp.MustCompile(`^[^/]*?:`)

// localName returns the local file that qemu takes a name for.
func localName(name string) (string, error) {
	if local, ok := strings.CutPrefix(name, "file:"); ok && local != "" && !strings.HasPrefix(local, "//") {
		return local, nil
	}
	if strings.HasPrefix(name, "json:") {
		return "", fmt.Errorf("%s: a name of options (json:), want the path of a local file (qemu-img rebase -u -b PATH -F FORMAT sets it)", quote(name))
	}
	if p := protocol.FindString(name); p != "" {
		return "", fmt.Errorf("%s: it is reached by %s, which is not read: want the path of a local file (one with a colon begins with ./ or /)", quote(name), quote(p))
	}
	return name, nil
}

// Size is the size that the header has.
func (d *Disk) Size() int64 { return d.size }

// Close closes all files, those of the backing images too.
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

// ReadAt implements source.Disk.
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

// read fills p with the bytes of s.
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
		c := max(s.off, s.off+d.dataSize-s.pos) >> d.clusterShift // the first that is not whole
		start := max(s.off, c<<d.clusterShift)
		return d.errorAt(c, "it is at offset %d of %s, which has %d bytes: that is truncated, or the L2 table is damaged", s.pos+start-s.off, d.dataPath, d.dataSize)
	}
	if err := image.ReadFull(d.data, p, s.pos); err != nil {
		return d.errorAt(s.off>>d.clusterShift, "%w", err)
	}
	return nil
}

// Extents tells the allocation from the tables, without reading data. Clusters
// that are marked as zeros are explicit zeros. Where the image's file is sparse
// its holes are too, as with images whose metadata alone is preallocated.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.path, d.size, off, length, func(out *image.Merger) error {
		return d.scan(ctx, off, off+length, func(s stretch) error { return d.emit(ctx, out, s) })
	})
}

// scan is walk for what looks at no data: plain stretches that are holes of the
// file are zeros with a place.
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

// splitHoles emits s in pieces that are data or holes of the file.
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

// emit passes on what a scan found, from the backing file where the image lacks
// it.
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
