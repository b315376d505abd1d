package sinktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// Op names a method that was called on a Memory disk.
type Op string

// The operations are the methods of sink.Disk, the function that Checkpoint returns
// (OpSync), and Reopen of sink.Verifiable.
const (
	OpWrite      Op = "write"
	OpZero       Op = "zero"
	OpSame       Op = "same"
	OpSize       Op = "size" // SetSize
	OpCheckpoint Op = "checkpoint"
	OpSync       Op = "sync"
	OpFinish     Op = "finish"
	OpReopen     Op = "reopen"
	OpPublish    Op = "publish"
	OpSuspend    Op = "suspend"
	OpAbort      Op = "abort"
)

// Call is one call with its range in bytes. If the call has no range, Len is
// zero. Off is then the new size of the disk for OpSize, the offset of the
// checkpoint for OpCheckpoint and OpSync, and zero for all other operations.
type Call struct {
	Op       Op
	Off, Len int64
}

func (c Call) String() string {
	switch c.Op {
	case OpWrite, OpZero, OpSame:
		return fmt.Sprintf("%s [%d, %d)", c.Op, c.Off, c.Off+c.Len)
	case OpSize, OpCheckpoint, OpSync:
		return fmt.Sprintf("%s %d", c.Op, c.Off)
	}
	return string(c.Op)
}

// Counts counts the successful calls of a Memory and the bytes in their ranges.
type Counts struct {
	Writes, Zeroes, Sames              int64 // calls
	WrittenBytes, ZeroBytes, SameBytes int64
	MaxInFlight                        int // the largest number of these calls that ran at the same time
}

// Memory is a target in memory, for testing code that writes to sinks. It keeps
// the content and logs the calls. A call fails if the function Before returns an
// error. Each call that breaks the contract of sink.Disk is recorded as a
// violation. A Memory holds one published disk, like a file with its final name,
// and one disk that is being written or suspended, like a .partial file.
//
// The fields are set before the first Create. The zero value is a sequential
// sink. Its unit is 1 byte, and its unwritten ranges need not read as zeros.
// The methods of a Memory are safe for concurrent use.
type Memory struct {
	Unit      int64 // in bytes, a power of two; 0 means 1
	Parallel  int   // 0: the disks are not sink.Parallel
	Zeroed    bool  // new disks are sink.Zeroed: callers may skip ZeroAt
	Encoded   bool  // the disks are sink.Encoders and refuse WriteAt; cannot be used with Parallel
	Fill      byte  // every byte of a new disk; cannot be used with Zeroed
	CountOnly bool  // keep only Counts, no content and no log: for disks of any size
	// Before is called before a call takes effect. It must be safe for
	// concurrent use. Its parameter ctx is always the context of the disk. If
	// Before returns an error, the call fails with this error. Before may
	// block, for example until ctx ends.
	Before func(ctx context.Context, c Call) error

	mu         sync.Mutex
	calls      []Call
	counts     Counts
	violations []string
	open       *memoryDisk
	partial    *content
	published  *content
}

var errMemoryBusy = errors.New("memory: a disk is being written already")

// Create makes a disk, or resumes the suspended one. To resume, Options.State
// must be the state that Checkpoint returned for the offset Options.Resume. The
// disks have the abilities sink.Sizer and sink.Verifiable.
func (m *Memory) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.open != nil {
		return nil, errMemoryBusy
	}
	if size < sink.UnknownSize || o.Resume < 0 || o.Resume > max(size, 0) {
		return nil, fmt.Errorf("memory: cannot resume at offset %d: want an offset from 0 to the end of the disk, which has %d bytes", o.Resume, size)
	}
	d := &memoryDisk{m: m, ctx: ctx, size: size, unit: max(m.Unit, 1), backing: o.Backing, next: o.Resume, fresh: o.State == nil}
	if o.State == nil {
		if o.Resume != 0 {
			return nil, fmt.Errorf("memory: cannot resume at offset %d: the state of the checkpoint is missing (sink.Options.State is nil)", o.Resume)
		}
		m.partial = &content{size: size, fill: m.Fill, pages: map[int64][]byte{}}
	} else {
		if m.partial == nil || m.partial.size != size {
			return nil, errors.New("memory: there is no suspended disk of this size")
		}
		if want := memoryState(o.Resume); string(o.State) != want {
			return nil, fmt.Errorf("memory: cannot resume: the checkpoint records %q, want %q", o.State, want)
		}
	}
	if o.State != nil && !m.CountOnly {
		// After a resume, content above the checkpoint is undefined. This
		// sink always fills it with garbage.
		garbage := bytes.Repeat([]byte{0xDB}, int(size-o.Resume))
		m.partial.write(garbage, o.Resume)
	}
	if o.Resume > 0 {
		d.done = []span{{0, o.Resume}}
	}
	d.content = m.partial
	m.open = d
	switch {
	case m.Encoded && m.Zeroed:
		return struct {
			encoder
			zeroed
		}{encoder{d}, zeroed{d}}, nil
	case m.Encoded:
		return encoder{d}, nil
	case m.Parallel > 0 && m.Zeroed:
		return struct {
			*memoryDisk
			parallel
			zeroed
		}{d, parallel(m.Parallel), zeroed{d}}, nil
	case m.Parallel > 0:
		return struct {
			*memoryDisk
			parallel
		}{d, parallel(m.Parallel)}, nil
	case m.Zeroed:
		return struct {
			*memoryDisk
			zeroed
		}{d, zeroed{d}}, nil
	}
	return d, nil
}

