package transfer

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/source"
)

// buffer is memory for the content of a piece, a range of the disk that is copied or hashed as a
// whole. The memory comes from a source.Allocator.
type buffer struct {
	buf  []byte // nil: the piece has no memory
	free func() // returns buf to its allocator; nil: buf need not be returned
}

// releaseBuffer returns the memory of the buffer to its allocator. It does nothing if the buffer
// has no memory.
func (b *buffer) releaseBuffer() {
	if b.free != nil {
		b.free()
		b.buf, b.free = nil, nil
	}
}

// reserveBuffers provides buffers for reading the disk d. If d is a source.Allocator, these are the
// buffers of d itself. If it is not, or if d is nil, reserveBuffers allocates the given number of
// buffers, of bufferSize bytes each. When no buffer is in use any more, the caller frees them by
// calling the second result, the function release.
func reserveBuffers(d source.Disk, number, bufferSize int) (buffers source.Allocator, release func() error, err error) {
	if own, ok := source.Ability[source.Allocator](d); ok {
		return own, func() error { return nil }, nil
	}
	a, err := newArena(number, bufferSize)
	if err != nil {
		return nil, nil, err
	}
	return a, a.close, nil
}

// arena is a source.Allocator with a fixed number of buffers of one size, for sources that have
// no memory of their own. Its memory is mapped outside Go's heap. If it were a part of the
// heap, the garbage collector would let the heap grow by the same amount again. Every buffer
// begins at a page border. An arena is safe for concurrent use.
type arena struct {
	mem  []byte
	free chan []byte
}

// newArena maps the memory for n buffers of size bytes each.
func newArena(n, size int) (*arena, error) {
	stride := (size + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
	mem, err := unix.Mmap(-1, 0, n*stride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("cannot allocate %d buffers of %d bytes: %w", n, size, err)
	}
	a := &arena{mem: mem, free: make(chan []byte, n)}
	for i := range n {
		a.free <- mem[i*stride : i*stride+size : i*stride+size]
	}
	return a, nil
}

// Buffer implements source.Allocator. It must not be called for more bytes than one buffer has.
func (a *arena) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	select {
	case b := <-a.free:
		return b[:n], func() { a.free <- b }, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// The method close unmaps the memory. No buffer may be used afterwards.
func (a *arena) close() error { return unix.Munmap(a.mem) }
