package transfer_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

const ms = time.Millisecond

// slowCopy describes a copy whose parts take a certain time, on the clock of a bubble of package
// testing/synctest. There, everything else takes no time.
type slowCopy struct {
	read   func(off int64) time.Duration
	target map[sinktest.Op]time.Duration
	encode time.Duration // of each unit; 0: the target takes no encoded units
	o      transfer.Options
	stream bool

	parallel int // as in sinktest.Memory
}

// encodes is a sink that needs time to encode a unit.
type encodes struct {
	sink.Disk
	sink.Encoder
	time time.Duration
}

func (e encodes) NewEncoding() sink.Encoding { return encoding{e.Encoder.NewEncoding(), e.time} }

type encoding struct {
	sink.Encoding
	time time.Duration
}

func (e encoding) Encode(dst, unit []byte, off int64) ([]byte, bool, error) {
	time.Sleep(e.time)
	return e.Encoding.Encode(dst, unit, off)
}

// slowReader is a stream.
type slowReader struct {
	io.Reader
	time time.Duration
}

func (r slowReader) Read(p []byte) (int, error) {
	time.Sleep(r.time)
	return r.Reader.Read(p)
}

// The method run makes the copy, and returns what it has waited for.
func (c *slowCopy) run(t *testing.T) (w progress.Waits, took time.Duration) {
	const size = 64 << 20
	memory := &sinktest.Memory{Zeroed: true, Unit: 1 << 20, Encoded: c.encode > 0, Parallel: c.parallel}
	memory.Before = func(_ context.Context, call sinktest.Call) error {
		time.Sleep(c.target[call.Op])
		return nil
	}
	dst := create(t, memory, size, sink.Options{})
	if c.encode > 0 {
		dst = encodes{dst, dst.(sink.Encoder), c.encode}
	}
	c.o.Counters = new(progress.Counters)
	begin := time.Now()
	var err error
	if c.stream {
		_, err = transfer.CopyStream(t.Context(), slowReader{bytes.NewReader(bytes.Repeat([]byte{1}, size)), c.read(0)}, size, dst, c.o)
	} else {
		src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, size)}
		src.OnRead = func(off int64, _ int) error {
			if c.read != nil {
				time.Sleep(c.read(off))
			}
			return nil
		}
		_, err = transfer.Copy(t.Context(), src, dst, plan(t, src), c.o)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c.o.Counters.Snapshot().Waits, time.Since(begin)
}

func takes(d time.Duration) func(int64) time.Duration { return func(int64) time.Duration { return d } }

// TestWaits makes copies of which one part is the slowest, and checks that this is the part for
// which the copy has waited longest. A copy always waits for exactly one thing.
func TestWaits(t *testing.T) {
	write := func(d time.Duration) map[sinktest.Op]time.Duration {
		return map[sinktest.Op]time.Duration{sinktest.OpWrite: d}
	}
	for name, test := range map[string]struct {
		slowCopy
		want progress.Wait
	}{
		"source":                      {slowCopy{read: takes(5 * ms)}, progress.WaitSource},
		"source, some reads are slow": {slowCopy{read: func(off int64) time.Duration { return time.Duration(off>>20) * 7 % 20 * ms }, target: write(ms)}, progress.WaitSource},
		"source, the target is nearly as slow": {slowCopy{read: takes(10 * ms), target: write(6 * ms),
			o: transfer.Options{Requests: 1}}, progress.WaitSource},
		"source, a parallel target is nearly as slow": {slowCopy{read: takes(10 * ms), target: write(6 * ms), parallel: 4}, progress.WaitSource},
		"source is a stream":                          {slowCopy{read: takes(5 * ms), target: write(3 * ms), stream: true}, progress.WaitSource},
		"source with encoders":                        {slowCopy{read: takes(50 * ms), encode: 2 * ms}, progress.WaitSource},
		"encoders":                                    {slowCopy{read: takes(5 * ms), encode: 50 * ms, target: write(ms)}, progress.WaitEncoders},
		"encoders of a stream":                        {slowCopy{read: takes(ms), encode: 50 * ms, target: write(ms), stream: true}, progress.WaitEncoders},
		"target":                                      {slowCopy{read: takes(5 * ms), target: write(5 * ms)}, progress.WaitTarget},
		"target, many reads":                          {slowCopy{read: takes(10 * ms), target: write(4 * ms), o: transfer.Options{Requests: 16}}, progress.WaitTarget},
		"target of a stream":                          {slowCopy{read: takes(ms), target: write(3 * ms), stream: true}, progress.WaitTarget},
		"target takes encoded":                        {slowCopy{read: takes(ms), encode: ms, target: write(3 * ms)}, progress.WaitTarget},
		"parallel target":                             {slowCopy{read: takes(5 * ms), target: write(6 * ms), parallel: 4}, progress.WaitTarget},
		"target ends slowly":                          {slowCopy{read: takes(5 * ms), target: map[sinktest.Op]time.Duration{sinktest.OpFinish: time.Second}}, progress.WaitTarget},
		"target is opened again":                      {slowCopy{read: takes(5 * ms), target: map[sinktest.Op]time.Duration{sinktest.OpReopen: time.Second}, o: transfer.Options{Verify: true}}, progress.WaitTarget},
		"target is synced": {slowCopy{read: takes(5 * ms), target: map[sinktest.Op]time.Duration{sinktest.OpSync: time.Minute},
			o: transfer.Options{Interval: 1, Keep: func(transfer.Checkpoint) error { return nil }}}, progress.WaitTarget},
		"rate limit": {slowCopy{read: takes(ms), o: transfer.Options{Limit: transfer.NewLimiter(32 << 20)}}, progress.WaitRateLimit},
		"rate limit below many slow reads": {slowCopy{read: takes(100 * ms), target: write(ms),
			o: transfer.Options{Requests: 16, Limit: transfer.NewLimiter(80 << 20)}}, progress.WaitRateLimit},
		"rate limit that the source does not reach": {slowCopy{read: takes(100 * ms),
			o: transfer.Options{Limit: transfer.NewLimiter(80 << 20)}}, progress.WaitSource},
		"rate limit of a stream": {slowCopy{read: takes(ms), stream: true, o: transfer.Options{Limit: transfer.NewLimiter(32 << 20)}}, progress.WaitRateLimit},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w, took := test.run(t)
				if got, _ := w.Longest(); got != test.want {
					t.Errorf("the longest wait is %v, want %v: %v", got, test.want, w)
				}
				checkSum(t, w, took)
			})
		})
	}
}