// Published returns the content of the published disk, and whether there is one.
func (m *Memory) Published() ([]byte, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.published == nil {
		return nil, false
	}
	b := make([]byte, m.published.size)
	m.published.read(b, 0)
	return b, true
}

// Leftovers returns the name "partial" if there is an unpublished disk, and no
// names otherwise.
func (m *Memory) Leftovers() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.partial == nil {
		return nil
	}
	return []string{"partial"}
}

// Ended reports whether every disk was ended by Publish, Suspend or Abort.
func (m *Memory) Ended() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.open == nil
}

// Calls returns the calls in the order in which they began. It leaves out calls
// of Abort for a disk that has ended already, since every caller defers Abort.
func (m *Memory) Calls() []Call {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.calls)
}

// Log returns the calls, one per line.
func (m *Memory) Log() string {
	var b strings.Builder
	for _, c := range m.Calls() {
		fmt.Fprintln(&b, c)
	}
	return b.String()
}

// Counts returns the counts of the calls of all disks so far.
func (m *Memory) Counts() Counts {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.counts
}

// Violations returns descriptions of the calls that broke the contract of
// sink.Disk. Such calls also return an error.
func (m *Memory) Violations() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.violations)
}

type parallel int

func (p parallel) MaxParallel() int { return int(p) }

type zeroed struct{ d *memoryDisk }

func (z zeroed) ZeroedFrom(int64) bool { return z.d.fresh && z.d.content.fill == 0 }

// These are the stages in the life of a disk.
const (
	writing = iota
	finished
	ended
)

type memoryDisk struct {
	m       *Memory
	ctx     context.Context
	unit    int64
	backing source.Disk
	fresh   bool
	content *content

	// The mutex m.mu of the Memory guards the following fields.
	size     int64 // or sink.UnknownSize
	stage    int
	err      error // the first error, which all later calls return
	inFlight []Call
	next     int64  // for a sequential disk, the offset at which the next call must start
	done     []span // ranges of WriteAt, ZeroAt and SameAt; sorted and not adjacent
}

func (d *memoryDisk) Unit() int64 { return d.unit }

