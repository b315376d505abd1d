package nfc

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// maxHandshake limits how long a host may take for a step of the handshake before another form
	// of it is tried.
	maxHandshake = 20 * time.Second
	// headSize is the number of bytes at the beginning of a disk that are compared when the disk
	// is opened again.
	headSize = 64 << 10
)

// smallBuffers are the buffers of a session on a host that has refused larger ones.
var smallBuffers = nfcbudget.Buffers{Size: nfcbudget.Unit, Count: 4}

// Open opens a disk for reading. The returned disk repeats failed calls, as Options.Retry says, and
// implements source.Identified, source.Described and source.Counted. Its range is one extent with
// data, because hosts do not reliably say which parts of a disk are allocated.
//
// If the disk cannot be opened at first, Open returns the error, which is an *Error if it comes
// from a step of the connection. When ctx ends, all methods of the disk return the cause of ctx.
func Open(ctx context.Context, p Params, t Tickets, o Options) (source.Disk, error) {
	o, err := o.normalised()
	if err != nil {
		return nil, err
	}
	op := newOpener(p, t, o)
	op.limits.changed = func(text string) { o.Log.Debug("nfc: "+text, "disk", p.Name) }
	op.limits.waits = func() (end func()) { return observer.Wait(ctx) }
	d, err := source.Retry(ctx, op.open, o.Retry)
	if err != nil {
		op.release()
		return nil, err
	}
	return &budgeted{d, op}, nil
}

// budgeted is a disk that gives its share of the host's memory back when it is closed. It keeps it
// while the disk is opened again.
type budgeted struct {
	source.Disk
	opener *opener
}

// Unwrap implements source.Wrapper.
func (d *budgeted) Unwrap() source.Disk { return d.Disk }

// Close implements source.Disk.
func (d *budgeted) Close() error {
	err := d.Disk.Close()
	d.opener.release()
	return err
}

// OpenAgain implements source.Rereadable. The result reads over a new connection, one request of 64
// KiB after the other, and without compression, so that it shares as little as possible with the
// connection of the disk. That connection is ended first, because both use the disk's share of the
// host's memory. A later read of the disk opens a new one.
func (d *budgeted) OpenAgain(ctx context.Context) (source.Disk, error) {
	op := d.opener
	if s := op.current.Swap(nil); s != nil {
		s.end(ctx)
	}
	o := op.o
	o.Compression, o.Budget = "none", nil
	other := &opener{params: op.params, tickets: op.tickets, o: o, buffers: smallBuffers,
		opened: op.opened, limits: &limits{size: headSize, depth: 1}}
	if op.buffers == (nfcbudget.Buffers{}) {
		other.buffers = op.buffers
	}
	policy := o.Retry.Policy()
	attempts := policy.Start(retry.NewProgress())
	for {
		again, err := source.Retry(ctx, other.open, o.Retry)
		if err == nil {
			return again, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		wait, gaveUp := attempts.Failed(err)
		if gaveUp != nil {
			return nil, gaveUp
		}
		if !policy.Pause(ctx, err, wait, nil) {
			return nil, context.Cause(ctx)
		}
	}
}

// An opener opens a disk, and opens it again after its connection was lost. source.Retry makes only
// one call of its method open at a time.
type opener struct {
	params  Params
	tickets Tickets
	o       Options
	limits  *limits

	buffers nfcbudget.Buffers // of the next session; the zero value lets the host choose
	opened  *facts            // of the first opening; nil before it
	samples source.Samples    // of what was read; used only if the content cannot change
	current atomic.Pointer[session]

	budget   *nfcbudget.Budget // of which a share is held
	giveBack func()            // returns the share; nil if none is held
}

func newOpener(p Params, t Tickets, o Options) *opener {
	op := &opener{params: p, tickets: t, o: o, buffers: o.Buffers, limits: &limits{size: o.RequestSize, depth: o.Depth}}
	if o.Quirks.zeroSession {
		op.buffers = nfcbudget.Buffers{}
	}
	return op
}

// facts are properties of a disk that must be the same at each opening.
type facts struct {
	capacity            int64
	uuid, longContentID string
	head                [sha256.Size]byte // of the first bytes of the disk
}

// The method open opens the disk for source.Retry.
func (op *opener) open(ctx context.Context) (source.Disk, error) {
	if err := op.acquire(ctx); err != nil {
		return nil, err
	}
	limited, cancel := op.o.limit(ctx)
	defer cancel()
	if _, _, refusals := op.limits.get(); refusals > 0 && op.buffers.Bytes() > smallBuffers.Bytes() {
		op.buffers = smallBuffers // the host had no memory for reads
	}
	for {
		d, err := op.attempt(limited, ctx)
		if err == nil {
			return d, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var e *Error
		if !errors.As(err, &e) || e.Step != StepOpenSession || !errors.As(err, new(*hostError)) || !op.smaller() {
			return nil, err
		}
		op.o.Log.Debug("nfc: the host has refused the buffers of the session", "disk", op.params.Name, "error", err, "next", op.buffers)
	}
}

// The method limit returns a context that ends when opening a connection takes too long.
func (o *Options) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := openTimeouts * o.Timeout
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("the host did not answer within %v: %w", limit, os.ErrDeadlineExceeded))
}

