package progress

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
)

// BatchDisplay shows the progress of a batch of copies. Style Bar draws a line for the batch
// and one for each running copy. Style Lines prints only lines for the batch, and style JSON
// only lines for the running copies. All other output to the same stream must go through Write.
// A BatchDisplay is safe for concurrent use.
type BatchDisplay struct {
	style Style
	size  func() (columns, rows int)

	mu      sync.Mutex // guards the fields below
	out     io.Writer
	title   string
	jobs    int    // in the batch
	phase   string // of the copy of a VM; "" while its disks are copied
	running []*shownJob
	ended   map[string]int // number of jobs by how they ended, such as "done"
	waiting int            // number of jobs that are tried again at the time retry
	retry   time.Time
	bytes   Snapshot // sums for the jobs that have ended
	meter   meter
	shown   []string  // lines on the terminal, which the next draw replaces
	line    time.Time // when style Lines printed its last line
}

// shownJob is a running job of a batch, as a BatchDisplay shows it.
type shownJob struct {
	name     string
	counters *Counters
	meter    meter
	line     Line // for style JSON, without the counts
}

// NewBatchDisplay returns a display for a batch with the given number of jobs. It writes to
// out. The function size returns the size of the terminal. If out is not a terminal, the
// function is nil.
func NewBatchDisplay(style Style, out io.Writer, jobs int, size func() (columns, rows int)) *BatchDisplay {
	if size == nil {
		size = func() (int, int) { return 80, 24 }
	}
	return &BatchDisplay{style: style, out: out, title: "batch", jobs: jobs, size: size, ended: map[string]int{}}
}

// ShowVM makes the display one of the copy of a VM with the given number of disks. StartDisk adds
// them.
func (d *BatchDisplay) ShowVM(name string, disks int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.title, d.jobs = printable.Name(name), disks
}

// Phase shows what the copy of a VM does at the moment. The percentage is that of a task of the
// server; it is -1 if it is not known.
func (d *BatchDisplay) Phase(vm, phase string, percent int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.phase = phase; percent >= 0 {
		d.phase = fmt.Sprintf("%s %d%%", phase, percent)
	}
	if phase == Copy.String() {
		d.phase = ""
	}
	if d.style == JSON {
		line := phaseLine{Type: "progress", Time: time.Now(), VM: vm, Phase: phase}
		if percent >= 0 {
			line.Percent = &percent
		}
		writeJSON(d.out, line)
	}
}

// phaseLine is a line of the output of --progress json, about a task of the server.
type phaseLine struct {
	Type    string    `json:"type"`
	Time    time.Time `json:"time"`
	VM      string    `json:"vm"`
	Phase   string    `json:"phase"`
	Percent *int      `json:"percent,omitempty"`
}

// Start adds a running job to the display. The caller calls the result, the function done, when the
// job has ended.
func (d *BatchDisplay) Start(name, disk string, c *Counters) (done func()) {
	return d.start(&shownJob{name: name, counters: c, line: Line{Job: name, Disk: disk}})
}

// StartDisk is like Start, for a disk of a VM. The parameter number is the number of the disk.
func (d *BatchDisplay) StartDisk(vm string, number int, disk string, c *Counters) (done func()) {
	return d.start(&shownJob{name: disk, counters: c, line: Line{VM: vm, Number: number, Round: 1, Disk: disk}})
}

func (d *BatchDisplay) start(j *shownJob) (done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := j.counters
	d.running = append(d.running, j)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.style == JSON {
			j.writeJSON(d.out, time.Now())
		}
		i := slices.Index(d.running, j)
		d.running = slices.Delete(d.running, i, i+1)
		s := c.Snapshot()
		s.Planned = s.Done // a failed job does not do the rest
		d.bytes.add(s)
	}
}

// Ended counts a job that has ended. outcome is "done", "failed" or "interrupted".
func (d *BatchDisplay) Ended(outcome string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended[outcome]++
}

