package vmdk

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// grainFile is the file of a sparse extent. The extent and its index share the fields
// of this type.
type grainFile struct {
	name     string // as errors call the file
	file     source.Disk
	fileSize int64   // bytes
	id       uint64  // number of the file in mem
	mem      *memory // nil until share is called
	warnings []string
}

func newGrainFile(name string, f source.Disk) *grainFile {
	return &grainFile{name: name, file: f, fileSize: f.Size()}
}

// The method warn adds a warning, a sentence that begins with the name of the file.
func (f *grainFile) warn(format string, args ...any) {
	f.warnings = append(f.warnings, fmt.Sprintf("%s: %v", f.name, fmt.Errorf(format, args...)))
}

// The method page returns the bytes of the file from the given offset to the end of the page that
// this offset lies in. A page is the unit in which the cache holds files. The caller must not
// change the bytes.
func (f *grainFile) page(off int64) ([]byte, error) {
	data, err := f.mem.Page(f.file, f.id, f.fileSize, off/image.PageSize)
	if err != nil {
		return nil, err
	}
	return data[off%image.PageSize:], nil
}

// The type tables is an index with two levels. The grain directory says where the grain tables are
// in the file, and the grain tables say where the grains are. Both are read on demand and cached.
// The indexes of hosted, COWD and seSparse extents embed this type.
type tables struct {
	*grainFile
	geometry
	format   entryFormat
	shift    uint  // base-2 logarithm of the size of an entry in bytes
	perTable int64 // entries in a grain table
	count    int64 // grain tables, which is the number of entries of the directory

	primary directory
	// redundant is a second directory with its own grain tables. It is the zero value
	// if the extent has no second directory, or if that directory is not used.
	redundant directory
	fallback  bool            // redundant replaces damaged or missing entries of primary
	replaced  map[int64]error // tables that are not read through primary, and the reason

	fixed    []region      // places where no grain table can be
	metadata []region      // places where no grain can be, in addition to the tables
	overlaps *overlapCheck // nil: grains are not checked for overlaps
}

// directory is a grain directory.
type directory struct {
	what   string        // as errors call it
	at     int64         // offset in the file, bytes; 0: there is no such directory
	tables *image.Places // places of its grain tables; nil: not known
}

// Functions that return the offset of a grain table return one of these values if the table
// does not exist.
const (
	noTable   = 0 // all grains of the table are absent
	zeroTable = 1 // all grains of the table are zeros
)

// maxSkipped is the largest number of missing tables that one call of the method run
// examines. A scan of a large empty disk makes many such calls, and checks its context
// between them.
const maxSkipped = 1 << 16

// tableCount returns the number of grain tables of an extent. The capacity and the size
// of a grain are in sectors.
func tableCount(capacity, grain, perTable uint64) int64 {
	return int64((capacity-1)/(perTable*grain) + 1) // no overflow: perTable <= 2^16, grain <= 2^15
}

func newTables(f *grainFile, g geometry, format entryFormat, shift uint, perTable uint64) tables {
	return tables{
		grainFile: f, geometry: g, format: format, shift: shift,
		perTable: int64(perTable), count: tableCount(g.capacity, g.grain, perTable),
	}
}

func (t *tables) share(m *memory) {
	m.Share(t.primary.tables)
	m.Share(t.redundant.tables)
}

// directorySize returns the number of bytes of a grain directory.
func (t *tables) directorySize() int64 { return t.count << t.shift }

// The method length returns the number of bytes of a whole grain table.
func (t *tables) length() int64 { return t.perTable << t.shift }

// tableSize returns the number of bytes of grain table i that the extent needs. The
// last table may be shorter than the others.
func (t *tables) tableSize(i int64) int64 {
	return min(t.perTable, (int64(t.capacity)-1)/int64(t.grain)+1-i*t.perTable) << t.shift
}

// The method checkable reports whether the directories of the extent are small enough to be read
// and checked when the extent is opened. Entries of larger directories are checked only when they
// are used.
func (t *tables) checkable() bool { return t.count <= image.MaxTables }

