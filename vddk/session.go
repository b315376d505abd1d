package vddk

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// process is what a session needs of a worker.Process.
type process interface {
	Has(function string) bool
	Open(ctx context.Context, r worker.OpenRequest) (worker.Opened, error)
	Slot(i int) []byte
	Read(ctx context.Context, slot int, sector uint64, sectors int) error
	Write(ctx context.Context, slot int, sector uint64, sectors int) error
	Flush(ctx context.Context) error
	Query(ctx context.Context, start, sectors, chunk uint64) ([]worker.Block, error)
	Cleanup(ctx context.Context, r worker.OpenRequest) (cleaned, remaining uint32, err error)
	PrepareAccess(ctx context.Context, r worker.OpenRequest) error
	EndAccess(ctx context.Context, r worker.OpenRequest) error
	Close(ctx context.Context) error
	Kill()
	Done() <-chan struct{}
	Err() error
	Release()
}

// session is a worker process in which the disk is open, and its slots. Most
// slots are handed out as buffers; the spare ones are for requests into other
// memory, so that those never wait for a buffer to be freed.
type session struct {
	proc   process
	opened worker.Opened
	timers []*time.Timer // one a slot: the deadline of its request

	why    sync.Once // guards reason until the process ended
	reason error     // why it was killed; nil: it wasn't, or by the end of a context

	// Guarded by pool.mu.
	buffers []int // slots to hand out
	handed  []int // bytes of the buffer in each slot
	spare   []int
	used    int // slots that are handed out, of either kind
	queries int // in progress
	lost    bool
	ended   bool // the process was waited for: nothing writes to the slots
}

func newSession(p process, opened worker.Opened, buffers, spare int, timeout time.Duration) *session {
	s := &session{proc: p, opened: opened, handed: make([]int, buffers+spare)}
	for i := range buffers + spare {
		if i < buffers {
			s.buffers = append(s.buffers, buffers-1-i)
		} else {
			s.spare = append(s.spare, i)
		}
		t := time.AfterFunc(time.Hour, func() { s.kill(fmt.Errorf("no answer within %v", timeout)) })
		t.Stop()
		s.timers = append(s.timers, t)
	}
	return s
}

// kill ends the process and returns when it was waited for.
func (s *session) kill(why error) {
	s.why.Do(func() { s.reason = why })
	s.proc.Kill()
}

// gone returns why the process has ended.
func (s *session) gone(op string) error {
	err := s.proc.Err()
	s.why.Do(func() {}) // what is set later was not the reason
	if s.reason != nil {
		err = s.reason
	}
	return &lostError{op: op, err: err}
}

// read reads into a slot, which must come within timeout.
func (s *session) read(ctx context.Context, timeout time.Duration, slot int, sector uint64, sectors int) error {
	s.timers[slot].Reset(timeout)
	defer s.timers[slot].Stop()
	return s.proc.Read(ctx, slot, sector, sectors)
}

func (s *session) write(ctx context.Context, timeout time.Duration, slot int, sector uint64, sectors int) error {
	s.timers[slot].Reset(timeout)
	defer s.timers[slot].Stop()
	return s.proc.Write(ctx, slot, sector, sectors)
}

// deadline kills the process after timeout unless stop is called before.
func (s *session) deadline(timeout time.Duration) (stop func() bool) {
	return time.AfterFunc(timeout, func() { s.kill(fmt.Errorf("no answer within %v", timeout)) }).Stop
}

// slotRef names a slot of a session of a handle.
type slotRef struct {
	h    *handle
	s    *session
	slot int
}

// permit is the right to make one request: it counts as one of the requests in flight
// on the handle, and owns the slot.
type permit struct {
	slotRef
	spare bool   // the slot is a spare one, not a buffer of the caller
	pace  uint64 // what Pace.Denied wants to know
	write bool
}

// memory returns the memory of the slot.
func (t *permit) memory() []byte { return t.s.proc.Slot(t.slot) }
