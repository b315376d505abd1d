package batch

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// sampleInterval is how often a Monitor reads the counters of the jobs that run. sampleWindow is
// the number of such readings over which it computes rates, so a rate is the mean of 10 s.
const (
	sampleInterval = 2 * time.Second
	sampleWindow   = 5
)

// notEnded is the exit status of a batch or a job in the report of a batch that has not ended.
const notEnded = -1

// Monitor collects the state of a batch while it runs. Run passes one to Options.Watch. A Monitor
// is safe for concurrent use.
type Monitor struct {
	begun time.Time
	jobs  []*Job

	mu      sync.Mutex // guards the fields below
	ended   map[*Job]*JobReport
	counts  Counts // without Running and Pending
	again   map[*Job]*JobReport
	running map[*Job]*live
	totals  Totals // of the attempts that have ended
	pace    pace   // of all jobs together
	curve   sampler
}

// live is an attempt at a job that runs.
type live struct {
	job      *Job
	attempt  int
	begun    time.Time
	counters progress.Counters

	way  report.Way // guarded by Monitor.mu
	pace pace       // guarded by Monitor.mu
	hook string     // "before" or "after" while this command runs; guarded by Monitor.mu
}

// Totals are sums over the jobs that a run of a batch has copied. Bytes are counted from the
// beginning of the run. Bytes that earlier runs copied do not count.
type Totals struct {
	BytesRead    int64        `json:"bytes_read"`
	BytesWritten int64        `json:"bytes_written"`
	BytesZero    int64        `json:"bytes_zero"`
	BytesCloned  int64        `json:"bytes_cloned"`
	Rate         float64      `json:"rate"`        // bytes read per second
	Connections  int          `json:"connections"` // that are open now
	Retries      int64        `json:"retries"`     // of attempts that have ended
	Waits        report.Waits `json:"waits"`       // in seconds
}

func newMonitor(jobs []*Job) *Monitor {
	m := &Monitor{
		begun: time.Now(), jobs: jobs, ended: make(map[*Job]*JobReport, len(jobs)),
		again: map[*Job]*JobReport{}, running: map[*Job]*live{},
	}
	m.pace.add(m.begun, 0, progress.Waits{})
	return m
}

// The method doneBefore records a job that an earlier run has done.
func (m *Monitor) doneBefore(j *Job, r *JobReport) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended[j] = r
	m.counts.add(r.Status)
}

// The method start records that an attempt at a job begins. The first attempt has the number 1.
func (m *Monitor) start(j *Job, number int) *live {
	m.mu.Lock()
	defer m.mu.Unlock()
	l := &live{job: j, attempt: number, begun: time.Now()}
	l.pace.add(l.begun, 0, progress.Waits{})
	delete(m.again, j)
	m.running[j] = l
	return l
}

func (m *Monitor) setWay(l *live, w report.Way) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.way = w
}

// The method setHook records that a command of the job runs: "before" or "after". "" says that the
// command has ended.
func (m *Monitor) setHook(l *live, kind string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	l.hook = kind
}

// The method end records that an attempt has ended. again says that the job will be tried again.
func (m *Monitor) end(l *live, r *JobReport, again bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.running, l.job)
	m.totals.add(l.counters.Snapshot())
	m.totals.Retries += r.Retries
	if again {
		m.again[l.job] = r
		return
	}
	m.ended[l.job] = r
	m.counts.add(r.Status)
}

// The method add adds what a copy has counted. Connections are not added, because only those of
// running copies are open.
func (t *Totals) add(s progress.Snapshot) {
	t.BytesRead += s.Read
	t.BytesWritten += s.Written
	t.BytesZero += s.Zeroed
	t.BytesCloned += s.Cloned
	t.Waits.Add(report.WaitsOf(s.Waits))
}

// The method sum returns the totals with those of the jobs that run. The caller holds m.mu.
func (m *Monitor) sum() Totals {
	t := m.totals
	for _, l := range m.running {
		s := l.counters.Snapshot()
		t.add(s)
		t.Connections += s.Connections
	}
	return t
}

// The method keepSampling reads the counters regularly until the channel done is closed.
func (m *Monitor) keepSampling(done <-chan struct{}) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.sample(time.Now())
		case <-done:
			return
		}
	}
}

func (m *Monitor) sample(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range m.running {
		s := l.counters.Snapshot()
		l.pace.add(now, s.Done, s.Waits)
	}
	read := m.sum().BytesRead
	m.pace.add(now, read, progress.Waits{})
	m.curve.add(now.Sub(m.begun), read)
}

// Report returns the report of the batch as it is now, with the status running. It has all jobs.
// It takes time in proportion to the number of jobs of the batch.
func (m *Monitor) Report() *Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.head()
	r.Jobs = make([]*JobReport, 0, len(m.jobs))
	for _, j := range m.jobs {
		switch ended, l := m.ended[j], m.running[j]; {
		case l != nil:
			r.Jobs = append(r.Jobs, l.report(r.Updated))
		case ended != nil:
			r.Jobs = append(r.Jobs, ended)
		default:
			r.Jobs = append(r.Jobs, m.pending(j, r.Updated))
		}
	}
	return r
}

// Now is like Report, but the result has only the jobs that run, in the order in which they
// began. It is cheap for batches of any size.
func (m *Monitor) Now() *Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.head()
	r.Jobs = []*JobReport{}
	for _, l := range slices.SortedFunc(maps.Values(m.running), func(a, b *live) int { return a.begun.Compare(b.begun) }) {
		r.Jobs = append(r.Jobs, l.report(r.Updated))
	}
	return r
}

