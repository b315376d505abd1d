package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/zero"

	"github.com/vddkcp/vddkcp/internal/image"
)

// These are the bits of an entry of an L1 or L2 table (section "Cluster mapping" of the
// specification).
const (
	entryCopied     = 1 << 63
	entryCompressed = 1 << 62
	entryOffset     = 0x00ff_ffff_ffff_fe00
	entryZero       = 1
	l1Reserved      = 0x7f00_0000_0000_01ff
	l2Reserved      = 0x3f00_0000_0000_01fe
)

// The type kind says how the tables describe the content of a range.
type kind uint8

const (
	absent kind = iota // the image does not have it: the backing file's content, or zeros
	zeros              // zeros, also if the backing file has data
	plain              // as it is, in the image file or the data file
	packed             // compressed, in the image file
	bad                // the table entry is damaged
)

// The type run describes consecutive clusters whose L2 entries have been read.
type run struct {
	first, n int64  // number of the first cluster, and number of clusters
	entries  []byte // L2 entries of the clusters; nil: all clusters are absent
	at       int64  // offset of the entries in the file, bytes
}

// The method end returns the number of the first cluster after the run.
func (r *run) end() int64 { return r.first + r.n }

// The type stretch is a range of the disk whose content is of one kind.
type stretch struct {
	kind   kind
	off, n int64 // bytes
	pos    int64 // of a plain stretch, which is contiguous in the file: its offset there, bytes
}

// The method entry returns the L2 entry of cluster c, which must be one of the clusters
// of r. If the image has subclusters, the method also returns the bitmap of this cluster.
// The bitmap says which subclusters are allocated, and which are zeros.
func (d *Disk) entry(r *run, c int64) (entry, bitmap uint64) {
	b := r.entries[(c-r.first)<<d.entryBits:]
	entry = binary.BigEndian.Uint64(b)
	if d.entryBits == 4 {
		bitmap = binary.BigEndian.Uint64(b[8:])
	}
	return entry, bitmap
}

// The method clusters returns the number of clusters of the disk.
func (d *Disk) clusters() int64 { return (d.size + d.cluster - 1) >> d.clusterShift }

