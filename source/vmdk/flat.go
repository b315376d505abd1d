package vmdk

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// flat is a FLAT or VMFS extent: the bytes of a file, from start on.
type flat struct {
	name        string
	file        source.Disk
	start, size int64 // bytes, in the file
}

func newFlat(name string, f source.Disk, e extentLine) (*flat, error) {
	x := &flat{name: name, file: f, start: e.offset * sectorSize, size: e.sectors * sectorSize}
	if have := f.Size(); x.start > have || x.size > have-x.start {
		return nil, fmt.Errorf("%s: the extent needs %d bytes from offset %d on, the file has %d: it is truncated", name, x.size, x.start, have)
	}
	return x, nil
}

func (x *flat) readAt(p []byte, off int64) error {
	if err := image.ReadFull(x.file, p, x.start+off); err != nil {
		return fmt.Errorf("%s: %w", x.name, err)
	}
	return nil
}

func (x *flat) scan(ctx context.Context, off, end int64, emit func(grainKind, int64, int64) error) error {
	for e, err := range x.file.Extents(ctx, x.start+off, end-off) {
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		kind := dataGrain
		if e.Kind == source.Zero {
			kind = zeroGrain
		}
		if err := emit(kind, e.Off-x.start, e.Len); err != nil {
			return err
		}
	}
	return nil
}

// zeros is a ZERO extent. It reads as zeros also where there is a parent.
type zeros struct{}

func (zeros) readAt(p []byte, _ int64) error {
	clear(p)
	return nil
}

func (zeros) scan(_ context.Context, off, end int64, emit func(grainKind, int64, int64) error) error {
	return emit(zeroGrain, off, end-off)
}

// noAccess is an extent that the descriptor forbids to read. Its file is not
// opened, and zeros in its place would be invented.
type noAccess struct {
	path string
	line extentLine
	base int64
}

func (x *noAccess) readAt(_ []byte, off int64) error {
	return fmt.Errorf("%s: the extent of disk offset %d is declared NOACCESS in line %d of the descriptor: it can't be read", x.path, x.base+off, x.line.line)
}

// scan calls it data, so that a copy comes to the error of readAt.
func (x *noAccess) scan(_ context.Context, off, end int64, emit func(grainKind, int64, int64) error) error {
	return emit(dataGrain, off, end-off)
}
