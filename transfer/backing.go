package transfer

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/source"
)

// backing is the backing image of a target that is an overlay. The target holds only the
// differences from the backing image. If that image changes after the copy began, the content of
// the target is wrong.
type backing struct {
	disk     source.Disk // nil: the target has no backing
	identity string      // of the disk when the target was planned
	reopen   func(context.Context) (source.Disk, error)
}

// newBacking returns the backing image that is set in the options o. If o.BackingIdentity is
// "", newBacking queries the identity of the image.
func newBacking(ctx context.Context, o Options) (b backing, err error) {
	b = backing{disk: o.Backing, identity: o.BackingIdentity, reopen: o.ReopenBacking}
	if b.disk != nil && b.identity == "" {
		b.identity, err = identityOf(ctx, b.disk)
	}
	return b, err
}

// The method unchanged returns an error if the backing image has changed since the copy began. It
// queries the identity of the open image. If b.reopen is set, it also opens the file that now has
// the name of the image, and queries the identity of this file. Each of these identities must equal
// b.identity, the identity at the beginning.
func (b *backing) unchanged(ctx context.Context) error {
	if b.disk == nil {
		return nil
	}
	now, err := identityOf(ctx, b.disk)
	if err == nil && now == b.identity && b.reopen != nil {
		now, err = b.identityByName(ctx)
	}
	if err == nil && now != b.identity {
		err = &changedBackingError{b.identity, now}
	}
	return err
}

// identityByName opens the file that now has the name of the backing image, and returns the
// identity of this file.
func (b *backing) identityByName(ctx context.Context) (string, error) {
	named, err := b.reopen(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot open the backing image again: %w", err)
	}
	defer named.Close()
	return identityOf(ctx, named)
}

// identityOf returns the identity of a disk: a text that no other disk has. If the disk can detect
// changes, the text also changes with the content. If the disk has no identity, identityOf returns
// "".
func identityOf(ctx context.Context, d source.Disk) (string, error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", nil
	}
	id, _, err := i.Identity(ctx)
	if err != nil {
		return "", fmt.Errorf("cannot query the identity of the disk: %w", err)
	}
	return id, nil
}

// changedBackingError says that the backing image changed during a copy. errors.Is reports that
// it is an ErrSourceChanged.
type changedBackingError struct{ was, is string }

func (e *changedBackingError) Error() string {
	return fmt.Sprintf("the backing image changed while the target was written: its identity was %s and is now %s; nothing may write to the file of a backing image", e.was, e.is)
}

func (e *changedBackingError) Is(target error) bool { return target == ErrSourceChanged }
