package transfer

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// errStopped is the error of a copy that stopped because Options.Stop ended. When it is
// returned, all pieces that had been sent to the workers are finished.
var errStopped = errors.New("stopped")

// The type stages holds the functions that runOrdered calls.
type stages[T any] struct {
	// The function produce acquires items, fills in their values and sends them to the workers.
	// It runs in one goroutine.
	produce func(ctx context.Context, o *ordered[T]) error
	// The function work processes one value. It runs in many goroutines, for values in any order.
	work func(ctx context.Context, v *T) error
	// The function collect receives each value after the function work has processed it. It runs
	// in one goroutine, for values in the order in which they were sent.
	collect func(ctx context.Context, v *T) error
	// The function after is called after each call of collect, in the same goroutine. It may be
	// nil.
	after func(v *T) error
	// The function release frees the memory that a value refers to. It runs when a value has been
	// collected, and once more for all values when the goroutines have ended, also after an
	// error. It may be nil.
	release func(v *T)
	// counters gets to know how many values wait for the collector. It may be nil. The function
	// collect calls counters.Collecting.
	counters *progress.Counters
}

// The type ordered passes items from one producer to parallel workers, and then, in the order of
// sending, to one collector. There is a fixed number of items, which are reused, so this number
// bounds the work in progress.
type ordered[T any] struct {
	halt <-chan struct{} // closed when the producer must stop; nil: never
	free chan *item[T]   // not in use
	work chan *item[T]   // for the workers
	next chan *item[T]   // for the collector, in the order of sending

	counters *progress.Counters // as in stages
}

// An item holds a value that is passed from stage to stage.
type item[T any] struct {
	value T
	skips bool          // the item goes from the producer to the collector
	done  chan struct{} // of capacity 1; gets one value when a worker has finished
}

// runOrdered runs the stages with the given numbers of workers and items, and returns when all
// goroutines have ended. If the caller closes the channel halt, the producer's next call of acquire
// fails. The items that were sent before are finished, and the error of runOrdered is errStopped.
func runOrdered[T any](ctx context.Context, halt <-chan struct{}, workers, items int, s stages[T]) error {
	o := &ordered[T]{
		halt: halt,
		free: make(chan *item[T], items),
		work: make(chan *item[T], items),
		next: make(chan *item[T], items),

		counters: s.counters,
	}
	if s.counters != nil {
		defer s.counters.DropFinished()
	}
	all := make([]item[T], items)
	for i := range all {
		all[i].done = make(chan struct{}, 1)
		o.free <- &all[i]
	}
	if s.release != nil {
		defer func() {
			for i := range all {
				s.release(&all[i].value)
			}
		}()
	}
	halted := false
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(o.work)
		defer close(o.next)
		err := s.produce(ctx, o)
		if halted = errors.Is(err, errStopped); halted {
			return nil // the other goroutines finish what was sent
		}
		return err
	})
	for range workers {
		g.Go(func() error { return o.runWorker(ctx, s.work) })
	}
	g.Go(func() error { return o.runCollector(ctx, s) })
	if err := g.Wait(); err != nil || !halted {
		return err
	}
	return errStopped
}

// acquire returns an item that is not in use, and blocks until there is one. After the channel halt
// was closed, the error is errStopped. If ctx ends, the error is the cause of ctx. Only the
// producer may call acquire.
func (o *ordered[T]) acquire(ctx context.Context) (*item[T], error) {
	select {
	case <-o.halt:
		return nil, errStopped
	default:
	}
	select {
	case it := <-o.free:
		return it, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// The method send passes an acquired item to the workers or, if skip is true, directly to the
// collector. The producer must not use the item afterwards, because the collector may have recycled
// it. send never blocks, because the channel to the workers and the channel to the collector each
// have room for all items.
func (o *ordered[T]) send(it *item[T], skip bool) {
	it.skips = skip
	o.next <- it
	if !skip {
		o.work <- it
	}
}

// runWorker is one of several workers. It takes items from the queue of all workers and calls work
// for each of them, until the producer has ended and the queue is empty.
func (o *ordered[T]) runWorker(ctx context.Context, work func(context.Context, *T) error) error {
	for it := range o.work {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := work(ctx, &it.value); err != nil {
			return err
		}
		o.finished()
		it.done <- struct{}{}
	}
	return nil
}

// The method finished records that an item is ready for the collector.
func (o *ordered[T]) finished() {
	if o.counters != nil {
		o.counters.Finished()
	}
}

// runCollector calls the functions s.collect, s.after and s.release for each item, in the order of
// sending, until the producer has ended.
func (o *ordered[T]) runCollector(ctx context.Context, s stages[T]) error {
	for it := range o.next {
		if !it.skips {
			select {
			case <-it.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		} else {
			o.finished()
		}
		err := s.collect(ctx, &it.value)
		if o.counters != nil {
			o.counters.Collected()
		}
		if err != nil {
			return err
		}
		if s.after != nil {
			if err := s.after(&it.value); err != nil {
				return err
			}
		}
		if s.release != nil {
			s.release(&it.value)
		}
		o.free <- it
	}
	return context.Cause(ctx)
}
