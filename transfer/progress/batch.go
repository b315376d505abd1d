package progress

import (
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
	out Output

	mu      sync.Mutex // guards the fields below
	screen  screen
	title   string
	jobs    int    // in the batch
	phase   string // of the copy of a VM; "" while its disks are copied
	running []*shownJob
	ended   map[string]int // number of jobs by how they ended, such as "done"
	waiting int            // number of jobs that are tried again at the time retry
	retry   time.Time
	bytes   Snapshot // sums for the jobs that have ended
	recent  recent
	line    time.Time // when style Lines printed its last line
	closed  bool      // End was called
	closing string    // the text of End
}

// shownJob is a running job of a batch, as a BatchDisplay shows it.
type shownJob struct {
	name     string
	counters *Counters
	recent   recent
	line     Line // for style JSON, without the counts
}

// NewBatchDisplay returns a display for a batch with the given number of jobs.
func NewBatchDisplay(out Output, jobs int) *BatchDisplay {
	return &BatchDisplay{out: out, screen: screen{out: out.To}, title: "batch", jobs: jobs, ended: map[string]int{}}
}

// End makes Run end with the given line instead of a summary, or with no line if the text is "".
// The styles None and JSON do not show the line.
func (d *BatchDisplay) End(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed, d.closing = true, text
}

// Reads returns how many reads of sources are in progress or wait for the rate limit, and of how
// many copies.
func (d *BatchDisplay) Reads() (reads, copies int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, j := range d.running {
		if n := j.counters.Snapshot().Reads; n > 0 {
			reads, copies = reads+n, copies+1
		}
	}
	return reads, copies
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
	if d.out.Style == JSON {
		line := phaseLine{Type: "progress", Time: time.Now(), VM: vm, Phase: phase}
		if percent >= 0 {
			line.Percent = &percent
		}
		writeJSON(d.out.To, line)
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
		if d.out.Style == JSON {
			j.writeJSON(d.out.To, time.Now())
		}
		i := slices.Index(d.running, j)
		d.running = slices.Delete(d.running, i, i+1)
		s := c.Snapshot()
		s.Planned = s.Done // a failed job does not do the rest
		d.bytes.Add(s)
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
	d.out.Style.keepDrawing(done, d.draw)
}

// Write writes p above the lines that the display has drawn. p must consist of whole lines.
// Control characters are replaced by visible escapes.
func (d *BatchDisplay) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.screen.write(p)
}

// The method draw shows the present state.
func (d *BatchDisplay) draw(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if last {
		d.phase = ""
	}
	now := time.Now()
	total := d.bytes
	for _, j := range d.running {
		total.Add(j.counters.Snapshot())
	}
	// The rate is that of the bytes that the lines name, and so without checks that read targets
	// back.
	p := d.recent.add(now, Snapshot{Done: total.Read + total.Cloned})
	switch {
	case d.out.Style == JSON:
		for _, j := range d.running {
			j.writeJSON(d.out.To, now)
		}
	case last:
		d.screen.draw(nil)
		switch {
		case d.closing != "":
			d.out.printLine(d.closing)
		case !d.closed && len(d.ended) > 0: // else no job began
			d.out.printLine(d.title + ": " + d.summary(total, p))
		}
	case d.out.Style == Bar:
		columns, rows := d.out.size()
		lines := []string{d.status(total, p, columns)}
		most := max(rows-2, 1) // one line is for the batch, and one for the cursor
		for i, j := range d.running {
			if i+1 == most && len(d.running) > most {
				lines = append(lines, fmt.Sprintf("  and %d more", len(d.running)-i))
				break
			}
			lines = append(lines, j.describe(now, columns))
		}
		d.screen.draw(fit(lines, columns, max(rows, 3)))
	case now.Sub(d.line) >= 10*time.Second:
		d.line = now
		d.out.printLine(d.title + ": " + d.summary(total, p))
	}
}

// The method status returns the line about the whole batch for a terminal. The bar in this line
// shows the share of the jobs that is done. It cannot show the share of the bytes, because the
// sizes of jobs that have not begun are not known. The caller holds d.mu.
func (d *BatchDisplay) status(s Snapshot, p pace, columns int) string {
	share := 0.0
	for _, n := range d.ended {
		share += float64(n)
	}
	for _, j := range d.running {
		share += j.counters.Snapshot().share()
	}
	share /= float64(max(d.jobs, 1))
	rate := bytesize.Format(int64(p.rate)) + "/s"
	if columns < wideEnough {
		return fmt.Sprintf("%s %s; %s", percent(share), rate, d.counts())
	}
	return fmt.Sprintf("%s %s %s; %s, %s", percent(share), drawBar(share, barColumns), d.counts(), bytesize.Format(s.Read+s.Cloned), rate)
}

// barColumns is the length of the bars of a BatchDisplay.
const barColumns = 20

// The method share returns how large a part of the planned bytes is done, as a number from 0 to 1.
func (s Snapshot) share() float64 {
	if s.Planned <= 0 {
		return 0
	}
	return min(float64(s.Done)/float64(s.Planned), 1)
}

// The method summary returns a text about all jobs together, without a bar. The caller holds d.mu.
func (d *BatchDisplay) summary(s Snapshot, p pace) string {
	var b strings.Builder
	// The text shows how many bytes were read or cloned. It does not show the number of done
	// bytes (s.Done), because that number also counts checks that read targets back.
	fmt.Fprintf(&b, "%s; %s copied", d.counts(), bytesize.Format(s.Read+s.Cloned))
	if s.Skipped > 0 {
		fmt.Fprintf(&b, ", %s of holes skipped", bytesize.Format(s.Skipped))
	}
	if p.rate > 0 {
		fmt.Fprintf(&b, ", %s/s", bytesize.Format(int64(p.rate)))
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
	writeLine(out, j.line, s, j.recent.add(now, s))
}

// describe returns the line of a job for a terminal. It says what limits the job if there is room.
func (j *shownJob) describe(now time.Time, columns int) string {
	s := j.counters.Snapshot()
	p := j.recent.add(now, s)
	line := fmt.Sprintf("%s %s/s", percent(s.share()), bytesize.Format(int64(p.rate)))
	if columns >= wideEnough {
		line = fmt.Sprintf("%s %s %-6s %s/s", percent(s.share()), drawBar(s.share(), barColumns), s.Phase, bytesize.Format(int64(p.rate)))
		if eta := left(s, p); eta != "" && s.Phase == Copy {
			line += " " + eta
		}
	}
	line += "  " + printable.Name(j.name)
	limit, _, _ := strings.Cut(p.bound, ",") // without the connections
	for _, bound := range []string{p.bound, limit} {
		if bound = "  (" + bound + ")"; p.bound != "" && utf8.RuneCountInString(line+bound) < columns {
			return line + bound
		}
	}
	return line
}
