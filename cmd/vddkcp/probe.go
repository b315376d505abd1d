package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/diskjob"
	"github.com/vddkcp/vddkcp/transfer/job"
)

// The method estimate reads --probe bytes of each disk, and prints how long the batch will
// take, what limits it, and which job ends last. First it measures each disk alone: it
// reads only one disk of an ESXi host at a time, but it reads from different hosts at the
// same time. Then it takes the disks with which the batch begins, and reads several of them
// together: first those of each host, and then those of all hosts.
func (b *batchRun) estimate(ctx context.Context, out io.Writer, all []checked) error {
	var ready []*batch.Job
	bytes := map[*batch.Job]int64{}
	for _, c := range all {
		if c.err == nil {
			ready = append(ready, c.job)
			bytes[c.job] = c.data
		}
	}
	expected, err := b.probeAlone(ctx, ready, bytes)
	if err != nil {
		return err
	}
	e := batch.Estimate(expected, b.file.Limits, b.probeTogether(ctx, expected))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if e.Last == nil {
		_, err := fmt.Fprintln(out, "estimate: no job could be measured")
		return err
	}
	text := fmt.Sprintf("estimate: %s, until %s; %s; %s ends last\n", e.Time.Round(time.Second),
		time.Now().Add(e.Time).Format("2006-01-02 15:04"), e.Binds, printable.Name(e.Last.Name))
	if unknown := len(all) - len(expected); unknown > 0 {
		text += fmt.Sprintf("estimate: %d jobs are not included\n", unknown)
	}
	_, err = io.WriteString(out, text)
	return err
}

// byHost groups jobs by their ESXi host. A host comes before another one if its first job
// comes before the first job of the other host.
func byHost(jobs []*batch.Job) (groups [][]*batch.Job) {
	at := map[string]int{}
	for _, j := range jobs {
		i, ok := at[j.HostKey()]
		if !ok {
			i = len(groups)
			at[j.HostKey()] = i
			groups = append(groups, nil)
		}
		groups[i] = append(groups[i], j)
	}
	return groups
}

