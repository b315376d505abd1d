package raw

import (
	"context"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
)

// Null returns a disk that drops all data, for measuring the speed of a source.
// It has the abilities sink.Parallel, sink.Zeroed and sink.Sizer.
func Null(ctx context.Context, size int64) sink.Disk {
	return &null{newLife(ctx, "null:", size)}
}

type null struct{ life }

func (d *null) MaxParallel() int { return 16 }

func (d *null) ZeroedFrom(int64) bool { return true }

func (d *null) WriteAt(p []byte, off int64) (int, error) {
	if err := d.ZeroAt(d.Context, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *null) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.Begin(ctx, off, n); err != nil {
		return err
	}
	d.Done()
	return nil
}

func (d *null) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	return d.checkpoint(off, nothing)
}

func (d *null) SetSize(n int64) error { return d.life.SetSize(n, nothing) }

func (d *null) Finish(ctx context.Context) error  { return d.Advance(ctx, lifecycle.Writing, nothing) }
func (d *null) Publish(ctx context.Context) error { return d.Advance(ctx, lifecycle.Finished, nothing) }
func (d *null) Suspend() error                    { return d.End(nothing) }
func (d *null) Abort() error                      { return d.life.Abort(nothing) }

func nothing() error { return nil }
