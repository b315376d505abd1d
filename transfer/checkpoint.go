package transfer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

// Checkpoint is where a copy can go on: what lies below Offset is done and
// durable.
type Checkpoint struct {
	Offset int64     `json:"offset"` // bytes
	State  []byte    `json:"state"`  // the sink's
	Sums   [][]byte  `json:"sums"`   // the digests' states, marshalled
	Tail   []Stretch `json:"tail"`   // what was written last below Offset, ascending
}

// Stretch is a range of a disk, in bytes, and the CRC-32C of its content.
type Stretch struct {
	Off int64  `json:"off"`
	Len int64  `json:"len"`
	CRC uint32 `json:"crc"`
}

// zeros reports whether the content has the checksum of zeros.
func (s Stretch) zeros() bool { return s.CRC == zeroSum(s.Len) }

// zeroSums are the results of zeroSum by length; nearly all pieces have the same.
var zeroSums sync.Map

// zeroSum returns the CRC-32C of n zero bytes.
func zeroSum(n int64) uint32 {
	if sum, ok := zeroSums.Load(n); ok {
		return sum.(uint32)
	}
	block, sum := make([]byte, 64<<10), uint32(0)
	for left := n; left > 0; left -= int64(len(block)) {
		sum = crc32.Update(sum, castagnoli, block[:min(left, int64(len(block)))])
	}
	if n == maxTailPiece || n&(n-1) == 0 { // the map stays small
		zeroSums.Store(n, sum)
	}
	return sum
}

// Proves reports whether a target that has the content of Tail can only be the
// one that was written: a piece of it has a byte that is not zero. Zeros are on
// every new device, too.
func (c *Checkpoint) Proves() bool { return proves(c.Tail) }

func proves(tail []Stretch) bool {
	return slices.ContainsFunc(tail, func(s Stretch) bool { return s.Len > 0 && s.Len <= maxTailPiece && !s.zeros() })
}

const (
	// A checkpoint is due after so much time, or so many bytes.
	checkpointInterval = 5 * time.Second
	checkpointBytes    = 1 << 30
	// How much of what was written last a checkpoint can tell by its sums.
	tailBytes  = 64 << 20
	tailPieces = 256
)

// castagnoli has instructions of its own on every processor of the day.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ResumableError is a failed copy that can go on where it was.
type ResumableError struct {
	Err    error
	Offset int64 // where it goes on, bytes
}

func (e *ResumableError) Error() string { return e.Err.Error() }
func (e *ResumableError) Unwrap() error { return e.Err }

// keeper takes checkpoints of a pipeline and makes them durable beside the
// further copy.
type keeper struct {
	p        *pipeline
	interval time.Duration
	begun    time.Time  // the last one, or the copy
	bytes    int64      // written since
	tail     []Stretch  // of what was collected
	length   int64      // of the tail, bytes
	proof    Stretch    // the last that was dropped from the tail and is not zeros
	due      chan kept  // to be synced; of capacity 1
	idle     chan token // holds one while none is being synced
	last     *Checkpoint
	done     int64 // of the counters' bytes when last was taken
	exists   bool  // a checkpoint is durable: last, or one before it
}

type token struct{}

// kept is a checkpoint that is not durable yet.
type kept struct {
	Checkpoint
	done int64
	sync func(context.Context) error
}

// newKeeper returns the keeper of a pipeline that begins at a checkpoint. Done
// is what the counters say of the bytes below it; exists says whether the
// checkpoint is durable.
func newKeeper(p *pipeline, last *Checkpoint, done int64, exists bool) *keeper {
	k := &keeper{
		p: p, interval: cmp.Or(p.o.Interval, killpoint.Interval(), checkpointInterval), begun: time.Now(),
		due: make(chan kept, 1), idle: make(chan token, 1), last: last, done: done, exists: exists,
	}
	for _, s := range last.Tail {
		k.remember(s)
	}
	k.idle <- token{}
	return k
}

// remember adds to the tail.
func (k *keeper) remember(s Stretch) {
	k.tail = append(k.tail, s)
	k.length += s.Len
	for len(k.tail) > tailPieces || len(k.tail) > 1 && k.length > tailBytes {
		if !k.tail[0].zeros() {
			k.proof = k.tail[0]
		}
		k.length -= k.tail[0].Len
		k.tail = k.tail[1:]
	}
}

