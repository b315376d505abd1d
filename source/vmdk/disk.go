// Package vmdk reads VMDK images ("Virtual Disk Format 5.0" by VMware): flat,
// sparse, streamOptimized, vmfsSparse and seSparse ones, in one file or many,
// and chains of them.
//
// The extents of the descriptor decide what is read, not its createType: FLAT
// and VMFS from a file, SPARSE from a hosted sparse extent of version 1 to 3,
// compressed or not, with its grain directory in the header or the footer or, of
// a whole stream, with none, VMFSSPARSE from a COWD file and SESPARSE from a
// seSparse one, the deltas of ESXi's snapshots, and ZERO. A child has its
// parent's content where its own grain tables have nothing; the parent is found
// by parentFileNameHint and must have the CID that the child's parentCID says.
// Encrypted disks, raw device mappings and physical devices are refused, and so
// is a seSparse extent whose journal must be replayed.
//
// What is damaged is an error when it is come to, never zeros. An image takes
// at most 6 MiB for its tables, with all its parents, and each reader of
// compressed grains about two grains more, of at most 1 MiB.
package vmdk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"sort"

	"vddkcp/internal/image"
	"vddkcp/source"
)

// maxChain bounds the length of a chain of images. VMware's own limit is 32.
const maxChain = 256

// Disk is a disk in a VMDK image and the images that it is a child of. Beside
// source.Disk it is Identified, Described, InFile, Mapped and Uncached.
type Disk struct {
	ctx     context.Context
	path    string
	options Options
	size    int64
	extents []placed
	parent  source.Disk   // nil: none, or not opened
	lacks   source.Extent // what a range is that the image lacks, where there is no parent
	info    source.Info
	mem     *memory

	// files are all that the image consists of, without its parents. The first
	// is the one at path.
	files []source.Disk

	life image.Life
}

// extent is a part of a disk, as a line of the descriptor has it.
type extent interface {
	// readAt fills p with the bytes at off in the extent, where they are.
	readAt(p []byte, off int64) error
	// scan tells the allocation of [off, end), not empty, in the extent: what
	// kind, where, for how many bytes. An error of emit ends it and is returned.
	scan(ctx context.Context, off, end int64, emit func(kind grainKind, off, n int64) error) error
}

// placed is an extent in its place in the disk, in bytes.
type placed struct {
	extent
	start, end int64
}

// Options say how an image is read. The zero value reads it with its parents.
type Options struct {
	// SingleLink reads the image without its parents, which need not be there:
	// what it lacks is Same.
	SingleLink bool
}

// Open opens the image whose file is at path, and all that it names. F holds
// the raw bytes of that file; the Disk owns it, and Open closes it where it
// returns an error. Extents are opened by open with the format "raw", a parent
// with "vmdk", and their own names as the descriptor has them; open decides
// which names it follows. The disk lives under ctx.
//
// An extent with the access NOACCESS is Data that can't be read. Flags that say
// that the image was not closed cleanly are ignored.
func Open(ctx context.Context, path string, f source.Disk, open source.Opener, o Options) (*Disk, error) {
	d := &Disk{ctx: ctx, path: path, options: o, lacks: source.Extent{Kind: source.Zero, Absent: true}, files: []source.Disk{f}, mem: new(memory), life: image.Life{Context: ctx, Name: path}}
	if err := d.open(open); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Disk) open(open source.Opener) error {
	f := d.files[0]
	head := make([]byte, min(f.Size(), 4<<10))
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
	return fmt.Errorf("%s: no VMDK image: found %q at offset 0, want %q or a descriptor (\"# Disk DescriptorFile\")", d.path, head[:min(len(head), 16)], magicSparse)
}

