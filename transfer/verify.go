package transfer

import (
	"context"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// MismatchError says that Options.Verify found that the target does not hold the content that
// was read from the source.
type MismatchError struct {
	// Want is the blksum, a digest, of the content that was read. Got is that of the target.
	// Both are "" if source and target were compared byte by byte.
	Want, Got string
	// Difference is the result of reading both disks once more to compare them. It is nil if
	// the disks were equal this time, if reading failed, or if the source is a stream.
	Difference *Difference
	// Search is the text of the error if reading the disks once more failed, else "".
	Search string
	// Stream says that the source is a stream, which cannot be read again.
	Stream bool
}

func (e *MismatchError) Error() string {
	if e.Want == "" {
		return "the target does not hold the content of the source: " + e.Difference.String()
	}
	message := fmt.Sprintf("the target does not hold what was read from the source: its blksum is %s, want %s", e.Got, e.Want)
	switch {
	case e.Difference != nil:
		return message + "; " + e.Difference.String()
	case e.Search != "":
		return message + "; the search for the first difference failed: " + e.Search
	case e.Stream:
		return message
	}
	return message + "; both were equal when they were read again, so one of the first reads returned wrong data"
}

// Hint says how the user can find the reason of the mismatch.
func (e *MismatchError) Hint() string {
	return "the target was kept for inspection; if it is a file, its name is DST.partial; the memory, a cable or a disk of this machine may be faulty: check the kernel's log, then copy again with --force"
}

// ExitStatus tells report.Of the exit status for disks that differ.
func (*MismatchError) ExitStatus() int { return exit.Difference }

// verifier compares a finished target with the content that was written to it.
type verifier struct {
	dst    sink.Disk
	sums   []*digest.Sum // of what was written; a blksum, if there is one, is the last
	reader *reader       // of the content of the copy; its src is nil for a stream
	o      CompareOptions
	stop   context.Context // ends the reading with errStopped
}

// The method verify reads the target back. If the target does not have the content that was written
// to it, verify suspends it, which keeps it for inspection. The error is then a *MismatchError.
func (v *verifier) verify(ctx context.Context) (report.Verify, error) {
	failed := report.Verify{Status: report.VerifyNotRun}
	verifiable, ok := sink.Ability[sink.Verifiable](v.dst)
	if !ok {
		return failed, fmt.Errorf("cannot verify the target, because it cannot be read back: %w", errors.ErrUnsupported)
	}
	d, err := verifiable.Reopen(ctx)
	if err != nil {
		return failed, fmt.Errorf("cannot open the target to verify it: %w", err)
	}
	defer d.Close()
	var mismatch *MismatchError
	if n := len(v.sums); n > 0 && v.sums[n-1].Algorithm() == digest.Blksum {
		mismatch, err = v.compareSums(ctx, d, v.sums[n-1].Value())
	} else {
		mismatch, err = v.compareContent(ctx, d)
	}
	switch {
	case err != nil:
		return failed, err
	case mismatch == nil:
		v.o.account.end()
		return report.Verify{Status: report.VerifyOK}, nil
	}
	result := report.Verify{Status: report.VerifyMismatch}
	if mismatch.Difference != nil {
		result.Different = mismatch.Difference.Bytes
	}
	if err := v.dst.Suspend(); err != nil {
		return result, fmt.Errorf("%w (and closing the target failed: %w)", mismatch, err)
	}
	return result, mismatch
}

// compareSums compares the blksum of the target with want, the blksum of the content that was
// read. If these digests differ, it reads both disks once more to find the first difference.
func (v *verifier) compareSums(ctx context.Context, d source.Disk, want string) (mismatch *MismatchError, err error) {
	var got string
	search := v.o
	search.account = nil
	err = v.untilStopped(ctx, func(ctx context.Context) (err error) {
		got, err = Sum(ctx, d, digest.Blksum, v.o)
		return err
	})
	if err != nil || got == want {
		return nil, err
	}
	// The search for the difference is work that nobody has planned, so it is added to the plan.
	mismatch = &MismatchError{Want: want, Got: got, Stream: v.reader.src == nil}
	if !mismatch.Stream {
		var searched error
		if mismatch.Difference, searched = Compare(ctx, v.reader.whole(ctx), d, search); searched != nil {
			mismatch.Search = searched.Error()
		}
	}
	return mismatch, nil
}

// compareContent reads the source once more and compares the target with the source. It is used
// if there is no digest of the source, because the copy was resumed from a checkpoint without a
// digest.
func (v *verifier) compareContent(ctx context.Context, d source.Disk) (mismatch *MismatchError, err error) {
	var difference *Difference
	err = v.untilStopped(ctx, func(ctx context.Context) (err error) {
		difference, err = Compare(ctx, v.reader.whole(ctx), d, v.o)
		return err
	})
	if err != nil || difference == nil {
		return nil, err
	}
	return &MismatchError{Difference: difference}, nil
}

// untilStopped calls the given function, which reads disks. It passes the function a context that
// also ends when Options.Stop ends. If Options.Stop has ended, untilStopped returns errStopped.
func (v *verifier) untilStopped(ctx context.Context, read func(context.Context) error) error {
	return untilStopped(ctx, v.stop, func(ctx context.Context) error {
		if err := read(ctx); err != nil {
			return fmt.Errorf("cannot verify the target: %w", err)
		}
		return nil
	})
}

// The function untilStopped calls the given function with a context that also ends when stop ends.
// If stop has ended, untilStopped returns errStopped, and otherwise the error of the given
// function.
func untilStopped(ctx, stop context.Context, read func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(stop, cancel)()
	err := read(ctx)
	if stop.Err() != nil {
		return errStopped
	}
	return err
}