// Waiting shows that the given number of jobs will be tried again after the duration wait. When
// this time is over, the caller calls the result, the function done.
func (d *BatchDisplay) Waiting(jobs int, wait time.Duration) (done func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.waiting, d.retry = jobs, time.Now().Add(wait)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.waiting = 0
	}
}

// Run shows the progress until the channel done is closed.
func (d *BatchDisplay) Run(done <-chan struct{}) {
	d.mu.Lock()
	d.line = time.Now()
	d.mu.Unlock()
	d.style.keepDrawing(done, d.draw)
}

// Write writes p above the lines that the display has drawn. p must consist of whole lines.
// Control characters are replaced by visible escapes.
func (d *BatchDisplay) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.shown) == 0 {
		_, err := d.out.Write(printable.Bytes(p))
		return len(p), err
	}
	// A single write to the terminal draws the new lines over the old ones, without clearing
	// them first, so that nothing flickers.
	above := bytes.ReplaceAll(printable.Bytes(p), []byte("\n"), []byte("\x1b[K\n"))
	if _, err := io.WriteString(d.out, d.back()+string(above)+inLines(d.shown)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// The method back returns the escape sequence that moves the cursor to the first line that the
// display has drawn. The caller holds d.mu.
func (d *BatchDisplay) back() string {
	if len(d.shown) == 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\r", len(d.shown))
}

// inLines returns a text that draws the given lines over those on the terminal. It makes the
// terminal cut long lines instead of wrapping them, because only the terminal knows the width
// of all characters.
func inLines(lines []string) string {
	var b strings.Builder
	b.WriteString("\x1b[?7l")
	for _, line := range lines {
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[?7h\x1b[J")
	return b.String()
}

// The method draw shows the present state. It ignores write errors, because a batch must go on when
// its terminal was closed.
func (d *BatchDisplay) draw(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if last {
		d.phase = ""
	}
	now := time.Now()
	total := d.bytes
	for _, j := range d.running {
		total.add(j.counters.Snapshot())
	}
	rate := d.meter.add(now, total.Moved())
	switch d.style {
	case JSON:
		for _, j := range d.running {
			j.writeJSON(d.out, now)
		}
	case Lines:
		if last && len(d.ended) == 0 {
			return // no job began
		}
		if last || now.Sub(d.line) >= 10*time.Second {
			d.line = now
			_, _ = io.WriteString(d.out, d.title+": "+d.summary(total, rate)+"\n")
		}
	case Bar:
		var lines []string
		columns, rows := d.size()
		switch {
		case !last:
			lines = append(lines, cut(d.status(total, rate, columns), columns))
			fit := max(rows-2, 1) // one line is for the batch, and one for the cursor
			for i, j := range d.running {
				if i+1 == fit && len(d.running) > fit {
					lines = append(lines, fmt.Sprintf("  and %d more", len(d.running)-i))
					break
				}
				lines = append(lines, cut(j.describe(now, columns), columns))
			}
		case len(d.ended) > 0:
			lines = append(lines, cut(d.title+": "+d.summary(total, rate), columns))
		}
		_, _ = io.WriteString(d.out, d.back()+inLines(lines))
		d.shown = lines
		if last {
			d.shown = nil
		}
	}
}

// The method status returns the line about the whole batch for a terminal. The bar in this line
// shows the share of the jobs that is done. It cannot show the share of the bytes, because the
// sizes of jobs that have not begun are not known. The caller holds d.mu.
func (d *BatchDisplay) status(s Snapshot, rate float64, columns int) string {
	share := 0.0
	for _, n := range d.ended {
		share += float64(n)
	}
	for _, j := range d.running {
		share += j.counters.Snapshot().share()
	}
	share /= float64(max(d.jobs, 1))
	counts := fmt.Sprintf("%s; %s, %s/s", d.counts(), bytesize.Format(s.Done), bytesize.Format(int64(rate)))
	if columns < wideEnough {
		return fmt.Sprintf("%3d%% %s", int(share*100), counts)
	}
	return drawBar(share) + " " + counts
}

// drawBar returns a percentage followed by a bar of 20 columns.
func drawBar(share float64) string {
	share = min(max(share, 0), 1)
	full := int(share * 20)
	return fmt.Sprintf("%3d%% [%s%s]", int(share*100), strings.Repeat("#", full), strings.Repeat(".", 20-full))
}

// The method add adds the counts of one more copy to the sums in s. It adds only the counts whose
// sums a BatchDisplay shows.
func (s *Snapshot) add(copied Snapshot) {
	s.Planned += copied.Planned
	s.Done += copied.Done
	s.Free += copied.Free
	s.Skipped += copied.Skipped
	s.Read += copied.Read
	s.Cloned += copied.Cloned
}

// The method share returns how large a part of the planned bytes is done, as a number from 0 to 1.
func (s Snapshot) share() float64 {
	if s.Planned <= 0 {
		return 0
	}
	return min(float64(s.Done)/float64(s.Planned), 1)
}

// The method summary returns a text about all jobs together, without a bar. The caller holds d.mu.
func (d *BatchDisplay) summary(s Snapshot, rate float64) string {
	var b strings.Builder
	// The text shows how many bytes were read or cloned. It does not show the number of done
	// bytes (s.Done), because that number also counts checks that read targets back.
	fmt.Fprintf(&b, "%s; %s copied", d.counts(), bytesize.Format(s.Read+s.Cloned))
	if s.Skipped > 0 {
		fmt.Fprintf(&b, ", %s of holes skipped", bytesize.Format(s.Skipped))
	}
	if rate > 0 {
		fmt.Fprintf(&b, ", %s/s", bytesize.Format(int64(rate)))
	}
	return b.String()
}

// counts returns a text that says how many jobs are in each state. The caller holds d.mu.
func (d *BatchDisplay) counts() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d of %d done", d.ended["done"], d.jobs)
	for _, how := range []string{"failed", "interrupted"} {
		if n := d.ended[how]; n > 0 {
			fmt.Fprintf(&b, ", %d %s", n, how)
		}
	}
	if n := len(d.running); n > 0 {
		fmt.Fprintf(&b, ", %d running", n)
	}
	if d.phase != "" {
		fmt.Fprintf(&b, ", %s", d.phase)
	}
	if d.waiting > 0 {
		fmt.Fprintf(&b, ", %d tried again in %v", d.waiting, max(time.Until(d.retry), 0).Round(time.Second))
	}
	return b.String()
}

// writeJSON writes the progress of a job as a Line.
func (j *shownJob) writeJSON(out io.Writer, now time.Time) {
	s := j.counters.Snapshot()
	j.line.Type, j.line.Time = "progress", now
	writeLine(out, j.line, s, j.meter.add(now, s.Moved()))
}

// wideEnough is the smallest number of columns for which a BatchDisplay draws bars.
const wideEnough = 70

// describe returns the line of a job for a terminal.
func (j *shownJob) describe(now time.Time, columns int) string {
	s := j.counters.Snapshot()
	// On a terminal, describe is called five times a second. The meter of the job computes the
	// rate from the last ten calls, so the rate is the mean of only the last two seconds.
	rate := j.meter.add(now, s.Moved())
	if columns < wideEnough {
		return fmt.Sprintf("%3d%% %s/s  %s", int(s.share()*100), bytesize.Format(int64(rate)), printable.Name(j.name))
	}
	line := fmt.Sprintf("%s %-6s %s/s", drawBar(s.share()), s.Phase, bytesize.Format(int64(rate)))
	if eta := timeLeft(s, rate); eta != nil && *eta < longestETA && s.Phase == Copy {
		line += " " + (time.Duration(*eta) * time.Second).String()
	}
	return line + "  " + printable.Name(j.name)
}

// The function cut shortens s so that it fits on one line of a terminal with the given number of
// columns.
func cut(s string, columns int) string {
	if columns < 1 || utf8.RuneCountInString(s) < columns {
		return s
	}
	return string([]rune(s)[:columns-1])
}
