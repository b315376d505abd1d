// Package cow puts a writable layer over a disk that is only read: what is
// written goes to a file of blocks, what was not written is read from below,
// and the disk below is never touched.
//
// The layer knows of each block whether it is here, reads as zeros, or is
// still that of the disk below: two bits a block, kept in pages of which a
// bounded number is in memory (table.go). A block lies in the file at the
// place that it has in the disk, so the file is sparse and nothing is
// allocated (store.go): a run of blocks is one system call, and no order of
// writing can give two blocks one place. docs/cow.md has the format.
package cow

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// DefaultBlockSize is the block size of a new layer, in bytes.
const DefaultBlockSize = 64 << 10

const (
	minBlockSize = 4 << 10
	maxBlockSize = 2 << 20
)

// Options say how a layer is kept. The zero value is a temporary one.
type Options struct {
	// File is where the layer is kept. It is made where there is none (or an
	// empty one); one that is there must be the layer of the same disk, in the
	// same state, and is continued. "": a file without a name in the folder for
	// temporary files ($TMPDIR), which is gone at the end, however that comes.
	File string
	// OnRead keeps blocks that were read once in the layer too, for a disk below
	// that is slow. Where there is no space for them they are not kept.
	OnRead bool
	// BlockSize is a power of two from 4 KiB to 2 MiB, in bytes. 0 is that of
	// File where that is there, else DefaultBlockSize. A part of a block that is
	// written first has the rest of it read from below.
	BlockSize int64
	// Log gets warnings; nil: nobody does.
	Log *slog.Logger
}

// Disk is a disk with its layer. Beside source.Disk it is source.Writable,
// Identified, Described, InFile and Uncached; it is no Wrapper. All methods are
// safe for concurrent use: of two calls that overlap in a block neither loses
// the bytes of the other beside it.
type Disk struct {
	life  life.Life
	base  source.Disk
	size  int64
	block int64 // bytes, a power of two
	log   *slog.Logger
	id    string
	info  source.Info

	store      *store
	table      *table
	locks      locks
	buffers    chan []byte // of one block each; nil: not made yet
	zeros      []byte      // one block
	copyOnRead atomic.Bool // OnRead, while there is space

	flushes flush.Group
}

// New puts a layer over under, to live under ctx. The disk that it returns owns
// under and closes it; where New fails it stays the caller's. Errors of File
// name it: one that is in use, that is no layer, or the layer of another disk
// (then both are named) is refused and left as it is.
func New(ctx context.Context, base source.Disk, o Options) (*Disk, error) {
	return newDisk(ctx, base, o, kernel())
}

func newDisk(ctx context.Context, base source.Disk, o Options, sys system) (*Disk, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("cow: %w", err)
	}
	if b := o.BlockSize; b != 0 && (b < minBlockSize || b > maxBlockSize || b&(b-1) != 0) {
		return nil, fmt.Errorf("cow: block size of %d bytes: want a power of two from %d to %d", b, minBlockSize, maxBlockSize)
	}
	want := header{Size: base.Size(), BlockSize: o.BlockSize, Proof: "none"}
	if i, ok := source.Ability[source.Identified](base); ok {
		var err error
		if want.Source, want.Proof, err = i.Identity(ctx); err != nil {
			return nil, fmt.Errorf("cow: %w", err)
		}
	}
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s, err := openStore(o.File, want, sys)
	if err != nil {
		return nil, err
	}
	if s.found && want.Proof == "none" {
		log.Warn("a layer is continued over a disk that can't prove to be unchanged", "file", s.name, "disk", want.Source)
	}
	t, err := newTable(s)
	if err != nil {
		s.close()
		return nil, err
	}
	d := &Disk{
		life:    life.Life{Context: ctx, Name: s.name},
		base:    base,
		size:    want.Size,
		block:   s.block,
		log:     log,
		id:      want.Source,
		info:    source.Info{Format: "raw"},
		store:   s,
		table:   t,
		buffers: make(chan []byte, max(4, min(64, maxBuffered/s.block))),
		zeros:   make([]byte, s.block),
	}
	for range cap(d.buffers) {
		d.buffers <- nil
	}
	d.copyOnRead.Store(o.OnRead)
	if i, ok := source.Ability[source.Described](base); ok {
		d.info = i.Info()
		d.info.Format = cmp.Or(d.info.Format, "raw")
	}
	if len(d.info.Chain) == 0 {
		d.info.Chain = []string{cmp.Or(d.id, "the disk below")} // so that the layer is not all there is
	}
	d.info.ClusterSize = max(d.info.ClusterSize, d.block)
	d.info.Chain = append([]string{s.name}, d.info.Chain...)
	return d, nil
}

// maxBuffered bounds the memory that blocks take of which a part is written, or
// read and kept, in bytes.
const maxBuffered = 8 << 20

// buffer returns memory for a block, and waits for it.
func (d *Disk) buffer() (b []byte, err error) {
	select {
	case b = <-d.buffers:
	case <-d.life.Context.Done():
		return nil, context.Cause(d.life.Context)
	}
	if b == nil {
		b = make([]byte, d.block)
	}
	return b, nil
}

// Size is that of the disk below.
func (d *Disk) Size() int64 { return d.size }

// Identity is that of the disk below and says so; it proves nothing, since the
// disk is written to.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	if err := d.life.Check(ctx); err != nil {
		return "", "", fmt.Errorf("identity of %s: %w", d.life.Name, err)
	}
	return "cow:" + d.id, "none", nil
}

// Info is that of the disk below, with the layer as the first of its chain, and
// no smaller clusters than the layer's blocks: what is written in whole blocks
// needs no reading.
func (d *Disk) Info() source.Info { return d.info }

// ReadUncached asks it of the disk below. The layer's own blocks stay cached,
// since what was written is likely read again.
func (d *Disk) ReadUncached() { image.ReadUncached(d.base) }

// inFileAhead bounds for how many bytes InFile answers: it is asked for one
// request.
const inFileAhead = 64 << 20

// InFile answers for blocks that are here, and forwards what the disk below
// answers for those that are not (not with OnRead, since what is read past this
// disk is not kept). An answer is true until its range is written to. That is
// enough for who reads from the file to answer one request: a file below never
// changes, and a block never changes its place, so what is read there is what
// the range held at some time since InFile was asked, as with any read beside
// a write.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= d.size {
		return nil, 0, 0, false
	}
	state, n, err := d.run(off, min(d.size-off, inFileAhead))
	switch {
	case err != nil:
		return nil, 0, 0, false // ReadAt will tell
	case state == present:
		f, pos, have := d.store.place(off)
		return f, pos, min(n, have), true
	case state == absent && !d.copyOnRead.Load():
		return image.InFile(d.base, off, n)
	}
	return nil, 0, 0, false
}

// run returns the state of the byte at off, and for how many of n bytes it is
// the same; it may stop early in a long run.
func (d *Disk) run(off, n int64) (state int, same int64, err error) {
	b := off / d.block
	last := (off + n - 1) / d.block
	state, blocks, err := d.table.run(b, last-b+1)
	return state, min(n, (b+blocks)*d.block-off), err
}

// Close waits for calls in progress, makes what was written durable (but in a
// temporary file), and closes the layer and the disk below.
func (d *Disk) Close() error {
	return d.life.Close(func() error {
		var err error
		if !d.store.temporary {
			err = d.flush()
		}
		return errors.Join(err, d.store.close(), d.base.Close())
	})
}
