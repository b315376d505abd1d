package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
)

// emptySlack is how many bytes the file of an empty disk may have behind its
// metadata and a directory: markers, a footer, and what a transfer has added.
const emptySlack = footerSearch

// directory is a grain directory: the places of the grain tables.
type directory struct {
	what   string
	at     int64         // offset in the file, bytes; 0: there is none
	tables *image.Places // nil: not known
}

// regions are the parts of a file of fileSize bytes that the header at its
// start occupies or names, in which no grain directory or table can be.
func (h *header) regions(fileSize int64) []region {
	all := []region{{"header", 0, headerSize}}
	limit := uint64(fileSize) / sectorSize
	if h.descriptorSize > 0 && h.descriptorOffset > 0 && h.descriptorOffset <= limit && h.descriptorSize <= limit {
		all = append(all, region{"descriptor", int64(h.descriptorOffset) * sectorSize, int64(h.descriptorOffset+h.descriptorSize) * sectorSize})
	}
	return all
}

// within returns the first of all that has bytes in common with [start, end).
func within(all []region, start, end int64) (r region, ok bool) {
	for _, r := range all {
		if start < r.end && end > r.start {
			return r, true
		}
	}
	return region{}, false
}

// locate returns the grain directory that the header puts at sector, or why it
// cannot be there.
func (s *sparse) locate(what string, sector uint64) (directory, error) {
	at, err := s.directory(what, sector, s.fileSize)
	if err != nil {
		return directory{}, err
	}
	end := at + s.tables()<<s.entryShift
	if r, ok := within(s.fixed, at, end); ok {
		return directory{}, fmt.Errorf("the %s at sector %d, bytes %d to %d of the file, lies in the %s, bytes %d to %d: the header is damaged", what, sector, at, end, r.what, r.start, r.end)
	}
	return directory{what: what, at: at}, nil
}

// initDirectories finds the grain directory of a hosted sparse extent, whose
// redundant one is found already, if there is one.
func (s *sparse) initDirectories() error {
	primary, err := s.locate("grain directory", s.directoryOffset)
	switch {
	case err == nil:
	case s.redundant.at == 0:
		return err
	default:
		s.warn("all grain tables are read through the redundant grain directory at offset %d: %w", s.redundant.at, err)
		primary, s.redundant = s.redundant, directory{}
	}
	s.primary = primary
	size := s.tables() << s.entryShift
	own := region{primary.what, primary.at, primary.at + size}
	s.fixed, s.metadata = append(s.fixed, own), append(s.metadata, own)
	if r := s.redundant.at; r == primary.at {
		s.redundant = directory{} // one directory under two names
	} else if r != 0 {
		other := region{s.redundant.what, r, r + size}
		if err := disjoint([]region{own, other}); err != nil {
			return err
		}
		s.fixed, s.metadata = append(s.fixed, other), append(s.metadata, other)
	}
	return s.indexTables()
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

// compareDirectories finds out whether the redundant directory has what the
// primary one lacks, and says so in a warning.
func (s *sparse) compareDirectories() {
	n := int64(0)
	var first error
	s.eachTable(func(i int64, read func(*directory) (int64, error)) {
		at, err := read(&s.primary)
		if why := s.replaced[i]; why != nil {
			at, err = 0, why
		}
		if err == nil && at != 0 {
			return
		}
		redundant, damaged := read(&s.redundant)
		if damaged != nil || redundant == 0 && err == nil {
			return
		}
		if n++; n > 1 {
			return
		}
		if first = err; err == nil {
			first = fmt.Errorf("the grain directory's entry at offset %d, of grain table %d, is 0, and in the redundant grain directory it is not", s.primary.at+i<<s.entryShift, i)
		}
	})
	if n > 0 {
		s.fallback = true
		s.warn("the grain directory is damaged: %d of %d grain tables are read through the redundant grain directory; the first: %w", n, s.tables(), first)
	}
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
