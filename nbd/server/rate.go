package server

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

const (
	// rateQuantum is how many bytes one peer gets before the next one gets any, if several peers
	// wait. Long requests therefore do not get more than short ones.
	rateQuantum = 64 << 10
	// rateBurst is the part of a second for which bytes are saved up while no client wants any.
	rateBurst = 10
)

// The type rateLimits has a limit for each direction of data.
type rateLimits struct{ reads, writes *rateLimit }

// A rateLimit limits how many bytes per second all clients together may read or write. Peers that
// wait at the same time get the same number of bytes. A request waits before it has any memory. A
// nil rateLimit does not limit.
type rateLimit struct {
	perSecond int64
	burst     int64 // bytes that can be saved up, and that a request can get at once

	mu      sync.Mutex
	saved   float64 // bytes that a request may get now
	at      time.Time
	queue   []*share // of the peers that wait; the first one is next
	waking  *time.Timer
	waiting map[*peer]*share
}

// A share has the requests of one peer that wait, in the order of their arrival.
type share struct {
	peer     *peer
	requests []*limited
}

// A limited is a request that waits.
type limited struct {
	missing int64 // bytes
	ready   chan struct{}
}

// newRateLimit returns a limit of the given number of bytes per second, or nil if the number is 0.
func newRateLimit(perSecond int64) *rateLimit {
	if perSecond == 0 {
		return nil
	}
	burst := max(perSecond/rateBurst, 1)
	return &rateLimit{perSecond: perSecond, burst: burst, saved: float64(burst), at: time.Now(), waiting: map[*peer]*share{}}
}

// errGone says that nobody waits for the data of a request any more.
var errGone = errors.New("the client has left")

// lookAgain is how often wait checks whether the client has left.
const lookAgain = time.Second

// The method wait returns when a client of the given peer may get n bytes. It returns the cause of
// ctx if ctx ends first, ErrShutdown if the channel stopping is closed first, and errGone as soon
// as the function gone returns true. The function gone is called unless wait returns at once.
func (l *rateLimit) wait(ctx context.Context, stopping <-chan struct{}, p *peer, n int64, gone func() bool) error {
	if l == nil || n == 0 {
		return nil
	}
	w := l.enqueue(p, n)
	select {
	case <-w.ready:
		return nil
	default:
	}
	var err error
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	for err == nil {
		if gone() {
			err = errGone
			break
		}
		select {
		case <-w.ready:
			return nil
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-stopping:
			err = ErrShutdown
		case <-look.C:
		}
	}
	l.remove(p, w)
	return err
}

func (l *rateLimit) enqueue(p *peer, n int64) *limited {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.waiting[p]
	if s == nil {
		s = &share{peer: p}
		l.waiting[p] = s
		l.queue = append(l.queue, s)
	}
	w := &limited{n, make(chan struct{})}
	s.requests = append(s.requests, w)
	l.serve()
	return w
}

// The method remove forgets a request whose connection has ended.
func (l *rateLimit) remove(p *peer, w *limited) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.waiting[p]
	if s == nil {
		return
	}
	s.requests = slices.DeleteFunc(s.requests, func(other *limited) bool { return other == w })
	if len(s.requests) > 0 {
		return
	}
	delete(l.waiting, p)
	l.queue = slices.DeleteFunc(l.queue, func(other *share) bool { return other == s })
	l.serve() // the next peer may need fewer bytes than this one
}

// The method serve gives bytes to the peers that wait, one peer after the other. If there are not
// enough bytes, it arranges that it is called again later. The caller holds l.mu.
func (l *rateLimit) serve() {
	now := time.Now()
	l.saved = min(l.saved+now.Sub(l.at).Seconds()*float64(l.perSecond), float64(l.burst))
	l.at = now
	for len(l.queue) > 0 {
		s := l.queue[0]
		w := s.requests[0]
		n := min(w.missing, rateQuantum, l.burst)
		if lacks := float64(n) - l.saved; lacks > 0 {
			l.wakeIn(time.Duration(lacks/float64(l.perSecond)*float64(time.Second)) + time.Microsecond)
			return
		}
		l.saved -= float64(n)
		l.queue = append(l.queue[1:], s)
		if w.missing -= n; w.missing > 0 {
			continue
		}
		close(w.ready)
		if s.requests = s.requests[1:]; len(s.requests) == 0 {
			delete(l.waiting, s.peer)
			l.queue = l.queue[:len(l.queue)-1]
		}
	}
	if l.waking != nil {
		l.waking.Stop()
	}
}

func (l *rateLimit) wakeIn(d time.Duration) {
	if l.waking != nil {
		l.waking.Reset(d)
		return
	}
	l.waking = time.AfterFunc(d, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.serve()
	})
}
