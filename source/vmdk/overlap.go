package vmdk

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/image"
)

// soundTables notes which grain tables of an extent were found sound, a bit for
// each. It is safe for concurrent use.
type soundTables []atomic.Uint64

func newSoundTables(n int64) soundTables { return make(soundTables, (n+63)/64) }

func (t soundTables) has(i int64) bool { return t[i/64].Load()&(1<<(i%64)) != 0 }

func (t soundTables) add(i int64) { t[i/64].Or(1 << (i % 64)) }

// checkOverlap returns an error if two grains of table i, which is at the offset
// at, have bytes of the file in common: then the entry of one of them is damaged,
// and it would read as the other's data. It reads each table once. Only tables of
// grains that are not compressed have entries that say where a grain ends.
func (s *sparse) checkOverlap(i, at int64) error {
	if s.sound == nil || s.sound.has(i) {
		return nil
	}
	data := make([]byte, s.tableSize(i))
	if err := image.ReadFull(s.file, data, at); err != nil {
		return fmt.Errorf("%s: grain table %d: %w", s.name, i, err)
	}
	sectors := make([]int64, 0, len(data)/4)
	ascending, before := true, -int64(s.grain)
	for ; len(data) > 0; data = data[4:] {
		entry := uint64(binary.LittleEndian.Uint32(data))
		if s.kind(entry) != dataGrain {
			continue
		}
		ascending = ascending && int64(entry) >= before+int64(s.grain)
		before = int64(entry)
		sectors = append(sectors, before)
	}
	if !ascending {
		slices.Sort(sectors)
		for k := 1; k < len(sectors); k++ {
			if sectors[k] < sectors[k-1]+int64(s.grain) {
				return fmt.Errorf("%s: grain table %d at offset %d: two grains of %d bytes overlap, at offsets %d and %d of the file: the table is damaged", s.name, i, at, s.grainSize, sectors[k-1]*sectorSize, sectors[k]*sectorSize)
			}
		}
	}
	s.sound.add(i)
	return nil
}
