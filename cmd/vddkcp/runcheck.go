package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"vddkcp/internal/bytesize"
	sinkopen "vddkcp/sink/open"
	"vddkcp/source"
	"vddkcp/transfer/batch"
	"vddkcp/transfer/progress"
)

// checked is what --check found out of a job.
type checked struct {
	job         *batch.Job
	size, data  int64 // bytes
	need        int64 // bytes that the target takes
	fileSystem  uint64
	transport   string
	connections int
	rate        float64 // bytes a second, of --probe; 0: not known
	err         error
}

// check looks at every job without copying, and prints what it found.
func (b *batchRun) check(ctx context.Context, jobs []*batch.Job) error {
	total := b.file.Limits.Total
	if total == 0 {
		total = batch.DefaultTotal
	}
	all := make([]checked, len(jobs))
	var group errgroup.Group
	group.SetLimit(total)
	for i, j := range jobs {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			all[i] = b.checkJob(ctx, j)
			return nil
		})
	}
	_ = group.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	out := standardOutput(ctx)
	bad, wrong, err := printChecked(out, all)
	if err != nil {
		return err
	}
	full, err := b.printSpace(out, all)
	if err != nil {
		return err
	}
	if b.Probe != nil {
		if err := b.printEstimate(out, all); err != nil {
			return err
		}
	}
	if bad+full == 0 {
		return nil
	}
	e := &batchError{exit: exitFailed, message: fmt.Sprintf("%d of %d jobs are not ready", bad, len(all))}
	if full > 0 {
		e.message += fmt.Sprintf(", and %d file systems have too little space", full)
	}
	if wrong > 0 {
		e.exit, e.hint = exitUsage, "the job file is wrong where a parameter is"
	}
	return e
}

func (b *batchRun) checkJob(ctx context.Context, t *batch.Job) checked {
	c := *t.Data.(*copyCommand)
	c.DryRun = true
	if b.Resume && sinkopen.PlaceOf(c.Dst).Kind == "file" {
		c.Resume = true
	}
	j := c.newJob(b.log.With("job", t.Name), new(progress.Counters))
	j.stdout = io.Discard
	j.opener.VDDK.Options.Budget = b.budget(t)
	r := checked{job: t}
	r.err = j.do(ctx)
	r.size, r.data, r.need = j.report.VirtualSize, j.need, j.need
	r.transport, r.connections = j.report.Transport, j.report.Connections
	if sinkopen.PlaceOf(c.Dst).Kind != "file" {
		r.need = 0
	} else if c.Preallocation != "off" {
		r.need = r.size
	}
	var st unix.Stat_t
	if r.need > 0 && unix.Stat(filepath.Dir(c.Dst), &st) == nil {
		r.fileSystem = st.Dev
	}
	if r.err == nil && b.Probe != nil {
		r.rate, r.err = b.probe(ctx, &c, t)
	}
	return r
}

// printChecked prints a line for each job. Bad are those that are not ready,
// wrong those of them where the job file is at fault.
func printChecked(out io.Writer, all []checked) (bad, wrong int, err error) {
	table := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "JOB\tSIZE\tTO COPY\tTARGET\tREADY")
	for _, c := range all {
		ready := "yes"
		if c.err != nil {
			bad++
			if exitStatus(c.err) == exitUsage {
				wrong++
			}
			ready = "no: " + c.err.Error()
			if h := hint(c.err); h != "" {
				ready += " (" + h + ")"
			}
		}
		// A tab or a line's end in a name would be another cell.
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", printable(c.job.Name), bytesize.Format(c.size), bytesize.Format(c.data), printable(c.job.Target), printable(ready))
	}
	return bad, wrong, table.Flush()
}

