package raw

import (
	"context"

	"vddkcp/sink"
)

// Null returns a disk that takes everything and keeps nothing, to measure a
// source. It is Parallel, Zeroed, and a Sizer.
func Null(ctx context.Context, size int64) sink.Disk {
	return &null{life{ctx: ctx, name: "null:", size: size}}
}

type null struct{ life }

func (d *null) MaxParallel() int { return 16 }

func (d *null) ZeroedFrom(int64) bool { return true }

func (d *null) WriteAt(p []byte, off int64) (int, error) {
	if err := d.ZeroAt(d.ctx, off, int64(len(p))); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *null) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.begin(ctx, off, n); err != nil {
		return err
	}
	d.calls.RUnlock()
	return nil
}

func (d *null) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	return d.checkpoint(off, nothing)
}

func (d *null) SetSize(n int64) error { return d.setSize(n, nothing) }

func (d *null) Finish(ctx context.Context) error  { return d.advance(ctx, writing, nothing) }
func (d *null) Publish(ctx context.Context) error { return d.advance(ctx, finished, nothing) }
func (d *null) Suspend() error                    { return d.end(nothing) }
func (d *null) Abort() error                      { return d.abort(nothing) }

func nothing() error { return nil }
