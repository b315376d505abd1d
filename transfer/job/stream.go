package job

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

func (j *job) isStream() bool {
	_, ok := j.at.source.(address.Stream)
	return ok
}

// checkStream returns an error for options that make no sense for a stream.
func (j *job) checkStream() error {
	switch {
	case j.SourceFormat != "" && j.SourceFormat != "raw":
		return usage.Errorf("standard input is read as a raw stream and cannot be read as %s: save it in a file, and copy the file", j.SourceFormat)
	case j.dry:
		return usage.Errorf("--dry-run cannot examine standard input")
	case j.Reflink == transfer.ReflinkAlways:
		return usage.Errorf("--reflink always: a stream on standard input has no blocks to share")
	}
	return nil
}

// copyStream copies the stream on standard input. A stream has no extents and cannot be read
// again, so this copy can never be resumed.
func (j *job) copyStream(ctx context.Context) error {
	if err := j.checkStream(); err != nil {
		return err
	}
	size := int64(sink.UnknownSize)
	if j.Size != nil {
		size = *j.Size
		j.report.VirtualSize = size
	}
	defer j.close()
	defer j.Counters.Background(progress.WaitSource)()
	if err := j.openBacking(ctx); err != nil {
		return err
	}
	if j.Opened != nil {
		if err := j.Opened(); err != nil {
			return err
		}
	}
	j.place = sinkopen.PlaceOf(j.at.target)
	target, err := j.place.Plan(ctx, size, j.targetOptions(j.warn))
	if err != nil {
		return err
	}
	if j.drop(0) {
		target.DropCache()
	}
	j.report.Format, j.report.Transport, j.report.ExtentsSource = target.Format, "stream", "full"
	if err := j.verifiable(target); err != nil {
		return err
	}
	reading, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	stream, err := j.openStream(reading, size)
	if err != nil {
		return err
	}
	dst, err := target.Create(ctx)
	if err != nil {
		return err
	}
	o := j.options()
	o.Interrupt = interrupt
	j.result, err = transfer.CopyStream(ctx, stream, size, dst, o)
	if err == nil {
		j.report.VirtualSize = j.result.Size
	}
	return err
}

// openStream returns a reader of standard input, and waits for the first bytes. The parameter size
// is the size of the disk in the stream. If the stream is empty but this size is not 0, openStream
// returns an error, because the command that should have written the stream has probably failed.
func (j *job) openStream(ctx context.Context, size int64) (io.Reader, error) {
	stdin := raw.Stream(ctx, j.Stdin)
	if size == 0 {
		return stdin, nil
	}
	const name = "standard input"
	if j.SourceFormat == "raw" {
		b := bufio.NewReader(stdin)
		if _, err := b.Peek(1); errors.Is(err, io.EOF) {
			return nil, emptyStream(fmt.Errorf("%s: %w", name, sourceopen.ErrEmptyStream))
		}
		return b, nil
	}
	r, luks, err := sourceopen.RawStream(stdin, name)
	if luks {
		j.warn(name + " is encrypted (LUKS): it is copied as it is, and only its passphrase opens the copy")
	}
	return r, emptyStream(err)
}

// emptyStream adds a hint to err if err says that the stream is empty.
func emptyStream(err error) error {
	if errors.Is(err, sourceopen.ErrEmptyStream) {
		return hinted.Error(err, "for a disk of 0 bytes use --size 0")
	}
	return err
}
