package nfcbudget_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
)

func TestBudgetIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := nfcbudget.New(10)
		first, err := b.Acquire(t.Context(), 6)
		if err != nil {
			t.Fatal(err)
		}
		var order []int64
		got := make(chan func(), 2)
		for _, n := range []int64{8, 4} { // the small one fits, and is behind
			go func() {
				release, err := b.Acquire(t.Context(), n)
				if err != nil {
					t.Error(err)
				}
				order = append(order, n)
				got <- release
			}()
			synctest.Wait()
		}
		if _, ok := b.TryAcquire(1); ok {
			t.Error("TryAcquire went past those who wait")
		}
		if len(order) != 0 {
			t.Errorf("%v got in while 8 of 10 bytes were waited for", order)
		}
		first()
		first() // only the first call counts
		synctest.Wait()
		if len(order) != 1 || order[0] != 8 {
			t.Errorf("%v got in, want 8 alone", order)
		}
		(<-got)()
		synctest.Wait()
		if len(order) != 2 {
			t.Errorf("%v got in, want 4 too", order)
		}
		(<-got)()
		release, ok := b.TryAcquire(10)
		if !ok {
			t.Fatal("not all came back")
		}
		release()
	})
}

func TestBudgetContext(t *testing.T) {
	b := nfcbudget.New(4)
	release, err := b.Acquire(t.Context(), 100) // more than there is
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, err := b.Acquire(ctx, 1); err != why {
		t.Errorf("%v, want the cause", err)
	}
	release()
	if _, ok := b.TryAcquire(4); !ok {
		t.Error("the one who gave up took something")
	}
}