func (d *memoryDisk) WriteAt(p []byte, off int64) (int, error) {
	err := d.put(d.ctx, Call{OpWrite, off, int64(len(p))}, func() error {
		if !d.m.CountOnly {
			d.content.write(p, off)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *memoryDisk) ZeroAt(ctx context.Context, off, n int64) error {
	return d.put(ctx, Call{OpZero, off, n}, func() error {
		if !d.m.CountOnly {
			d.content.zero(off, n)
		}
		return nil
	})
}

func (d *memoryDisk) SameAt(ctx context.Context, off, n int64) error {
	return d.put(ctx, Call{OpSame, off, n}, func() error {
		if d.backing == nil {
			return errors.New("SameAt needs a backing disk")
		}
		if d.m.CountOnly {
			return nil
		}
		for n > 0 { // in pieces, since the range may be the whole disk
			p := make([]byte, min(n, pageSize))
			have := min(int64(len(p)), max(d.backing.Size()-off, 0)) // a shorter backing is followed by zeros
			if k, err := d.backing.ReadAt(p[:have], off); err != nil && (err != io.EOF || int64(k) < have) {
				return fmt.Errorf("backing: %w", err)
			}
			d.content.write(p, off)
			off, n = off+int64(len(p)), n-int64(len(p))
		}
		return nil
	})
}

// The method put checks a call that has a range. It then performs the call with
// the function do. Until do returns, the call counts as being in progress.
func (d *memoryDisk) put(ctx context.Context, c Call, do func() error) error {
	m := d.m
	m.mu.Lock()
	if err := d.begin(ctx, c, writing); err != nil {
		m.mu.Unlock()
		return err
	}
	if what := d.breach(c); what != "" {
		err := d.violate(c, what)
		m.mu.Unlock()
		return err
	}
	d.inFlight = append(d.inFlight, c)
	m.counts.MaxInFlight = max(m.counts.MaxInFlight, len(d.inFlight))
	m.mu.Unlock()

	err := d.before(ctx, c)

	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil && d.stage == ended {
		err = sink.ErrClosed
	}
	if err == nil {
		err = do()
	}
	d.inFlight = slices.Delete(d.inFlight, slices.Index(d.inFlight, c), slices.Index(d.inFlight, c)+1)
	if err != nil {
		return d.fail(c, err)
	}
	d.done = addSpan(d.done, span{c.Off, c.Off + c.Len})
	switch c.Op {
	case OpWrite:
		m.counts.Writes++
		m.counts.WrittenBytes += c.Len
	case OpZero:
		m.counts.Zeroes++
		m.counts.ZeroBytes += c.Len
	case OpSame:
		m.counts.Sames++
		m.counts.SameBytes += c.Len
	}
	return nil
}

// breach describes how a call with a range breaks the contract of sink.Disk. It
// returns "" if the call is allowed.
func (d *memoryDisk) breach(c Call) string {
	end := c.Off + c.Len
	unknown := d.size == sink.UnknownSize
	if c.Off < 0 || c.Len <= 0 || end < c.Off || end > d.size && !unknown {
		return fmt.Sprintf("not in a disk of %d bytes, or empty", d.size)
	}
	if c.Off%d.unit != 0 || end%d.unit != 0 && end != d.size && !unknown {
		return fmt.Sprintf("not whole units of %d bytes", d.unit)
	}
	if d.m.Parallel == 0 {
		if len(d.inFlight) > 0 {
			return fmt.Sprintf("beside %s, and the sink is not Parallel", d.inFlight[0])
		}
		if c.Off != d.next && !(c.Off > d.next && d.zeroed()) {
			return fmt.Sprintf("does not start at %d, and the sink is not Parallel", d.next)
		}
		d.next = end
	} else if len(d.inFlight) >= d.m.Parallel {
		return fmt.Sprintf("beside %d others, the most is %d together", len(d.inFlight), d.m.Parallel)
	}
	s := span{c.Off, end}
	for _, f := range d.inFlight {
		if s.overlaps(span{f.Off, f.Off + f.Len}) {
			return fmt.Sprintf("beside %s, which it overlaps", f)
		}
	}
	for _, o := range d.done {
		if s.overlaps(o) {
			return fmt.Sprintf("again: [%d, %d) is done", o.from, o.to)
		}
	}
	return ""
}

func (d *memoryDisk) zeroed() bool { return d.m.Zeroed && zeroed{d}.ZeroedFrom(0) }

// uncovered returns the first offset that lies in none of the ranges of earlier
// calls. It returns -1 if these ranges cover all bytes of the disk below the
// given offset, or if gaps are allowed because unwritten ranges read as zeros.
func (d *memoryDisk) uncovered(end int64) int64 {
	switch {
	case end == 0 || d.zeroed() || len(d.done) > 0 && d.done[0].from == 0 && d.done[0].to >= end:
		return -1
	case len(d.done) > 0 && d.done[0].from == 0:
		return d.done[0].to
	}
	return 0
}

func memoryState(off int64) string { return fmt.Sprintf("checkpoint %d", off) }

func (d *memoryDisk) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	c := Call{OpCheckpoint, off, 0}
	err := d.step(d.ctx, c, writing, func() string {
		if d.size == sink.UnknownSize {
			return "while the size is unknown"
		}
		if off < 0 || off > d.size || off%d.unit != 0 && off != d.size {
			return fmt.Sprintf("not a whole unit of a disk of %d bytes", d.size)
		}
		if d.m.Parallel == 0 && len(d.inFlight) > 0 {
			return fmt.Sprintf("beside %s, and the sink is not Parallel", d.inFlight[0])
		}
		for _, f := range d.inFlight {
			if f.Off < off {
				return fmt.Sprintf("while %s runs", f)
			}
		}
		if at := d.uncovered(off); at >= 0 {
			return fmt.Sprintf("while nothing was written at %d", at)
		}
		return ""
	}, nil)
	if err != nil {
		return nil, nil, err
	}
	sync := func(ctx context.Context) error {
		return d.step(ctx, Call{OpSync, off, 0}, finished, nil, nil)
	}
	return []byte(memoryState(off)), sync, nil
}

func (d *memoryDisk) SetSize(n int64) error {
	return d.step(d.ctx, Call{OpSize, n, 0}, writing, func() string {
		if d.size != sink.UnknownSize {
			return fmt.Sprintf("the size is known to be %d bytes", d.size)
		}
		if k := len(d.done); n < 0 || k > 0 && d.done[k-1].to > n {
			return "more was written"
		}
		return ""
	}, func() { d.size, d.content.size = n, n })
}

func (d *memoryDisk) Finish(ctx context.Context) error {
	return d.step(ctx, Call{Op: OpFinish}, writing, func() string {
		if len(d.inFlight) > 0 {
			return fmt.Sprintf("while %s runs", d.inFlight[0])
		}
		if d.size == sink.UnknownSize {
			return "before SetSize"
		}
		if at := d.uncovered(d.size); at >= 0 {
			return fmt.Sprintf("while nothing was written at %d of %d bytes", at, d.size)
		}
		return ""
	}, func() { d.stage = finished })
}

func (d *memoryDisk) Publish(ctx context.Context) error {
	return d.step(ctx, Call{Op: OpPublish}, finished, d.notFinished, func() {
		d.m.published, d.m.partial = d.content, nil
		d.end()
	})
}

func (d *memoryDisk) notFinished() string {
	if d.stage != finished {
		return "before Finish"
	}
	return ""
}

func (d *memoryDisk) Suspend() error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.stage == ended {
		return sink.ErrClosed
	}
	d.record(Call{Op: OpSuspend})
	if len(d.inFlight) > 0 {
		m.violations = append(m.violations, fmt.Sprintf("suspend: while %s runs", d.inFlight[0]))
	}
	d.end()
	return nil
}

func (d *memoryDisk) Abort() error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if d.stage == ended {
		return nil
	}
	d.record(Call{Op: OpAbort})
	if len(d.inFlight) > 0 {
		m.violations = append(m.violations, fmt.Sprintf("abort: while %s runs", d.inFlight[0]))
	}
	if d.fresh {
		m.partial = nil
	}
	d.end()
	return nil
}