// openEmbedded opens an image in one file, a sparse extent that has its own
// descriptor.
func (d *Disk) openEmbedded(open source.Opener) error {
	f := d.files[0]
	h, err := readHeader(f)
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	if h.descriptorOffset == 0 || h.descriptorSize == 0 {
		return fmt.Errorf("%s: a sparse extent without a descriptor: it is a part of a disk, open the .vmdk file that describes that", d.path)
	}
	size := int64(min(h.descriptorSize, maxDescriptor/sectorSize+1)) * sectorSize // a byte too long is seen
	if h.descriptorOffset > uint64(f.Size())/sectorSize || int64(h.descriptorOffset)*sectorSize > f.Size()-size {
		return fmt.Errorf("%s: its descriptor at sector %d has %d sectors, the file has %d bytes: it is truncated", d.path, h.descriptorOffset, h.descriptorSize, f.Size())
	}
	text := make([]byte, size)
	if err := image.ReadFull(f, text, int64(h.descriptorOffset)*sectorSize); err != nil {
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
		// The file is nothing but a container of the descriptor.
		return d.openDescribed(desc, open)
	}
	// The descriptor names the one extent as it was called when it was made.
	sectors, err := desc.sectors()
	if err != nil {
		return fmt.Errorf("%s: embedded descriptor %w", d.path, err)
	}
	x, err := openSparse(d.path, f, sectors*sectorSize)
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
		return fmt.Errorf("extent %s is of type %s, %s", quote(e.name), e.kind, rawDevice)
	default:
		return fmt.Errorf("extent %s is of type %s, want FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE or SESPARSE", quote(e.name), quote(e.kind))
	}
	if e.device() {
		return fmt.Errorf("extent %s is %s", quote(e.name), physical)
	}
	if e.access == "NOACCESS" {
		d.add(&noAccess{path: d.path, line: e, base: d.size}, size)
		return nil
	}
	f := opened[e.name]
	if f == nil {
		var err error
		if f, err = open(d.ctx, d.path, e.name, "raw"); err != nil {
			return fmt.Errorf("extent %s: %w", quote(e.name), err)
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
	// The file says which sparse kind it is, whatever the descriptor calls it.
	var x *sparse
	var err error
	switch probe(head) {
	case kindCOWD:
		x, err = openCOWD(name, f, size)
	case kindSESparse:
		x, err = openSESparse(name, f, size)
	case kindSparse:
		x, err = openSparse(name, f, size)
	default:
		err = fmt.Errorf("%s: no sparse extent: found %q at offset 0, want %q (SPARSE), %q (VMFSSPARSE) or %q (SESPARSE)", name, head, magicSparse, magicCOWD, binary.LittleEndian.AppendUint64(nil, magicSESparse))
	}
	if err != nil {
		return err
	}
	d.add(x, size)
	return nil
}

// add appends an extent of size bytes.
func (d *Disk) add(x extent, size int64) {
	if x, ok := x.(*sparse); ok {
		x.disk, x.base = d, d.size
		x.share(d.mem)
	}
	d.extents = append(d.extents, placed{x, d.size, d.size + size})
	d.size += size
}

// finish describes the image and opens its parent.
func (d *Disk) finish(desc *descriptor, open source.Opener) error {
	if err := d.describe(desc); err != nil {
		return fmt.Errorf("%s: descriptor %w", d.path, err)
	}
	hint := desc.text("parentFileNameHint")
	want, ok, err := desc.cid("parentCID")
	switch {
	case err != nil:
		return fmt.Errorf("%s: descriptor %w", d.path, err)
	case hint == "" && (!ok || want == noParent):
		return nil
	case hint == "":
		return fmt.Errorf("%s: its parentCID %08x says that it has a parent, and there is no parentFileNameHint: where the parent is can't be known", d.path, want)
	case !ok || want == noParent:
		return fmt.Errorf("%s: its parentFileNameHint names the parent %s, and its parentCID (ffffffff or missing) says that it has none", d.path, quote(hint))
	}
	if d.options.SingleLink {
		d.lacks = source.Extent{Kind: source.Same}
		return nil
	}
	link, err := d.link()
	if err != nil {
		return err
	}
	parent, err := open(context.WithValue(d.ctx, linkKey{}, link), d.path, hint, "vmdk")
	if err != nil {
		return fmt.Errorf("parent %s of %s: %w", quote(hint), d.path, err)
	}
	d.parent = parent
	info, _ := source.Ability[source.Described](parent)
	if info == nil {
		return fmt.Errorf("parent %s of %s: it is no VMDK image, it has no CID", quote(hint), d.path)
	}
	d.info.Chain = append(d.info.Chain, info.Info().Chain...)
	if have := info.Info().CID; have != fmt.Sprintf("%08x", want) {
		if have == "" {
			have = "missing"
		}
		return fmt.Errorf("%s: its parentCID is %08x, the CID of its parent %s is %s: the parent is another one, or was changed after the child was made", d.path, want, image.PathOf(parent, hint), have)
	}
	if p, ok := source.Ability[*Disk](parent); ok {
		p.share(d.mem)
	}
	return nil
}

// share makes the image and its parents use the memory of a child, so that a
// chain takes no more than one image.
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

// link is an image whose parent is being opened, in the context that it is
// opened with: what is between, the Opener, knows of no chain.
type link struct {
	child    *link
	path, id string
	length   int
}

type linkKey struct{}

// link returns the link of d, or an error where the chain comes back to it.
func (d *Disk) link() (*link, error) {
	l := &link{path: d.path, id: d.path, length: 1}
	if i, ok := source.Ability[source.Identified](d.files[0]); ok {
		if id, _, err := i.Identity(d.ctx); err == nil {
			l.id = id
		}
	}
	l.child, _ = d.ctx.Value(linkKey{}).(*link)
	if l.child != nil {
		l.length += l.child.length
	}
	if l.length > maxChain {
		return nil, fmt.Errorf("%s: the chain of parents up to here has more than %d images", d.path, maxChain)
	}
	for c := l.child; c != nil; c = c.child {
		if c.id == l.id {
			return nil, fmt.Errorf("%s: the chain of parents loops: it came here from %s, which is an earlier image of it", d.path, l.child.path)
		}
	}
	return l, nil
}

// Size is the sum of the sizes of the extents.
func (d *Disk) Size() int64 { return d.size }

// Close closes all files, those of the parents too.
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

// find returns the index of the extent that has the byte at off.
func (d *Disk) find(off int64) int {
	return sort.Search(len(d.extents), func(i int) bool { return d.extents[i].end > off })
}

// ReadAt implements source.Disk.
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

// Extents tells the allocation from the grain tables, without reading data. A
// ZERO extent and a grain that is marked as zeros are explicit zeros; a hole in
// the file of a flat extent is too.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.path, d.size, off, length, func(out *image.Merger) error {
		return d.scan(ctx, off, off+length, func(kind grainKind, off, n int64) error {
			return d.emit(ctx, out, kind, off, n)
		})
	})
}

// scan tells the allocation of [off, end) in this image alone: what kind, where
// in the disk, for how many bytes.
func (d *Disk) scan(ctx context.Context, off, end int64, emit func(kind grainKind, off, n int64) error) error {
	for i := d.find(off); off < end; i++ {
		e := &d.extents[i]
		if err := d.life.Usable(ctx); err != nil {
			return err
		}
		stop := min(end, e.end)
		err := e.scan(ctx, off-e.start, stop-e.start, func(kind grainKind, at, n int64) error {
			return emit(kind, e.start+at, n)
		})
		if err != nil {
			return err
		}
		off = stop
	}
	return nil
}

// emit passes on what a scan found, from the parent where the image lacks it.
func (d *Disk) emit(ctx context.Context, out *image.Merger, kind grainKind, off, n int64) error {
	switch {
	case kind == dataGrain:
		return out.Add(source.Extent{Off: off, Len: n})
	case kind == zeroGrain:
		return out.Add(source.Extent{Off: off, Len: n, Kind: source.Zero})
	case d.parent == nil:
		e := d.lacks
		e.Off, e.Len = off, n
		return out.Add(e)
	}
	return out.AddParent(ctx, d.parent, off, n)
}
