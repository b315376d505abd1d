package transfer

import (
	"fmt"

	"github.com/vddkcp/vddkcp/source"
)

// Difference describes how two disks, the source and the target, differ.
type Difference struct {
	// SourceSize and TargetSize are the sizes of the disks, in bytes. If
	// SizesDiffer is true, nothing else was compared.
	SourceSize, TargetSize int64
	SizesDiffer            bool

	// First is the offset of the first byte that differs. Source and Target are the values of
	// this byte in the two disks. Ranges is the number of ranges in which all bytes differ, and
	// Bytes the number of bytes in these ranges. If Ranges is 0, the content is equal.
	First          int64
	Source, Target byte
	Ranges, Bytes  int64

	// Allocation is filled in only if CompareOptions.Strict is set.
	Allocation AllocationDifference
}

// AllocationDifference describes the ranges in which one disk has data and the other a hole. If
// Ranges is 0, there are no such ranges.
type AllocationDifference struct {
	First          int64       // offset of the first range
	Source, Target source.Kind // kinds of the extents at First: Data or Zero
	Ranges, Bytes  int64       // number of the ranges, and of their bytes
}

// String returns a line about the first kind of difference that it finds: in the sizes, in the
// content, or in the allocation. docs/cli.md promises the format of this line.
func (d *Difference) String() string {
	switch {
	case d.SizesDiffer:
		return fmt.Sprintf("sizes differ: source %d bytes, target %d bytes", d.SourceSize, d.TargetSize)
	case d.Ranges > 0:
		return fmt.Sprintf("first difference at byte %d: source 0x%02X, target 0x%02X; %d ranges, %d bytes", d.First, d.Source, d.Target, d.Ranges, d.Bytes)
	case d.Allocation.Ranges > 0:
		a := d.Allocation
		return fmt.Sprintf("first allocation difference at byte %d: source %s, target %s; %d ranges, %d bytes", a.First, dataOrHole(a.Source), dataOrHole(a.Target), a.Ranges, a.Bytes)
	}
	return "no difference"
}

// dataOrHole returns the word that Difference.String prints for a kind of extent: "data" or "hole".
func dataOrHole(k source.Kind) string {
	if k == source.Zero {
		return "hole"
	}
	return "data"
}