// collected is called by the collector when all below off is done, the last
// piece of it being c.
func (k *keeper) collected(c *piece) error {
	if c.read {
		k.remember(Stretch{c.off, c.n, c.crc})
	}
	if c.kind == source.Data {
		k.bytes += c.n
	}
	if k.bytes < checkpointBytes && time.Since(k.begun) < k.interval {
		return nil
	}
	select {
	case <-k.idle:
	default:
		return nil // the last one is not durable yet
	}
	next, err := k.take(k.p.at)
	if err != nil {
		return err
	}
	k.begun, k.bytes = time.Now(), 0
	k.due <- next
	return nil
}

// take asks the sink and the digests for their states.
func (k *keeper) take(off int64) (kept, error) {
	next := kept{Checkpoint: Checkpoint{Offset: off}, done: k.p.o.Counters.Snapshot().Done}
	if k.proof.Len > 0 && !proves(k.tail) {
		next.Tail = append(next.Tail, k.proof)
	}
	next.Tail = append(next.Tail, k.tail...)
	var err error
	for _, s := range k.p.sums {
		state, err := s.MarshalBinary()
		if err != nil {
			return next, fmt.Errorf("state of the digest: %w", err)
		}
		next.Sums = append(next.Sums, state)
	}
	killpoint.At("checkpoint")
	next.State, next.sync, err = k.p.dst.Checkpoint(off)
	return next, err
}

// run makes the checkpoints durable that come by k.due, until that is closed.
func (k *keeper) run(ctx context.Context) error {
	for next := range k.due {
		if err := k.keep(ctx, next); err != nil {
			return err
		}
		k.idle <- token{}
	}
	return nil
}

func (k *keeper) keep(ctx context.Context, next kept) error {
	killpoint.At("sync")
	if err := next.sync(ctx); err != nil {
		return err
	}
	killpoint.At("slot")
	if k.p.o.Keep != nil {
		if err := k.store(next.Checkpoint); err != nil {
			return err
		}
	}
	k.last, k.done = &next.Checkpoint, next.done
	return nil
}

// store makes a checkpoint durable.
func (k *keeper) store(c Checkpoint) error {
	if err := k.p.o.Keep(c); err != nil {
		return err
	}
	k.exists = true
	return nil
}

// final keeps where the pipeline stopped, once all its goroutines have ended.
func (k *keeper) final(ctx context.Context) error {
	next, err := k.take(k.p.at)
	if err != nil {
		return err
	}
	return k.keep(ctx, next)
}

// sumsAt returns the digests of a copy that goes on at a checkpoint. The one
// that only Verify needs is left out where the checkpoint has none: what it
// would be of is gone by.
func (o Options) sumsAt(c *Checkpoint) ([]*digest.Sum, error) {
	wanted := o.sums()
	if c.Offset == 0 {
		return wanted, nil
	}
	kept := map[digest.Algorithm]*digest.Sum{}
	for _, state := range c.Sums {
		s := new(digest.Sum)
		if err := s.UnmarshalBinary(state); err != nil {
			return nil, fmt.Errorf("the checkpoint's digest: %w", err)
		}
		if s.Size() != c.Offset {
			return nil, fmt.Errorf("the checkpoint at %d has a %s of %d bytes", c.Offset, s.Algorithm(), s.Size())
		}
		kept[s.Algorithm()] = s
	}
	var sums []*digest.Sum
	for _, w := range wanted {
		switch s := kept[w.Algorithm()]; {
		case s != nil:
			sums = append(sums, s)
		case w.Algorithm() == o.Digest:
			return nil, fmt.Errorf("the checkpoint has no %s, and all below %d is copied already", o.Digest, c.Offset)
		}
	}
	return sums, nil
}

// ErrTail says that what a checkpoint tells of the last bytes below it is not
// what they are.
var ErrTail = errors.New("the bytes that were written last are not those of the checkpoint")

