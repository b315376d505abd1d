package vmdk

import (
	"cmp"
	"fmt"
	"slices"
)

// index says which grains of an extent its file holds, and where. Each kind of
// sparse extent has one: hosted, cowd, seSparse and markers. All methods except
// share are safe for concurrent use.
type index interface {
	// run returns the entries of the grains that begin with the given one. It
	// returns as many as one read of the file yields, at least one. It reads
	// beyond the first max grains only if that costs nothing.
	//
	// The parameter hole is nil in a read of data. A scan of the allocation passes a
	// fileHole, so that run can skip tables that lie in holes of the file. If the
	// grains are compressed, run may then return data grains without their entries.
	run(grain, max int64, hole *fileHole) (run, error)
	// occupied returns metadata that overlaps the bytes [start, end) of the
	// file, where no grain can be. It returns false if there is none.
	occupied(start, end int64) (region, bool)
	// share makes the index count against the limits of m. It is called while
	// an image is opened.
	share(m *memory)
}

// grainKind says where the content of a grain comes from.
type grainKind uint8

const (
	absentGrain grainKind = iota // the image does not have it: its parent's content, or zeros
	zeroGrain                    // zeros, also if the parent has data
	dataGrain                    // in the file of the extent
)

// run describes consecutive grains of an extent.
type run struct {
	n       int64       // number of grains
	kind    grainKind   // the kind of all grains, if entries is nil
	entries []byte      // the table entries of the grains, encoded as format says
	format  entryFormat // nil if entries is nil
}

// entryFormat decodes the entries of grain directories and grain tables.
type entryFormat interface {
	// table returns the offset in the file, in bytes, of the grain table that
	// an entry of the grain directory names, or noTable or zeroTable.
	table(entry []byte) (at int64, err error)
	// stretch returns the kind of grain i, and the first grain up to end that
	// does not continue it: that is of another kind or, if contiguous is set,
	// is data that does not follow in the file. pos is the offset of grain i in
	// the file, in bytes, if the grain is data. It is nowhere for an entry that
	// place refuses.
	stretch(entries []byte, i, end int64, contiguous bool) (kind grainKind, pos, next int64)
	// place returns the offset of grain i in the file, in bytes, or why its
	// entry cannot be right.
	place(entries []byte, i int64) (int64, error)
}

// nowhere is an offset past the end of every file. A grain whose entry is
// damaged has it.
const nowhere = 1 << 62

// stretch returns the kind of grain i of the run, its offset in the file, and the
// first grain up to end that does not continue it, as entryFormat.stretch does.
func (r *run) stretch(i, end int64, contiguous bool) (kind grainKind, pos, next int64) {
	if r.entries == nil {
		return r.kind, 0, end
	}
	return r.format.stretch(r.entries, i, end, contiguous)
}

// place returns the offset of grain i of the run in the file, in bytes, or why its
// entry cannot be right. Grains of a run without entries have the offset 0.
func (r *run) place(i int64) (int64, error) {
	if r.entries == nil {
		return 0, nil
	}
	return r.format.place(r.entries, i)
}

// region is a range of a file, in bytes, that holds metadata.
type region struct {
	what       string // as errors call it, without an article
	start, end int64
}

// disjoint sorts the regions by offset, and returns an error if two of them
// overlap.
func disjoint(all []region) error {
	slices.SortFunc(all, func(a, b region) int { return cmp.Compare(a.start, b.start) })
	for i := range all[1:] {
		if a, b := all[i], all[i+1]; a.end > b.start {
			return fmt.Errorf("the %s, bytes %d to %d of the file, and the %s, from byte %d on, overlap: the header is damaged", a.what, a.start, a.end, b.what, b.start)
		}
	}
	return nil
}

// within returns the first of the regions that overlaps [start, end).
func within(all []region, start, end int64) (r region, ok bool) {
	for i := range all {
		if r := &all[i]; start < r.end && end > r.start {
			return *r, true
		}
	}
	return region{}, false
}
