package vmdk

import "encoding/binary"

// sectorEntries is the entryFormat of all kinds of extents except seSparse. An entry is a
// little-endian number of 32 bits: the sector of the file where a table or a grain begins. The
// entry 0 means that there is no table or grain. If the header has flagZeroGrain, the entry 1
// means that the grain, or each grain of the table, reads as zeros.
type sectorEntries struct {
	grain     uint64 // sectors in a grain
	zeroGrain bool   // the header has flagZeroGrain
}

// sectorEntryShift is the base-2 logarithm of the size of an entry in bytes.
const sectorEntryShift = 2

func sectorAt(entries []byte, i int64) uint64 {
	return uint64(binary.LittleEndian.Uint32(entries[i<<sectorEntryShift:]))
}

func (f *sectorEntries) kind(sector uint64) grainKind {
	switch {
	case sector == 0:
		return absentGrain
	case sector == 1 && f.zeroGrain:
		return zeroGrain
	}
	return dataGrain
}

func (f *sectorEntries) table(entry []byte) (int64, error) {
	sector := sectorAt(entry, 0)
	switch f.kind(sector) {
	case absentGrain:
		return noTable, nil
	case zeroGrain:
		return zeroTable, nil
	}
	return int64(sector) * sectorSize, nil
}

func (f *sectorEntries) stretch(entries []byte, i, end int64, contiguous bool) (kind grainKind, pos, next int64) {
	first := sectorAt(entries, i)
	kind, next = f.kind(first), i+1
	if kind == dataGrain && contiguous {
		for want := first + f.grain; next < end && sectorAt(entries, next) == want; want += f.grain {
			next++
		}
	} else {
		for next < end && f.kind(sectorAt(entries, next)) == kind {
			next++
		}
	}
	return kind, int64(first) * sectorSize, next
}

// The method place never returns an error. Whether the file has the sector is checked when the
// grain is read.
func (f *sectorEntries) place(entries []byte, i int64) (int64, error) {
	return int64(sectorAt(entries, i)) * sectorSize, nil
}
