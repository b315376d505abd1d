package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"hash/crc32"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
)

// TestCheckpointThatWasNotSynced checks that a checkpoint is not kept if its sync
// failed, because the data below its offset may be lost.
func TestCheckpointThatWasNotSynced(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
	}{
		{"input/output error", syscall.EIO},
		{"no space", syscall.ENOSPC},
		{"target lost", sink.ErrLost},
	} {
		for _, first := range []int64{0, 1 << 20} { // syncs fail from this offset on
			src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 4<<20)}
			var s shelf
			var err error
			failed := int64(-1)
			// A copy may end before its second checkpoint begins, because a checkpoint
			// is written while the copy goes on. Such a copy proves nothing.
			for range 1000 {
				m := &sinktest.Memory{}
				m.Before = func(_ context.Context, call sinktest.Call) error {
					if call.Op == sinktest.OpSync && call.Off > first {
						failed = max(failed, call.Off)
						return c.err
					}
					return nil
				}
				s = shelf{}
				_, err = transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src),
					transfer.Options{RequestSize: 256 << 10, Requests: 1, Keep: s.keep, Interval: 1})
				if failed >= 0 || err != nil {
					break
				}
			}
			if !errors.Is(err, c.err) || failed < 0 {
				t.Errorf("%s: error %v, sync failed at %d", c.name, err, failed)
			}
			for _, kept := range s.kept {
				if kept.Offset > first {
					t.Errorf("%s: a checkpoint at %d is kept, and no sync above %d succeeded", c.name, kept.Offset, first)
				}
			}
		}
	}
}

// TestTailKeepsAProof checks that zeros in the tail of a checkpoint prove nothing,
// and that the last piece with other bytes stays in the tail however many zeros
// follow.
func TestTailKeepsAProof(t *testing.T) {
	sum := func(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }
	zeros, data := make([]byte, 70<<10), bytes.Repeat([]byte{0, 1}, 35<<10)
	for _, c := range []struct {
		name string
		tail []transfer.Stretch
		want bool
	}{
		{"empty", nil, false},
		{"zeros", []transfer.Stretch{{Len: 70 << 10, CRC: sum(zeros)}, {Off: 70 << 10, Len: 4 << 10, CRC: sum(zeros[:4<<10])}}, false},
		{"data", []transfer.Stretch{{Len: 70 << 10, CRC: sum(data)}}, true},
		{"zeros and data", []transfer.Stretch{{Len: 70 << 10, CRC: sum(zeros)}, {Off: 70 << 10, Len: 70 << 10, CRC: sum(data)}}, true},
		{"no bytes", []transfer.Stretch{{CRC: 5}}, false},
		{"too long", []transfer.Stretch{{Len: 1 << 40, CRC: 5}}, false},
	} {
		if got := (&transfer.Checkpoint{Tail: c.tail}).Proves(); got != c.want {
			t.Errorf("%s: proves %v, want %v", c.name, got, c.want)
		}
	}
	// 64 KiB of data are followed by more pieces of zeros than a tail can have. Then the copy
	// is stopped, which takes a last checkpoint.
	src := &sourcetest.Memory{Bytes: make([]byte, 64<<10+400*4<<10)}
	copy(src.Bytes, bytes.Repeat([]byte{7}, 64<<10))
	m := &sinktest.Memory{}
	stop, cancel := context.WithCancelCause(t.Context())
	src.OnRead = func(off int64, _ int) error {
		if off == 64<<10+300*4<<10 {
			cancel(errSignal)
		}
		return nil
	}
	var s shelf
	o := transfer.Options{RequestSize: 4 << 10, Requests: 1, Keep: s.keep, Interval: 1, Stop: stop}
	if _, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src), o); !errors.Is(err, errSignal) {
		t.Fatal(err)
	}
	last := s.last()
	if len(s.kept) == 0 || last.Offset < 64<<10+260*4<<10 {
		t.Fatalf("%d checkpoints, the last at %d", len(s.kept), last.Offset)
	}
	if !last.Proves() || last.CheckTail(t.Context(), bytes.NewReader(src.Bytes)) != nil {
		t.Errorf("the tail of %d pieces at %d proves nothing", len(last.Tail), last.Offset)
	}
	if err := last.CheckTail(t.Context(), bytes.NewReader(make([]byte, len(src.Bytes)))); !errors.Is(err, transfer.ErrTail) {
		t.Errorf("a target of zeros: %v, want %v", err, transfer.ErrTail)
	}
}

