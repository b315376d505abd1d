package vmdk

import (
	"cmp"
	"fmt"
	"slices"
)

// The type index says which grains (blocks) of a sparse extent the file of the extent has, and
// where in the file. The kinds of sparse extents have different types of index: hosted, cowd,
// seSparse and markers. All methods except share are safe for concurrent use.
type index interface {
	// The method run returns the table entries of consecutive grains, beginning with the given
	// grain. The parameter needed is the number of grains that the caller needs. The method
	// reads entries from the file at most once per call. The result may therefore have fewer
	// grains than needed, but has at least one, and the caller calls the method again for the
	// rest. The result may also have more grains than needed, if the same read yields their
	// entries.
	//
	// The parameter hole is nil if the caller reads data. A scan of the allocation passes a
	// fileHole, with which run skips tables that lie in holes of the file. A scan does not need
	// the places of compressed grains. In a scan, the result for compressed grains may therefore
	// have no entries, but only the kind dataGrain.
	run(grain, needed int64, hole *fileHole) (run, error)
	// The method occupied looks for metadata in the bytes [start, end) of the file. If it finds
	// metadata, it returns true and the range of the metadata, in which no grain can be.
	occupied(start, end int64) (region, bool)
	// The method share adds the memory of the index to the memory that m counts. All images of
	// a chain use the same m, which limits the memory of the whole chain. The method is called
	// while an image is opened.
	share(m *memory)
}

// grainKind says where the content of a grain comes from.
type grainKind uint8

const (
	absentGrain grainKind = iota // the image does not have it: its parent's content, or zeros
	zeroGrain                    // zeros, also if the parent has data
	dataGrain                    // in the file of the extent
)

// The type run describes consecutive grains of an extent.
type run struct {
	n       int64       // number of grains
	kind    grainKind   // the kind of all grains, if entries is nil
	entries []byte      // the table entries of the grains, encoded as format says
	format  entryFormat // nil if entries is nil
}

// entryFormat decodes the entries of grain directories and grain tables.
type entryFormat interface {
	// The method table returns the offset in the file, in bytes, of the grain table to which an
	// entry of the grain directory points. It returns noTable or zeroTable if there is no such
	// table.
	table(entry []byte) (at int64, err error)
	// The method stretch finds the longest sequence of grains that begins with grain i, ends
	// before grain number end, and has only grains of one kind. If the parameter contiguous is
	// true and the grains are in the file, they must also lie directly one after another in the
	// file. The result kind is the kind of these grains, and the result next is the number of
	// the first grain after them.
	//
	// If grain i is in the file, the result pos is its offset in the file, in bytes. If the
	// method place returns an error for the entry of grain i, the result pos is the constant
	// nowhere.
	stretch(entries []byte, i, end int64, contiguous bool) (kind grainKind, pos, next int64)
	// The method place returns the offset of grain i in the file, in bytes. It returns an error
	// if the entry is damaged.
	place(entries []byte, i int64) (int64, error)
}

// The constant nowhere is an offset past the end of every file. It stands for the offset of a
// grain whose entry is damaged.
const nowhere = 1 << 62

// The method stretch finds the longest sequence of grains that begins with grain i of the run,
// ends before grain number end, and has only grains of one kind. If the parameter contiguous is
// true and the grains are in the file, they must also lie directly one after another in the
// file. The result kind is the kind of these grains, and the result next is the number of the
// first grain after them. If the run has table entries and grain i is in the file, the result
// pos is the offset of the grain in the file.
func (r *run) stretch(i, end int64, contiguous bool) (kind grainKind, pos, next int64) {
	if r.entries == nil {
		return r.kind, 0, end
	}
	return r.format.stretch(r.entries, i, end, contiguous)
}

// The method place returns the offset of grain i of the run in the file, in bytes. It returns
// an error if the entry is damaged. If the run has no entries, it returns 0.
func (r *run) place(i int64) (int64, error) {
	if r.entries == nil {
		return 0, nil
	}
	return r.format.place(r.entries, i)
}

// The type region is a range of a file, in bytes, that holds metadata.
type region struct {
	what       string // as errors call it, without an article
	start, end int64
}

// The function disjoint sorts the regions by offset, and returns an error if two of them
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

// The function within returns the first region that overlaps the bytes [start, end) of the
// file.
func within(all []region, start, end int64) (r region, ok bool) {
	for i := range all {
		if r := &all[i]; start < r.end && end > r.start {
			return *r, true
		}
	}
	return region{}, false
}
