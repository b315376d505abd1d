package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
)

// The function reopen opens the file or device at the given path for reading. The
// returned disk consists of the first bytes of the file or device, as many as the
// given size says.
func reopen(ctx context.Context, path string, size int64) (source.Disk, error) {
	d, err := raw.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	switch {
	case d.Size() == size:
		return d, nil
	case d.Size() > size:
		return head{d, size}, nil
	}
	return nil, errors.Join(fmt.Errorf("cannot read %s back: found %d bytes, want at least %d bytes", path, d.Size(), size), d.Close())
}

// The type head is the beginning of a larger disk. Through it, the part of a device
// that this package wrote can be read. It has none of the abilities (interfaces of
// package source) of the larger disk, because their methods could reach beyond the
// beginning.
type head struct {
	disk source.Disk
	size int64
}

func (h head) Size() int64  { return h.size }
func (h head) Close() error { return h.disk.Close() }

func (h head) ReadAt(p []byte, off int64) (int, error) {
	return io.NewSectionReader(h.disk, 0, h.size).ReadAt(p, off)
}

func (h head) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return h.disk.Extents(ctx, off, length)
}
