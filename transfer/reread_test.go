package transfer_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// doubtful is a disk whose second opening has other content than the first one.
type doubtful struct {
	source.Disk
	again  source.Disk
	err    error
	opened int
}

func (d *doubtful) Unwrap() source.Disk { return d.Disk }

func (d *doubtful) OpenAgain(context.Context) (source.Disk, error) {
	d.opened++
	return unclosed{d.again}, d.err
}

// unclosed is a disk that stays open when it is closed.
type unclosed struct{ source.Disk }

func (unclosed) Close() error { return nil }

// TestReread copies disks whose places are read again.
func TestReread(t *testing.T) {
	const size = 64<<20 + 4096
	first := sourcetest.Pattern(size, source.Extent{Len: 20 << 20}, source.Extent{Off: 40 << 20, Len: size - 40<<20})
	for _, c := range []struct {
		name    string
		again   source.Disk
		places  int
		message string
	}{
		{"equal", first, 256, ""},
		{"data at another place", sourcetest.Pattern(size, source.Extent{Len: 19 << 20}, source.Extent{Off: 40 << 20, Len: size - 40<<20}), 0, "read again over a new connection, differ from the target: first difference at byte"},
		{"data in a hole", sourcetest.Pattern(size, source.Extent{Len: 40 << 20}, source.Extent{Off: 40 << 20, Len: size - 40<<20}), 0, "first difference at byte"},
		{"shorter", sourcetest.Pattern(size-4096, source.Extent{Len: size - 4096}), 0, "256 places"},
	} {
		src := &doubtful{Disk: first, again: c.again}
		dst := &sinktest.Memory{Zeroed: true}
		result, err := transfer.Copy(t.Context(), src, create(t, dst, size, sink.Options{}), plan(t, src), transfer.Options{})
		_, published := dst.Published()
		if src.opened != 1 {
			t.Errorf("%s: opened again %d times", c.name, src.opened)
		}
		if c.message == "" {
			if err != nil || result.Reread != c.places || !published {
				t.Errorf("%s: %d places, %v", c.name, result.Reread, err)
			}
			continue
		}
		if err == nil || published {
			t.Errorf("%s: error %v, published: %v", c.name, err, published)
		}
		var differs *transfer.RereadError
		if errors.As(err, &differs) {
			if o := report.Of(err); o.Exit != exit.Difference || o.Status != report.StatusMismatch || !strings.Contains(err.Error(), c.message) || !strings.Contains(o.Hint, "--via vddk") {
				t.Errorf("%s: %v, %+v", c.name, err, o)
			}
			if len(dst.Leftovers()) != 1 {
				t.Errorf("%s: the evidence was not kept", c.name)
			}
		} else if c.name != "shorter" {
			t.Errorf("%s: error %v", c.name, err)
		}
		ended(t, dst)
	}
}

// TestRereadFails checks that a copy fails whose places cannot be read again, and can be resumed.
func TestRereadFails(t *testing.T) {
	first := sourcetest.Pattern(1<<20, source.Extent{Len: 1 << 20})
	src := &doubtful{Disk: first, err: errors.New("no ticket")}
	dst := &sinktest.Memory{Zeroed: true}
	_, err := transfer.Copy(t.Context(), src, create(t, dst, 1<<20, sink.Options{}), plan(t, src), transfer.Options{
		Keep: func(transfer.Checkpoint) error { return nil },
	})
	var resumable *transfer.ResumableError
	if !errors.As(err, &resumable) || resumable.Offset != 1<<20 || !strings.Contains(err.Error(), "cannot read places of the source again, in order to check the copy: no ticket") {
		t.Errorf("error %v", err)
	}
}

// TestRereadSmall checks that a small disk is read again whole, and that places beyond the end of the
// disk are not read.
func TestRereadSmall(t *testing.T) {
	for range 20 {
		size := 1 + rand.Int64N(17<<20)
		first := sourcetest.Pattern(size, source.Extent{Len: size})
		src := &doubtful{Disk: first, again: first}
		dst := &sinktest.Memory{}
		result, err := transfer.Copy(t.Context(), src, create(t, dst, size, sink.Options{}), plan(t, src), transfer.Options{})
		want := min((size+64<<10-1)/(64<<10), 256)
		if err != nil || int64(result.Reread) != want {
			t.Errorf("%d bytes: %d places, want %d: %v", size, result.Reread, want, err)
		}
	}
}
