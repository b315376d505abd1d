package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/zero"

	"github.com/vddkcp/vddkcp/internal/image"
)

// The bits of a table entry ("Cluster mapping").
const (
	entryCopied     = 1 << 63
	entryCompressed = 1 << 62
	entryOffset     = 0x00ff_ffff_ffff_fe00
	entryZero       = 1
	l1Reserved      = 0x7f00_0000_0000_01ff
	l2Reserved      = 0x3f00_0000_0000_01fe
)

// kind says where the content of a range comes from, according to the tables.
type kind uint8

const (
	absent kind = iota // the image does not have it: the backing file's content, or zeros
	zeros              // zeros, also if the backing file has data
	plain              // as it is, in the image file or the data file
	packed             // compressed, in the image file
	bad                // the table entry is damaged
)

// run describes consecutive clusters whose L2 entries have been read.
type run struct {
	first, n int64  // number of the first cluster, and number of clusters
	entries  []byte // L2 entries of the clusters; nil: all clusters are absent
	at       int64  // offset of the entries in the file, bytes
}

// end is the number of the first cluster after the run.
func (r *run) end() int64 { return r.first + r.n }

// stretch is a range of the disk that is of one kind.
type stretch struct {
	kind   kind
	off, n int64 // bytes
	pos    int64 // of a plain stretch, which is contiguous in the file: its offset there, bytes
}

// entry returns the L2 entry of cluster c, which is in the run r. If the image has
// subclusters, it also returns their bitmap.
func (d *Disk) entry(r *run, c int64) (entry, bitmap uint64) {
	b := r.entries[(c-r.first)<<d.entryBits:]
	entry = binary.BigEndian.Uint64(b)
	if d.entryBits == 4 {
		bitmap = binary.BigEndian.Uint64(b[8:])
	}
	return entry, bitmap
}

// clusters is the number of clusters of the disk.
func (d *Disk) clusters() int64 { return (d.size + d.cluster - 1) >> d.clusterShift }

// run returns the L2 entries of the clusters that begin with c. It returns as many as
// one read of the file yields, at least one. It reads beyond the first max clusters
// only if that costs nothing.
func (d *Disk) run(c, max int64) (run, error) {
	perTable := d.cluster >> d.entryBits
	table, in := c/perTable, c%perTable
	at, err := d.table(table)
	if err != nil {
		return run{}, err
	}
	r := run{first: c, n: min(perTable-in, d.clusters()-c)}
	if at == 0 {
		// Often many consecutive tables are missing, so the run continues through all
		// of them.
		for r.n < max {
			if next, err := d.table(table + 1); err != nil || next != 0 {
				break
			}
			table++
			r.n = min(r.n+perTable, d.clusters()-c)
		}
		return r, nil
	}
	r.at = at + in<<d.entryBits
	data, err := d.mem.Page(d.file, d.id, d.fileSize, r.at/image.PageSize)
	if err != nil {
		return run{}, fmt.Errorf("%s: L2 table %d: %w", d.path, table, err)
	}
	data = data[r.at%image.PageSize:]
	r.n = min(r.n, int64(len(data))>>d.entryBits)
	r.entries = data[:r.n<<d.entryBits]
	return r, nil
}

// indexTables reads the L1 table and records the places of the L2 tables, so that
// entries of clusters that point into a table are recognized as damaged. It ignores
// damaged L1 entries: reads report them. Several L1 entries may share an L2 table, as
// in an image of a disk whose content repeats.
func (d *Disk) indexTables() error {
	const step = 8 << 10 // entries
	b := make([]byte, min(d.l1Entries, step)*8)
	starts := make([]int64, 0, d.l1Entries)
	for i := range d.l1Entries {
		in := i % step
		if in == 0 {
			n := min(d.l1Entries-i, step)
			if err := image.ReadFull(d.file, b[:n*8], d.l1Offset+i*8); err != nil {
				return fmt.Errorf("L1 table: %w", err)
			}
		}
		at, _ := d.tableFrom(i, binary.BigEndian.Uint64(b[in*8:]))
		if at == 0 {
			continue
		}
		if need := d.tableSize(i); need == d.cluster || at <= d.fileSize-d.cluster {
			starts = append(starts, at)
		}
	}
	d.tables, _ = image.NewPlaces(starts, d.cluster)
	return nil
}

// tableSize is the number of bytes of L2 table i that the disk needs. The last table
// may be shorter than the others.
func (d *Disk) tableSize(i int64) int64 {
	perTable := d.cluster >> d.entryBits
	return min(perTable, d.clusters()-i*perTable) << d.entryBits
}

