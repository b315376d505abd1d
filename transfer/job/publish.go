package job

import (
	"context"
	"fmt"

	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
)

// Publish gives the target of a copy with Spec.Hold its final name, durably. The parameter mark is
// the argument that Spec.Whole got. If the target is not a file, mark is "", and Publish does
// nothing.
//
// Publish fails if the .partial file is not the file that mark identifies. It replaces an existing
// file at the final name only if Spec.Force is set, or if Spec.KeepOld is set and the file is kept. If the file already has its
// final name, because an earlier call was interrupted, Publish completes that call and returns nil.
// After success there is no journal next to the target.
func Publish(ctx context.Context, spec Spec, mark string) error {
	j := newJob(spec)
	if err := j.Parse(); err != nil {
		return err
	}
	place := sinkopen.PlaceOf(j.at.target)
	switch {
	case place.Kind == "file":
	case place.Kind == "":
		// The folder of a file is missing, for example. PublishHeld returns an error that says why.
	case mark == "":
		return nil
	default:
		return fmt.Errorf("cannot give the complete copy its final name: %s was a file when it was written, and is now a %s", j.Target, place.Kind)
	}
	if j.KeepOld && !j.Force && !Published(spec.Target, mark) {
		j.keepOld()
	}
	if err := sinkraw.PublishHeld(ctx, place.Address.String(), mark, j.Force); err != nil {
		return err
	}
	Tidy(spec)
	return nil
}
