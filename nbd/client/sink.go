package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// SinkOptions configure Create. With the zero value, the client also writes the parts
// of the disk that contain only zeros, because the export may have old content there.
type SinkOptions struct {
	sink.Options
	Client       Options
	TargetIsZero bool // the whole export already reads as zeros, so zeros are not written
	NoHole       bool // zeroed ranges stay allocated
}

// A target is an export that a copy is written to. The export may be larger than the
// disk, whose size is lifecycle.Target.Size.
type target struct {
	lifecycle.Target
	server *server
	o      SinkOptions
	id     string

	noFast    atomic.Bool  // WRITE_ZEROES is not faster than writing
	noZeroes  atomic.Bool  // the server does not support WRITE_ZEROES
	zeroLimit atomic.Int64 // maximum length of a request WRITE_ZEROES, in bytes
}

// Create opens the export with the given URI, to write a disk of the given size, in
// bytes, to it in place. The export must be writable and at least as large as the disk.
// If the export is larger, its part after the disk is not changed, and Create reports
// that with o.Client.Warn. The methods Publish, Suspend and Abort only disconnect.
//
// The disk is sink.Parallel and sink.Verifiable. With the option TargetIsZero it is
// also sink.Zeroed. Its Unit is the minimum block size that the server advertises, or
// 512 bytes if it advertises none. Calls that fail because a connection was lost return
// an error that wraps sink.ErrLost.
func Create(ctx context.Context, uri *nbd.URI, size int64, o SinkOptions) (sink.Disk, error) {
	if size < 0 {
		return nil, fmt.Errorf("%s: cannot write a disk of unknown size to an NBD export: %w", uri, errors.ErrUnsupported)
	}
	if err := o.CheckResume(size, state(size)); err != nil {
		return nil, fmt.Errorf("%s: %w", uri, err)
	}
	s, err := dial(ctx, uri, o.Client)
	if err != nil {
		return nil, err
	}
	id := identity(uri, s.size)
	if err := o.CheckIdentity(s.life.Name, id); err != nil {
		s.close()
		return nil, err
	}
	if err := s.checkWritable(s.life.Name, size); err != nil {
		s.close()
		return nil, err
	}
	if s.size > size {
		o.Client.warn("%s is larger than the disk: the last %d bytes of the export, from offset %d on, are not changed", s.life.Name, s.size-size, size)
	}
	if err := probeFlush(ctx, s); err != nil {
		s.close()
		return nil, err
	}
	if s.flags&nbd.SendFlush == 0 {
		o.Client.warn(noFlush, s.life.Name)
	}
	t := newTarget(s, size, o)
	t.id = id
	return t, nil
}

// noFlush is the format of the warning about a server that does not support FLUSH. Its
// argument is the name of the server.
const noFlush = "%s does not support FLUSH: the server cannot make written data durable on request"

// The function identity returns a text that describes an export by the address of the
// server, the name of the export and its size. A server reports nothing else that
// distinguishes exports.
func identity(u *nbd.URI, size int64) string {
	server := net.JoinHostPort(u.Host, u.Port)
	if u.Socket != "" {
		server = u.Socket
	}
	return fmt.Sprintf("export %q of the server at %q, of %d bytes", u.Export, server, size)
}

// Identity implements sink.Identified.
func (t *target) Identity() (string, error) { return t.id, nil }

// newTarget returns a target that writes a disk of the given size, in bytes, to the export
// of a server.
func newTarget(s *server, size int64, o SinkOptions) *target {
	t := &target{
		Target: lifecycle.Target{Context: s.life.Context, Name: s.life.Name, Size: size, Unit: int64(s.sizes.Min), Resume: o.Resume},
		server: s, o: o,
	}
	t.noFast.Store(s.flags&nbd.SendFastZero == 0)
	t.noZeroes.Store(s.flags&nbd.SendWriteZeroes == 0)
	t.zeroLimit.Store(zeroPiece)
	return t
}

// The function state returns what a checkpoint of an NBD target records: the kind of
// target and the size of the disk in bytes. This state is the same for all checkpoints
// of one disk. A run that resumes passes the recorded state to Create in
// sink.Options.State. Create refuses a state that records another kind of target or
// another size.
func state(size int64) []byte { return fmt.Appendf(nil, "nbd %d", size) }

// probeFlush tests whether an oldstyle server that advertises FLUSH also supports it.
// The test is necessary because nbdkit --oldstyle advertises commands that it refuses.
// If the server refuses FLUSH, probeFlush removes the flag for FLUSH from s.flags, so
// that FLUSH is not sent again.
func probeFlush(ctx context.Context, s *server) error {
	if !s.oldstyle || s.flags&nbd.SendFlush == 0 {
		return nil
	}
	k := &call{cmd: nbd.CmdFlush}
	err := s.do(ctx, s.pick(), k)
	var refused *serverError
	if errors.As(err, &refused) && refused.errno == nbd.EINVAL {
		s.flags &^= nbd.SendFlush
		return nil
	}
	if err != nil {
		return s.wrap(k, err)
	}
	return nil
}

