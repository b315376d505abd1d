package vmdk

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
)

// run is a stretch of grains whose table entries are known.
type run struct {
	n       int64  // grains
	entries []byte // 4 bytes a grain, or 8; nil: all are like
	like    uint64
	wide    bool // 8 bytes
}

// entry is the table entry of grain i of the run: for all kinds but seSparse
// the sector of the file where it begins, or 0 or 1.
func (r *run) entry(i int64) uint64 {
	switch {
	case r.entries == nil:
		return r.like
	case r.wide:
		return binary.LittleEndian.Uint64(r.entries[i*8:])
	}
	return uint64(binary.LittleEndian.Uint32(r.entries[i*4:]))
}

// grainKind is what a table entry says.
type grainKind uint8

const (
	absentGrain grainKind = iota // not in this image
	zeroGrain
	dataGrain
)

func (s *sparse) kind(entry uint64) grainKind {
	switch {
	case entry == 0:
		return absentGrain
	case s.fileKind == kindSESparse:
		return seKind(entry)
	case entry == 1 && s.flags&flagZeroGrain != 0:
		return zeroGrain
	}
	return dataGrain
}

// place is where in the file the grain of an entry begins, in bytes; nowhere,
// where that can't be.
func (s *sparse) place(entry uint64) int64 {
	if s.fileKind == kindSESparse {
		return s.sePlace(entry)
	}
	return int64(entry) * sectorSize
}

// region is a stretch of a file, in bytes.
type region struct {
	what       string
	start, end int64
}

// disjoint returns an error where two regions have bytes in common.
func disjoint(all []region) error {
	slices.SortFunc(all, func(a, b region) int { return cmp.Compare(a.start, b.start) })
	for i := range all[1:] {
		if a, b := all[i], all[i+1]; a.end > b.start {
			return fmt.Errorf("the %s, bytes %d to %d of the file, and the %s, from byte %d on, overlap: the header is damaged", a.what, a.start, a.end, b.what, b.start)
		}
	}
	return nil
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
