package transfer

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/source"
)

// ErrSourceChanged says that the source, or the backing of the target, is not what
// it was when it was planned or opened, so that the target may hold parts of two
// states. It is the only error of a copy that removes work which a checkpoint
// covers.
var ErrSourceChanged = source.ErrChanged

// changedBackingError is an ErrSourceChanged that concerns the backing.
type changedBackingError struct{ was, is string }

func (e *changedBackingError) Error() string {
	return fmt.Sprintf("the backing changed while the target was written: it was %s, it is %s; nothing may write to a backing file", e.was, e.is)
}

func (e *changedBackingError) Is(target error) bool { return target == ErrSourceChanged }

// unchanged returns an error where the source or the backing is not what it was
// when the copy was planned.
func (p *pipeline) unchanged(ctx context.Context) error {
	now, err := identity(ctx, p.src)
	if err != nil {
		return err
	}
	if now != p.plan.identity {
		return fmt.Errorf("%w: it was %s, it is %s; copy from a snapshot, or with its user stopped", ErrSourceChanged, p.plan.identity, now)
	}
	return p.o.backingUnchanged(ctx)
}

// identifyBacking notes what the backing is, unless the caller did.
func (o *Options) identifyBacking(ctx context.Context) (err error) {
	if o.Backing != nil && o.BackingIdentity == "" {
		o.BackingIdentity, err = identity(ctx, o.Backing)
	}
	return err
}

// backingUnchanged returns an error where the backing is not what it was.
func (o *Options) backingUnchanged(ctx context.Context) error {
	if o.Backing == nil {
		return nil
	}
	now, err := identity(ctx, o.Backing)
	if err == nil && now == o.BackingIdentity && o.ReopenBacking != nil {
		now, err = o.identityByName(ctx)
	}
	if err == nil && now != o.BackingIdentity {
		err = &changedBackingError{o.BackingIdentity, now}
	}
	return err
}

// identityByName returns the identity of the disk that has the backing's name now.
func (o *Options) identityByName(ctx context.Context) (string, error) {
	named, err := o.ReopenBacking(ctx)
	if err != nil {
		return "", fmt.Errorf("look at the backing again: %w", err)
	}
	defer named.Close()
	return identity(ctx, named)
}

func identity(ctx context.Context, d source.Disk) (string, error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", nil
	}
	id, _, err := i.Identity(ctx)
	if err != nil {
		return "", fmt.Errorf("identify what is read: %w", err)
	}
	return id, nil
}
