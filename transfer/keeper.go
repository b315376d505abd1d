package transfer

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// A checkpoint is due after so much time, or so many bytes.
	checkpointInterval = 5 * time.Second
	checkpointBytes    = 1 << 30
	// How much of what was written last a checkpoint can tell by its sums.
	tailBytes  = 64 << 20
	tailPieces = 256
)

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