// The method run returns the L2 entries of consecutive clusters, beginning with cluster
// c. It reads an L2 table at most once per call, and returns as many entries as this read
// yields, at least one. The parameter needed is the number of clusters that the caller
// needs. The returned run may have fewer clusters. The caller then calls the method again
// for the rest. The returned run may also have more clusters than needed.
func (d *Disk) run(c, needed int64) (run, error) {
	perTable := d.cluster >> d.entryBits
	table, in := c/perTable, c%perTable
	at, err := d.table(table)
	if err != nil {
		return run{}, err
	}
	r := run{first: c, n: min(perTable-in, d.clusters()-c)}
	if at == 0 {
		// Often many consecutive L2 tables are missing. The run then has the clusters
		// of all these tables.
		for r.n < needed {
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

// indexTables reads the L1 table and records where the L2 tables are. These places are
// used to detect damage: if an L2 entry says that a cluster is inside of an L2 table, the
// entry is damaged. indexTables ignores damaged L1 entries, because they are reported
// when a read reaches them. Several L1 entries may point to the same L2 table, as in an
// image of a disk whose content repeats.
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

// tableSize returns the number of bytes of L2 table i that the disk needs. The last
// table may be shorter than the others.
func (d *Disk) tableSize(i int64) int64 {
	perTable := d.cluster >> d.entryBits
	return min(perTable, d.clusters()-i*perTable) << d.entryBits
}

// The method table returns the offset of L2 table i in the file, in bytes. It returns 0
// if the image does not have this table.
func (d *Disk) table(i int64) (int64, error) {
	off := d.l1Offset + i*8
	data, err := d.mem.Page(d.file, d.id, d.fileSize, off/image.PageSize)
	if err != nil {
		return 0, fmt.Errorf("%s: L1 table: %w", d.path, err)
	}
	return d.tableFrom(i, binary.BigEndian.Uint64(data[off%image.PageSize:]))
}

// tableFrom returns the offset of L2 table i in the file. It takes the offset from the
// given L1 entry. It returns 0 if the image does not have this table, and an error if no
// L2 table can be at the offset that the entry has.
func (d *Disk) tableFrom(i int64, entry uint64) (int64, error) {
	at := int64(entry & entryOffset)
	fail := func(format string, args ...any) (int64, error) {
		return 0, fmt.Errorf("%s: L1 entry %#x at offset %d, for disk offset %d: %w: the table is damaged or the file is truncated", d.path, entry, d.l1Offset+i*8, i*(d.cluster>>d.entryBits)<<d.clusterShift, fmt.Errorf(format, args...))
	}
	switch need := d.tableSize(i); {
	case entry&l1Reserved != 0:
		return fail("the entry has reserved bits set (%#x)", entry&l1Reserved)
	case at == 0:
		return 0, nil
	case at&(d.cluster-1) != 0:
		return fail("the L2 table is at offset %d, want a multiple of the cluster size of %d", at, d.cluster)
	case at > d.fileSize-need:
		return fail("the L2 table at offset %d needs %d bytes, but the file has %d", at, need, d.fileSize)
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
// L1 table or an L2 table. No cluster of the disk can be there.
func (d *Disk) inMetadata(start, end int64) bool {
	if d.inHeader(start, end) {
		return true
	}
	_, _, ok := d.tables.Has(start, end)
	return ok
}

// metadataAt returns the name that errors show for the metadata at the bytes [start,
// end) of the file. The caller has checked with inMetadata that there is metadata.
func (d *Disk) metadataAt(start, end int64) string {
	if d.inHeader(start, end) {
		return "the header or the L1 table"
	}
	return "an L2 table"
}

// The method unit finds the unit of allocation that has the byte at the given offset of
// the disk, and returns the kind of its content. In an image with subclusters, a unit of
// allocation is a subcluster. In other images it is a cluster. If the file stores the
// unit of allocation uncompressed, the method also returns the unit's offset in the file,
// in bytes.
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
	pos := int64(entry & entryOffset)
	allocated := pos != 0
	if pos == 0 && entry&entryCopied != 0 {
		// Here the entry says that the cluster is at the offset 0. This is possible
		// only in an external data file. The image file itself has its header there.
		if d.data == d.file {
			return bad, 0
		}
		allocated = true
	}
	if allocated && !d.canBeAt(pos, off&^(d.cluster-1)) {
		return bad, 0
	}
	if d.entryBits == 4 {
		return d.subcluster(entry, bitmap, allocated, pos, off)
	}
	switch {
	case entry&entryZero != 0 && d.version < 3:
		return bad, 0
	case entry&entryZero != 0:
		return zeros, 0
	case allocated:
		return plain, pos
	}
	return absent, 0
}

// canBeAt reports whether a cluster can be at the position pos in the file. The parameter
// off is the offset of the cluster in the disk.
func (d *Disk) canBeAt(pos, off int64) bool {
	if d.data != d.file {
		return pos == off
	}
	return pos&(d.cluster-1) == 0 && !d.inMetadata(pos, pos+d.cluster)
}

// subcluster does the work of the method unit for a cluster that has subclusters and is
// not compressed (section "Extended L2 Entries" of the specification). If the parameter
// allocated is true, the file has space for the cluster, and pos is the offset of this
// space in the file.
func (d *Disk) subcluster(entry, bitmap uint64, allocated bool, pos, off int64) (kind, int64) {
	if entry&entryZero != 0 || bitmap>>subclusters&bitmap != 0 || !allocated && uint32(bitmap) != 0 {
		return bad, 0
	}
	i := off & (d.cluster - 1) >> d.unitShift
	switch {
	case bitmap>>(subclusters+i)&1 != 0:
		return zeros, 0
	case bitmap>>i&1 != 0:
		return plain, pos + i<<d.unitShift
	}
	return absent, 0
}

// The method stretch returns the longest part of the range [off, end) that begins at the
// start of this range and consists of units of allocation of the same kind. If the file
// stores the units uncompressed, they must also follow each other in the file. The
// argument r has the table entries of the range.
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

// badEntry returns the error for the damaged table entry of the cluster that has the byte
// at the given offset of the disk.
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
		err = fmt.Errorf("the cluster is at offset %d, want a multiple of the cluster size of %d", at, d.cluster)
	case d.data != d.file && (at != 0 || entry&entryCopied != 0) && at != c<<d.clusterShift:
		err = fmt.Errorf("the cluster is at offset %d of the data file, want offset %d, because each cluster must have the same offset in the data file as in the disk", at, c<<d.clusterShift)
	case at != 0 && d.data == d.file && d.inMetadata(at, at+d.cluster):
		err = fmt.Errorf("the cluster at offset %d lies in %s", at, d.metadataAt(at, at+d.cluster))
	case d.entryBits == 4 && entry&entryZero == 0:
		err = fmt.Errorf("the bitmap %#x marks subclusters as both allocated and zero, or as allocated although there is no cluster", bitmap)
	default:
		err = fmt.Errorf("bit 0 of the entry marks the cluster as zeros, which is not possible in an image of version 2 or with subclusters")
	}
	return d.errorAt(c, "L2 entry %#x at offset %d: %w: the table is damaged", entry, r.at+(c-r.first)<<d.entryBits, err)
}

// errorAt returns an error about cluster c that names the offset of the cluster in the
// disk.
func (d *Disk) errorAt(c int64, format string, args ...any) error {
	return fmt.Errorf("%s: cluster at disk offset %d: %w", d.path, c<<d.clusterShift, fmt.Errorf(format, args...))
}

// scanStep limits the number of missing clusters that the method walk handles at once.
// Before it continues, walk checks again whether the context has ended.
const scanStep = 1 << 28

// The method walk divides the range [off, end) of the disk into stretches, ranges whose
// content is of one kind. It calls the function visit for each stretch s, in ascending
// order. The argument r of visit has the table entries of this stretch.
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
