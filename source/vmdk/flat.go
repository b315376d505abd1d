package vmdk

import (
	"context"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// The type flat is a FLAT or VMFS extent. Its content is a range of a file.
type flat struct {
	name        string // as errors call the file
	file        source.Disk
	start, size int64 // offset of the range in the file, and its length, in bytes
}

func newFlat(name string, f source.Disk, e extentLine) (*flat, error) {
	x := &flat{name: name, file: f, start: e.offset * sectorSize, size: e.sectors * sectorSize}
	if have := f.Size(); x.start > have || x.size > have-x.start {
		return nil, fmt.Errorf("%s: the extent needs %d bytes from offset %d on, but the file has %d bytes: the file is truncated", name, x.size, x.start, have)
	}
	return x, nil
}

func (x *flat) readAt(p []byte, off int64) error {
	if err := image.ReadFull(x.file, p, x.start+off); err != nil {
		return fmt.Errorf("%s: %w", x.name, err)
	}
	return nil
}

func (x *flat) scan(ctx context.Context, off, end int64, want detail, emit func(piece) error) error {
	for e, err := range x.file.Extents(ctx, x.start+off, end-off) {
		if err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
		p := piece{kind: dataGrain, off: e.Off - x.start, n: e.Len}
		if e.Kind == source.Zero {
			p.kind = zeroGrain
		}
		if want == places {
			err = p.emitPlaces(x.file, e.Off, emit)
		} else {
			err = emit(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (x *flat) inFile(off int64) (f *os.File, pos, n int64, ok bool) {
	return image.InFile(x.file, x.start+off, x.size-off)
}

// The type zeros is a ZERO extent. It reads as zeros even if the image has a parent.
type zeros struct{}

func (zeros) readAt(p []byte, _ int64) error {
	clear(p)
	return nil
}

func (zeros) scan(_ context.Context, off, end int64, _ detail, emit func(piece) error) error {
	return emit(piece{kind: zeroGrain, off: off, n: end - off})
}

// noAccess is an extent that the descriptor marks as NOACCESS. Its file is not opened,
// and reads of the extent fail, because the content is not known.
type noAccess struct {
	path string // of the descriptor
	line extentLine
	base int64 // offset of the extent in the disk, bytes
}

func (x *noAccess) readAt(_ []byte, off int64) error {
	return fmt.Errorf("%s: the extent at disk offset %d is declared NOACCESS in line %d of the descriptor: the extent cannot be read", x.path, x.base+off, x.line.line)
}

// The method scan reports the extent as data. A program that copies the disk therefore reads
// it, and the read returns the error.
func (x *noAccess) scan(_ context.Context, off, end int64, _ detail, emit func(piece) error) error {
	return emit(piece{kind: dataGrain, off: off, n: end - off})
}