// The method head returns the report without the jobs. The caller holds m.mu.
func (m *Monitor) head() *Report {
	now := time.Now()
	r := &Report{Version: 1, Status: report.StatusRunning, Exit: notEnded, Started: m.begun, Finished: now, Updated: now, Counts: m.counts, Totals: m.sum()}
	r.Counts.Running = len(m.running)
	r.Counts.Pending = len(m.jobs) - len(m.ended) - len(m.running)
	r.Totals.Rate = m.pace.rate()
	r.Curve = m.curve.curve(now.Sub(m.begun), r.Totals.BytesRead)
	return r
}

// The method complete fills in the fields of the report of a batch that ends now, except the list
// of jobs and the fields that depend on it.
func (m *Monitor) complete(r *Report) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.head()
	r.Finished, r.Updated, r.Totals, r.Curve = h.Finished, h.Updated, h.Totals, h.Curve
	r.Totals.Rate = 0
	if took := r.Finished.Sub(r.Started).Seconds(); took > 0 {
		r.Totals.Rate = float64(r.Totals.BytesRead) / took
	}
}

// The method pending returns the report of a job that waits. The caller holds m.mu.
func (m *Monitor) pending(j *Job, now time.Time) *JobReport {
	t := report.New(j.Source, j.Target)
	p := &JobReport{Name: j.Name, Host: j.Host, Labels: j.Labels(), Report: t}
	t.Status, t.Exit, t.Started, t.Finished = report.StatusPending, notEnded, now, now
	if failed := m.again[j]; failed != nil {
		p.Attempts = failed.Attempts
		t.Error, t.Hint = fmt.Sprintf("will be tried again; attempt %d failed: %s", failed.Attempts, failed.Error), failed.Hint
	}
	return p
}

// Live is what a report says about a job only while the job runs.
type Live struct {
	Phase      string   `json:"phase"` // as in the lines of --progress json, or the hook that runs: before or after
	BytesDone  int64    `json:"bytes_done"`
	Rate       float64  `json:"rate"`        // bytes per second, mean of the last ten seconds
	ETASeconds *float64 `json:"eta_seconds"` // nil: not known
	// BoundBy is what the copy has waited for most in the last ten seconds, such as "source". It is
	// "" if the copy did not wait.
	BoundBy string `json:"bound_by"`
}

// TimeLeft returns the estimated time until the copy is complete, or "" if it is not known.
func (l *Live) TimeLeft() string {
	if l.ETASeconds == nil || *l.ETASeconds > progress.LongestETA {
		return ""
	}
	return (time.Duration(*l.ETASeconds) * time.Second).String()
}

// Stage returns a text for people that says what a job does if it does not copy, such as "verify"
// or "after command".
func (l *Live) Stage() string {
	switch l.Phase {
	case progress.Copy.String():
		return ""
	case hookBefore, hookAfter:
		return l.Phase + " command"
	}
	return l.Phase
}

// The method report returns the report of a job that runs. The caller holds Monitor.mu.
func (l *live) report(now time.Time) *JobReport {
	s := l.counters.Snapshot()
	t := report.New(l.job.Source, l.job.Target)
	t.Count(s)
	t.Status, t.Exit, t.Way, t.Connections, t.VirtualSize = report.StatusRunning, notEnded, l.way, s.Connections, s.Size
	t.Started, t.Finished, t.Seconds = l.begun, now, now.Sub(l.begun).Seconds()
	state := &Live{Phase: s.Phase.String(), BytesDone: s.Done, Rate: l.pace.rate(), BoundBy: l.pace.boundBy()}
	if left := s.Planned - s.Done; state.Rate > 0 && left >= 0 {
		seconds := float64(left) / state.Rate
		state.ETASeconds = &seconds
	}
	if l.hook != "" {
		// The rate and the waits are those of the copy, which has not begun or has ended.
		state = &Live{Phase: l.hook, BytesDone: s.Done}
	}
	return &JobReport{Name: l.job.Name, Host: l.job.Host, Labels: l.job.Labels(), Attempts: l.attempt, Live: state, Report: t}
}

// pace computes a rate, and what bounds it, from the last sampleWindow readings of counters.
type pace struct {
	points []pacePoint // at most sampleWindow+1
}

type pacePoint struct {
	at    time.Time
	bytes int64
	waits progress.Waits
}

func (p *pace) add(at time.Time, bytes int64, waits progress.Waits) {
	if len(p.points) > sampleWindow {
		p.points = slices.Delete(p.points, 0, 1)
	}
	p.points = append(p.points, pacePoint{at, bytes, waits})
}

// The method rate returns the rate in bytes per second. It is 0 while a copy repeats work, because
// its counter stays the same then.
func (p *pace) rate() float64 {
	first, last := p.points[0], p.points[len(p.points)-1]
	if elapsed := last.at.Sub(first.at).Seconds(); elapsed > 0 {
		return float64(last.bytes-first.bytes) / elapsed
	}
	return 0
}

func (p *pace) boundBy() string {
	first, last := p.points[0], p.points[len(p.points)-1]
	if longest, ok := last.waits.Since(first.waits).Longest(); ok {
		return longest.String()
	}
	return ""
}