// The method acquire waits for the disk's share of the host's memory. If the disk has a share of
// another host, because it was migrated, acquire gives that share back first.
func (op *opener) acquire(ctx context.Context) error {
	if op.o.Budget == nil {
		return nil
	}
	b, err := op.o.Budget(ctx)
	if err != nil {
		return err
	}
	if op.giveBack != nil && b == op.budget {
		return nil
	}
	op.release()
	if b == nil {
		return nil
	}
	giveBack, err := b.Acquire(ctx, b.Of(1, op.o.Buffers.Bytes()))
	if err != nil {
		return err
	}
	op.budget, op.giveBack = b, giveBack
	return nil
}

// The method release gives the disk's share of the host's memory back.
func (op *opener) release() {
	if op.giveBack != nil {
		op.giveBack()
	}
	op.budget, op.giveBack = nil, nil
}

// The method smaller chooses smaller buffers for the next session. It returns false if there are
// none.
func (op *opener) smaller() bool {
	switch {
	case op.buffers == (nfcbudget.Buffers{}):
		return false
	case op.buffers.Bytes() > smallBuffers.Bytes():
		op.buffers = smallBuffers
	default:
		op.buffers = nfcbudget.Buffers{}
	}
	return true
}

// The method attempt opens the disk once. The opening ends with limited, and the disk with ctx.
func (op *opener) attempt(limited, ctx context.Context) (source.Disk, error) {
	dialogue, variant, err := op.connect(limited)
	if err != nil {
		return nil, err
	}
	c := newConn(dialogue, op.limits, op.o.Timeout)
	s := &session{opener: op, dialogue: dialogue, conn: c}
	stop := c.watch(limited)
	var found *facts
	if err = s.begin(); err == nil {
		found, err = s.open()
	}
	if err == nil {
		err = op.compare(s, found)
	}
	if !stop() && err == nil {
		err = s.explain(context.Cause(limited))
	}
	if err != nil {
		if cause := context.Cause(limited); cause != nil {
			err = dialogue.fail(cause, "")
		}
		s.end(limited)
		return nil, err
	}
	op.remember(dialogue, variant)
	if op.opened == nil {
		op.opened = found
	}
	d := &disk{
		opener: op, session: s, facts: op.opened, compression: compressions[op.o.Compression],
		life: life.Life{Context: ctx, Name: printable.Name(op.params.Name)},
	}
	d.stop = c.watch(ctx)
	op.current.Store(s)
	s.uncount = sync.OnceFunc(func() { observer.Connections(ctx, -1) })
	observer.Connections(ctx, 1)
	return d, nil
}

// The method connect connects to the host and performs the handshake. If nothing is known about the
// host, it tries several forms of the handshake, each with a new ticket.
func (op *opener) connect(ctx context.Context) (*dialogue, string, error) {
	var first error
	tried := map[string]bool{}
	for i, variant := range variants {
		quirks, limit := op.o.Quirks.with(variant), min(maxHandshake, op.o.Timeout)
		if i == len(variants)-1 {
			limit = 0 // there is no other form to try
		}
		if tried[quirks.String()] {
			continue
		}
		tried[quirks.String()] = true
		ticket, err := op.ticket(ctx)
		if err != nil {
			return nil, "", err
		}
		known, ok := op.o.Hosts.variant(op.o.address(ticket))
		if ok {
			variant, quirks, limit = known, op.o.Quirks.with(known), 0
		}
		d := newDialogue(&op.o, quirks, ticket)
		err = d.run(ctx, limit)
		if err == nil {
			return d, variant, nil
		}
		if first == nil {
			first = err
		}
		if ok || ctx.Err() != nil || !mayVary(err) {
			return nil, "", first
		}
		op.o.Log.Debug("nfc: the handshake has failed, another form of it is tried", "host", d.address, "quirks", d.quirks.String(), "error", err)
	}
	return nil, "", first
}

