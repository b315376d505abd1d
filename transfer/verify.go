package transfer

import (
	"context"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// MismatchError says that a target does not hold what was read for it.
type MismatchError struct {
	Want, Got string // digests, of what was read and of what the target holds; "": both were read and compared
	// Difference is what a second reading of both found; nil: it found none, or
	// the source can't be read again.
	Difference *Difference
	Search     string // why the second reading failed; "": it did not
	Stream     bool   // the source can't be read again
}

func (e *MismatchError) Error() string {
	if e.Want == "" {
		return "the target does not hold what the source does: " + e.Difference.String()
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
	return message + "; a second reading of both finds them alike, so a read went wrong"
}

// Hint is what the user can do.
func (e *MismatchError) Hint() string {
	return "the .partial file was kept for a look at it; memory, cable or disk may be failing: see the kernel's log, then copy again with --force"
}

// verify reads the finished target back, and keeps it unpublished where it is
// not what was written.
func (p *pipeline) verify(ctx context.Context) (report.Verify, error) {
	failed := report.Verify{Status: report.VerifyNotRun}
	v, ok := sink.Ability[sink.Verifiable](p.dst)
	if !ok {
		return failed, fmt.Errorf("verify: the target can't be read back: %w", errors.ErrUnsupported)
	}
	d, err := v.Reopen(ctx)
	if err != nil {
		return failed, fmt.Errorf("verify: %w", err)
	}
	defer d.Close()
	if len(p.sums) == 0 || p.sums[len(p.sums)-1].Algorithm() != digest.Blksum {
		return p.verifyByComparing(ctx, d)
	}
	o := CompareOptions{RequestSize: p.o.RequestSize, Requests: p.o.Requests, Counters: p.o.Counters}
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.o.stop(), cancel)()
	got, err := Sum(reading, d, digest.Blksum, o)
	if p.o.stop().Err() != nil {
		return failed, errStopped
	}
	if err != nil {
		return failed, fmt.Errorf("verify: %w", err)
	}
	// The last one: sums has it so.
	want := p.sums[len(p.sums)-1].Value()
	if got == want {
		return report.Verify{Status: report.VerifyOK}, nil
	}
	mismatch := &MismatchError{Want: want, Got: got, Stream: p.src == nil}
	different := int64(0)
	if p.src != nil {
		var searched error
		if mismatch.Difference, searched = Compare(ctx, p.whole(ctx), d, o); searched != nil {
			mismatch.Search = searched.Error()
		}
		if mismatch.Difference != nil {
			different = mismatch.Difference.Bytes
		}
	}
	return p.mismatched(mismatch, different)
}

// mismatched keeps a target that differs, with the number of bytes that do.
// However closing it ends, the copy ends with the mismatch.
func (p *pipeline) mismatched(mismatch *MismatchError, different int64) (report.Verify, error) {
	v := report.Verify{Status: report.VerifyMismatch, Different: different}
	if err := p.dst.Suspend(); err != nil {
		return v, fmt.Errorf("%w; closing the target: %w", mismatch, err)
	}
	return v, mismatch
}

// verifyByComparing is verify of a copy that was resumed from one without a
// digest: it reads the source once more.
func (p *pipeline) verifyByComparing(ctx context.Context, d source.Disk) (report.Verify, error) {
	failed := report.Verify{Status: report.VerifyNotRun}
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(p.o.stop(), cancel)()
	diff, err := Compare(reading, p.whole(reading), d, CompareOptions{RequestSize: p.o.RequestSize, Requests: p.o.Requests, Counters: p.o.Counters})
	switch {
	case p.o.stop().Err() != nil:
		return failed, errStopped
	case err != nil:
		return failed, fmt.Errorf("verify: %w", err)
	case diff == nil:
		return report.Verify{Status: report.VerifyOK}, nil
	}
	return p.mismatched(&MismatchError{Difference: diff}, diff.Bytes)
}