// probeAlone measures each disk while no other disk of its host is read.
func (b *batchRun) probeAlone(ctx context.Context, jobs []*batch.Job, bytes map[*batch.Job]int64) (expected []batch.Expected, err error) {
	var mu sync.Mutex // guards known
	known := map[*batch.Job]batch.Expected{}
	var group errgroup.Group
	group.SetLimit(b.file.Limits.Total)
	for _, host := range byHost(jobs) {
		group.Go(func() error {
			for _, j := range host {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				e, err := b.probeOne(ctx, j, bytes[j])
				if err != nil {
					b.log.Warn("the disk cannot be measured", "job", j.Name, "error", err)
					continue
				}
				mu.Lock()
				known[j] = e
				mu.Unlock()
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	for _, j := range jobs {
		if e, ok := known[j]; ok {
			expected = append(expected, e)
		}
	}
	return expected, nil
}

func (b *batchRun) probeOne(ctx context.Context, j *batch.Job, bytes int64) (batch.Expected, error) {
	c := b.command(j)
	e := batch.Expected{
		Job: j, Size: diskjob.Size(j), Bytes: bytes, Fixed: c.Connections > 0 || c.chosen.nfc,
		Buffers: cmp.Or(c.NFCBuffers.Size, 1<<20) * int64(cmp.Or(c.NFCBuffers.Count, 4)),
	}
	if bytes == 0 {
		return e, nil
	}
	m := new(probeMeter)
	var err error
	if e.Connections, err = b.probe(ctx, j, 0, m); err != nil {
		return e, err
	}
	if e.Rate, _ = m.rate(); e.Rate == 0 {
		return e, errors.New("the rate of the disk is unknown, because the read took no measurable time")
	}
	if c.RateLimit > 0 {
		e.Rate = min(e.Rate, float64(c.RateLimit))
	}
	return e, nil
}

// probeTogether measures how fast the disks with which the batch begins can be read at
// the same time: first the disks of each host that has several, and then the disks of
// all hosts.
func (b *batchRun) probeTogether(ctx context.Context, expected []batch.Expected) batch.Reached {
	reached := batch.Reached{ByHost: map[string]float64{}}
	size := int64(*b.Probe)
	var opening []*batch.Job
	rates := map[*batch.Job]float64{} // measured alone
	for _, e := range batch.Opening(expected, b.file.Limits) {
		if e.Bytes >= 3*size { // data that was read before may be in a cache, so other data is read now
			opening = append(opening, e.Job)
			rates[e.Job] = e.Rate
		}
	}
	hosts := byHost(opening)
	for _, jobs := range hosts {
		if len(jobs) > 1 {
			reached.ByHost[jobs[0].HostKey()] = b.probeSum(ctx, jobs, size, rates)
		}
	}
	if len(hosts) > 1 {
		reached.All = b.probeSum(ctx, opening, 2*size, rates)
	}
	return reached
}

// slowedFraction decides whether disks slow each other down. They do if the rate at which
// they are read together is less than this fraction of the sum of the rates at which they
// are read alone. A smaller difference may be noise.
const slowedFraction = 0.8

// minMeasurement is the minimum duration of a measurement of several disks. The result of a
// shorter measurement is not used.
const minMeasurement = 20 * time.Millisecond

// probeSum reads the disks of several jobs at the same time. It returns the rate that these
// jobs reach together, in bytes per second. It returns 0 if this rate could not be
// measured. It also returns 0 if this rate is not clearly less than the sum of the rates
// that the jobs reach alone.
func (b *batchRun) probeSum(ctx context.Context, jobs []*batch.Job, skip int64, rates map[*batch.Job]float64) float64 {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	var group errgroup.Group
	m, sum := new(probeMeter), 0.0
	for _, j := range jobs {
		sum += rates[j]
		group.Go(func() error {
			defer stop() // the measurement ends when the first disk has ended
			_, err := b.probe(reading, j, skip, m)
			if reading.Err() != nil {
				return nil
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		b.log.Warn("disks cannot be measured together", "error", err)
		return 0
	}
	if rate, took := m.rate(); took >= minMeasurement && rate < slowedFraction*sum {
		return rate
	}
	return 0
}

// The method probe skips the given number of bytes at the start of the data of a source,
// and reads the next --probe bytes of data. It returns the number of connections that the
// source had after the last read.
func (b *batchRun) probe(ctx context.Context, t *batch.Job, skip int64, m *probeMeter) (connections int, err error) {
	spec := b.spec(t)
	spec.Log = b.log.With("job", t.Name)
	src, err := job.OpenSource(ctx, spec)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	extents, err := someData(ctx, src, skip, int64(*b.Probe))
	if err != nil {
		return 0, err
	}
	group, reading := errgroup.WithContext(ctx)
	group.SetLimit(transfer.Requests(spec.Depth, src))
	m.begin()
	request := int64(spec.RequestSize)
	for _, e := range extents {
		for off := e.Off; off < e.End(); off += request {
			n := min(request, e.End()-off)
			group.Go(func() error {
				if reading.Err() != nil {
					return context.Cause(reading)
				}
				// The rate limit of the batch also applies to the measurement.
				if err := b.limit.Wait(ctx, int(n)); err != nil {
					return err
				}
				_, err := src.ReadAt(make([]byte, n), off)
				if err != nil && !errors.Is(err, io.EOF) {
					return err
				}
				m.add(n)
				return nil
			})
		}
	}
	if err := group.Wait(); err != nil {
		return 0, fmt.Errorf("probe %s: %w", spec.Source, err)
	}
	m.end()
	if s, ok := source.Ability[source.Counted](src); ok {
		connections = s.Stats().Connections
	}
	return connections, nil
}

// someData returns extents of a disk that hold data. It leaves out the given number of
// bytes at the start of the data. The returned extents have at most limit bytes in
// total.
func someData(ctx context.Context, src source.Disk, skip, limit int64) (data []source.Extent, err error) {
	for e, err := range src.Extents(ctx, 0, src.Size()) {
		if err != nil {
			return nil, err
		}
		if e.Kind != source.Data {
			continue
		}
		over := min(skip, e.Len)
		skip -= over
		e.Off, e.Len = e.Off+over, min(e.Len-over, limit)
		if e.Len > 0 {
			data = append(data, e)
		}
		if limit -= e.Len; limit == 0 {
			break
		}
	}
	return data, nil
}

// probeMeter measures how fast several disks are read together. The measurement begins when
// reading the last of them begins. It ends as soon as one of them has been read. A
// probeMeter is safe for concurrent use.
type probeMeter struct {
	mu          sync.Mutex // guards the other fields
	from, until time.Time
	reads       []probeRead
}

type probeRead struct {
	at time.Time
	n  int64
}

func (m *probeMeter) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.until.IsZero() {
		m.from = time.Now()
	}
}

func (m *probeMeter) add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reads = append(m.reads, probeRead{time.Now(), n})
}

func (m *probeMeter) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.until.IsZero() {
		m.until = time.Now()
	}
}

// The method rate returns the rate in bytes per second, or 0 if it is unknown, and the
// duration over which the rate was measured. If there were at least 16 reads, only the
// second half of the measurement counts, because connections are opened and queues are
// filled in the first half.
func (m *probeMeter) rate() (rate float64, over time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	from := m.from
	if len(m.reads) >= 16 {
		from = from.Add(m.until.Sub(from) / 2)
	}
	sum := int64(0)
	for _, r := range m.reads {
		if r.at.After(from) && !r.at.After(m.until) {
			sum += r.n
		}
	}
	if over = m.until.Sub(from); over > 0 {
		rate = float64(sum) / over.Seconds()
	}
	return rate, over
}
