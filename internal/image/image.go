// Package image is what the readers of image formats share: the life of a disk
// that is made of files, tables kept in bounded memory, and what lies below an
// image in a chain.
package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/vddkcp/vddkcp/source"
)

// Life is that of a disk: it ends with the context that the disk was opened
// under, or by Close, which waits for calls in progress. The fields are set
// before the first call. It is safe for concurrent use.
type Life struct {
	Context context.Context
	Name    string // as errors call the disk

	// mu is held for reading by each call. It is never held across a yield,
	// since the consumer may call Close.
	mu     sync.RWMutex
	closed bool
}

// Ended returns the cause for which the disk's context or ctx has ended. It may
// be asked within a call, as Usable may not: that waits for a Close that waits
// for the call.
func (l *Life) Ended(ctx context.Context) error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// usable returns why a call under ctx can't be made. The caller holds mu.
func (l *Life) usable(ctx context.Context) error {
	if err := l.Ended(ctx); err != nil {
		return err
	}
	if l.closed {
		return os.ErrClosed
	}
	return nil
}

// Usable returns why an iteration under ctx can't go on.
func (l *Life) Usable(ctx context.Context) error {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.usable(ctx)
}

// While makes a call of a disk that is not closed, and reports whether it did.
func (l *Life) While(call func()) bool {
	l.mu.RLock()
	defer l.mu.RUnlock()
	if l.closed {
		return false
	}
	call()
	return true
}

// ReadAt is source.Disk's for a disk of size bytes: read gets what of p lies in
// the disk, and returns how much of it was filled.
func (l *Life) ReadAt(p []byte, off, size int64, read func(p []byte) (int, error)) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", l.Name, off)
	}
	l.mu.RLock()
	defer l.mu.RUnlock()
	if err := l.usable(l.Context); err != nil {
		return 0, fmt.Errorf("read %s: %w", l.Name, err)
	}
	if off >= size {
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > size-off {
		p, atEnd = p[:size-off], io.EOF
	}
	n, err := read(p)
	if err != nil {
		return n, err
	}
	return n, atEnd
}

// Close ends the life, and then makes the call that closes the files. A second
// one is an os.ErrClosed.
func (l *Life) Close(files func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return fmt.Errorf("close %s: %w", l.Name, os.ErrClosed)
	}
	l.closed = true
	return files()
}

// ReadFull reads all of p.
func ReadFull(f source.Disk, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// PathOf returns the path of the file that f is of, name where it doesn't say.
func PathOf(f source.Disk, name string) string {
	if i, ok := source.Ability[source.Described](f); ok {
		if chain := i.Info().Chain; len(chain) > 0 {
			return chain[0]
		}
	}
	return name
}

// InFile asks f for its byte at off, for no more than max bytes. Where that is
// in no file that is said of max bytes.
func InFile(f source.Disk, off, max int64) (file *os.File, pos, n int64, ok bool) {
	i, ok := source.Ability[source.InFile](f)
	if !ok {
		return nil, 0, max, false
	}
	file, pos, n, ok = i.InFile(off)
	if !ok || n <= 0 {
		return nil, 0, max, false
	}
	return file, pos, min(n, max), true
}

// Identity combines those of all files that an image of the format is made of;
// nil is none. It proves no more than the weakest of them.
func Identity(ctx context.Context, format string, files ...source.Disk) (id, proof string, err error) {
	sum := sha256.New()
	proof = "snapshot"
	for _, f := range files {
		if f == nil {
			continue
		}
		i, ok := source.Ability[source.Identified](f)
		if !ok {
			proof = "none"
			continue
		}
		id, p, err := i.Identity(ctx)
		if err != nil {
			return "", "", err
		}
		fmt.Fprintf(sum, "%d:%s", len(id), id)
		proof = Weaker(proof, p)
	}
	return fmt.Sprintf("%s:%x", format, sum.Sum(nil)), proof, nil
}

// Weaker returns what two proofs of an identity prove together.
func Weaker(proof, other string) string {
	if other == "none" || proof == "snapshot" {
		return other
	}
	return proof
}

// ReadUncached forwards source.Uncached to all files that have it; nil is none.
func ReadUncached(files ...source.Disk) {
	for _, f := range files {
		if f == nil {
			continue
		}
		if u, ok := source.Ability[source.Uncached](f); ok {
			u.ReadUncached()
		}
	}
}
