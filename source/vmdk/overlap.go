package vmdk

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/image"
)

// overlapCheck checks that no two grains of a grain table overlap in the file. It
// checks each table of an extent once, when the table is first used. It is used for
// uncompressed grains only, because the end of a compressed grain does not follow from
// its table entry. It is safe for concurrent use.
type overlapCheck struct {
	entries *sectorEntries
	passed  []atomic.Uint64 // a bit for each table that passed the check
}

func newOverlapCheck(entries *sectorEntries, tables int64) *overlapCheck {
	return &overlapCheck{entries, make([]atomic.Uint64, (tables+63)/64)}
}

// The method check returns an error if two grains of table i overlap in the file. The table entry
// of one of these grains is then damaged, and reading this grain would return data of the other
// grain. pos is the offset of the table in the file.
func (c *overlapCheck) check(t *tables, i, pos int64) error {
	bits, bit := &c.passed[i/64], uint64(1)<<(i%64)
	if bits.Load()&bit != 0 {
		return nil
	}
	data := make([]byte, t.tableSize(i))
	if err := image.ReadFull(t.file, data, pos); err != nil {
		return fmt.Errorf("%s: grain table %d: %w", t.name, i, err)
	}
	grain := int64(t.grain)
	sectors := make([]int64, 0, len(data)>>sectorEntryShift)
	ascending, before := true, -grain
	for k := range int64(cap(sectors)) {
		sector := sectorAt(data, k)
		if c.entries.kind(sector) != dataGrain {
			continue
		}
		ascending = ascending && int64(sector) >= before+grain
		before = int64(sector)
		sectors = append(sectors, before)
	}
	if !ascending {
		slices.Sort(sectors)
		for k := 1; k < len(sectors); k++ {
			if sectors[k] < sectors[k-1]+grain {
				return fmt.Errorf("%s: grain table %d at offset %d: two grains of %d bytes overlap, at offsets %d and %d of the file: the table is damaged", t.name, i, pos, t.grainSize, sectors[k-1]*sectorSize, sectors[k]*sectorSize)
			}
		}
	}
	bits.Or(bit)
	return nil
}
