// Package vmdk reads VMDK images, the format of VMware's disks ("Virtual Disk
// Format 5.0" by VMware). [Open] opens an image with all files that it names, and
// returns a [Disk]. [Probe] recognizes an image by its first bytes.
//
// An image consists of a text, the descriptor, and of extents, each of which holds a
// part of the disk. The lines of the descriptor that list the extents decide how the
// disk is read. The createType of the image does not matter for that. This package
// reads these types of extents:
//
//   - FLAT and VMFS: a range of a file, as it is;
//   - ZERO: no file, only zeros;
//   - SPARSE: a hosted sparse extent of version 1 to 3, compressed or not. Its
//     grain directory may be named by the header or by the footer. It may be
//     missing if each grain has a marker, and the stream of grains is complete;
//   - VMFSSPARSE: a COWD file, the snapshot delta of older ESXi;
//   - SESPARSE: a seSparse file, the snapshot delta of newer ESXi. A file whose
//     journal must be replayed is refused.
//
// Where the grain tables of a child image have no entry, the disk has the content of the
// parent. The descriptor of the child names the parent by parentFileNameHint. The content
// identifier (CID) of the parent must equal the parentCID of the child. A differencing image of
// VirtualBox names its parent by ddb.uuid.parent only. This package looks for the image with
// that ddb.uuid.image in the folder of the child.
//
// Encrypted disks, raw device mappings and physical devices are refused.
//
// Damage is reported when a read reaches it; damaged ranges never read as zeros. If the
// primary grain directory is damaged and the redundant one is used instead,
// [Disk.Warnings] reports that. An image and all its parents keep at most 6 MiB of
// tables in memory. Each concurrent reader of compressed grains also needs the memory
// of about two grains, of at most 1 MiB each.
package vmdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"sort"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// Disk is the disk in a VMDK image and its parents. It is safe for concurrent use.
// It has the abilities [source.Identified], [source.Described], [source.InFile],
// [source.Mapped] and [source.Uncached].
type Disk struct {
	ctx     context.Context
	path    string
	options Options
	size    int64
	extents []placed
	parent  source.Disk // nil: none, or not opened
	uuids   uuids
	lacks   source.Extent // the kind of ranges that the image does not have, if parent is nil
	info    source.Info
	mem     *memory

	warnings []string // sentences that begin with the name of a file

	// The field files has the files of the image, without those of its parents. The first is
	// the file whose name is in the field path.
	files []source.Disk

	life life.Life
}

// The type extent is a part of a disk. One line of the descriptor describes this part. All
// methods are safe for concurrent use.
type extent interface {
	// readAt fills p with the bytes that begin at the given offset in the extent. The range
	// that is read must not pass the end of the extent.
	readAt(p []byte, off int64) error
	// The method scan divides the range [off, end) of the extent into pieces whose content is
	// of one kind. It passes the pieces to the function emit, in ascending order and without
	// gaps. The range is not empty. If emit returns an error, scan stops and returns this
	// error.
	scan(ctx context.Context, off, end int64, want detail, emit func(piece) error) error
}

// The type detail says what a scan of the allocation must find out.
type detail uint8

const (
	kinds  detail = iota // what kind of content each piece has
	places               // also where in a local file the content is
)

// The type piece is a range of a disk or of an extent whose content is of one kind.
type piece struct {
	kind   grainKind
	off, n int64 // bytes
	// The field file is the open local file that has the content of the piece. The content
	// begins at the offset pos in this file. The field is nil if no local file has the content
	// uncompressed, or if the scan looks only for the kinds of pieces.
	file *os.File
	pos  int64
}

// emitPlaces divides the piece p into parts and passes them to the function emit. The content of
// p is in f, at the offset pos. f may consist of several local files. Each part is contiguous in
// one of these files, or is in no local file.
func (p piece) emitPlaces(f source.Disk, pos int64, emit func(piece) error) error {
	for left := p.n; left > 0; {
		part := piece{kind: p.kind, off: p.off + p.n - left}
		var ok bool
		if part.file, part.pos, part.n, ok = image.InFile(f, pos+p.n-left, left); !ok {
			part.file, part.pos = nil, 0
		}
		if err := emit(part); err != nil {
			return err
		}
		left -= part.n
	}
	return nil
}

// The type placed is an extent together with its range in the disk, in bytes.
type placed struct {
	extent
	start, end int64
}

// Options change how [Open] reads an image. The zero value reads an image with its
// parents.
type Options struct {
	// SingleLink reads the image without its parents, which need not exist.
	// Ranges that the image does not have are [source.Inherited].
	SingleLink bool
	// Folder has the files among which Open searches for the parent of an image that
	// names its parent only by a UUID. If it is nil, Open refuses such an image.
	Folder Folder
}

