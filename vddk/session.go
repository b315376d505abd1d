package vddk

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// process has the methods of worker.Process that this package uses. Tests replace worker.Process by
// a type of their own.
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

// session is a worker process in which the disk is open, with its slots of shared memory. Most
// slots are given out as buffers by pool.buffer. The others, the spare slots, are for requests
// that read into or write from other memory. These requests therefore never wait until a caller
// frees a buffer.
type session struct {
	proc   process
	at     *destination  // where the disk was opened
	opened worker.Opened // the disk as the library describes it

	why    sync.Once // sets reason at most once
	reason error     // why this package killed the process; nil if it did not

	// These fields are guarded by pool.mu.
	buffers []int       // free slots for buffers
	handed  []int       // for each slot, the size in bytes of the last buffer that it was handed out as
	spare   []int       // free spare slots
	used    int         // slots of both kinds that are not free
	begun   []time.Time // for each slot with a request in flight, when the call of the request began; zero for others
	queries int         // queries in progress
	lost    bool        // no new request may use the session
	ended   bool        // the process has ended, so that nothing writes to the slots any more
}

// newSession returns a session for the process p. The slots of p are of two kinds: the given number
// of slots for buffers, and the given number of spare slots.
func newSession(p process, opened worker.Opened, buffers, spare int) *session {
	s := &session{proc: p, opened: opened, handed: make([]int, buffers+spare), begun: make([]time.Time, buffers+spare)}
	for i := range buffers + spare {
		if i < buffers {
			s.buffers = append(s.buffers, buffers-1-i)
		} else {
			s.spare = append(s.spare, i)
		}
	}
	return s
}

// The method kill kills the process for the given reason, and waits for its end.
func (s *session) kill(why error) {
	s.blame(why)
	s.proc.Kill()
}

// The method blame records the reason for the end of the process. It does nothing if a reason is
// already recorded.
func (s *session) blame(why error) { s.why.Do(func() { s.reason = why }) }

// interruptedSinceLocked is called when the loss of the session is noticed. The loss interrupts all
// calls that have a request in flight. The result is the time when the earliest of these calls
// began. If the given time is earlier, the result is the given time.
func (s *session) interruptedSinceLocked(now time.Time) time.Time {
	for _, begun := range s.begun {
		if !begun.IsZero() && begun.Before(now) {
			now = begun
		}
	}
	return now
}

// The method gone returns a *lostError that says why the process has ended. The parameter op
// describes the operation that noticed the end of the process, with the disk and the range.
func (s *session) gone(op string) error {
	err := s.proc.Err()
	s.why.Do(func() {}) // a reason that kill gives from now on is not why the process ended
	if s.reason != nil {
		err = s.reason
	}
	return &lostError{op: op, err: err}
}

// The method read reads sectors of the disk into a slot. If the call takes longer than the given
// timeout, the process is killed.
func (s *session) read(ctx context.Context, timeout time.Duration, slot int, sector uint64, sectors int) error {
	defer s.deadline(timeout)()
	return s.proc.Read(ctx, slot, sector, sectors)
}

// The method write writes sectors of the disk from a slot. If the call takes longer than the given
// timeout, the process is killed.
func (s *session) write(ctx context.Context, timeout time.Duration, slot int, sector uint64, sectors int) error {
	defer s.deadline(timeout)()
	return s.proc.Write(ctx, slot, sector, sectors)
}

// The method deadline starts a timer and returns a function that stops the timer. If that function
// is not called within the given time, the process is killed.
func (s *session) deadline(timeout time.Duration) (stop func() bool) {
	return time.AfterFunc(timeout, func() {
		s.kill(fmt.Errorf("the worker was killed: no answer within %v", timeout.Round(time.Millisecond)))
	}).Stop
}

// slotRef identifies a slot: it has the number of the slot in its session, the session, and the
// handle of the session.
type slotRef struct {
	h    *handle
	s    *session
	slot int
}

// permit is the right to make one request over a handle. The request uses the slot of the permit
// and counts as one of the requests in flight on the handle.
type permit struct {
	slotRef
	spare bool   // the slot is a spare one, not a buffer of the caller
	pace  uint64 // version of the limits, for Pace.Denied
	write bool
}

// The method memory returns the shared memory of the slot.
func (t *permit) memory() []byte { return t.s.proc.Slot(t.slot) }
