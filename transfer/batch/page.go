package batch

import (
	"bytes"
	_ "embed"
	"fmt"
	"html/template"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/transfer/report"
)

//go:embed page.html
var pageText string

// PageStart is how each page begins that Report.Write writes.
const PageStart = "<!doctype html>"

// refreshSeconds is how often a browser loads the page of a batch that runs.
const refreshSeconds = 10

// Sizes of the timeline drawing. Unless a comment says otherwise, they are in coordinates of
// the drawing.
const (
	maxNamed  = 400 // jobs; if there are more, the bars have no names
	rowHeight = 16
	barHeight = 12
	timeWidth = 1000 // the page scales the drawing to the screen
	rateBins  = 250
	rateHigh  = 60
)

// page is the data that the template page.html shows.
type page struct {
	Status   report.Status
	Refresh  int // seconds after which a browser loads the page again; 0: never
	Outcome  string
	Summary  string
	When     string
	Running  []pageJob
	Failures []*failure
	Warnings []pageJob
	Timeline *timeline // nil: nothing ran
	Jobs     []pageJob

	byCause map[cause]*failure // the elements of Failures
}

// cause holds the values of a report by which the page groups jobs that failed. Jobs for which all
// these values are equal belong to the same failure.
type cause struct {
	status      report.Status
	exit        int
	error, hint string
}

// failure is a cause, with all jobs that failed for this cause.
type failure struct {
	*JobReport // of the first of these jobs
	Jobs       []link
}

// link is a job in a list that leads to the row of the job in the table.
type link struct {
	Index int
	Name  string
}

// The method failed adds a job to the failure that has the same cause. If there is no such failure
// yet, it adds a new failure with this job.
func (p *page) failed(j *JobReport, index int) {
	c := cause{j.Status, j.Exit, j.Error, j.Hint}
	f := p.byCause[c]
	if f == nil {
		f = &failure{JobReport: j}
		p.byCause[c] = f
		p.Failures = append(p.Failures, f)
	}
	f.Jobs = append(f.Jobs, link{index, j.Name})
}

type pageJob struct {
	*JobReport
	Index                           int
	Labels                          []string
	From, To                        []string // the source and the target, divided where a line may end
	Through                         string   // the host, and how the disk was read there
	Size, Read, Written, Time, Rate string
	BoundBy                         string
	Percent                         int // of a job that runs
	Left                            string
}

// timeline is a drawing: the total rate over time, and below it a bar for each job.
type timeline struct {
	From, To string
	Most     string // the highest rate
	Rate     string // the curve, as the path of an SVG; "": no rates were measured
	Names    []string
	Statuses []report.Status // that the bars have
	Height   int
	Bars     []bar
}

type bar struct {
	Status              report.Status
	X, Y, Width, Height float64
	Title               string
}

// The method page returns the report as one HTML file that has no scripts and refers to no other
// files.
func (r *Report) page() ([]byte, error) {
	t, err := template.New("page").Parse(pageText)
	if err != nil {
		return nil, err
	}
	p := &page{Status: r.Status, Outcome: r.outcome(), Timeline: r.timeline(), byCause: map[cause]*failure{}}
	if r.Status == report.StatusRunning {
		p.Refresh = refreshSeconds
	}
	for i, j := range r.Jobs {
		row := j.row(i)
		p.Jobs = append(p.Jobs, row)
		switch j.Status {
		case report.StatusRunning:
			p.Running = append(p.Running, row)
		case report.StatusOK, report.StatusSkipped:
		case report.StatusPending:
			if j.Error != "" { // an attempt has failed
				p.failed(j, i)
			}
		default:
			p.failed(j, i)
		}
		if len(j.Warnings) > 0 {
			p.Warnings = append(p.Warnings, row)
		}
	}
	// The sums are those of this run. The reports of jobs do not add up to them: a job may have
	// been copied by an earlier run, or in several attempts.
	read, written, retries := r.Totals.BytesRead, r.Totals.BytesWritten, r.Totals.Retries
	took := r.Finished.Sub(r.Started).Seconds()
	p.Summary = fmt.Sprintf("%s read and %s written in %s", bytesize.Format(read), bytesize.Format(written), duration(took))
	switch {
	case p.Refresh > 0:
		p.Summary += fmt.Sprintf(", now %s/s", bytesize.Format(int64(r.Totals.Rate)))
	case took > 0 && read > 0:
		p.Summary += fmt.Sprintf(", %s/s", bytesize.Format(int64(float64(read)/took)))
	}
	switch {
	case retries == 1:
		p.Summary += "; 1 read was tried again"
	case retries > 1:
		p.Summary += fmt.Sprintf("; %d reads were tried again", retries)
	}
	p.When = r.when()
	var text bytes.Buffer
	if err := t.Execute(&text, p); err != nil {
		return nil, err
	}
	return text.Bytes(), nil
}

