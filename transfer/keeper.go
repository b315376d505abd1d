package transfer

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

const (
	// A checkpoint is due when checkpointInterval has passed since the last checkpoint, or when
	// checkpointBytes of data were copied since the last checkpoint.
	checkpointInterval = 5 * time.Second
	checkpointBytes    = 1 << 30
	// The tail of a checkpoint holds checksums of the data that was copied last: of at most
	// tailBytes bytes, in at most tailPieces ranges.
	tailBytes  = 64 << 20
	tailPieces = 256
)

// keeper takes checkpoints of a copy and makes them durable while the copy continues. The
// method run makes them durable, in a goroutine of its own. While a pipeline runs, only its
// collector, the goroutine that gets all pieces in order, may call the other methods.
type keeper struct {
	dst      sink.Disk
	sums     []*digest.Sum
	counters *progress.Counters
	keep     func(Checkpoint) error // Options.Keep; nil: checkpoints serve only this copy
	interval time.Duration

	at       int64     // everything below this offset is done, in bytes
	lastTime time.Time // when the last checkpoint was taken, or the copy began
	bytes    int64     // of data collected since lastTime
	tail     []Stretch // the pieces that were collected last
	length   int64     // of the tail, in bytes
	proof    Stretch   // the newest piece that was removed from the tail and has a byte other than zero

	due    chan pending  // for run; of capacity 1
	idle   chan struct{} // holds a value while run has nothing to do
	last   *Checkpoint   // the newest one at which the copy can continue
	exists bool          // Options.Keep has a checkpoint: last, or an earlier one
}

// The type pending is a checkpoint that is not durable yet.
type pending struct {
	Checkpoint
	sync func(context.Context) error // of the sink
}

// newKeeper returns the keeper of a copy to dst that begins at the given checkpoint. The parameter
// stored is true if Options.Keep has stored this checkpoint.
func newKeeper(o Options, dst sink.Disk, sums []*digest.Sum, checkpoint *Checkpoint, stored bool) *keeper {
	k := &keeper{
		dst: dst, sums: sums, counters: o.Counters, keep: o.Keep,
		interval: cmp.Or(o.Interval, killpoint.Interval(), checkpointInterval),
		at:       checkpoint.Offset, lastTime: time.Now(),
		due: make(chan pending, 1), idle: make(chan struct{}, 1),
		last: checkpoint, exists: stored,
	}
	for _, s := range checkpoint.Tail {
		k.remember(s)
	}
	k.idle <- struct{}{}
	return k
}

// remember adds a range to the tail of the next checkpoint. If the tail exceeds its limits,
// remember removes the oldest ranges.
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

// The method collected is called when the piece c and all pieces before it are copied. It takes a
// checkpoint when one is due, unless the last checkpoint is not durable yet.
func (k *keeper) collected(c *piece) error {
	k.at = c.End()
	if c.read {
		k.remember(Stretch{c.Off, c.Len, c.crc})
	}
	if c.Kind == source.Data {
		k.bytes += c.Len
	}
	if k.bytes < checkpointBytes && time.Since(k.lastTime) < k.interval {
		return nil
	}
	select {
	case <-k.idle:
	default:
		return nil
	}
	next, err := k.take()
	if err != nil {
		return err
	}
	k.lastTime, k.bytes = time.Now(), 0
	k.due <- next
	return nil
}

// The method take returns a checkpoint that covers all collected pieces. It is not durable yet.
func (k *keeper) take() (pending, error) {
	next := pending{Checkpoint: Checkpoint{Offset: k.at}}
	if k.proof.Len > 0 && !proves(k.tail) {
		next.Tail = append(next.Tail, k.proof)
	}
	next.Tail = append(next.Tail, k.tail...)
	for _, s := range k.sums {
		state, err := s.MarshalBinary()
		if err != nil {
			return next, fmt.Errorf("cannot save the state of the %s digest: %w", s.Algorithm(), err)
		}
		next.Sums = append(next.Sums, state)
	}
	killpoint.At("checkpoint")
	var err error
	next.State, next.sync, err = k.dst.Checkpoint(k.at)
	return next, err
}

// The method run receives the checkpoints from the method collected and makes each of them durable.
// It returns after finish was called, or after an error.
func (k *keeper) run(ctx context.Context) error {
	for next := range k.due {
		if err := k.makeDurable(ctx, next); err != nil {
			return err
		}
		k.idle <- struct{}{}
	}
	return nil
}

// The method finish tells the method run that no more checkpoints come. The method run then returns
// after it has made the last checkpoint durable.
func (k *keeper) finish() { close(k.due) }

// makeDurable makes the target durable up to the checkpoint, and then stores the checkpoint.
func (k *keeper) makeDurable(ctx context.Context, next pending) error {
	defer k.counters.Background(progress.WaitTarget)()
	killpoint.At("sync")
	if err := next.sync(ctx); err != nil {
		return err
	}
	killpoint.At("slot")
	if k.keep != nil {
		if err := k.store(next.Checkpoint); err != nil {
			return err
		}
	}
	k.last = &next.Checkpoint
	return nil
}

// The method store calls Options.Keep, which stores a checkpoint for a later run.
func (k *keeper) store(c Checkpoint) error {
	if err := k.keep(c); err != nil {
		return err
	}
	k.exists = true
	return nil
}

// takeFinal takes a checkpoint that covers all collected pieces, and makes it durable. It must
// not be called while a pipeline runs.
func (k *keeper) takeFinal(ctx context.Context) error {
	next, err := k.take()
	if err != nil {
		return err
	}
	return k.makeDurable(ctx, next)
}

// keepLast makes sure that a stored checkpoint exists, at which a later run can continue. If
// acceptsMore is true, the sink accepts one more checkpoint, and keepLast tries to take and store
// this final checkpoint. If there is no final checkpoint, a checkpoint that was stored earlier is
// enough. If no checkpoint was stored earlier, keepLast stores the checkpoint at which the copy
// began. If keepLast returns an error, no checkpoint is stored.
func (k *keeper) keepLast(ctx context.Context, acceptsMore bool) error {
	if acceptsMore && k.takeFinal(ctx) == nil || k.exists {
		return nil
	}
	return k.store(*k.last)
}

// restartUnproven returns the checkpoint at which the copy continues after the connection to its
// target was lost. Usually the result is the last checkpoint of the copy. But if all data that the
// tail of this checkpoint describes is zeros, this checkpoint cannot identify the target. In this
// case the result is a new checkpoint at offset 0, which replaces the last one. The parameter
// originState is the state that the sink had before the first write. The new checkpoint gets this
// state, or the state of the last checkpoint if originState is nil.
func (k *keeper) restartUnproven(originState []byte) *Checkpoint {
	if k.last.Offset > 0 && !k.last.Proves() {
		state := k.last.State
		if originState != nil {
			state = originState
		}
		k.last = &Checkpoint{State: state}
	}
	return k.last
}
