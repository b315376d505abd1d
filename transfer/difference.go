package transfer

import (
	"fmt"

	"github.com/vddkcp/vddkcp/source"
)

// Difference is what two disks, the source and the target, differ in.
type Difference struct {
	// The sizes of the disks, in bytes. Where they are a difference, it is the
	// only one that is looked for.
	SourceSize, TargetSize int64
	SizesDiffer            bool

	// Content: the offset of the first byte that differs and what it is. A
	// range is a run of bytes that all differ, as long as can be; Bytes is how
	// many they are together. Ranges is 0 where the content is the same.
	First          int64
	Source, Target byte
	Ranges, Bytes  int64

	// Allocation, with CompareOptions.Strict: the same of the kinds of extents
	// that the disks have there, Data or Zero.
	Allocation AllocationDifference
}

// AllocationDifference is where one disk has data and the other a hole.
// Ranges is 0 where there is none.
type AllocationDifference struct {
	First          int64
	Source, Target source.Kind
	Ranges, Bytes  int64
}

// String is the line that docs/cli.md promises: of the sizes, else of the
// content, else of the allocation.
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

func dataOrHole(k source.Kind) string {
	if k == source.Zero {
		return "hole"
	}
	return "data"
}