// Open opens the image in f, and all files that the image names. The parameter path is the name
// of the image file, and f has the raw bytes of this file. The Disk takes over f, and closes it
// in Close. If Open returns an error, Open has closed f.
//
// The parameter open opens the other files. It is called with the names in the descriptor,
// and with the format "raw" for an extent and "vmdk" for the parent. The Opener decides
// which files may be opened, and must return an error for a chain of parents that loops.
//
// When ctx ends, the calls of the disk return the cause of its end.
//
// An extent with the access NOACCESS is reported as Data, and reading it fails. Flags that
// say that the image was not closed cleanly are ignored.
func Open(ctx context.Context, path string, f source.Disk, open source.Opener, o Options) (*Disk, error) {
	d := &Disk{ctx: ctx, path: path, options: o, lacks: source.Extent{Kind: source.Zero, Absent: true}, files: []source.Disk{f}, mem: new(memory), life: life.Life{Context: ctx, Name: path}}
	if err := d.open(open); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Disk) open(open source.Opener) error {
	f := d.files[0]
	head := make([]byte, min(f.Size(), headSize))
	if err := image.ReadFull(f, head, 0); err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	switch probe(head) {
	case kindSparse:
		return d.openEmbedded(open)
	case kindDescriptor:
		text := make([]byte, min(f.Size(), maxDescriptor+1))
		if err := image.ReadFull(f, text, 0); err != nil {
			return fmt.Errorf("%s: %w", d.path, err)
		}
		desc, err := parseDescriptor(text)
		if err == nil {
			err = desc.readable()
		}
		if err != nil {
			return fmt.Errorf("%s: descriptor %w", d.path, err)
		}
		return d.openDescribed(desc, open)
	case kindCOWD:
		return partOfDisk(d.path, "vmfsSparse (COWD)", "-delta.vmdk")
	case kindSESparse:
		return partOfDisk(d.path, "seSparse", "-sesparse.vmdk")
	}
	if len(head) == 0 {
		return fmt.Errorf("%s: the file is empty, want a VMDK image", d.path)
	}
	return fmt.Errorf("%s is no VMDK image: found %q at offset 0, want %q or a descriptor (\"# Disk DescriptorFile\")", d.path, head[:min(len(head), 16)], magicSparse)
}

// openEmbedded opens an image whose descriptor is embedded in a sparse extent.
func (d *Disk) openEmbedded(open source.Opener) error {
	f := d.files[0]
	h, err := readHeader(f)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	if h.descriptorOffset == 0 || h.descriptorSize == 0 {
		return fmt.Errorf("%s is only a part of a disk, a sparse extent without a descriptor: open the .vmdk file that describes the disk", d.path)
	}
	text, err := h.readDescriptor(f)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	desc, err := parseDescriptor(text)
	if err == nil {
		err = desc.readable()
	}
	if err != nil {
		return fmt.Errorf("%s: embedded descriptor %w", d.path, err)
	}
	if h.capacity == 0 && h.directoryOffset != gdAtEnd {
		// The opened file holds only the descriptor. The extents are in other files.
		return d.openDescribed(desc, open)
	}
	// The descriptor has a name for the file of its extent. This name is ignored. It is the
	// name that the file had when it was created, and the file may have been renamed.
	sectors, err := desc.sectors()
	if err != nil {
		return fmt.Errorf("%s: embedded descriptor %w", d.path, err)
	}
	x, err := openSparse(d.path, f, sectors*sectorSize, newHosted)
	if err != nil {
		return err
	}
	d.add(x, x.size)
	return d.finish(desc, open)
}

// openDescribed opens the extents that a descriptor names.
func (d *Disk) openDescribed(desc *descriptor, open source.Opener) error {
	sectors, err := desc.sectors()
	if err != nil {
		return fmt.Errorf("%s: descriptor %w", d.path, err)
	}
	if sectors == 0 {
		return fmt.Errorf("%s: descriptor has no extents (lines such as: RW 8192 SPARSE \"disk-s001.vmdk\")", d.path)
	}
	opened := map[string]source.Disk{}
	for _, e := range desc.extents {
		if e.sectors == 0 {
			continue
		}
		if err := d.openExtent(e, opened, open); err != nil {
			return fmt.Errorf("%s: descriptor line %d: %w", d.path, e.line, err)
		}
		d.describePart(e, opened[e.name])
	}
	return d.finish(desc, open)
}

