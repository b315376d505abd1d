package vmdk

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
)

// maxLoose bounds the loose grain tables that are read when an extent is opened,
// in bytes. Writers lay all tables of a hosted sparse extent one behind the other,
// so that a sound directory has none or a few loose ones.
const maxLoose = 64 << 20

// loose is a grain table that is not contiguous with the table before it nor with
// the one behind it. Either it was put there, or its entry in the directory is
// damaged.
type loose struct {
	table int64
	at    int64 // offset in the file, bytes; 0 or 1: the directory has none
	// between is the place between the tables before and behind it, if there is
	// room for just one table; else 0.
	between int64
}

// loose returns the loose tables of d. A neighbour that d does not have, or whose
// entry is no place for a table, proves nothing: a table with no other neighbours
// is returned only if lonely is set. A table that d does not have is returned if
// there is a place for it between its neighbours.
func (s *sparse) loose(d *directory, lonely bool) []loose {
	length := int64(s.tableEntries) << s.entryShift
	stride := (length + sectorSize - 1) / sectorSize * sectorSize
	most := int(maxLoose / length)
	var all []loose
	var before, at int64 // of the tables i-2 and i-1; 0 and 1: no place, -1: a wrong one
	check := func(i, next int64) {
		known := before > 1 || next > 1
		between := int64(0)
		if before > 1 && next == before+2*stride {
			between = before + stride
		}
		missing := at >= 0 && at <= 1 && i > 0 && between > 0
		if (missing || at > 1 && (known || lonely) && before+stride != at && at+stride != next) && len(all) < most {
			all = append(all, loose{i, at, between})
		}
	}
	s.eachTable(func(i int64, read func(*directory) (int64, error)) {
		next, err := read(d)
		if err != nil {
			next = -1 // a read tells why
		}
		if i > 0 {
			check(i-1, next)
		}
		before, at = at, next
	})
	check(s.tables()-1, 0)
	return all
}

// replaceLoose compares loose tables of the primary directory with those that the
// redundant one has in their place, since an entry that leads into unused zeros of
// the metadata would make 32 MiB of the disk read as zeros. Writers keep both
// directories' tables alike: where a loose table differs from one that is not
// loose, or is empty and the other is not, the redundant directory serves. It is
// damage that a read must not pass over silently.
func (s *sparse) replaceLoose() {
	if s.fileKind != kindSparse {
		return
	}
	tables := s.loose(&s.primary, s.redundant.at != 0)
	if len(tables) == 0 {
		return
	}
	if s.redundant.at == 0 {
		s.warnLoose(tables)
		return
	}
	others := s.loose(&s.redundant, true)
	for _, l := range tables {
		redundant := s.redundantTable(l.table)
		if l.at <= 1 || redundant <= 1 || redundant == l.at {
			continue
		}
		mine, err := s.readTable(l.table, l.at)
		if err != nil {
			continue // a read that needs it says so
		}
		other, err := s.readTable(l.table, redundant)
		if err != nil || bytes.Equal(mine, other) {
			continue
		}
		_, both := slices.BinarySearchFunc(others, l.table, func(l loose, table int64) int { return cmp.Compare(l.table, table) })
		if both && !zero.Is(mine) {
			continue // nothing tells which of them is right
		}
		s.replace(l.table, fmt.Errorf("grain table %d at offset %d, by the grain directory's entry at offset %d, does not follow its neighbours, and differs from the one of the redundant grain directory at offset %d", l.table, l.at, s.primary.at+l.table<<s.entryShift, redundant))
	}
}

// replace notes why grain table i is not read through the primary directory.
func (s *sparse) replace(i int64, why error) {
	if s.replaced == nil {
		s.replaced = make(map[int64]error)
	}
	s.replaced[i] = why
}

// redundantTable is tableIn for the redundant directory while the extent is being
// opened; 0 where there is no such table.
func (s *sparse) redundantTable(i int64) int64 {
	entry := make([]byte, 1<<s.entryShift)
	if err := image.ReadFull(s.file, entry, s.redundant.at+i<<s.entryShift); err != nil {
		return 0
	}
	at, err := s.tableFrom(&s.redundant, i, entry)
	if err != nil {
		return 0
	}
	return at
}

// warnLoose warns of loose tables that have no grain, where no other directory
// tells whether that is right. A loose table in whose place between its neighbours
// there is a table that has grains is damage.
func (s *sparse) warnLoose(tables []loose) {
	if s.compressed() {
		return // the tables of a stream lie between the grains
	}
	n, first := 0, loose{}
	for _, l := range tables {
		if s.isTable(l.table, l.between) {
			s.replace(l.table, fmt.Errorf("the grain directory's entry at offset %d leads to offset %d, and grain table %d lies at offset %d, between its neighbours: the directory is damaged", s.primary.at+l.table<<s.entryShift, l.at, l.table, l.between))
			continue
		}
		if l.at <= 1 || l.at+s.tableSize(l.table) > int64(s.overhead)*sectorSize {
			continue // indexDirectory has warned of it
		}
		b, err := s.readTable(l.table, l.at)
		if err != nil || !zero.Is(b) {
			continue
		}
		if n++; n == 1 {
			first = l
		}
	}
	if n > 0 {
		s.warn("%d of %d grain tables are empty and do not follow their neighbours, the first, grain table %d, at offset %d: if the disk has zeros where there should be data, the grain directory is damaged", n, s.tables(), first.table, first.at)
	}
}

// isTable reports whether the bytes at the offset at, where grain table i would lie,
// are metadata, are not zeros, and belong to no other table. At 0 is none.
func (s *sparse) isTable(i, at int64) bool {
	if at == 0 || at+s.tableSize(i) > int64(s.overhead)*sectorSize {
		return false
	}
	if _, _, ok := s.primary.tables.Has(at, at+s.tableSize(i)); ok {
		return false
	}
	b, err := s.readTable(i, at)
	return err == nil && !zero.Is(b)
}

// readTable reads grain table i, which is at the offset at.
func (s *sparse) readTable(i, at int64) ([]byte, error) {
	b := make([]byte, s.tableSize(i))
	if err := image.ReadFull(s.file, b, at); err != nil {
		return nil, fmt.Errorf("grain table %d: %w", i, err)
	}
	return b, nil
}