// indexDirectory reads the whole directory d, and records in d where its tables are. For
// each table it calls the function visit with the range of the table in the file. It
// ignores damaged entries, which are reported when a read reaches them. It returns an
// error if so many tables overlap that d cannot be a directory.
func (t *tables) indexDirectory(d *directory, visit func(start, end int64)) error {
	starts := make([]int64, 0, t.count)
	t.eachTable(func(i int64, read func(*directory) (int64, error)) {
		at, err := read(d)
		if err != nil || at <= zeroTable {
			return
		}
		need := t.tableSize(i)
		visit(at, at+need)
		if need < t.length() {
			// The function image.NewPlaces needs tables that all have the full length. Only the
			// last table may be shorter, and the file may end right after it. If this table is
			// shorter, it is therefore not passed to image.NewPlaces, but recorded in t.metadata.
			t.metadata = append(t.metadata, region{"grain table", at, at + need})
			return
		}
		starts = append(starts, at)
	})
	var err error
	if d.tables, err = image.NewPlaces(starts, t.length()); err != nil {
		return fmt.Errorf("the %s at offset %d: %w: the directory is damaged", d.what, d.at, err)
	}
	return nil
}

// eachTable calls the function visit for each grain table in ascending order. visit gets the number
// of the table and a function that returns the offset of this table according to a directory. That
// function does not use the cache. eachTable reads many entries of the directory at once.
func (t *tables) eachTable(visit func(i int64, read func(*directory) (int64, error))) {
	type piece struct {
		first int64 // number of the table that data begins with
		data  []byte
		err   error
	}
	var primary, redundant piece
	const step = 8 << 10 // tables
	for i := range t.count {
		visit(i, func(d *directory) (int64, error) {
			p := &primary
			if d == &t.redundant {
				p = &redundant
			}
			if p.data == nil {
				p.first, p.data = -1, make([]byte, min(t.count, step)<<t.shift)
			}
			if first := i / step * step; p.first != first {
				p.first = first
				p.err = image.ReadFull(t.file, p.data[:min(t.count-first, step)<<t.shift], d.at+first<<t.shift)
			}
			if p.err != nil {
				return 0, fmt.Errorf("%s: %w", d.what, p.err)
			}
			return t.tableFrom(d, i, p.data[(i-p.first)<<t.shift:])
		})
	}
}

// The method table returns the offset of grain table i in the file, in bytes, or one of the
// constants noTable and zeroTable. It uses the redundant directory for entries that are damaged or
// missing in the primary directory. Writers keep the two directories equal, so that a difference
// means damage. A warning about the damage was added when the extent was opened.
func (t *tables) table(i int64) (int64, error) {
	at, err := t.tableIn(&t.primary, i)
	if why := t.replaced[i]; why != nil {
		err = why
	}
	if t.fallback && (err != nil || at == noTable) {
		if redundant, damaged := t.tableIn(&t.redundant, i); damaged == nil && (redundant != noTable || err != nil) {
			return redundant, nil
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", t.name, err)
	}
	return at, nil
}

// tableIn returns the offset of grain table i according to the directory d alone, which is
// the primary or the redundant one. It reads the entry through the cache.
func (t *tables) tableIn(d *directory, i int64) (int64, error) {
	entry, err := t.page(d.at + i<<t.shift)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", d.what, err)
	}
	return t.tableFrom(d, i, entry)
}

// tableFrom returns the offset of grain table i in the file. entry is the entry of this
// table, which the caller has read from the directory d. tableFrom returns an error if
// no grain table can be at the offset that the entry has.
func (t *tables) tableFrom(d *directory, i int64, entry []byte) (int64, error) {
	at, err := t.format.table(entry)
	if err != nil {
		return 0, fmt.Errorf("the %s's entry at offset %d, of grain table %d: %w: the directory is damaged", d.what, d.at+i<<t.shift, i, err)
	}
	if at <= zeroTable {
		return at, nil
	}
	bad := func(format string, args ...any) (int64, error) {
		return 0, fmt.Errorf("grain table %d at offset %d, according to the %s's entry at offset %d: %s", i, at, d.what, d.at+i<<t.shift, fmt.Sprintf(format, args...))
	}
	need := t.tableSize(i)
	if at > t.fileSize-need {
		return bad("the table needs %d bytes and would end at offset %d, but the file has %d bytes: the file is truncated, or the directory is damaged", need, at+need, t.fileSize)
	}
	if r, ok := within(t.fixed, at, at+need); ok {
		return bad("the table lies in the %s, bytes %d to %d of the file: the directory is damaged", r.what, r.start, r.end)
	}
	if d.tables.Overlaps(at) {
		return bad("the table overlaps another grain table: the directory is damaged")
	}
	if need < t.length() {
		if from, to, ok := d.tables.Has(at, at+need); ok {
			return bad("the table overlaps the other grain tables at bytes %d to %d of the file: the directory is damaged", from, to)
		}
	}
	return at, nil
}