// The method when returns the lines below the summary.
func (r *Report) when() string {
	text := ""
	if r.JobFile != "" && r.JobFile != "-" {
		text = fmt.Sprintf("Job file %s. ", r.JobFile)
	}
	if r.Status == report.StatusRunning {
		return text + fmt.Sprintf("Running since %s, updated %s. This page loads itself again; if the time of the update stays the same, the batch was killed.", clock(r.Started), clock(r.Updated))
	}
	return text + fmt.Sprintf("From %s to %s. Exit status %d.", clock(r.Started), clock(r.Finished), r.Exit)
}

// The method row returns the row of the table for the job with the given index.
func (j *JobReport) row(index int) pageJob {
	row := pageJob{JobReport: j, Index: index, From: strings.SplitAfter(j.Source, "/"), To: strings.SplitAfter(j.Target, "/"), Through: j.through()}
	for _, key := range slices.Sorted(maps.Keys(j.Labels)) {
		row.Labels = append(row.Labels, key+"="+j.Labels[key])
	}
	if j.Status == report.StatusSkipped || j.Status == report.StatusPending {
		return row
	}
	row.Time = duration(j.Seconds)
	if j.VirtualSize > 0 { // otherwise the disk was never opened
		row.Size, row.Read, row.Written = bytesize.Format(j.VirtualSize), bytesize.Format(j.BytesRead), bytesize.Format(j.BytesWritten)
	}
	if j.Seconds > 0 && j.BytesRead > 0 {
		row.Rate = bytesize.Format(int64(float64(j.BytesRead)/j.Seconds)) + "/s"
	}
	row.BoundBy = j.boundBy()
	if l := j.Live; l != nil {
		row.Rate, row.BoundBy, row.Left = bytesize.Format(int64(l.Rate))+"/s", l.BoundBy, l.TimeLeft()
		if l.Phase == hookBefore || l.Phase == hookAfter {
			row.Rate = ""
		}
		if j.BytesPlanned > 0 {
			row.Percent = int(min(l.BytesDone*100/j.BytesPlanned, 100))
		}
	}
	return row
}

// The method through returns the host of a job's disk, and how the disk was read there, such as
// "esxi1, nfc, 4 connections".
func (j *JobReport) through() string {
	var parts []string
	for _, part := range []string{j.Host, j.Via} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	switch {
	case j.Connections == 1:
		parts = append(parts, "1 connection")
	case j.Connections > 1:
		parts = append(parts, fmt.Sprintf("%d connections", j.Connections))
	}
	return strings.Join(parts, ", ")
}

// The method boundBy returns what the copy has waited for most, with the share of its time, such as
// "source 71%". It is "" if the copy did not wait.
func (j *JobReport) boundBy() string {
	name, longest := "", 0.0
	for _, w := range []struct {
		name    string
		seconds float64
	}{
		{"source", j.Waits.Source}, {"encoders", j.Waits.Encoders}, {"target", j.Waits.Target},
		{"rate limit", j.Waits.RateLimit}, {"host budget", j.Waits.HostBudget},
	} {
		if w.seconds > longest {
			name, longest = w.name, w.seconds
		}
	}
	if name == "" || j.Seconds <= 0 {
		return name
	}
	return fmt.Sprintf("%s %d%%", name, int(min(longest/j.Seconds, 1)*100))
}

// The method outcome returns the sentence at the top of the page.
func (r *Report) outcome() string {
	c := r.Counts
	if c.Done == 1 && len(r.Jobs) == 1 {
		return "The disk is copied"
	}
	if c.Done == len(r.Jobs) && len(r.Jobs) > 0 || len(r.Jobs) == 0 && r.Status != report.StatusRunning {
		return fmt.Sprintf("All %d disks are copied", c.Done)
	}
	text := fmt.Sprintf("%d of %d disks are copied", c.Done, len(r.Jobs))
	if c.Done == 0 && r.Status != report.StatusRunning {
		text = fmt.Sprintf("None of %d disks is copied", len(r.Jobs))
	}
	for _, n := range []struct {
		count int
		what  string
	}{{c.Running, "running"}, {c.Failed, "failed"}, {c.Interrupted, "interrupted"}, {c.Skipped, "not started"}, {c.Pending, "waiting"}} {
		if n.count > 0 {
			text += fmt.Sprintf(", %d %s", n.count, n.what)
		}
	}
	return text
}

