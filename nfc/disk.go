package nfc

import (
	"context"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

// These are the size of a piece that is remembered of a read, in bytes, and the number of pieces of a
// read of which one is searched for data.
const (
	samplePiece  = 64 << 10
	sampleStride = 4
)

// disk is a disk that is open on one connection. After the connection was lost, all its calls fail, and
// source.Retry opens the disk again.
type disk struct {
	opener      *opener
	session     *session
	facts       *facts // of the first opening, so that the identity stays the same
	compression wire.Compression
	life        life.Life
	stop        func() bool // stops the function that ends the connection when the context ends
}

var _ interface {
	source.Disk
	source.Identified
	source.Described
	source.Counted
} = (*disk)(nil)

// Size returns the capacity of the disk in bytes, as the host reports it.
func (d *disk) Size() int64 { return d.facts.capacity }

// ReadAt implements source.Disk.
func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.facts.capacity, func(p []byte) (int, error) {
		empty, err := d.session.readAt(p, off, d.compression)
		if cause := context.Cause(d.life.Context); err != nil && cause != nil {
			err = cause
		}
		if err != nil {
			return 0, fmt.Errorf("%s: %w", d.life.Name, d.session.readError(p, off, err))
		}
		if d.opener.params.Frozen {
			d.remember(p, off, empty)
		}
		return len(p), nil
	})
}

// The method remember remembers a piece of p, which was read at the given offset. To search all of p
// for a piece with data would cost much of the time of reading zeros. If empty is true, p is zeros.
func (d *disk) remember(p []byte, off int64, empty bool) {
	at := 0
	for i := 0; i < len(p) && !empty; i += sampleStride * samplePiece {
		if !zero.Is(p[i:min(len(p), i+samplePiece)]) {
			at = i
			break
		}
	}
	d.opener.samples.Add(p[at:min(len(p), at+samplePiece)], off+int64(at))
}

// Extents implements source.Disk. The whole range is data: nobody has seen how a host answers the
// question what is allocated in a chain of images, and a wrong answer would lose data.
func (d *disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	if err := d.life.Check(ctx); err != nil {
		return func(yield func(source.Extent, error) bool) {
			yield(source.Extent{}, fmt.Errorf("%s: %w", d.life.Name, err))
		}
	}
	return source.WholeData(off, length)
}

// Identity implements source.Identified.
func (d *disk) Identity(context.Context) (id, proof string, err error) {
	id = d.opener.params.Identity
	if id == "" {
		id = fmt.Sprintf("nfc:%s:%s", d.opener.params.Name, d.facts.uuid)
	}
	id = fmt.Sprintf("%s:%d", id, d.facts.capacity)
	if d.opener.params.Frozen {
		return id, "snapshot", nil
	}
	return id, "none", nil
}

// transport returns the name of the form in which data is sent, as VDDK's messages call it.
func (d *disk) transport() string {
	if d.opener.o.Clear {
		return "nfc"
	}
	return "nfcssl"
}

// Info implements source.Described.
func (d *disk) Info() source.Info {
	f := &d.session.file
	return source.Info{
		Format: "nfc", Subformat: d.transport(), AdapterType: d.session.adapter, UUID: d.facts.uuid,
		LogicalSector: sectorSize, GuestSector: int64(f.SectorSize), Allocated: d.facts.capacity,
		Geometry: [3]int64{int64(f.Geometry[0]), int64(f.Geometry[1]), int64(f.Geometry[2])},
		Chain:    []string{d.session.dialogue.ticket.File},
	}
}

// Stats implements source.Counted.
func (d *disk) Stats() source.Stats {
	return source.Stats{Transport: d.transport(), Connections: 1, Most: 1, ExtentsSource: "full"}
}

// Close waits for calls in progress and ends the session.
func (d *disk) Close() error {
	return d.life.Close(func() error {
		d.stop()
		d.session.end(d.life.Context)
		return nil
	})
}