func (t *tables) run(g, needed int64, hole *fileHole) (run, error) {
	table, in := g/t.perTable, g%t.perTable
	at, err := t.table(table)
	if err != nil {
		return run{}, err
	}
	left := min(t.perTable-in, t.grains()-g)
	off := at + in<<t.shift
	if at > zeroTable && hole.has(off, left<<t.shift) {
		at = noTable
	}
	if at <= zeroTable {
		r := run{n: left}
		if at == zeroTable {
			r.kind = zeroGrain
		}
		if left < needed {
			r.n = t.skip(table, at, g, left, needed, hole)
		}
		return r, nil
	}
	if t.overlaps != nil {
		if err := t.overlaps.check(t, table, at); err != nil {
			return run{}, err
		}
	}
	data, err := t.page(off)
	if err != nil {
		return run{}, fmt.Errorf("%s: grain table %d: %w", t.name, table, err)
	}
	left = min(left, int64(len(data))>>t.shift)
	data = data[:left<<t.shift]
	if hole != nil && zero.Is(data) {
		// This part of the table has only zeros. An empty disk may have up to 4 GiB of such tables.
		// If this part lies in a hole of the file, the scan need not read the following tables that
		// lie in the same hole.
		return run{n: left}, hole.find(t.grainFile, off)
	}
	return run{n: left, entries: data, format: t.format}, nil
}

// The method skip returns the number of grains in a run of grains that have no grain table. The run
// begins with grain g, which belongs to the missing table with the number table. n is the number of
// grains from g to the end of this table. The parameter missing says what all these grains are:
// noTable stands for absent grains, zeroTable for zeros.
//
// The run continues with the grains of the next tables, as long as these tables are missing in the
// same way. The run ends when it has at least as many grains as the parameter needed says, or when
// skip has examined maxSkipped tables.
func (t *tables) skip(table, missing, g, n, needed int64, hole *fileHole) int64 {
	last := table + maxSkipped
	for n < needed && table < last {
		next, err := t.table(table + 1)
		if next > zeroTable && hole.has(next, t.length()) {
			next = noTable
		}
		if err != nil || next != missing {
			break
		}
		table++
		n = min(n+t.perTable, t.grains()-g)
	}
	return n
}

func (t *tables) occupied(start, end int64) (region, bool) {
	if r, ok := within(t.metadata, start, end); ok {
		return r, true
	}
	for _, d := range []*directory{&t.primary, &t.redundant} {
		if from, to, ok := d.tables.Has(start, end); ok {
			return region{"grain tables", from, to}, true
		}
	}
	return region{}, false
}

// fileHole is a hole, a range that reads as zeros, in the file of an extent. A scan of the
// allocation remembers here the hole that it found last, and skips the tables in this hole.
// A nil fileHole stands for no hole.
type fileHole struct {
	ctx        context.Context // of the scan
	start, end int64
	known      int64 // find has asked about the bytes before this offset
}

func (h *fileHole) has(off, n int64) bool {
	return h != nil && off >= h.start && off+n <= h.end
}

// The method find checks whether the file has a hole at the given offset. If there is a hole, h
// remembers the range of the hole.
func (h *fileHole) find(f *grainFile, off int64) error {
	if off < h.known {
		return nil
	}
	for e, err := range f.file.Extents(h.ctx, off, f.fileSize-off) {
		if err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
		if h.known = e.End(); e.Kind == source.Zero {
			h.start, h.end = e.Off, e.End()
		}
		break
	}
	return nil
}
