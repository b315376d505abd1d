package transfer

import (
	"context"
	"io"
	"iter"

	"github.com/vddkcp/vddkcp/source"
)

// sourceError is an error that the disk which is copied returned. It has the
// text of that error.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// ofSource marks an error as one of the source. nil and io.EOF are returned as
// they are.
func ofSource(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &sourceError{err}
}

// guard returns src as a disk whose errors are all marked as errors of the
// source, whichever goroutine of a copy sees them first: a read, the wait for a
// buffer, the query for extents, or the identity. A nil src is returned as it
// is: a stream has no disk.
func guard(src source.Disk) source.Disk {
	if src == nil {
		return nil
	}
	g := &guarded{src}
	if a, ok := source.Ability[source.Allocator](src); ok {
		return &guardedAllocator{g, a}
	}
	return g
}

// guarded marks the errors of the disk that it wraps.
type guarded struct{ disk source.Disk }

// Unwrap implements source.Wrapper. An ability that returns errors of the source
// must be a method here as well.
func (g *guarded) Unwrap() source.Disk { return g.disk }

func (g *guarded) Size() int64  { return g.disk.Size() }
func (g *guarded) Close() error { return g.disk.Close() }

func (g *guarded) ReadAt(p []byte, off int64) (int, error) {
	n, err := g.disk.ReadAt(p, off)
	return n, ofSource(err)
}

func (g *guarded) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range g.disk.Extents(ctx, off, length) {
			if !yield(e, ofSource(err)) {
				return
			}
		}
	}
}

// Identity is that of the disk, and empty where the disk has none.
func (g *guarded) Identity(ctx context.Context) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](g.disk)
	if !ok {
		return "", "none", nil
	}
	id, proof, err = i.Identity(ctx)
	return id, proof, ofSource(err)
}

// guardedAllocator is a guarded disk that is a source.Allocator.
type guardedAllocator struct {
	*guarded
	allocator source.Allocator
}

func (g *guardedAllocator) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	b, free, err := g.allocator.Buffer(ctx, n)
	return b, free, ofSource(err)
}
