package nfctest

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// job is an answer that is to be sent: a frame, or the fragments of a read.
type job struct {
	rule   *Rule
	held   bool // the rule was waited for
	answer []byte
	read   *read
	part   int // of the fragments; allParts: all of them
	due    time.Time
}

const allParts = -1

// queue has the answers of a connection that are to be sent.
type queue struct {
	latency time.Duration
	delayed chan job // nil without latency
	ended   chan struct{}

	mu     sync.Mutex
	filled sync.Cond // there is a job, or the queue is closed
	jobs   []job
	random *rand.Rand // nil: jobs are taken in the order of their requests
	closed bool
}

func newQueue(o Options, connection int) *queue {
	q := &queue{latency: o.Latency, ended: make(chan struct{})}
	q.filled.L = &q.mu
	if q.latency > 0 {
		q.delayed = make(chan job, 1024)
	}
	if o.Shuffle {
		q.random = rand.New(rand.NewPCG(uint64(o.Seed), uint64(connection)))
	}
	return q
}

// add adds a job of a request that has just come.
func (q *queue) add(jobs ...job) {
	if q.delayed == nil {
		q.push(jobs...)
		return
	}
	due := time.Now().Add(q.latency)
	for _, j := range jobs {
		j.due = due
		select {
		case q.delayed <- j:
		case <-q.ended:
		}
	}
}

// delay moves jobs to the queue when the latency has passed. All jobs have the same latency, and
// therefore they are due in their order.
func (q *queue) delay() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case j := <-q.delayed:
			if wait := time.Until(j.due); wait > 0 {
				timer.Reset(wait)
				select {
				case <-timer.C:
				case <-q.ended:
					return
				}
			}
			q.push(j)
		case <-q.ended:
			return
		}
	}
}

func (q *queue) push(jobs ...job) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.jobs = append(q.jobs, jobs...)
	if len(jobs) == 1 {
		q.filled.Signal()
	} else {
		q.filled.Broadcast()
	}
}

// pop waits for a job. It returns false when the queue is closed.
func (q *queue) pop() (j job, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.jobs) == 0 && !q.closed {
		q.filled.Wait()
	}
	if q.closed {
		return job{}, false
	}
	i := 0
	if q.random != nil {
		i = q.random.IntN(len(q.jobs))
	}
	j = q.jobs[i]
	q.jobs = slices.Delete(q.jobs, i, i+1)
	return j, true
}

// close ends the queue. Jobs in it are lost.
func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	close(q.ended)
	q.filled.Broadcast()
}
