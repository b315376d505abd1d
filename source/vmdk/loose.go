package vmdk

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
)

// maxLoose limits the total size of the loose grain tables (see the type loose) that are
// read when an extent is opened, in bytes. Writers put all tables of a hosted sparse extent
// one after another. An undamaged directory therefore has few loose tables or none.
const maxLoose = 64 << 20

// The type loose is a grain table that lies apart from its neighbours. In the file, it lies
// neither directly after the table of the previous directory entry nor directly before the
// table of the next entry. Either a writer has put it there, or its entry in the directory is
// damaged.
type loose struct {
	table int64
	at    int64 // offset in the file, bytes, or noTable or zeroTable
	// The previous and the next entry of the directory point to two other tables. The field
	// between is the offset of the space between these two tables. The field is 0 unless
	// exactly one table fits into this space.
	between int64
}

// The method loose returns the loose tables of the directory d. The neighbours of a table are
// the tables to which the previous and the following entry of the directory point. If both
// entries are empty or damaged, the table has no neighbours, and is returned only if the
// parameter lonely is true.
//
// A table with an empty entry also counts as loose if the space between its neighbours is
// exactly as long as one table, because the missing table may be there.
func (x *hosted) loose(d *directory, lonely bool) []loose {
	length := x.length()
	stride := (length + sectorSize - 1) / sectorSize * sectorSize
	most := int(maxLoose / length)
	var all []loose
	var before, at int64 // offsets of the tables i-2 and i-1; -1: the entry is damaged
	check := func(i, next int64) {
		known := before > zeroTable || next > zeroTable
		between := int64(0)
		if before > zeroTable && next == before+2*stride {
			between = before + stride
		}
		missing := at >= 0 && at <= zeroTable && i > 0 && between > 0
		if (missing || at > zeroTable && (known || lonely) && before+stride != at && at+stride != next) && len(all) < most {
			all = append(all, loose{i, at, between})
		}
	}
	x.eachTable(func(i int64, read func(*directory) (int64, error)) {
		next, err := read(d)
		if err != nil {
			next = -1 // reads report the error
		}
		if i > 0 {
			check(i-1, next)
		}
		before, at = at, next
	})
	check(x.count-1, 0)
	return all
}

// replaceLoose compares loose tables of the primary directory with the same tables of the
// redundant directory. Writers keep both tables equal. Without this check, a damaged entry
// that points to unused zeros in the metadata would make a part of the disk, usually 32
// MiB, read as zeros without an error.
//
// If the two tables differ, the table of the redundant directory is used in two cases: it is not
// loose itself, or it is loose but the table of the primary directory has no grains.
func (x *hosted) replaceLoose() {
	tables := x.loose(&x.primary, x.redundant.at != 0)
	if len(tables) == 0 {
		return
	}
	if x.redundant.at == 0 {
		x.warnLoose(tables)
		return
	}
	others := x.loose(&x.redundant, true)
	for _, l := range tables {
		redundant := x.redundantTable(l.table)
		if l.at <= zeroTable || redundant <= zeroTable || redundant == l.at {
			continue
		}
		own, err := x.readTable(l.table, l.at)
		if err != nil {
			continue // a read that needs the table reports the error
		}
		other, err := x.readTable(l.table, redundant)
		if err != nil || bytes.Equal(own, other) {
			continue
		}
		_, both := slices.BinarySearchFunc(others, l.table, func(l loose, table int64) int { return cmp.Compare(l.table, table) })
		if both && !zero.Is(own) {
			continue // both are loose and have grains: either may be right
		}
		x.replace(l.table, fmt.Errorf("the grain directory's entry at offset %d says that grain table %d is at offset %d, which is not next to the previous or the following table; the redundant grain directory has another table at offset %d, and that table is used", x.primary.at+l.table<<x.shift, l.table, l.at, redundant))
	}
}

// The method replace makes later reads ignore the entry of grain table i in the primary
// directory. The parameter reason has the text with which errors explain why the entry is
// ignored.
func (x *hosted) replace(i int64, reason error) {
	if x.replaced == nil {
		x.replaced = make(map[int64]error)
	}
	x.replaced[i] = reason
}

// redundantTable returns the offset of grain table i according to the redundant directory, or
// noTable if the entry of the table is damaged or cannot be read. It does not use the cache of
// the extent, because the extent has no cache yet while it is opened.
func (x *hosted) redundantTable(i int64) int64 {
	entry := make([]byte, 1<<x.shift)
	if err := image.ReadFull(x.file, entry, x.redundant.at+i<<x.shift); err != nil {
		return noTable
	}
	at, err := x.tableFrom(&x.redundant, i, entry)
	if err != nil {
		return noTable
	}
	return at
}

// warnLoose checks the loose tables of an extent that has no redundant directory. For each loose
// table it looks into the space between the neighbours of the table. If a table with grains is
// there, the directory entry of the loose table is damaged: it should point into this space.
// Later reads that need the table then return an error. If no table is there, and the loose
// table has no grains, the entry may be damaged. warnLoose then adds a warning.
func (x *hosted) warnLoose(tables []loose) {
	if x.compressed {
		return // in a stream, tables lie between the grains
	}
	n, first := 0, loose{}
	for _, l := range tables {
		if x.isTable(l.table, l.between) {
			x.replace(l.table, fmt.Errorf("the grain directory's entry at offset %d says that grain table %d is at offset %d, but the table lies at offset %d, between the previous and the following table: the directory is damaged", x.primary.at+l.table<<x.shift, l.table, l.at, l.between))
			continue
		}
		if l.at <= zeroTable || l.at+x.tableSize(l.table) > x.metadataEnd {
			continue // indexDirectories warned of tables after the metadata
		}
		b, err := x.readTable(l.table, l.at)
		if err != nil || !zero.Is(b) {
			continue
		}
		if n++; n == 1 {
			first = l
		}
	}
	if n > 0 {
		x.warn("the grain directory may be damaged: %d of %d grain tables are empty and do not lie next to the previous or the following table, although writers put tables one after another; the first of these tables is grain table %d, at offset %d; check that the disk does not have zeros where it should have data", n, x.count, first.table, first.at)
	}
}

// isTable reports whether the bytes of the file that begin at the given offset look like grain
// table i. Such bytes lie in the metadata, are not all zeros, and do not belong to another
// table. There is never a table at the offset 0.
func (x *hosted) isTable(i, off int64) bool {
	if off == 0 || off+x.tableSize(i) > x.metadataEnd {
		return false
	}
	if _, _, ok := x.primary.tables.Has(off, off+x.tableSize(i)); ok {
		return false
	}
	b, err := x.readTable(i, off)
	return err == nil && !zero.Is(b)
}

// readTable reads grain table i from the given offset of the file.
func (x *hosted) readTable(i, off int64) ([]byte, error) {
	b := make([]byte, x.tableSize(i))
	if err := image.ReadFull(x.file, b, off); err != nil {
		return nil, fmt.Errorf("grain table %d: %w", i, err)
	}
	return b, nil
}