func clock(t time.Time) string { return t.Format("2006-01-02 15:04:05 MST") }

func duration(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	if d < 10*time.Second {
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

// The method timeline draws the jobs that ran. The curve is the one that was measured. The reports
// of early versions of vddkcp have no curve. The report of a single copy has none either, and a bar
// alone says nothing, so it has no timeline.
func (r *Report) timeline() *timeline {
	var ran []*JobReport
	for _, j := range r.Jobs {
		if j.Status != report.StatusSkipped && j.Status != report.StatusPending {
			ran = append(ran, j)
		}
	}
	if len(ran) == 0 || r.Curve == nil && len(r.Jobs) == 1 {
		return nil
	}
	slices.SortStableFunc(ran, func(a, b *JobReport) int { return a.Started.Compare(b.Started) })
	from, to := ran[0].Started, ran[0].Finished
	for _, j := range ran {
		if j.Finished.After(to) {
			to = j.Finished
		}
	}
	if r.Curve != nil && r.Finished.After(to) {
		to = r.Finished
	}
	whole := max(to.Sub(from).Seconds(), 1e-3)
	row, high := float64(rowHeight), float64(barHeight)
	if len(ran) > maxNamed {
		row = max(4000/float64(len(ran)), 1)
		high = row * 0.8
	}
	t := &timeline{From: clock(from), To: clock(to), Height: int(row*float64(len(ran))) + 1}
	for i, j := range ran {
		start, end := j.Started.Sub(from).Seconds(), j.Finished.Sub(from).Seconds()
		width := max((end-start)/whole*timeWidth, 1.5)
		t.Bars = append(t.Bars, bar{
			Status: j.Status, X: round(min(start/whole*timeWidth, timeWidth-width)), Y: round(float64(i)*row + (row-high)/2),
			Width: round(width), Height: round(high),
			Title: fmt.Sprintf("%s: %s, %s read in %s", j.Name, j.Status, bytesize.Format(j.BytesRead), duration(end-start)),
		})
		if !slices.Contains(t.Statuses, j.Status) {
			t.Statuses = append(t.Statuses, j.Status)
		}
		if len(ran) <= maxNamed {
			t.Names = append(t.Names, j.Name)
		}
	}
	if r.Curve != nil {
		t.drawRate(r, from, whole)
	}
	return t
}

// The method drawRate draws the curve of a report. The drawing begins at the time from and stands
// for the given number of seconds.
func (t *timeline) drawRate(r *Report, from time.Time, whole float64) {
	bins := make([]float64, rateBins) // bytes read in each interval
	r.Curve.each(r.Started, r.Finished, func(start, end time.Time, bytes float64) {
		spread(bins, start.Sub(from).Seconds()/whole*rateBins, end.Sub(from).Seconds()/whole*rateBins, bytes)
	})
	most := slices.Max(bins)
	t.Most = bytesize.Format(int64(most / (whole / rateBins)))
	var path strings.Builder
	fmt.Fprintf(&path, "M0 %d", rateHigh)
	for i, b := range bins {
		y := float64(rateHigh)
		if most > 0 {
			y = round(rateHigh * (1 - b/most))
		}
		fmt.Fprintf(&path, "L%d %gL%d %g", i*timeWidth/rateBins, y, (i+1)*timeWidth/rateBins, y)
	}
	fmt.Fprintf(&path, "L%d %dZ", timeWidth, rateHigh)
	t.Rate = path.String()
}

// The function spread distributes the given amount over the bins. Each bin gets a share in
// proportion to the part of the bin that lies between start and end. start and end are positions in
// the slice bins, and may have fractions: 1.5 is the middle of bins[1].
func spread(bins []float64, start, end, amount float64) {
	end = max(end, start+1e-6)
	for i := max(int(start), 0); i < len(bins) && float64(i) < end; i++ {
		share := min(float64(i+1), end) - max(float64(i), start)
		bins[i] += amount * share / (end - start)
	}
}

// The function round rounds to one decimal, so that the text of the drawing stays short.
func round(x float64) float64 { return float64(int64(x*10+0.5)) / 10 }