func (d *memoryDisk) Reopen(ctx context.Context) (source.Disk, error) {
	if err := d.step(ctx, Call{Op: OpReopen}, finished, d.notFinished, nil); err != nil {
		return nil, err
	}
	if d.m.CountOnly {
		return nil, errors.New("memory: a disk with CountOnly cannot be read back")
	}
	return &contentReader{ctx: ctx, m: d.m, content: d.content}, nil
}

// The method step performs a call that has no range. The function check says how
// the call breaks the contract of sink.Disk. It returns "" if the call is allowed.
// If it is allowed and Before returns no error, step runs the function do.
func (d *memoryDisk) step(ctx context.Context, c Call, last int, check func() string, do func()) error {
	m := d.m
	m.mu.Lock()
	if err := d.begin(ctx, c, last); err != nil {
		m.mu.Unlock()
		return err
	}
	if check != nil {
		if what := check(); what != "" {
			err := d.violate(c, what)
			m.mu.Unlock()
			return err
		}
	}
	m.mu.Unlock()
	err := d.before(ctx, c)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		return d.fail(c, err)
	}
	if do != nil {
		do()
	}
	return nil
}

func (d *memoryDisk) begin(ctx context.Context, c Call, last int) error {
	if d.stage == ended {
		return sink.ErrClosed
	}
	d.record(c)
	if d.err != nil {
		return fmt.Errorf("memory: an earlier call failed: %w", d.err)
	}
	if d.stage > last {
		return d.violate(c, "after Finish")
	}
	for _, ctx := range []context.Context{d.ctx, ctx} {
		if ctx.Err() != nil {
			return d.fail(c, context.Cause(ctx))
		}
	}
	return nil
}

func (d *memoryDisk) before(ctx context.Context, c Call) error {
	if d.m.Before == nil {
		return nil
	}
	if err := d.m.Before(d.ctx, c); err != nil {
		return err
	}
	for _, ctx := range []context.Context{d.ctx, ctx} {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return nil
}

func (d *memoryDisk) record(c Call) {
	if !d.m.CountOnly {
		d.m.calls = append(d.m.calls, c)
	}
}

func (d *memoryDisk) violate(c Call, what string) error {
	what = fmt.Sprintf("%s: %s", c, what)
	d.m.violations = append(d.m.violations, what)
	return d.fail(c, errors.New(what))
}

func (d *memoryDisk) fail(c Call, err error) error {
	err = fmt.Errorf("memory: %s: %w", c, err)
	if d.err == nil {
		d.err = err
	}
	return err
}

func (d *memoryDisk) end() {
	d.stage = ended
	d.m.open = nil
}
