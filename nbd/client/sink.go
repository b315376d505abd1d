package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// zeroPiece is how much one request zeroes at most.
const zeroPiece = 128 << 20

// lookTimeout is how long Check waits for a server.
const lookTimeout = 5 * time.Second

// zeros is never written to.
var zeros [1 << 20]byte

// SinkOptions are those of Create. The zero value writes every zero.
type SinkOptions struct {
	sink.Options
	Client       Options
	TargetIsZero bool // all of the export reads as zeros before, so that zeros need no writing
	NoHole       bool // zeros are to stay allocated
}

// target is an export that is written. Its size is that of the disk; the export
// may have more.
type target struct {
	lifecycle.Target
	server *server
	o      SinkOptions
	id     string

	noFast    atomic.Bool // WRITE_ZEROES is not faster than writing
	noZeroes  atomic.Bool // there is no WRITE_ZEROES
	zeroLimit atomic.Int64
}

// Create opens the export that uri names for writing a disk of size bytes to it,
// in place. It must not be read-only, and have size bytes or more; what it has
// more stays as it is, and Client.Warn is told. Publish, Suspend and Abort only
// disconnect.
//
// The disk is Parallel, Zeroed with TargetIsZero, and Verifiable. Its Unit is
// the server's minimum block, 512 where the server told none. A connection that
// is lost is a sink.ErrLost.
func Create(ctx context.Context, uri *nbd.URI, size int64, o SinkOptions) (sink.Disk, error) {
	if size < 0 {
		return nil, fmt.Errorf("%s: an NBD server takes no disk whose size is not known: %w", uri, errors.ErrUnsupported)
	}
	if o.Resume < 0 || o.Resume > size || o.State == nil && o.Resume > 0 {
		return nil, fmt.Errorf("%s: a disk of %d bytes, to be resumed at %d", uri, size, o.Resume)
	}
	if o.State != nil && string(o.State) != string(state(size)) {
		return nil, sink.Unfit(fmt.Errorf("%s: resume: the checkpoint is %q, want %q", uri, o.State, state(size)))
	}
	s, err := dial(ctx, uri, o.Client)
	if err != nil {
		return nil, err
	}
	id := identity(uri, s.size)
	if err := o.CheckIdentity(s.name, id); err != nil {
		s.close()
		return nil, err
	}
	if err := s.writable(s.name, size); err != nil {
		s.close()
		return nil, err
	}
	if s.size > size {
		o.Client.warn("%s is larger than the disk: its last %d bytes, from %d on, stay as they are", s.name, s.size-size, size)
	}
	if err := tryFlush(ctx, s); err != nil {
		s.close()
		return nil, err
	}
	if s.flags&nbd.SendFlush == 0 {
		o.Client.warn("%s can't be told to make durable what was written (it has no FLUSH)", s.name)
	}
	t := newTarget(s, size, o)
	t.id = id
	return t, nil
}

// identity tells an export apart from others, as far as a server tells anything:
// where the server is, the name of the export, and its size.
func identity(u *nbd.URI, size int64) string {
	server := net.JoinHostPort(u.Host, u.Port)
	if u.Socket != "" {
		server = u.Socket
	}
	return fmt.Sprintf("export %q of the server at %q, of %d bytes", u.Export, server, size)
}

// Identity implements sink.Identified.
func (t *target) Identity() (string, error) { return t.id, nil }

func newTarget(s *server, size int64, o SinkOptions) *target {
	t := &target{
		Target: lifecycle.Target{Context: s.ctx, Name: s.name, Size: size, Unit: int64(s.sizes.Min), Resume: o.Resume},
		server: s, o: o,
	}
	t.noFast.Store(s.flags&nbd.SendFastZero == 0)
	t.noZeroes.Store(s.flags&nbd.SendWriteZeroes == 0)
	t.zeroLimit.Store(zeroPiece)
	return t
}

func state(size int64) []byte { return fmt.Appendf(nil, "nbd %d", size) }

// writable refuses an export that can't hold a disk of size bytes.
func (n *negotiated) writable(name string, size int64) error {
	if n.flags&nbd.ReadOnly != 0 {
		return &hinted{fmt.Errorf("%s: %w", name, ErrReadOnly), "start the server without -r or --read-only, or vddkcp export with --rw"}
	}
	if n.size < size {
		return &hinted{
			fmt.Errorf("%s is too small: it has %d bytes (%s), and the disk %d (%s)", name, n.size, bytesize.Format(n.size), size, bytesize.Format(size)),
			fmt.Sprintf("an NBD export can't grow: let the server have one of at least %d bytes", size),
		}
	}
	return nil
}

