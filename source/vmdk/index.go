package vmdk

import (
	"cmp"
	"fmt"
	"slices"
)

// index says which grains (blocks) of a sparse extent the file of the extent has, and where in
// the file. The kinds of sparse extents have different types of index: hosted, cowd, seSparse
// and markers. All methods except share are safe for concurrent use.
type index interface {
	// run returns the table entries of consecutive grains, beginning with the given grain.
	// needed is the number of grains that the caller needs. The returned run may have fewer
	// grains, but at least one: run reads the file at most once for entries. The caller
	// then calls run again. The returned run may also have more grains than needed, if one
	// read yields them.
	//
	// The parameter hole is nil if the caller reads data. A scan of the allocation passes a
	// fileHole, with which run skips tables that lie in holes of the file. A scan does not
	// need the places of compressed grains. For these grains, run may therefore return no
	// entries and only the kind dataGrain.
	run(grain, needed int64, hole *fileHole) (run, error)
	// occupied looks for metadata in the bytes [start, end) of the file. If there is
	// any, it returns the range of the metadata, where no grain can be, and true.
	occupied(start, end int64) (region, bool)
	// share makes the index count the memory that it needs in m. All images of a chain
	// count in the same m, which limits their memory together. share is called while an
	// image is opened.
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
	// table returns the offset in the file, in bytes, of the grain table to which an
	// entry of the grain directory points. It returns noTable or zeroTable if there is
	// no such table.
	table(entry []byte) (at int64, err error)
	// stretch returns the kind of grain i and, as next, the number of the first later grain
	// that does not continue grain i. That is a grain of another kind. If contiguous is true
	// and grain i is in the file, it may also be a grain that does not lie directly after the
	// previous grain in the file. next is at most end.
	//
	// If grain i is in the file, pos is its offset in the file, in bytes. If the method place
	// returns an error for the entry of grain i, pos is the constant nowhere.
	stretch(entries []byte, i, end int64, contiguous bool) (kind grainKind, pos, next int64)
	// place returns the offset of grain i in the file, in bytes. It returns an error if
	// the entry is damaged.
	place(entries []byte, i int64) (int64, error)
}

// nowhere is an offset past the end of every file. It stands for the offset of a grain
// whose entry is damaged.
const nowhere = 1 << 62

// stretch returns the kind of grain i of the run, the offset of the grain in the file and, as
// next, the number of the first later grain that does not continue grain i. That is a grain of
// another kind. If contiguous is true and grain i is in the file, it may also be a grain that
// does not lie directly after the previous grain in the file. next is at most end.
func (r *run) stretch(i, end int64, contiguous bool) (kind grainKind, pos, next int64) {
	if r.entries == nil {
		return r.kind, 0, end
	}
	return r.format.stretch(r.entries, i, end, contiguous)
}

// place returns the offset of grain i of the run in the file, in bytes. It returns an
// error if the entry is damaged. If the run has no entries, it returns 0.
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

// within returns the first region that overlaps the bytes [start, end) of the file.
func within(all []region, start, end int64) (r region, ok bool) {
	for i := range all {
		if r := &all[i]; start < r.end && end > r.start {
			return *r, true
		}
	}
	return region{}, false
}
