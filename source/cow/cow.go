// Package cow makes a disk writable without changing it. This disk is called the base.
// [New] returns a [Disk] for it. Blocks that are written are stored in a file, which is
// called the layer. All other blocks are read from the base.
//
// The layer records the state of each block in two bits: absent (the base has the
// content), present (the layer has the content) or zeroed. These states are kept in
// pages. A limited number of pages is kept in memory (table.go). The offset of a block
// in the file is its offset in the disk plus a constant (store.go). The file is
// therefore sparse, and this package need not assign space to blocks. Consecutive
// blocks are read or written with one system call, and two blocks can never get the
// same place, whatever the order of the writes. docs/cow.md describes the format of the
// file.
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

// DefaultBlockSize is the block size of a new layer in bytes.
const DefaultBlockSize = 64 << 10

const (
	minBlockSize = 4 << 10
	maxBlockSize = 2 << 20
)

// Options say how a layer is stored. The zero value stores it in a temporary file.
type Options struct {
	// File is the path of the layer. If the file does not exist or is empty, a new
	// layer is created in it. Otherwise the file must be a layer that was created for
	// the same base, and the base must not have changed since then. The blocks in the
	// layer are kept, and new writes are added. If File is empty, the layer is a file
	// without a name in the folder for temporary files ($TMPDIR). Such a file
	// disappears when the process ends, for whatever reason.
	File string
	// If OnRead is true, each block that is read from the base is also copied into the
	// layer, so that it is read only once from a slow base. Copying stops when there
	// is no space left for the layer.
	OnRead bool
	// BlockSize is a power of two from 4 KiB to 2 MiB, in bytes. 0 means the block size
	// of the existing layer, or DefaultBlockSize for a new one. The first write to a
	// part of a block reads the rest of the block from the base.
	BlockSize int64
	// Log receives warnings. It may be nil.
	Log *slog.Logger
}

// Disk is a base disk with its layer. It has the abilities source.Writable, Identified,
// Described, InFile and Uncached. It is not a source.Wrapper, because its content
// differs from that of the base. All methods are safe for concurrent use. If two calls
// write to different parts of a block, the block has the data of both.
type Disk struct {
	life  life.Life
	base  source.Disk
	size  int64
	block int64 // block size in bytes, a power of two
	log   *slog.Logger
	id    string
	info  source.Info

	store      *store
	table      *table
	locks      locks
	buffers    chan []byte // of one block each; nil if not allocated yet
	zeros      []byte      // one block
	copyOnRead atomic.Bool // Options.OnRead, until copying fails

	flushes flush.Group
}

// New returns a disk that reads from the given base and stores writes in a layer. After
// the context has ended, all calls of the disk return the cause that context.Cause
// returns for it. The disk owns the base and closes it. If New fails, the base still
// belongs to the caller.
//
// New returns an error if Options.File is in use, is not a layer, or is the layer of
// another base. It does not change such a file. The error names the file. If the layer
// belongs to another base, the error also names both bases.
func New(ctx context.Context, base source.Disk, o Options) (*Disk, error) {
	return newDisk(ctx, base, o, kernel())
}

func newDisk(ctx context.Context, base source.Disk, o Options, sys system) (*Disk, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("cow: %w", err)
	}
	if b := o.BlockSize; b != 0 && (b < minBlockSize || b > maxBlockSize || b&(b-1) != 0) {
		return nil, fmt.Errorf("cow: invalid block size of %d bytes: want a power of two from %d to %d", b, minBlockSize, maxBlockSize)
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
		log.Warn("the layer is continued, but nothing proves that its base is unchanged", "file", s.name, "disk", want.Source)
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
		d.info.Chain = []string{cmp.Or(d.id, "base disk")} // the chain must not end with the layer
	}
	d.info.ClusterSize = max(d.info.ClusterSize, d.block)
	d.info.Chain = append([]string{s.name}, d.info.Chain...)
	return d, nil
}

// maxBuffered limits the memory for buffers, in bytes. Each buffer holds one block. A
// call needs a buffer if it writes only a part of a block, or if it copies a whole
// block into the layer although it reads only a part of the block.
const maxBuffered = 8 << 20

// The method buffer returns memory for one block. It waits until a buffer is free. If
// the context of the disk ends first, it returns an error.
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

// Size returns the size of the base in bytes.
func (d *Disk) Size() int64 { return d.size }

// Identity returns the identity of the base with the prefix "cow:", and always the
// proof "none" (see source.Identified): a write changes the content of the disk but not
// its identity.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	if err := d.life.Check(ctx); err != nil {
		return "", "", fmt.Errorf("identity of %s: %w", d.life.Name, err)
	}
	return "cow:" + d.id, "none", nil
}

// Info returns the description of the base with two changes. The layer is the first
// element of the field Chain. The field ClusterSize is at least the block size of the
// layer. An NBD server derives its preferred block size from ClusterSize. Its clients
// then prefer to write whole blocks, and writing a whole block does not read from the
// base.
func (d *Disk) Info() source.Info { return d.info }

// ReadUncached makes reads of the base bypass the page cache. Reads of the layer still
// use the cache, because data that was written is likely to be read again.
func (d *Disk) ReadUncached() { image.ReadUncached(d.base) }

// inFileAhead limits the length, in bytes, of the range for which one call of InFile
// returns a position. Callers do not need positions for longer ranges, because they use
// a position only for a single request.
const inFileAhead = 64 << 20

// InFile returns the file and the position that have the content at the given offset.
// If the block at this offset is present, the file is that of the layer. If the block
// is absent, InFile returns what the method InFile of the base returns. With
// Options.OnRead, however, it returns no position for absent blocks, because a read
// that bypasses this disk would not copy the block into the layer. A zeroed block has
// no position.
//
// A position is valid for a range of n bytes, until this range is written. If the range
// is written while the caller answers a request, the caller may still read from the
// position to answer this request. It then gets content that the range had at some time
// since the call of InFile, because the base never changes, and a block never moves
// within the file of the layer. Any read that overlaps a write may return such content.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= d.size {
		return nil, 0, 0, false
	}
	state, n, err := d.run(off, min(d.size-off, inFileAhead))
	switch {
	case err != nil:
		return nil, 0, 0, false // ReadAt returns the error
	case state == present:
		f, pos, have := d.store.place(off)
		return f, pos, min(n, have), true
	case state == absent && !d.copyOnRead.Load():
		return image.InFile(d.base, off, n)
	}
	return nil, 0, 0, false
}

// The method run examines the states of the blocks that contain n bytes, beginning at
// the given offset. It returns the state of the block with the first byte. It also
// returns how many bytes, counted from the first one, lie in blocks that are known to
// have this state. The true number may be larger, because one call examines only a
// limited number of pages of the table.
func (d *Disk) run(off, n int64) (state int, same int64, err error) {
	b := off / d.block
	last := (off + n - 1) / d.block
	state, blocks, err := d.table.run(b, last-b+1)
	return state, min(n, (b+blocks)*d.block-off), err
}

// Close waits for calls in progress, makes all writes durable unless the layer is
// temporary, and closes the layer and the base.
func (d *Disk) Close() error {
	return d.life.Close(func() error {
		var err error
		if !d.store.temporary {
			err = d.flush()
		}
		return errors.Join(err, d.store.close(), d.base.Close())
	})
}