// checkSum checks that the times of w are those of a copy that has waited for one thing at a time.
func checkSum(t *testing.T, w progress.Waits, took time.Duration) {
	t.Helper()
	sum := time.Duration(0)
	for _, d := range w {
		if d < 0 {
			t.Errorf("a time is negative: %v", w)
		}
		sum += d
	}
	if sum != took {
		t.Errorf("the copy has waited %v in %v: %v", sum, took, w)
	}
}

// TestWaitsOfReads checks what Compare and Sum have waited for.
func TestWaitsOfReads(t *testing.T) {
	slow := func(d time.Duration) *sourcetest.Memory {
		return &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 16<<20), OnRead: func(int64, int) error {
			time.Sleep(d)
			return nil
		}}
	}
	for name, test := range map[string]struct {
		read func(ctx context.Context, o transfer.CompareOptions) error
		want progress.Wait
	}{
		"compare, slow source": {func(ctx context.Context, o transfer.CompareOptions) error {
			_, err := transfer.Compare(ctx, slow(3*ms), slow(ms), o)
			return err
		}, progress.WaitSource},
		"compare, slow target": {func(ctx context.Context, o transfer.CompareOptions) error {
			_, err := transfer.Compare(ctx, slow(ms), slow(3*ms), o)
			return err
		}, progress.WaitTarget},
		"sum": {func(ctx context.Context, o transfer.CompareOptions) error {
			_, err := transfer.Sum(ctx, slow(ms), digest.SHA256, o)
			return err
		}, progress.WaitSource},
		"sum with a rate limit": {func(ctx context.Context, o transfer.CompareOptions) error {
			o.Limit = transfer.NewLimiter(8 << 20)
			_, err := transfer.Sum(ctx, slow(ms), digest.Blksum, o)
			return err
		}, progress.WaitRateLimit},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				counters := new(progress.Counters)
				begin := time.Now()
				if err := test.read(t.Context(), transfer.CompareOptions{Counters: counters}); err != nil {
					t.Fatal(err)
				}
				w := counters.Snapshot().Waits
				if got, _ := w.Longest(); got != test.want {
					t.Errorf("the longest wait is %v, want %v: %v", got, test.want, w)
				}
				checkSum(t, w, time.Since(begin))
			})
		})
	}
}

// TestReadsInProgress checks that the counter of reads is right while reads block, and 0 after a
// copy that failed.
func TestReadsInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		counters := new(progress.Counters)
		ctx, cancel := context.WithCancel(t.Context())
		src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 16<<20), OnRead: func(int64, int) error {
			<-ctx.Done()
			return context.Cause(ctx)
		}}
		done := make(chan error)
		dst := create(t, &sinktest.Memory{}, src.Size(), sink.Options{})
		p := plan(t, src)
		go func() {
			_, err := transfer.Copy(ctx, src, dst, p, transfer.Options{Requests: 3, Counters: counters})
			done <- err
		}()
		synctest.Wait()
		if n := counters.Snapshot().Reads; n != 3 {
			t.Errorf("%d reads are in progress, want 3", n)
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("the copy has succeeded")
		}
		if n := counters.Snapshot().Reads; n != 0 {
			t.Errorf("%d reads are in progress after the copy, want 0", n)
		}
	})
}
