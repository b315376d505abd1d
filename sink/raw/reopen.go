package raw

import (
	"context"
	"io"
	"iter"
	"os"

	"vddkcp/source"
)

// reopen reads the first size bytes of a file or device.
func reopen(ctx context.Context, path string, size int64) (source.Disk, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &readBack{f, size}, nil
}

type readBack struct {
	*os.File
	size int64
}

func (r *readBack) Size() int64 { return r.size }
func (r *readBack) ReadAt(p []byte, off int64) (int, error) {
	return io.NewSectionReader(r.File, 0, r.size).ReadAt(p, off)
}
func (r *readBack) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}