// CheckTail reads what was written last below a checkpoint and compares it. An
// error is an ErrTail where it differs.
func (c *Checkpoint) CheckTail(ctx context.Context, d io.ReaderAt) error {
	for _, s := range c.Tail {
		if s.Off < 0 || s.Len < 0 || s.Len > maxTailPiece || s.Off > c.Offset-s.Len {
			return fmt.Errorf("the checkpoint at %d tells of [%d, +%d): %w", c.Offset, s.Off, s.Len, ErrTail)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := make([]byte, s.Len)
		if n, err := d.ReadAt(b, s.Off); n < len(b) {
			return fmt.Errorf("read [%d, %d) back: %w", s.Off, s.Off+s.Len, err)
		}
		if sum := crc32.Checksum(b, castagnoli); sum != s.CRC {
			return fmt.Errorf("[%d, %d) has the checksum %08x, want %08x: %w", s.Off, s.Off+s.Len, sum, s.CRC, ErrTail)
		}
	}
	return nil
}

// maxTailPiece is the largest request that there is, in bytes.
const maxTailPiece = 64 << 20

// reopen opens a target again whose connection was lost, as of the last
// checkpoint. The failures are those since the last progress, and since is when
// the first of them was. An error of it is a sink.ErrLost, unless the copy was
// stopped: whatever refused the target, it was there before.
func (p *pipeline) reopen(ctx context.Context, cause error, failures int, since time.Time) (dst sink.Disk, err error) {
	o := p.o.Lost
	for {
		failures++
		wait, patient := o.Wait(failures, time.Since(since))
		if o.Retries >= 0 && failures > o.Retries || !patient {
			return nil, fmt.Errorf("given up after %d retries: %w", failures-1, cause)
		}
		if o.OnRetry != nil {
			o.OnRetry(cause, wait)
		}
		select {
		case <-time.After(wait):
		case <-p.o.stop().Done():
			return nil, errStopped
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if dst, err = p.reopenOnce(ctx, o.Patience()-time.Since(since)); err == nil {
			return dst, nil
		}
		cause = fmt.Errorf("open the target again: %w (%w)", err, sink.ErrLost)
		if source.IsPermanent(err) || errors.Is(err, ErrTail) || errors.As(err, new(*sink.OtherError)) {
			return nil, cause
		}
	}
}

// reopenOnce opens the target as of the last checkpoint and compares what was
// written last: a server that started again may serve another disk by the same
// name. Where only zeros were written so far, which proves nothing, it makes the
// copy go on from the start. The limit is how long the opening may take.
func (p *pipeline) reopenOnce(ctx context.Context, limit time.Duration) (sink.Disk, error) {
	last := p.keeper.last
	if last.Offset > 0 && !last.Proves() {
		state := last.State
		if p.origin != nil {
			state = p.origin
		}
		last = &Checkpoint{State: state}
		p.keeper.last, p.keeper.done = last, 0
	}
	dst, err := p.openWithin(ctx, limit, last)
	if err != nil {
		return nil, err
	}
	back, ok := sink.Ability[sink.Readback](dst)
	if !ok {
		return dst, nil
	}
	if err := last.CheckTail(ctx, back); err != nil {
		return nil, errors.Join(err, dst.Suspend())
	}
	return dst, nil
}

// errNoAnswer ends the opening of a target that hangs.
var errNoAnswer = errors.New("no answer")

// openWithin opens the target as of a checkpoint. That ends with the limit, and
// when the copy is to stop. The target lives under the context that it is opened
// with.
func (p *pipeline) openWithin(ctx context.Context, limit time.Duration, at *Checkpoint) (sink.Disk, error) {
	opening, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
	stopping := context.AfterFunc(p.o.stop(), func() { cancel(errStopped) })
	dst, err := p.o.Reopen(opening, at.State, at.Offset)
	// If the timer has fired or the stop has come, its function may still be about to
	// cancel the context: the target would be returned as open and then fail.
	inTime, running := late.Stop(), stopping()
	if !inTime || !running {
		<-opening.Done()
	}
	if err == nil && opening.Err() != nil { // it came too late
		err = errors.Join(context.Cause(opening), dst.Suspend())
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return dst, nil
}
