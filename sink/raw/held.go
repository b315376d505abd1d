package raw

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/sink"
)

// PublishHeld gives a file its final name, durably. The parameter path is the path with which the
// file was created. The file has its .partial name because Suspend, and not Publish, was called
// after Finish. The parameter mark is the identity that fileid.MarkOf returned for the file after
// Suspend. If the .partial file has another identity, PublishHeld returns an error and changes
// nothing.
//
// If the file at the final name already has this identity, an earlier call was interrupted, and
// PublishHeld completes what that call has begun. If another file has the final name, PublishHeld
// replaces that file only if force is true. Without force the error wraps fs.ErrExist.
func PublishHeld(ctx context.Context, path, mark string, force bool) error {
	return publishHeld(ctx, path, mark, force, kernel())
}

func publishHeld(ctx context.Context, path, mark string, force bool, sys system) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if mark == "" {
		return fmt.Errorf("cannot give the file %s its final name: its identity was not recorded", path)
	}
	p, err := openPlace(path)
	if err != nil {
		return err
	}
	defer p.close()
	d := &file{
		life:  newLife(ctx, p.path, sink.UnknownSize),
		w:     writer{sys: sys, name: p.partialPath()},
		place: p, o: Options{Force: force},
	}
	if fileid.MarkAt(p.fd(), p.name) == mark {
		return d.published()
	}
	f, err := p.open(p.partial, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return fmt.Errorf("cannot give the complete copy its final name %s: %w", p.name, err)
	}
	defer durable.CloseLocked(f)
	if err := d.acquire(f); err != nil {
		return err
	}
	if now := fileid.MarkAt(p.fd(), p.partial); now != mark {
		return fmt.Errorf("%s is not the file that the copy wrote: it is %q, but the copy wrote %q", p.partialPath(), now, mark)
	}
	d.w.f = f
	return d.publish()
}

// The method published completes an interrupted call of PublishHeld that has already given the file
// its final name. Where the file system cannot rename without replacing, the file may still have
// its .partial name as a second name.
func (d *file) published() error {
	p := d.place
	final, err := p.stat(p.name)
	if err != nil {
		return err
	}
	partial, err := p.stat(p.partial)
	if err != nil {
		return err
	}
	if final != nil && partial != nil && os.SameFile(final, partial) {
		err := eintr.Retry(func() error { return d.w.sys.unlink(p.fd(), p.partial) })
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the name %s of the complete copy: %w", p.partialPath(), err)
		}
	}
	if err := d.syncDir(); err != nil {
		return fmt.Errorf("%s: %w: %w", p.path, sink.ErrUnsynced, err)
	}
	return nil
}
