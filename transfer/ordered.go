package transfer

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// ordered does pieces of work in parallel and takes their results in order.
// The pieces are made once and used again and again, so that what they hold
// bounds what is under way.
type ordered[T any] struct {
	free chan *orderedPiece[T] // not in use
	work chan *orderedPiece[T] // to the workers
	next chan *orderedPiece[T] // the same, in the order in which they were sent
}

type orderedPiece[T any] struct {
	value T
	done  chan struct{} // of capacity 1; gets one value when a worker is finished with it
}

// steps are what is done with the pieces of an ordered.
type steps[T any] struct {
	produce func(ctx context.Context, o *ordered[T]) error // takes and sends all pieces; in one goroutine
	work    func(ctx context.Context, v *T) error          // in many
	fold    func(ctx context.Context, v *T) error          // in one, in the order of sending
	release func(v *T)                                     // of every piece there is, after all of that, also on failure; nil: nothing
}

// runOrdered runs the steps with so many workers and at most so many pieces
// under way, and returns when all its goroutines have ended.
func runOrdered[T any](ctx context.Context, workers, pieces int, s steps[T]) error {
	o := &ordered[T]{
		free: make(chan *orderedPiece[T], pieces),
		work: make(chan *orderedPiece[T], pieces),
		next: make(chan *orderedPiece[T], pieces),
	}
	for range pieces {
		p := &orderedPiece[T]{done: make(chan struct{}, 1)}
		o.free <- p
		if s.release != nil {
			defer s.release(&p.value)
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(o.work)
		defer close(o.next)
		return s.produce(ctx, o)
	})
	for range workers {
		g.Go(func() error {
			for p := range o.work {
				if err := context.Cause(ctx); err != nil {
					return err
				}
				if err := s.work(ctx, &p.value); err != nil {
					return err
				}
				p.done <- struct{}{}
			}
			return nil
		})
	}
	g.Go(func() error {
		for p := range o.next {
			select {
			case <-p.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			if err := s.fold(ctx, &p.value); err != nil {
				return err
			}
			o.free <- p
		}
		return nil
	})
	return g.Wait()
}

// take returns a piece that is not in use, when there is one.
func (o *ordered[T]) take(ctx context.Context) (*orderedPiece[T], error) {
	select {
	case p := <-o.free:
		return p, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// send gives a taken piece to the workers.
func (o *ordered[T]) send(p *orderedPiece[T]) {
	// Both channels have room for every piece there is.
	o.next <- p
	o.work <- p
}
