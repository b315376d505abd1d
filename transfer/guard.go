package transfer

import (
	"context"
	"io"
	"iter"

	"github.com/vddkcp/vddkcp/source"
)

// sourceError marks an error as an error of the source of a copy. Its text is the text of that
// error.
type sourceError struct{ error }

func (e *sourceError) Unwrap() error { return e.error }

// ofSource marks err as an error of the source. It returns nil and io.EOF unchanged.
func ofSource(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &sourceError{err}
}

// guard returns src as a disk that marks all its errors as errors of the source: the errors of
// reading, of waiting for a buffer, of querying extents, and of querying the identity. A copy can
// then distinguish them from errors of its target, whichever goroutine meets them first. The copy
// of a stream has no source disk; src is then nil, and so is the result.
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

// The type guarded is a source.Wrapper that marks the errors of its disk.
type guarded struct{ disk source.Disk }

// Unwrap implements source.Wrapper, through which callers find the abilities (optional interfaces)
// of the wrapped disk. The type guarded itself must implement every ability whose methods return
// errors of the source, because otherwise those errors are not marked.
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

// Identity returns the identity of the disk, or "" if it has none.
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