// printSpace prints what the targets take on each file system, and returns how
// many are too small for theirs together.
func (b *batchRun) printSpace(out io.Writer, all []checked) (full int, err error) {
	type fileSystem struct {
		id   uint64
		path string
		need int64
		jobs int
	}
	var systems []*fileSystem
	find := func(id uint64, path string) *fileSystem {
		for _, s := range systems {
			if s.id == id {
				return s
			}
		}
		s := &fileSystem{id: id, path: path}
		systems = append(systems, s)
		return s
	}
	for _, c := range all {
		if c.need > 0 && c.fileSystem != 0 {
			s := find(c.fileSystem, filepath.Dir(c.job.Target))
			s.need += c.need
			s.jobs++
		}
	}
	for _, s := range systems {
		var st unix.Statfs_t
		if err := unix.Statfs(s.path, &st); err != nil {
			return full, fmt.Errorf("%s: %w", s.path, err)
		}
		free := int64(st.Bavail) * st.Frsize
		verdict := "enough"
		if s.need > free {
			verdict = "too little"
			full++
		}
		if _, err := fmt.Fprintf(out, "space at %s: %d jobs take up to %s, %s are free: %s\n", printable(s.path), s.jobs, bytesize.Format(s.need), bytesize.Format(free), verdict); err != nil {
			return full, err
		}
	}
	return full, nil
}

// probe reads the first --probe bytes of data of a source, and returns how many
// bytes a second came.
func (b *batchRun) probe(ctx context.Context, c *copyCommand, t *batch.Job) (float64, error) {
	j := c.newJob(b.log.With("job", t.Name), new(progress.Counters))
	j.opener.VDDK.Options.Budget = b.budget(t)
	src, err := j.opener.Open(ctx, c.Src, c.SourceFormat)
	if err != nil {
		return 0, err
	}
	defer src.Close()
	rest := int64(*b.Probe)
	begun := time.Now()
	group, reading := errgroup.WithContext(ctx)
	group.SetLimit(requests(j.Depth, src))
	read := int64(0)
	extents, err := firstData(ctx, src, rest)
	if err != nil {
		return 0, err
	}
	request := int64(c.RequestSize)
	for _, e := range extents {
		for off := e.Off; off < e.End(); off += request {
			n := min(request, e.End()-off)
			read += n
			group.Go(func() error {
				if reading.Err() != nil {
					return nil
				}
				// A probe takes no more than its share.
				if err := b.limit.Wait(ctx, int(n)); err != nil {
					return err
				}
				_, err := src.ReadAt(make([]byte, n), off)
				if errors.Is(err, io.EOF) {
					err = nil
				}
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		return 0, fmt.Errorf("probe %s: %w", c.Src, err)
	}
	if read == 0 {
		return 0, nil
	}
	return float64(read) / time.Since(begun).Seconds(), nil
}

// firstData are the first extents of a disk that hold data, of so many bytes at
// most.
func firstData(ctx context.Context, src source.Disk, most int64) (data []source.Extent, err error) {
	for e, err := range src.Extents(ctx, 0, src.Size()) {
		if err != nil {
			return nil, err
		}
		if e.Kind != source.Data {
			continue
		}
		e.Len = min(e.Len, most)
		data = append(data, e)
		if most -= e.Len; most == 0 {
			break
		}
	}
	return data, nil
}

// printEstimate says how long the batch will take, what binds it, and which job
// ends last.
func (b *batchRun) printEstimate(out io.Writer, all []checked) error {
	var jobs []batch.Expected
	unknown := 0
	for _, c := range all {
		if c.err != nil || c.rate <= 0 && c.data > 0 {
			unknown++
			continue
		}
		e := batch.Expected{Job: c.job}
		if c.data > 0 {
			e.Bytes, e.Rate = c.data, c.rate
		}
		if limit := c.job.Data.(*copyCommand).RateLimit; limit > 0 {
			e.Rate = min(e.Rate, float64(limit))
		}
		jobs = append(jobs, e)
	}
	e := batch.Estimate(jobs, b.file.Limits)
	if e.Last == nil {
		_, err := fmt.Fprintln(out, "estimate: nothing is known of any job")
		return err
	}
	text := fmt.Sprintf("estimate: %s, until %s; %s; %s ends last\n", e.Time.Round(time.Second),
		time.Now().Add(e.Time).Format("2006-01-02 15:04"), e.Binds, printable(e.Last.Name))
	if unknown > 0 {
		text += fmt.Sprintf("estimate: %d jobs are not in it\n", unknown)
	}
	_, err := io.WriteString(out, text)
	return err
}