// table returns the offset of L2 table i in the file, in bytes, or 0 if the image does
// not have it.
func (d *Disk) table(i int64) (int64, error) {
	off := d.l1Offset + i*8
	data, err := d.mem.Page(d.file, d.id, d.fileSize, off/image.PageSize)
	if err != nil {
		return 0, fmt.Errorf("%s: L1 table: %w", d.path, err)
	}
	return d.tableFrom(i, binary.BigEndian.Uint64(data[off%image.PageSize:]))
}

// tableFrom is table for an L1 entry that was read before. It returns an error if no
// L2 table can be at the offset in the entry.
func (d *Disk) tableFrom(i int64, entry uint64) (int64, error) {
	at := int64(entry & entryOffset)
	fail := func(format string, args ...any) (int64, error) {
		return 0, fmt.Errorf("%s: L1 entry %#x at offset %d, of disk offset %d: %w: the table is damaged or the file is truncated", d.path, entry, d.l1Offset+i*8, i*(d.cluster>>d.entryBits)<<d.clusterShift, fmt.Errorf(format, args...))
	}
	switch need := d.tableSize(i); {
	case entry&l1Reserved != 0:
		return fail("the entry has reserved bits set (%#x)", entry&l1Reserved)
	case at == 0:
		return 0, nil
	case at&(d.cluster-1) != 0:
		return fail("the L2 table is at offset %d, want a multiple of %d (a cluster)", at, d.cluster)
	case at > d.fileSize-need:
		return fail("the L2 table at offset %d needs %d bytes, the file has %d", at, need, d.fileSize)
	case d.inHeader(at, at+need):
		return fail("the L2 table at offset %d lies in the header or the L1 table", at)
	}
	return at, nil
}

// inHeader reports whether the bytes [start, end) of the file overlap the header or the
// L1 table.
func (d *Disk) inHeader(start, end int64) bool {
	return start < d.cluster || start < d.l1Offset+d.l1Entries*8 && end > d.l1Offset
}

// inMetadata reports whether the bytes [start, end) of the file overlap the header, the
// L1 table or an L2 table, where no cluster can be.
func (d *Disk) inMetadata(start, end int64) bool {
	if d.inHeader(start, end) {
		return true
	}
	_, _, ok := d.tables.Has(start, end)
	return ok
}

// metadataAt names the metadata at [start, end), for which inMetadata returned true.
func (d *Disk) metadataAt(start, end int64) string {
	if d.inHeader(start, end) {
		return "the header or the L1 table"
	}
	return "an L2 table"
}

// unit returns the kind of the unit that has the byte at off: a subcluster if the image
// has subclusters, otherwise a cluster. If the unit is plain, unit also returns its
// offset in the file, in bytes.
func (d *Disk) unit(r *run, off int64) (kind, int64) {
	entry, bitmap := d.entry(r, off>>d.clusterShift)
	if entry&entryCompressed != 0 {
		if d.data != d.file {
			return bad, 0
		}
		return packed, 0
	}
	if entry&l2Reserved != 0 {
		return bad, 0
	}
	at := int64(entry & entryOffset)
	isThere := at != 0
	if at == 0 && entry&entryCopied != 0 {
		// Only a data file can have a cluster at the offset 0.
		if d.data == d.file {
			return bad, 0
		}
		isThere = true
	}
	if isThere && !d.canBeAt(at, off&^(d.cluster-1)) {
		return bad, 0
	}
	if d.entryBits == 4 {
		return d.subcluster(entry, bitmap, isThere, at, off)
	}
	switch {
	case entry&entryZero != 0 && d.version < 3:
		return bad, 0
	case entry&entryZero != 0:
		return zeros, 0
	case isThere:
		return plain, at
	}
	return absent, 0
}

// canBeAt reports whether the cluster at the offset guest of the disk can be at the
// offset at of the file.
func (d *Disk) canBeAt(at, guest int64) bool {
	if d.data != d.file {
		return at == guest
	}
	return at&(d.cluster-1) == 0 && !d.inMetadata(at, at+d.cluster)
}

