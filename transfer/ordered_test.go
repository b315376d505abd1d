package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
)

// TestOrdered sends numbers, of which every third skips the workers, and checks
// that they are collected in order, each after its work, and that each value is
// released after its hook.
func TestOrdered(t *testing.T) {
	type number struct {
		n      int
		worked bool
		state  string
	}
	var collected []int
	err := runOrdered(t.Context(), nil, 4, 7, stages[number]{
		produce: func(ctx context.Context, o *ordered[number]) error {
			for i := range 1000 {
				it, err := o.acquire(ctx)
				if err != nil {
					return err
				}
				if it.value.state != "" && it.value.state != "released" {
					return fmt.Errorf("acquired a value that is %s", it.value.state)
				}
				it.value = number{n: i, state: "sent"}
				o.send(it, i%3 == 0)
			}
			return nil
		},
		work: func(_ context.Context, v *number) error {
			v.worked = true
			return nil
		},
		collect: func(_ context.Context, v *number) error {
			if v.worked != (v.n%3 != 0) || v.state != "sent" {
				return fmt.Errorf("collected %+v", *v)
			}
			collected = append(collected, v.n)
			v.state = "collected"
			return nil
		},
		after: func(v *number) error {
			if v.state != "collected" {
				return fmt.Errorf("the hook got %+v", *v)
			}
			v.state = "hooked"
			return nil
		},
		release: func(v *number) {
			if v.state != "" && v.state != "hooked" && v.state != "released" {
				t.Errorf("released %+v", *v)
			}
			v.state = "released"
		},
	})
	if err != nil || len(collected) != 1000 || !slices.IsSorted(collected) {
		t.Errorf("%d values in order %v: %v", len(collected), slices.IsSorted(collected), err)
	}
}

// TestOrderedHalts checks that a halt finishes the items that were sent, and no more.
func TestOrderedHalts(t *testing.T) {
	halt := make(chan struct{})
	sent, collected := 0, 0
	err := runOrdered(t.Context(), halt, 2, 5, stages[int]{
		produce: func(ctx context.Context, o *ordered[int]) error {
			for {
				it, err := o.acquire(ctx)
				if err != nil {
					return err
				}
				if sent++; sent == 20 {
					close(halt)
				}
				o.send(it, false)
			}
		},
		work:    func(context.Context, *int) error { return nil },
		collect: func(context.Context, *int) error { collected++; return nil },
	})
	if !errors.Is(err, errStopped) || sent != 20 || collected != 20 {
		t.Errorf("sent %d, collected %d: %v", sent, collected, err)
	}
}

// TestOrderedFails fails in each of the stages. The error must be returned, and
// every value be released after all goroutines have ended.
func TestOrderedFails(t *testing.T) {
	errBroken := errors.New("broken")
	for _, at := range []string{"produce", "work", "collect", "after", "context"} {
		ctx, cancel := context.WithCancelCause(t.Context())
		fail := func(stage string, n int) error {
			if stage != at || n != 50 {
				return nil
			}
			return errBroken
		}
		var running atomic.Int64
		released := 0
		err := runOrdered(ctx, nil, 3, 9, stages[int]{
			produce: func(ctx context.Context, o *ordered[int]) error {
				for i := 0; ; i++ {
					it, err := o.acquire(ctx)
					if err != nil {
						return err
					}
					if at == "context" && i == 50 {
						cancel(errBroken)
					}
					if err := fail("produce", i); err != nil {
						return err
					}
					it.value = i
					o.send(it, i%2 == 1)
				}
			},
			work: func(_ context.Context, v *int) error {
				running.Add(1)
				defer running.Add(-1)
				return fail("work", *v)
			},
			collect: func(_ context.Context, v *int) error { return fail("collect", *v) },
			after: func(v *int) error {
				released = 0 // only the releases at the end count
				return fail("after", *v)
			},
			release: func(*int) { released++ },
		})
		if !errors.Is(err, errBroken) || running.Load() != 0 || released < 9 {
			t.Errorf("%s: %d workers are running, %d values were released: %v", at, running.Load(), released, err)
		}
		cancel(nil)
	}
}
