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
// in bytes. Writers put all tables of a hosted sparse extent one after another, so
// an undamaged directory has few loose ones or none.
const maxLoose = 64 << 20

// loose is a grain table that is next to neither the table before it nor the one
// after it. Either a writer put it there, or its entry in the directory is
// damaged.
type loose struct {
	table int64
	at    int64 // offset in the file, bytes, or noTable or zeroTable
	// between is the offset of the space between the neighbouring tables, if one
	// table fits there exactly; otherwise 0.
	between int64
}

// loose returns the loose tables of d. If d does not have the neighbours of a
// table, or their entries are damaged, the table is returned only if lonely is
// set. A table that d does not have is returned if there is space for it between
// its neighbours.
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

// replaceLoose compares loose tables of the primary directory with the same
// tables of the redundant one. A damaged entry that points to unused zeros in the
// metadata would otherwise make the whole range of a table, usually 32 MiB, read
// as zeros without an error. Writers keep the tables of both directories alike.
// The redundant table is used if it differs and is not loose itself, and also if
// it has grains and the loose table is empty.
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
		x.replace(l.table, fmt.Errorf("grain table %d at offset %d, by the grain directory's entry at offset %d, does not follow its neighbours, and differs from the one of the redundant grain directory at offset %d", l.table, l.at, x.primary.at+l.table<<x.shift, redundant))
	}
}

// replace records why grain table i is not read through the primary directory.
func (x *hosted) replace(i int64, why error) {
	if x.replaced == nil {
		x.replaced = make(map[int64]error)
	}
	x.replaced[i] = why
}

// redundantTable returns the offset of grain table i according to the redundant
// directory, or noTable if the entry is damaged. It does not use the cache, which the
// extent does not have yet while it is opened.
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

// warnLoose adds a warning about loose tables without grains, for an extent that
// has no redundant directory to compare them with. If the space between the
// neighbours of a loose table holds a table with grains, the directory is damaged
// and reads of the loose table fail.
func (x *hosted) warnLoose(tables []loose) {
	if x.compressed {
		return // in a stream, tables lie between the grains
	}
	n, first := 0, loose{}
	for _, l := range tables {
		if x.isTable(l.table, l.between) {
			x.replace(l.table, fmt.Errorf("the grain directory's entry at offset %d leads to offset %d, and grain table %d lies at offset %d, between its neighbours: the directory is damaged", x.primary.at+l.table<<x.shift, l.at, l.table, l.between))
			continue
		}
		if l.at <= zeroTable || l.at+x.tableSize(l.table) > x.metadataEnd {
			continue // indexDirectories warned of tables behind the metadata
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
		x.warn("%d of %d grain tables are empty and do not follow their neighbours, the first, grain table %d, at offset %d: if the disk has zeros where there should be data, the grain directory is damaged", n, x.count, first.table, first.at)
	}
}

// isTable reports whether the bytes at an offset look like grain table i: they
// are in the metadata, are not all zeros, and belong to no other table. The
// offset 0 is never a table.
func (x *hosted) isTable(i, at int64) bool {
	if at == 0 || at+x.tableSize(i) > x.metadataEnd {
		return false
	}
	if _, _, ok := x.primary.tables.Has(at, at+x.tableSize(i)); ok {
		return false
	}
	b, err := x.readTable(i, at)
	return err == nil && !zero.Is(b)
}

// readTable reads grain table i from the offset at.
func (x *hosted) readTable(i, at int64) ([]byte, error) {
	b := make([]byte, x.tableSize(i))
	if err := image.ReadFull(x.file, b, at); err != nil {
		return nil, fmt.Errorf("grain table %d: %w", i, err)
	}
	return b, nil
}