// The method ticket asks for a ticket.
func (op *opener) ticket(ctx context.Context) (Ticket, error) {
	if op.o.Step != nil {
		op.o.Step(StepTicket)
	}
	t, err := op.tickets.Ticket(ctx)
	switch {
	case err == nil:
		return t, nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case source.IsPermanent(err):
		return t, source.Permanent(&Error{Step: StepTicket, Err: err})
	}
	return t, &Error{Step: StepTicket, Err: err}
}

// mayVary reports whether another form of the handshake may work after an error.
func mayVary(err error) bool {
	var e *Error
	if !errors.As(err, &e) || source.IsPermanent(err) {
		return false
	}
	return canVary(e.Step)
}

// canVary reports whether another form of the handshake changes a step.
func canVary(s Step) bool {
	switch s {
	case StepThumbprint, StepHello, StepVersion, StepFrames:
		return true
	}
	return false
}

// The method remember records how the host was reached. It warns if that is unusual: of another
// form of the handshake once for each host, and of a weak check of the certificate once for each
// disk, because each disk has a report of its own.
func (op *opener) remember(d *dialogue, variant string) {
	host := printable.Name(d.address)
	if op.opened == nil && d.checkedBySHA1() {
		op.o.Warn(fmt.Sprintf("the certificate of the host %s was compared with a SHA-1 thumbprint only, because the host sends no SHA-256 thumbprint", host))
	}
	if !op.o.Hosts.record(d.address, variant) {
		return
	}
	op.o.Log.Debug("nfc: the host was reached", "host", d.address, "version", d.version(), "banner", d.hide(d.banner.Text))
	if variant != "" {
		op.o.Warn(fmt.Sprintf("the handshake with the host %s works only with %s: please report this, as docs/guide/nfc.md describes", host, variant))
	}
}

// The method compare checks that the disk is the one that the inventory describes, and the one that
// was opened before.
func (op *opener) compare(s *session, found *facts) error {
	first := op.opened
	if first == nil && !sameUUID(op.params.UUID, found.uuid) {
		op.o.Warn(fmt.Sprintf("%s: the host has a disk with the UUID %s, but the server says that the disk has the UUID %s: check that the copy is that of the right disk", printable.Name(op.params.Name), found.uuid, printable.Name(op.params.UUID)))
	}
	switch {
	case op.params.Capacity != 0 && found.capacity != op.params.Capacity:
		return s.explain(source.Permanent(fmt.Errorf("the host has a disk of %d bytes, but the server says that the disk has %d bytes", found.capacity, op.params.Capacity)))
	case first == nil:
		return nil
	case found.capacity != first.capacity:
		return s.explain(source.Changed(fmt.Errorf("the disk has %d bytes, but it had %d bytes before", found.capacity, first.capacity)))
	case differ(found.uuid, first.uuid):
		return s.explain(source.Changed(fmt.Errorf("the disk has the UUID %s, but it had %s before", printable.Name(found.uuid), printable.Name(first.uuid))))
	case op.params.Frozen && differ(found.longContentID, first.longContentID):
		return s.explain(source.Changed(fmt.Errorf("the disk has the content ID %s, but it had %s before", printable.Name(found.longContentID), printable.Name(first.longContentID))))
	case !op.params.Frozen:
		return nil // source.Retry compares what was read before
	case found.head != first.head:
		return s.explain(source.Changed(fmt.Errorf("the first %d bytes of the disk are not those that were read before", min(headSize, found.capacity))))
	}
	err := op.samples.Check(func(p []byte, off int64) (proceed bool, err error) {
		_, err = s.readAt(p, off, compressions[op.o.Compression])
		return errors.As(err, new(*hostError)), err
	})
	if err != nil {
		return s.explain(err)
	}
	return nil
}

// differ reports whether two values of an entry differ. The value of an entry that the host does
// not know is "", and differs from no other value.
func differ(a, b string) bool { return a != "" && b != "" && a != b }

// sameUUID reports whether two UUIDs are the same, whatever is between their digits. A UUID that is
// not known is the same as every other one.
func sameUUID(a, b string) bool {
	digits := func(r rune) rune {
		if strings.ContainsRune("0123456789abcdef", r) {
			return r
		}
		return -1
	}
	a, b = strings.Map(digits, strings.ToLower(a)), strings.Map(digits, strings.ToLower(b))
	return a == "" || b == "" || a == b
}
