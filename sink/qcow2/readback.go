package qcow2

import (
	"context"
	"io"
	"iter"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// ReadAt implements sink.Readback. It reads the disk through the tables of the
// unfinished image.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	if err := d.life.BeginAt(d.life.Context, lifecycle.Writing); err != nil {
		return 0, err
	}
	defer d.life.Done()
	header, err := d.header(d.o, d.first<<d.shift, 1)
	if err != nil {
		return 0, err
	}
	file := &unfinished{d: d, header: header}
	image, err := d.openImage(d.life.Context, file)
	if err != nil {
		return 0, d.named(err)
	}
	defer image.Close()
	n, err := image.ReadAt(p, off)
	if err != nil && file.failed == nil && d.life.Context.Err() == nil {
		// The file does not contain the tables that were written before the checkpoint.
		// The target is therefore not the one for which the checkpoint was made.
		err = sink.Unfit(err)
	}
	return n, err
}

// The type unfinished is the file of an image whose header and L1 table have not yet
// been written to the file. Reads return the content that the file would have if the
// header and the L1 table were already there.
type unfinished struct {
	d      *disk
	header []byte
	failed error // of a read
}

// Size returns the offset at which the allocated clusters end.
func (u *unfinished) Size() int64 { return u.d.next << u.d.shift }

func (u *unfinished) Close() error { return nil }

func (u *unfinished) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}

func (u *unfinished) ReadAt(p []byte, off int64) (int, error) {
	n, err := u.d.file.ReadAt(p, off)
	if err != nil && err != io.EOF {
		u.failed = err
	}
	patch(p, off, u.header, 0)
	// On a device, the part of the L1 table that is not written yet would
	// read as old content of the device.
	patch(p, off, u.d.l1, u.d.l1Offset())
	return n, err
}

// The function patch replaces bytes in p by bytes of b. Both slices are ranges of
// the same file: p begins at the offset pOff, and b at bOff. Only the bytes where
// the two ranges overlap are replaced.
func patch(p []byte, pOff int64, b []byte, bOff int64) {
	if from := max(pOff, bOff); from < min(pOff+int64(len(p)), bOff+int64(len(b))) {
		copy(p[from-pOff:], b[from-bOff:])
	}
}