func (t *target) Unit() int64 { return t.Target.Unit }

func (t *target) MaxParallel() int { return len(t.server.conns) * depth }

// Connections implements sink.Connected.
func (t *target) Connections() int { return len(t.server.conns) }

func (t *target) ZeroedFrom(int64) bool { return t.o.TargetIsZero && t.o.State == nil }

// markLost makes err wrap sink.ErrLost if a connection was lost. The caller can then open
// the target again.
func (t *target) markLost(err error) error {
	if errors.As(err, new(*lostError)) && t.Context.Err() == nil {
		return fmt.Errorf("%w (%w)", err, sink.ErrLost)
	}
	return err
}

func (t *target) SameAt(ctx context.Context, off, n int64) error {
	if err := t.Begin(ctx, off, n); err != nil {
		return err
	}
	defer t.Done()
	return t.Fail(fmt.Errorf("%s: cannot take bytes [%d, %d) from a backing disk: an NBD export has no backing disk", t.Name, off, off+n))
}

func (t *target) WriteAt(p []byte, off int64) (int, error) {
	if err := t.Begin(t.Context, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer t.Done()
	if err := t.server.write(p, off); err != nil {
		return 0, t.Fail(t.markLost(err))
	}
	return len(p), nil
}

func (t *target) ZeroAt(ctx context.Context, off, n int64) error {
	if err := t.Begin(ctx, off, n); err != nil {
		return err
	}
	defer t.Done()
	if t.ZeroedFrom(off) {
		return nil
	}
	if err := t.zero(ctx, off, n, t.o.NoHole); err != nil {
		return t.Fail(t.markLost(err))
	}
	return nil
}

// The method flush sends FLUSH on every connection, which makes all completed writes
// durable. It does nothing if the server does not support FLUSH.
func (t *target) flush(ctx context.Context) error {
	s := t.server
	if s.flags&nbd.SendFlush == 0 {
		return nil
	}
	var first error
	for _, c := range s.conns {
		k := &call{cmd: nbd.CmdFlush}
		if err := s.do(ctx, c, k); err != nil && first == nil {
			first = s.wrap(k, err)
		}
	}
	return first
}

func (t *target) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	if err := t.Begin(t.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer t.Done()
	return state(t.Size), func(ctx context.Context) error {
		return t.InAnyStage(ctx, func() error { return t.markLost(t.flush(ctx)) })
	}, nil
}

func (t *target) Finish(ctx context.Context) error {
	return t.Advance(ctx, lifecycle.Writing, func() error { return t.markLost(t.flush(ctx)) })
}

// Publish only disconnects, because the export has its final name from the beginning, and
// its content is complete after Finish.
func (t *target) Publish(ctx context.Context) error {
	return t.Advance(ctx, lifecycle.Finished, t.server.close)
}

func (t *target) Suspend() error { return t.End(t.server.close) }

func (t *target) Abort() error { return t.Target.Abort(t.server.close) }

// ReadAt implements sink.Readback.
func (t *target) ReadAt(p []byte, off int64) (int, error) {
	d := t.disk()
	return d.ReadAt(p, off)
}

// Reopen returns a disk that reads the export over the same connections, since a server
// may accept no further connections.
func (t *target) Reopen(ctx context.Context) (source.Disk, error) {
	if err := t.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer t.Done()
	return &readback{t.disk(), ctx}, nil
}

// The method disk returns a Disk that reads the target over the same connections that
// write it.
func (t *target) disk() Disk {
	return Disk{server: t.server, size: t.Size, borrowed: true, uri: t.Name}
}

// A readback is the disk that Reopen returns. Its reads fail after the context that was
// passed to Reopen has ended.
type readback struct {
	Disk
	ctx context.Context
}

func (w *readback) ReadAt(p []byte, off int64) (int, error) {
	if w.ctx.Err() != nil {
		return 0, fmt.Errorf("%s: read at %d: %w", w.server.life.Name, off, context.Cause(w.ctx))
	}
	return w.Disk.ReadAt(p, off)
}

var (
	_ source.Disk     = (*readback)(nil)
	_ sink.Verifiable = (*target)(nil)
	_ sink.Parallel   = (*target)(nil)
	_ sink.Zeroed     = (*target)(nil)
	_ sink.Connected  = (*target)(nil)
)