// TestLostTargetComesBackAsAnother checks that a lost target which has another
// content when it is opened again is not continued, and that one to which only zeros
// were written is written from the start.
func TestLostTargetComesBackAsAnother(t *testing.T) {
	const size = 1 << 20
	for _, c := range []struct {
		name string
		data int // bytes at the start of the disk that are not zeros
		from int64
		err  error
	}{
		{"after data", 256 << 10, 0, transfer.ErrTail},
		{"after zeros", 0, 0, nil},
	} {
		src := &sourcetest.Memory{Bytes: make([]byte, size)}
		copy(src.Bytes, bytes.Repeat([]byte{1}, c.data))
		copy(src.Bytes[size/2:], bytes.Repeat([]byte{2}, size/2))
		m := &sinktest.Memory{}
		lost := false
		m.Before = func(_ context.Context, call sinktest.Call) error {
			if call.Op == sinktest.OpWrite && call.Off >= size/2 && !lost {
				lost = true
				return sink.ErrLost
			}
			return nil
		}
		var s shelf
		from := int64(-1)
		fresh := make([]byte, size)
		_, err := transfer.Copy(t.Context(), src, create(t, m, size, sink.Options{}), plan(t, src), transfer.Options{
			RequestSize: 64 << 10, Requests: 1, Keep: s.keep, Interval: 1,
			Lost: source.RetryOptions{Retries: 3, Backoff: func(int) time.Duration { return 0 }},
			Reopen: func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) {
				from = resume
				d, err := m.Create(ctx, size, sink.Options{State: state, Resume: resume})
				return readback{d, bytes.NewReader(fresh)}, err
			},
		})
		if c.err != nil && !errors.Is(err, c.err) || c.err == nil && (err != nil || from != c.from) {
			t.Errorf("%s: gone on from %d, error %v, want %d, %v", c.name, from, err, c.from, c.err)
		}
	}
}

// readback is a target whose Readback reads another disk.
type readback struct {
	sink.Disk
	io.ReaderAt
}

// TestBackingThatChanges checks that a backing which changes while an overlay is
// written is an error, and that the overlay, which may be a mixture of two states, is
// removed.
func TestBackingThatChanges(t *testing.T) {
	for _, stream := range []bool{false, true} {
		for _, noted := range []string{"", "base at noon"} {
			src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
			backing := &sourcetest.Memory{Bytes: src.Bytes, ID: "base at noon", Proof: "mtime"}
			m := &sinktest.Memory{}
			m.Before = func(_ context.Context, call sinktest.Call) error {
				if call.Op == sinktest.OpWrite {
					backing.ID = "base at night"
				}
				return nil
			}
			o := transfer.Options{Backing: backing, BackingIdentity: noted, RequestSize: 64 << 10, Requests: 1}
			dst := create(t, m, src.Size(), sink.Options{Backing: backing})
			var err error
			if stream {
				_, err = transfer.CopyStream(t.Context(), bytes.NewReader(src.Bytes), src.Size(), dst, o)
			} else {
				_, err = transfer.Copy(t.Context(), src, dst, plan(t, src), o)
			}
			if !errors.Is(err, transfer.ErrSourceChanged) || !strings.Contains(err.Error(), "the backing image changed while the target was written: its identity was base at noon and is now base at night") {
				t.Errorf("stream %v: error %v", stream, err)
			}
			if _, published := m.Published(); published || len(m.Leftovers()) > 0 {
				t.Errorf("stream %v: published %v, left %v", stream, published, m.Leftovers())
			}
		}
	}
}

// TestBackingThatIsReplaced checks that it is an error if the name of the backing
// belongs to another file at the end of a copy, also after the target was read back.
func TestBackingThatIsReplaced(t *testing.T) {
	for _, c := range []struct {
		name     string
		stream   bool
		replaced int // the file is replaced before it is opened again for this many-th time
		verify   bool
	}{{"copy", false, 1, false}, {"stream", true, 1, false}, {"copy that is read back", false, 2, true}} {
		src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
		backing := &sourcetest.Memory{Bytes: src.Bytes, ID: "the first", Proof: "mtime"}
		m, opened := &sinktest.Memory{}, 0
		o := transfer.Options{Backing: backing, RequestSize: 64 << 10, Requests: 1, Verify: c.verify}
		o.ReopenBacking = func(context.Context) (source.Disk, error) {
			named := &sourcetest.Memory{Bytes: src.Bytes, ID: backing.ID, Proof: "mtime"}
			if opened++; opened >= c.replaced {
				named.ID = "another"
			}
			return named, nil
		}
		dst := create(t, m, src.Size(), sink.Options{Backing: backing})
		var err error
		if c.stream {
			_, err = transfer.CopyStream(t.Context(), bytes.NewReader(src.Bytes), src.Size(), dst, o)
		} else {
			_, err = transfer.Copy(t.Context(), src, dst, plan(t, src), o)
		}
		if !errors.Is(err, transfer.ErrSourceChanged) || !strings.Contains(err.Error(), "its identity was the first and is now another") {
			t.Errorf("%s: error %v", c.name, err)
		}
		if _, published := m.Published(); published || len(m.Leftovers()) > 0 {
			t.Errorf("%s: published %v, left %v", c.name, published, m.Leftovers())
		}
	}
}
