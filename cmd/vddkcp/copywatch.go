package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/transfer/metrics"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The type copyWatch sums up the disks that the command copy or vm copies, for its metrics and for
// the service manager. It is safe for concurrent use.
type copyWatch struct {
	command string
	metrics string // path of the file of --metrics; "": none
	begun   time.Time

	mu       sync.Mutex // guards the fields below
	counters []*progress.Counters
	retries  int64
	at       time.Time // when read was counted
	read     int64
	rate     float64 // bytes per second, until the time at
}

// rateWindow is the shortest time over which a copyWatch computes a rate.
const rateWindow = 5 * time.Second

func newCopyWatch(command, metrics string) *copyWatch {
	now := time.Now()
	return &copyWatch{command: command, metrics: metrics, begun: now, at: now}
}

// The method add adds a disk whose copy begins.
func (c *copyWatch) add(counters *progress.Counters) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counters = append(c.counters, counters)
}

// The method addRetries adds the retries of a copy that has ended. r may be nil.
func (c *copyWatch) addRetries(r *report.Report) {
	if r != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.retries += r.Retries
	}
}

// The method sum returns the sums over all disks, and the present rate.
func (c *copyWatch) sum() (sum progress.Snapshot, rate float64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, counters := range c.counters {
		s := counters.Snapshot()
		sum.Phase = s.Phase
		sum.Add(s)
	}
	if elapsed := time.Since(c.at); elapsed >= rateWindow {
		c.rate = float64(max(sum.Read-c.read, 0)) / elapsed.Seconds()
		c.at, c.read = time.Now(), sum.Read
	}
	return sum, c.rate
}

// The method status returns a line about the copies for the service manager.
func (c *copyWatch) status() string {
	s, rate := c.sum()
	c.mu.Lock()
	disks := len(c.counters)
	c.mu.Unlock()
	text := "begins"
	switch {
	case disks > 1:
		text = plural(disks, "disk", "disks")
	case disks == 1:
		text = s.Phase.String()
	}
	if s.Planned > 0 {
		text += fmt.Sprintf(" %d%%", s.Done*100/s.Planned)
	}
	return fmt.Sprintf("%s, %s/s", text, bytesize.Format(int64(rate)))
}

// The method watch writes metrics and tells the service manager what the copies do, until the
// caller calls the result, the function end, with the error of the command. The function end
// returns an error if the metrics cannot be written at the end. Messages go through the display;
// the watchdog is not fed while the display is stuck.
func (c *copyWatch) watch(ctx context.Context, log *slog.Logger, service *service, display io.Writer) (end func(error) error) {
	ending := make(chan struct{})
	var all sync.WaitGroup
	if c.metrics != "" && mayRewrite(c.metrics, metrics.Start) {
		all.Go(func() {
			repeat(ending, reportInterval, warnOnce(log, metricsLater, func() error { return c.write(nil, false) }))
		})
	}
	served := service.begin(ctx, log, func() string {
		_, _ = display.Write(nil)
		return c.status()
	})
	return func(err error) error {
		served()
		close(ending)
		all.Wait()
		if c.metrics == "" {
			return nil
		}
		return c.write(err, true)
	}
}

// The method write writes the metrics. err is the error of the command if it has ended.
func (c *copyWatch) write(err error, ended bool) error {
	s, rate := c.sum()
	now := time.Now()
	m := &metrics.Status{
		Command: c.command, Name: metricsName(c.metrics), Started: c.begun, Updated: now,
		Read: s.Read, Written: s.Written, Zeroed: s.Zeroed, Cloned: s.Cloned,
		Rate: rate, Connections: s.Connections, Waits: report.WaitsOf(s.Waits),
	}
	c.mu.Lock()
	m.Retries = c.retries
	c.mu.Unlock()
	if ended {
		m.Finished, m.Exit, m.Rate, m.Connections = now, report.Of(err).Exit, 0, 0
	}
	return m.Write(c.metrics)
}
