package transfer

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// arena hands out n buffers of one size, for sources that have no memory of
// their own. It is mapped outside Go's heap, so that the garbage collector
// does not keep as much again in reserve, and every buffer begins on a page.
type arena struct {
	mem  []byte
	free chan []byte
}

func newArena(n, size int) (*arena, error) {
	stride := (size + os.Getpagesize() - 1) &^ (os.Getpagesize() - 1)
	mem, err := unix.Mmap(-1, 0, n*stride, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("reserve %d buffers of %d bytes: %w", n, size, err)
	}
	a := &arena{mem: mem, free: make(chan []byte, n)}
	for i := range n {
		a.free <- mem[i*stride : i*stride+size : i*stride+size]
	}
	return a, nil
}

// Buffer is source.Allocator's.
func (a *arena) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	select {
	case b := <-a.free:
		return b[:n], func() { a.free <- b }, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

// close unmaps the memory. No buffer may be in use.
func (a *arena) close() error { return unix.Munmap(a.mem) }
