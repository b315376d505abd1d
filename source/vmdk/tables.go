package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// directory is a grain directory: the places of the grain tables.
type directory struct {
	what   string
	at     int64         // offset in the file, bytes; 0: there is none
	tables *image.Places // nil: not known
}

func (s *sparse) warn(format string, args ...any) {
	s.warnings = append(s.warnings, fmt.Sprintf("%s: %v", s.name, fmt.Errorf(format, args...)))
}

// indexTables reads the grain directories once, so that tables that overlap
// each other, grains that lie in a table, and the need of the redundant
// directory are known before the first read. It reports no other damage: reads
// do that where they reach it.
//
// The directories of more than image.MaxTables tables are not read here. Such an
// extent has no use of its redundant directory.
func (s *sparse) indexTables() error {
	if s.tables() > image.MaxTables {
		s.redundant = directory{}
		return nil
	}
	if s.fileKind != kindSESparse && !s.compressed() {
		s.sound = newSoundTables(s.tables())
	}
	for _, d := range []*directory{&s.primary, &s.redundant} {
		if d.at == 0 {
			continue
		}
		if err := s.indexDirectory(d); err != nil {
			return err
		}
	}
	s.replaceLoose()
	if s.redundant.at != 0 {
		s.compareDirectories()
	}
	return nil
}

// indexDirectory sets the places of the tables of d.
func (s *sparse) indexDirectory(d *directory) error {
	length := int64(s.tableEntries) << s.entryShift
	starts := make([]int64, 0, s.tables())
	metadataEnd := int64(s.overhead) * sectorSize
	known, behind, first := 0, 0, int64(0)
	s.eachTable(func(i int64, read func(*directory) (int64, error)) {
		at, err := read(d)
		if err != nil || at <= 1 {
			return
		}
		known++
		need := s.tableSize(i)
		if at+need > metadataEnd {
			if behind++; behind == 1 {
				first = at
			}
		}
		if need < length {
			// The last table may be as short as the extent needs it.
			s.metadata = append(s.metadata, region{"grain table", at, at + need})
			return
		}
		starts = append(starts, at)
	})
	if behind > 0 && metadataEnd > 0 && !s.compressed() && d == &s.primary {
		// Nothing tells a table that was moved from an entry that was damaged and
		// points to zeros in a grain.
		s.warn("%d of %d grain tables lie behind the metadata (overHead), which ends at offset %d, the first at offset %d: if the disk has zeros where there should be data, the grain directory is damaged", behind, s.tables(), metadataEnd, first)
	}
	size := s.tables() << s.entryShift
	if extra := s.fileSize - max(metadataEnd, d.at+size) - size; known == 0 && extra > emptySlack && s.fileKind == kindSparse && s.redundant.at == 0 {
		s.warn("the grain directory at offset %d has no grain table, and the file has %d more bytes than an empty disk needs: if the disk should have data, the directory is damaged", d.at, extra)
	}
	var err error
	if d.tables, err = image.NewPlaces(starts, length); err != nil {
		return fmt.Errorf("the %s at offset %d: %w: the directory is damaged", d.what, d.at, err)
	}
	return nil
}

// eachTable visits all tables in order. Read returns what tableIn does for the
// table that is visited.
func (s *sparse) eachTable(visit func(i int64, read func(*directory) (int64, error))) {
	type piece struct {
		first int64
		data  []byte
		err   error
	}
	var pieces [2]piece // of the two directories
	n := s.tables()
	const step = 8 << 10 // tables
	for i := range n {
		visit(i, func(d *directory) (int64, error) {
			p := &pieces[0]
			if d == &s.redundant {
				p = &pieces[1]
			}
			if p.data == nil {
				p.first, p.data = -1, make([]byte, min(n, step)<<s.entryShift)
			}
			if first := i / step * step; p.first != first {
				p.first = first
				p.err = image.ReadFull(s.file, p.data[:min(n-first, step)<<s.entryShift], d.at+first<<s.entryShift)
			}
			if p.err != nil {
				return 0, fmt.Errorf("%s: %w", d.what, p.err)
			}
			return s.tableFrom(d, i, p.data[(i-p.first)<<s.entryShift:])
		})
	}
}

// tableSize is how many bytes of grain table i the extent needs.
func (s *sparse) tableSize(i int64) int64 {
	perTable := int64(s.tableEntries)
	return min(perTable, (int64(s.capacity)-1)/int64(s.grain)+1-i*perTable) << s.entryShift
}

// table returns where in the file grain table i is, in bytes; 0: nowhere, 1:
// nowhere, and all its grains are zeros. The redundant directory serves where
// the primary one has nothing, or nonsense: writers keep the two alike, so that
// this means damage, of which the extent has warned when it was opened.
func (s *sparse) table(i int64) (int64, error) {
	at, err := s.tableIn(&s.primary, i)
	if why := s.replaced[i]; why != nil {
		err = why
	}
	if s.fallback && (err != nil || at == 0) {
		if redundant, damaged := s.tableIn(&s.redundant, i); damaged == nil && (redundant != 0 || err != nil) {
			return redundant, nil
		}
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", s.name, err)
	}
	return at, nil
}