// tryFlush looks whether an oldstyle server can do what it says: nbdkit's
// --oldstyle refuses the commands that it has flags for. That is to be known
// before anything is written. The flag is taken away where it is not true.
func tryFlush(ctx context.Context, s *server) error {
	if !s.old || s.flags&nbd.SendFlush == 0 {
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
		return s.explain(k, err)
	}
	return nil
}

// Check looks whether Create could write a disk of size bytes to the export that
// uri names, without opening it: the server sees a connection that asks (by INFO)
// and goes, which none takes for the one client that it waits for. It returns
// errors.ErrUnsupported where a server tells nothing in that way, or nothing at
// all within some seconds: one that is busy with its only client does not.
func Check(ctx context.Context, uri *nbd.URI, size int64, o Options) error {
	name := nbd.Text([]byte(uri.String()))
	n, err := ask(ctx, uri, min(lookTimeout, cmp.Or(o.Timeout, defaultTimeout)))
	if err == nil && n.size == 0 { // nbd-server's INFO says so of every export
		err = errUntold
	}
	if errors.Is(err, errUntold) || errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return n.writable(name, size)
}

// ask learns of an export by a connection of its own.
func ask(ctx context.Context, uri *nbd.URI, limit time.Duration) (negotiated, error) {
	config, err := tlsConfig(uri)
	if err != nil {
		return negotiated{}, err
	}
	ctx, cancel := within(ctx, limit)
	defer cancel()
	raw, err := reach(ctx, uri)
	if err != nil {
		return negotiated{}, err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	s := &shaker{conn: raw, uri: uri, look: true}
	_, n, err := s.shake(ctx, config)
	switch {
	case err != nil && ctx.Err() != nil:
		return n, context.Cause(ctx)
	case err != nil:
		return n, err
	case n.old:
		s.send(nbd.Request{Type: nbd.CmdDisconnect}.Append(nil))
	default:
		s.option(nbd.OptAbort, nil)
	}
	return n, nil
}

func (t *target) Unit() int64 { return t.Target.Unit }

func (t *target) MaxParallel() int { return len(t.server.conns) * depth }

// Connections implements sink.Connected.
func (t *target) Connections() int { return len(t.server.conns) }

func (t *target) ZeroedFrom(int64) bool { return t.o.TargetIsZero && t.o.State == nil }

// lost tells what is to be done about an error: to open the target again, where
// its connection was lost.
func (t *target) lost(err error) error {
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
	return t.Fail(fmt.Errorf("%s: [%d, %d) is to stay as in the backing, and an NBD server has none", t.Name, off, off+n))
}

func (t *target) WriteAt(p []byte, off int64) (int, error) {
	if err := t.Begin(t.Context, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer t.Done()
	if err := t.server.write(p, off); err != nil {
		return 0, t.Fail(t.lost(err))
	}
	return len(p), nil
}

// write writes p at any offset. Of a block that it has only a part of, the rest is
// read and written back.
func (s *server) write(p []byte, off int64) error {
	head, whole := s.blocks(off, int64(len(p)))
	if head > 0 {
		if err := s.change(p[:head], off); err != nil {
			return err
		}
	}
	p, off = p[head:], off+head
	tail, end := p[whole:], off+whole
	p = p[:whole]
	k, err := s.each(s.ctx, func() *call {
		if len(p) == 0 {
			return nil
		}
		n := min(len(p), s.maxPayload())
		k := &call{cmd: nbd.CmdWrite, off: off, n: int64(n), data: p[:n:n]}
		p, off = p[n:], off+int64(n)
		return k
	})
	if err != nil {
		return s.explain(k, err)
	}
	if len(tail) > 0 {
		return s.change(tail, end)
	}
	return nil
}

// change writes what lies inside one block. One call at a time does so: two that
// have parts of the same block would undo each other's.
func (s *server) change(p []byte, off int64) error {
	s.changing.Lock()
	defer s.changing.Unlock()
	block := int64(s.sizes.Min)
	head := off % block
	buf := make([]byte, min(block, s.size-off+head))
	if err := s.read(buf, off-head); err != nil {
		return err
	}
	copy(buf[head:], p)
	k := &call{cmd: nbd.CmdWrite, off: off - head, n: int64(len(buf)), data: buf}
	if err := s.do(s.ctx, s.pick(), k); err != nil {
		return s.explain(k, err)
	}
	return nil
}

// blocks divides n bytes at off: how many lie in a block that begins before them,
// and how many in blocks that are wholly theirs. The last block of an export may
// be a short one.
func (s *server) blocks(off, n int64) (head, whole int64) {
	block := int64(s.sizes.Min)
	if in := off % block; in > 0 {
		head = min(block-in, n)
	}
	whole = n - head
	if off+n < s.size && whole > 0 {
		whole -= (off + n) % block
	}
	return head, whole
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
		return t.Fail(t.lost(err))
	}
	return nil
}

// zero zeroes by the first way that the server has: WRITE_ZEROES that is fast,
// WRITE_ZEROES that is not, zeros. TRIM is none, since what it leaves is not
// known. With noHole the zeros are to stay allocated.
func (t *target) zero(ctx context.Context, off, n int64, noHole bool) error {
	s := t.server
	head, whole := s.blocks(off, n)
	if head > 0 {
		if err := s.write(zeros[:head], off); err != nil {
			return err
		}
	}
	off, n = off+head, n-head
	tail := n - whole
	for whole > 0 {
		if t.noZeroes.Load() {
			p := zeros[:min(whole, int64(len(zeros)))]
			if ctx.Err() != nil {
				return fmt.Errorf("%s: zero at %d: %w", s.name, off, context.Cause(ctx))
			}
			if err := s.write(p, off); err != nil {
				return err
			}
			off, whole = off+int64(len(p)), whole-int64(len(p))
			continue
		}
		fast := !t.noFast.Load()
		k := &call{cmd: nbd.CmdWriteZeroes, off: off, n: min(whole, t.zeroLimit.Load())}
		if fast {
			k.flags |= nbd.FlagFastZero
		}
		if noHole {
			k.flags |= nbd.FlagNoHole
		}
		err := s.do(ctx, s.pick(), k)
		var server *serverError
		switch most := int64(s.maxPayload()); {
		case err == nil:
			off, whole = off+k.n, whole-k.n
		case !errors.As(err, &server):
			return s.explain(k, err)
		case fast && (server.errno == nbd.ENOTSUP || server.errno == nbd.EINVAL):
			t.noFast.Store(true)
		case k.n > most && (server.errno == nbd.EOVERFLOW || server.errno == nbd.EINVAL):
			t.zeroLimit.Store(most)
		case server.errno == nbd.ENOTSUP || server.errno == nbd.EINVAL:
			t.noZeroes.Store(true)
		default:
			return s.explain(k, err)
		}
	}
	if tail > 0 {
		return s.write(zeros[:tail], off)
	}
	return nil
}

// flush makes durable what was replied to, on every connection.
func (t *target) flush(ctx context.Context) error {
	s := t.server
	if s.flags&nbd.SendFlush == 0 {
		return nil
	}
	var first error
	for _, c := range s.conns {
		k := &call{cmd: nbd.CmdFlush}
		if err := s.do(ctx, c, k); err != nil && first == nil {
			first = s.explain(k, err)
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
		return t.Beside(ctx, func() error { return t.lost(t.flush(ctx)) })
	}, nil
}

func (t *target) Finish(ctx context.Context) error {
	return t.Advance(ctx, lifecycle.Writing, func() error { return t.lost(t.flush(ctx)) })
}

// Publish has nothing to do but to disconnect: what Finish flushed has its name.
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

// Reopen reads over the same connections: a server may take no others.
func (t *target) Reopen(ctx context.Context) (source.Disk, error) {
	if err := t.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer t.Done()
	return &written{t.disk(), ctx}, nil
}

// disk reads the target over the connections that write it.
func (t *target) disk() Disk {
	return Disk{server: t.server, size: t.Size, borrowed: true, text: t.Name}
}

// written is what was written of an export.
type written struct {
	Disk
	ctx context.Context
}

func (w *written) ReadAt(p []byte, off int64) (int, error) {
	if w.ctx.Err() != nil {
		return 0, fmt.Errorf("%s: read at %d: %w", w.server.name, off, context.Cause(w.ctx))
	}
	return w.Disk.ReadAt(p, off)
}

var (
	_ source.Disk     = (*written)(nil)
	_ sink.Verifiable = (*target)(nil)
	_ sink.Parallel   = (*target)(nil)
	_ sink.Zeroed     = (*target)(nil)
	_ sink.Connected  = (*target)(nil)
)
