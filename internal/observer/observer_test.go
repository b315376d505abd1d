package observer_test

import (
	"context"
	"testing"

	"github.com/vddkcp/vddkcp/internal/observer"
)

func TestObserver(t *testing.T) {
	observer.Wait(t.Context())()
	observer.Connections(t.Context(), 1)
	observer.Wait(observer.With(t.Context(), observer.Observer{}))()
	waiting, open := 0, 0
	ctx, cancel := context.WithCancel(observer.With(t.Context(), observer.Observer{
		Waiting: func(n int) { waiting += n }, Connections: func(n int) { open += n },
	}))
	defer cancel()
	end := observer.Wait(ctx)
	observer.Connections(ctx, 3)
	observer.Connections(ctx, -1)
	if waiting != 1 || open != 2 {
		t.Errorf("%d calls wait and %d connections are open, want 1 and 2", waiting, open)
	}
	if end(); waiting != 0 {
		t.Errorf("%d calls wait after the end", waiting)
	}
}