// subcluster does what unit does, for a cluster that is not compressed, in an image
// with subclusters ("Extended L2 Entries"). isThere says whether the file has the
// cluster, which is then at the offset at of the file.
func (d *Disk) subcluster(entry, bitmap uint64, isThere bool, at, off int64) (kind, int64) {
	if entry&entryZero != 0 || bitmap>>subclusters&bitmap != 0 || !isThere && uint32(bitmap) != 0 {
		return bad, 0
	}
	i := off & (d.cluster - 1) >> d.unitShift
	switch {
	case bitmap>>(subclusters+i)&1 != 0:
		return zeros, 0
	case bitmap>>i&1 != 0:
		return plain, at + i<<d.unitShift
	}
	return absent, 0
}

// stretch returns the longest stretch from off to at most end whose units are of one
// kind and, if they are plain, follow each other in the file. r has the entries of
// the range.
func (d *Disk) stretch(r *run, off, end int64) stretch {
	s := stretch{off: off, n: end - off}
	if r.entries == nil {
		return s
	}
	var pos int64
	s.kind, pos = d.unit(r, off)
	size := int64(1) << d.unitShift
	if s.kind == packed {
		size = d.cluster
	}
	next := off&^(size-1) + size
	if s.kind == plain {
		s.pos = pos + off&(size-1)
	}
	for next < end && s.kind != bad {
		kind, pos := d.unit(r, next)
		if kind != s.kind || kind == plain && pos != s.pos+next-off {
			break
		}
		next += size
	}
	s.n = min(next, end) - off
	return s
}

// badEntry returns the error for the cluster at the offset off of the disk, whose kind
// is bad.
func (d *Disk) badEntry(r *run, off int64) error {
	c := off >> d.clusterShift
	entry, bitmap := d.entry(r, c)
	at := int64(entry & entryOffset)
	var err error
	switch {
	case entry&entryCompressed != 0:
		err = fmt.Errorf("the entry says that the cluster is compressed, which is not possible in an image with a data file")
	case entry&l2Reserved != 0:
		err = fmt.Errorf("the entry has reserved bits set (%#x)", entry&l2Reserved)
	case at == 0 && entry&entryCopied != 0 && d.data == d.file:
		err = fmt.Errorf("the cluster is at offset 0, where the header is")
	case at != 0 && d.data == d.file && at&(d.cluster-1) != 0:
		err = fmt.Errorf("the cluster is at offset %d, want a multiple of %d", at, d.cluster)
	case d.data != d.file && (at != 0 || entry&entryCopied != 0) && at != c<<d.clusterShift:
		err = fmt.Errorf("the cluster is at offset %d of the data file, want %d", at, c<<d.clusterShift)
	case at != 0 && d.data == d.file && d.inMetadata(at, at+d.cluster):
		err = fmt.Errorf("the cluster at offset %d lies in %s", at, d.metadataAt(at, at+d.cluster))
	case d.entryBits == 4 && entry&entryZero == 0:
		err = fmt.Errorf("the bitmap %#x marks subclusters as both allocated and zero, or as allocated although there is no cluster", bitmap)
	default:
		err = fmt.Errorf("bit 0 of the entry marks the cluster as zeros, which is not possible in an image of version 2 or with subclusters")
	}
	return d.errorAt(c, "L2 entry %#x at offset %d: %w: the table is damaged", entry, r.at+(c-r.first)<<d.entryBits, err)
}

// errorAt returns an error about cluster c, with the offset of the cluster in the disk.
func (d *Disk) errorAt(c int64, format string, args ...any) error {
	return fmt.Errorf("%s: cluster of disk offset %d: %w", d.path, c<<d.clusterShift, fmt.Errorf(format, args...))
}

// scanStep is the number of missing clusters that walk passes over before it checks
// again whether its context has ended.
const scanStep = 1 << 28

// walk calls visit with each stretch s of [off, end), in ascending order, and with the
// run r of clusters that has the stretch.
func (d *Disk) walk(ctx context.Context, off, end int64, visit func(r *run, s stretch) error) error {
	for off < end {
		if err := d.life.Cause(ctx); err != nil {
			return err
		}
		c := off >> d.clusterShift
		need := min((end-1)>>d.clusterShift-c+1, scanStep)
		r, err := d.run(c, need)
		if err != nil {
			return err
		}
		r.n = min(r.n, need)
		if r.entries != nil && zero.Is(r.entries[:r.n<<d.entryBits]) {
			r.entries = nil // faster: a new image may have whole tables of zeros
		}
		for stop := min(end, r.end()<<d.clusterShift); off < stop; {
			s := d.stretch(&r, off, stop)
			if err := visit(&r, s); err != nil {
				return err
			}
			off += s.n
		}
	}
	return nil
}
