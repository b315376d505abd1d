// Package life decides whether a call of a method of a disk may begin. It implements these rules
// for disks: if the context that the disk was opened with has ended, all calls fail; Close waits
// for calls in progress; and reads stop at the end of the disk.
//
// A disk has a [Life] as a field. The methods of the disk call Life.Begin and Life.End, and its
// method Close calls Life.Close:
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
// The method ReadAt of a disk can call [Life.ReadAt], which calls Begin and End itself and
// limits the range to the disk with [Clip].
package life

import (
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"sync/atomic"
)

// Life is the state of a disk from its opening to its end. The fields Context and Name are set
// before the first call and do not change afterwards. All methods are safe for concurrent use. A
// Life must not be copied after its first use.
type Life struct {
	Context context.Context // the context that the disk was opened with
	Name    string          // what errors call the disk

	calls   atomic.Int64  // number of calls in progress; Close adds the constant closing
	closed  atomic.Bool   // Close was called
	drained chan struct{} // made by Close; gets a value when no call is in progress
}

// The constant closing is the negative number that Close adds to Life.calls in order to mark the
// disk as closed. It is so small that the sum is negative, however many calls are in progress.
const closing = math.MinInt64

// Cause returns the cause for which a call must stop: the cause of the context of the disk or of
// ctx, the context of the call. It returns nil if neither context has ended. A call that takes
// long should check Cause from time to time.
func (l *Life) Cause(ctx context.Context) error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// Check returns the error that Begin would return now, without beginning a call.
func (l *Life) Check(ctx context.Context) error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	if l.calls.Load() < 0 {
		return os.ErrClosed
	}
	return context.Cause(ctx)
}

// Begin starts a call with the context ctx. If Begin returns nil, the caller must call End at the
// end of the call, and Close waits for that. If Begin returns an error, End must not be called.
// The error is os.ErrClosed, or the cause of the context of the disk or of ctx, if one of these
// contexts has ended.
func (l *Life) Begin(ctx context.Context) error {
	l.calls.Add(1)
	if err := l.Check(ctx); err != nil {
		l.End()
		return err
	}
	return nil
}

// End ends a call for which Begin returned nil.
func (l *Life) End() {
	if l.calls.Add(-1) == closing {
		select {
		case l.drained <- struct{}{}:
		default: // calls that Begin refuses may bring the number to 0 again
		}
	}
}

// Close makes all later calls of Begin fail, waits for the calls in progress, and then calls the
// function release. Close returns the result of release. Close must not be called inside a call,
// between Begin and End, because it would wait forever. If Close was called before, the error wraps
// os.ErrClosed.
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

// ReadAt implements the method ReadAt of a disk. size is the number of bytes of the disk. ReadAt
// calls the function read with the part of the buffer p for which the disk has bytes. The function
// read returns how many bytes of that part it has filled.
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

// Clip is for the method ReadAt of a disk, and gets the arguments of ReadAt: the buffer p and the
// offset off, which must not be negative. size is the number of bytes of the disk. Clip returns the
// part of p that ReadAt can fill with bytes of the disk, and an error. The error is io.EOF if the
// range extends past the end of the disk or begins after its last byte. Otherwise the error is nil.
// If ReadAt fills its part of p without an error of its own, it must return the error of Clip.
func Clip(p []byte, off, size int64) ([]byte, error) {
	switch {
	case off >= size:
		return nil, io.EOF
	case int64(len(p)) > size-off:
		return p[:size-off], io.EOF
	}
	return p, nil
}

// InDisk reports whether the range [off, off+n) lies in a disk that has size bytes. A range of 0
// bytes may lie at the end of the disk.
func InDisk(off, n, size int64) bool {
	return off >= 0 && n >= 0 && off <= size && n <= size-off
}