// tableIn is table by the entry of one directory.
func (s *sparse) tableIn(d *directory, i int64) (int64, error) {
	off := d.at + i<<s.entryShift
	data, err := s.mem.Page(s.file, s.id, s.fileSize, off/image.PageSize)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", d.what, err)
	}
	return s.tableFrom(d, i, data[off%image.PageSize:])
}

// tableFrom is tableIn for an entry that data begins with.
func (s *sparse) tableFrom(d *directory, i int64, data []byte) (int64, error) {
	var at int64
	bad := func(format string, args ...any) (int64, error) {
		return 0, fmt.Errorf("grain table %d at offset %d, by the %s's entry at offset %d, %s", i, at, d.what, d.at+i<<s.entryShift, fmt.Sprintf(format, args...))
	}
	if s.fileKind == kindSESparse {
		var err error
		if at, err = s.seTable(binary.LittleEndian.Uint64(data)); err != nil {
			return 0, fmt.Errorf("the %s's entry at offset %d, of grain table %d: %w: the directory is damaged", d.what, d.at+i<<s.entryShift, i, err)
		}
		if at == 0 {
			return 0, nil
		}
	} else {
		sector := uint64(binary.LittleEndian.Uint32(data))
		if s.kind(sector) != dataGrain {
			return int64(sector), nil
		}
		at = int64(sector) * sectorSize
	}
	need := s.tableSize(i)
	if at > s.fileSize-need {
		return bad("needs %d bytes, the file has %d: the file is truncated, or the directory is damaged", need, s.fileSize)
	}
	if r, ok := within(s.fixed, at, at+need); ok {
		return bad("lies in the %s, bytes %d to %d of the file: the directory is damaged", r.what, r.start, r.end)
	}
	if d.tables.Overlaps(at) {
		return bad("overlaps another grain table: the directory is damaged")
	}
	if need < int64(s.tableEntries)<<s.entryShift {
		if from, to, ok := d.tables.Has(at, at+need); ok {
			return bad("lies in other grain tables, bytes %d to %d of the file: the directory is damaged", from, to)
		}
	}
	return at, nil
}

// run returns the table entries from grain g on, of as many grains as are at
// hand, at least one. It looks no further than max where that would cost.
// Tables that lie in hole, where the file is known to have zeros, are not read.
func (s *sparse) run(g, max int64, hole *fileHole) (run, error) {
	if s.markers != nil {
		return s.markerRun(g, max, hole != nil)
	}
	perTable := int64(s.tableEntries)
	table, in := g/perTable, g%perTable
	at, err := s.table(table)
	if err != nil {
		return run{}, err
	}
	left := min(perTable-in, s.grains()-g)
	off := at + in<<s.entryShift
	if at > 1 && hole.has(off, left<<s.entryShift) {
		at = 0
	}
	if at <= 1 {
		// A table that is not there, and often many of them.
		for left < max {
			next, err := s.table(table + 1)
			if next > 1 && hole.has(next, perTable<<s.entryShift) {
				next = 0
			}
			if err != nil || next != at {
				break
			}
			table++
			left = min(left+perTable, s.grains()-g)
		}
		return run{n: left, like: uint64(at)}, nil
	}
	if err := s.checkOverlap(table, at); err != nil {
		return run{}, err
	}
	data, err := s.mem.Page(s.file, s.id, s.fileSize, off/image.PageSize)
	if err != nil {
		return run{}, fmt.Errorf("%s: grain table %d: %w", s.name, table, err)
	}
	data = data[off%image.PageSize:]
	left = min(left, int64(len(data))>>s.entryShift)
	return run{n: left, entries: data[:left<<s.entryShift], wide: s.entryShift == 3}, nil
}

// fileHole is a range of an extent's file that is known to read as zeros,
// during one scan of its tables. A nil one is empty.
type fileHole struct {
	start, end int64
	asked      int64 // below, another question would bring nothing new
}

func (h *fileHole) has(off, n int64) bool {
	return h != nil && off >= h.start && off+n <= h.end
}

// find looks for a hole at the table of grain g.
func (h *fileHole) find(ctx context.Context, s *sparse, g int64) error {
	perTable := int64(s.tableEntries)
	at, err := s.table(g / perTable)
	if err != nil || at <= 1 {
		return err
	}
	at += g % perTable << s.entryShift
	if at < h.asked {
		return nil
	}
	for e, err := range s.file.Extents(ctx, at, s.fileSize-at) {
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if h.asked = e.End(); e.Kind == source.Zero {
			h.start, h.end = e.Off, e.End()
		}
		break
	}
	return nil
}
