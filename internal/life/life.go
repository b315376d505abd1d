// Package life is the part of a disk that decides whether a call may begin: a disk
// ends with the context it was opened with, Close waits for calls in progress, and
// reads stop at the end of the disk.
//
// A disk has a [Life] as a field and brackets each call with it:
//
//	func (d *disk) Identity(ctx context.Context) (id, proof string, err error) {
//		if err := d.life.Begin(ctx); err != nil {
//			return "", "", err
//		}
//		defer d.life.End()
//		...
//	}
//
//	func (d *disk) Close() error { return d.life.Close(d.file.Close) }
//
// [Life.ReadAt] does this for the ReadAt of a disk, with [Clip].
package life

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"sync/atomic"
)

// Life is the state of a disk from its opening to its end. Context and Name are set
// before the first call and not changed afterwards. All methods are safe for
// concurrent use. A Life must not be copied after its first use.
type Life struct {
	Context context.Context // the context that the disk was opened with
	Name    string          // what errors call the disk

	calls   atomic.Int64  // calls in progress, plus closing as soon as Close was called
	closed  atomic.Bool   // Close was called
	drained chan struct{} // made by Close; gets a value when no call is in progress
}

// closing is added to the field calls by Close. It makes the sum negative, whatever the
// number of calls in progress is.
const closing = math.MinInt64

// Cause returns why the context of the disk or ctx has ended, or nil if neither has. A
// call that takes long should check it from time to time.
func (l *Life) Cause(ctx context.Context) error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// Check returns the error with which Begin would fail, or nil.
func (l *Life) Check(ctx context.Context) error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	if l.calls.Load() < 0 {
		return os.ErrClosed
	}
	return context.Cause(ctx)
}

// Begin starts a call under ctx. If it returns nil, Close waits until End is
// called. Otherwise the error is os.ErrClosed, or the cause for which the context
// of the disk or ctx has ended, and End must not be called.
func (l *Life) Begin(ctx context.Context) error {
	l.calls.Add(1)
	if err := l.Check(ctx); err != nil {
		l.End()
		return err
	}
	return nil
}

// End ends a call that Begin started.
func (l *Life) End() {
	if l.calls.Add(-1) == closing {
		select {
		case l.drained <- struct{}{}:
		default: // calls that Begin refuses may bring the number to 0 again
		}
	}
}

// Close makes Begin fail from now on, waits for the calls in progress, and then returns
// the result of release. It must not be called between Begin and End. If Close was
// called before, the error wraps os.ErrClosed.
func (l *Life) Close(release func() error) error {
	if l.closed.Swap(true) {
		return fmt.Errorf("close %s: %w", l.Name, os.ErrClosed)
	}
	l.drained = make(chan struct{}, 1)
	if l.calls.Add(closing) != closing {
		<-l.drained
	}
	return release()
}

// ReadAt is the ReadAt of a disk of size bytes. read gets the part of p that lies
// in the disk, and returns how many bytes of it were filled.
func (l *Life) ReadAt(p []byte, off, size int64, read func(p []byte) (int, error)) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", l.Name, off)
	}
	if err := l.Begin(l.Context); err != nil {
		return 0, fmt.Errorf("read %s [%d, %d): %w", l.Name, off, off+int64(len(p)), err)
	}
	defer l.End()
	p, atEnd := Clip(p, off, size)
	if len(p) == 0 {
		return 0, atEnd
	}
	if n, err := read(p); err != nil {
		return n, err
	}
	return len(p), atEnd
}

// Clip returns the part of p that lies in a disk of size bytes when p is read at
// off, which must not be negative. The error is what ReadAt returns after that part
// was read: io.EOF if p passes the end of the disk, or if off is at or past the end.
func Clip(p []byte, off, size int64) ([]byte, error) {
	switch {
	case off >= size:
		return nil, io.EOF
	case int64(len(p)) > size-off:
		return p[:size-off], io.EOF
	}
	return p, nil
}

// InDisk reports whether [off, off+n) is a range of a disk of size bytes. An empty
// range may lie at the end of the disk.
func InDisk(off, n, size int64) bool {
	return off >= 0 && n >= 0 && off <= size && n <= size-off
}