func (d *Disk) openExtent(e extentLine, opened map[string]source.Disk, open source.Opener) error {
	size := e.sectors * sectorSize
	switch e.kind {
	case "ZERO":
		d.add(zeros{}, size)
		return nil
	case "FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE":
	case "VMFSRDM", "VMFSRAW":
		return fmt.Errorf("extent %s of type %s is not supported: it is %s", quote(e.name), e.kind, rawDevice)
	default:
		return fmt.Errorf("extent %s is of the unknown type %s, want FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE or SESPARSE", quote(e.name), quote(e.kind))
	}
	if e.device() {
		return fmt.Errorf("extent %s is not supported: it is %s", quote(e.name), physical)
	}
	if object, ok := storageObject(e.name); ok {
		return storageError("extent", e.name, object)
	}
	if e.access == "NOACCESS" {
		d.add(&noAccess{path: d.path, line: e, base: d.size}, size)
		return nil
	}
	f := opened[e.name]
	if f == nil {
		var err error
		if f, err = open(d.ctx, d.path, e.name, "raw"); err != nil {
			return d.explainExtent(e, open, fmt.Errorf("extent %s: %w", quote(e.name), err))
		}
		opened[e.name] = f
		d.files = append(d.files, f)
	}
	name := image.PathOf(f, e.name)
	if e.kind == "FLAT" || e.kind == "VMFS" {
		x, err := newFlat(name, f, e)
		if err != nil {
			return err
		}
		d.add(x, size)
		return nil
	}
	head := make([]byte, min(f.Size(), 8))
	if err := image.ReadFull(f, head, 0); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	// The magic of the file decides how the sparse extent is read. The type in the descriptor is
	// ignored, even if it does not fit the magic.
	var read sparseReader
	switch probe(head) {
	case kindCOWD:
		read = newCOWD
	case kindSESparse:
		read = newSESparse
	case kindSparse:
		read = newHosted
	default:
		return fmt.Errorf("%s is no sparse extent: found %q at offset 0, want %q (SPARSE), %q (VMFSSPARSE) or %q (SESPARSE)", name, head, magicSparse, magicCOWD, binary.LittleEndian.AppendUint64(nil, magicSESparse))
	}
	x, err := openSparse(name, f, size, read)
	if err != nil {
		return err
	}
	d.add(x, size)
	return nil
}

// The method add appends the extent x to the disk. The parameter size is the size of this
// extent in bytes.
func (d *Disk) add(x extent, size int64) {
	if x, ok := x.(*sparse); ok {
		x.disk, x.base = d, d.size
		x.share(d.mem)
		d.warnings = append(d.warnings, x.warnings...)
	}
	d.extents = append(d.extents, placed{x, d.size, d.size + size})
	d.size += size
}

// The method share makes the image and its parents use the cache m. It is called when an image
// has opened its parent: the method of the parent is called with the cache of the image. The
// images of a chain together therefore need no more memory than one image.
func (d *Disk) share(m *memory) {
	d.mem = m
	for _, e := range d.extents {
		if x, ok := e.extent.(*sparse); ok {
			x.share(m)
		}
	}
	if p, ok := source.Ability[*Disk](d.parent); ok {
		p.share(m)
	}
}

// Size implements [source.Disk]. The size is the sum of the sizes of the extents.
func (d *Disk) Size() int64 { return d.size }

// Close implements [source.Disk]. It closes the files of the image and of its
// parents.
func (d *Disk) Close() error {
	return d.life.Close(func() error {
		var errs []error
		for _, f := range d.files {
			errs = append(errs, f.Close())
		}
		if d.parent != nil {
			errs = append(errs, d.parent.Close())
		}
		return errors.Join(errs...)
	})
}

// The method find returns the index of the extent that has the byte at the given offset of the
// disk.
func (d *Disk) find(off int64) int {
	return sort.Search(len(d.extents), func(i int) bool { return d.extents[i].end > off })
}

// ReadAt implements [source.Disk].
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.size, func(p []byte) (n int, err error) {
		for i := d.find(off); n < len(p); i++ {
			e := &d.extents[i]
			at := off + int64(n)
			piece := p[n:min(int64(len(p)), e.end-off)]
			if err := e.readAt(piece, at-e.start); err != nil {
				return n, err
			}
			n += len(piece)
		}
		return n, nil
	})
}

// Extents implements [source.Disk]. It reads grain tables, but no data. ZERO extents, grains
// that are marked as zeros, and holes in the file of a flat extent are reported as
// [source.Zero], with the field Absent set to false.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.path, d.size, off, length, func(out *image.Merger) error {
		return d.scan(ctx, off, off+length, kinds, func(p piece) error { return d.emit(ctx, out, p) })
	})
}

// The method scan divides the range [off, end) of the disk into pieces whose content is of one
// kind, and passes the pieces to the function emit. scan does not look into the parents: a
// piece that only a parent has is passed as absent. The offsets of the pieces are offsets in
// the disk.
func (d *Disk) scan(ctx context.Context, off, end int64, want detail, emit func(piece) error) error {
	for i := d.find(off); off < end; i++ {
		e := &d.extents[i]
		if err := d.life.Check(ctx); err != nil {
			return err
		}
		stop := min(end, e.end)
		err := e.scan(ctx, off-e.start, stop-e.start, want, func(p piece) error {
			p.off += e.start
			return emit(p)
		})
		if err != nil {
			return err
		}
		off = stop
	}
	return nil
}

// The method emit adds the piece p to out, which collects the extents of the disk. If the image
// does not have the piece, the method adds the extents that the parent has for this range.
// Without a parent, the range is added as a range that the image does not have.
func (d *Disk) emit(ctx context.Context, out *image.Merger, p piece) error {
	switch {
	case p.kind == dataGrain:
		return out.Add(source.Extent{Off: p.off, Len: p.n})
	case p.kind == zeroGrain:
		return out.Add(source.Extent{Off: p.off, Len: p.n, Kind: source.Zero})
	case d.parent == nil:
		e := d.lacks
		e.Off, e.Len = p.off, p.n
		return out.Add(e)
	}
	return out.AddParent(ctx, d.parent, p.off, p.n)
}
