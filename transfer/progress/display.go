package progress

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
)

// Style says how progress is shown.
type Style int

// These are the styles of the flag --progress.
const (
	None  Style = iota // nothing
	Bar                // lines that are drawn again five times a second, for a terminal
	Lines              // a line every ten seconds, for a log
	JSON               // a line with a JSON object every second, for a program
)

// Display shows the Counters of a copy while it runs. All other output to the same
// stream must go through Write, so that a bar and a message never share a line. A
// Display is safe for concurrent use.
type Display struct {
	out      Output
	disk     string
	counters *Counters

	mu     sync.Mutex // guards the fields below
	screen screen
	recent recent
	begun  time.Time
	line   time.Time // when style Lines printed its last line

	ended   bool   // End was called
	closing string // the text of End

	paused int    // number of pauses that have not been resumed
	held   []byte // output that was written during a pause
}

// NewDisplay returns a Display that shows the counters c. The parameter disk is the name of the
// disk in JSON output.
func NewDisplay(out Output, disk string, c *Counters) *Display {
	return &Display{out: out, disk: disk, counters: c, screen: screen{out: out.To}}
}

// Run shows the progress until the channel done is closed. Then it shows the text of End, or the
// progress once more, and returns.
func (d *Display) Run(done <-chan struct{}) {
	d.mu.Lock()
	d.begun = time.Now()
	d.line = d.begun
	d.mu.Unlock()
	if d.out.Style != None {
		d.draw(false)
	}
	d.out.Style.keepDrawing(done, d.draw)
}

// End makes Run end with the given line instead of the progress, or with no line if the text is "".
// The styles None and JSON do not show the line.
func (d *Display) End(text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended, d.closing = true, text
}

// Reads returns how many reads of the source are in progress or wait for the rate limit, and of how
// many copies.
func (d *Display) Reads() (reads, copies int) { return d.counters.Snapshot().Reads, 1 }

// keepDrawing calls the function draw at intervals that depend on the style until the channel done
// is closed. Then it calls draw once more, with the argument true.
func (s Style) keepDrawing(done <-chan struct{}, draw func(last bool)) {
	if s == None {
		<-done
		return
	}
	every := time.Second
	if s == Bar {
		every = 200 * time.Millisecond
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			draw(false)
		case <-done:
			draw(true)
			return
		}
	}
}

// Write writes p to the stream of the display, so that p does not share a line with the bar. p
// must consist of whole lines. Control characters are replaced by visible escapes.
func (d *Display) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 && len(d.held) < maxHeld {
		d.held = append(d.held, p...)
		return len(p), nil
	}
	return d.screen.write(p)
}

// maxHeld is how many bytes of output a paused Display holds back until the pause ends. Once it
// holds so many bytes, it writes all further output immediately.
const maxHeld = 1 << 20

// Pause clears the display, so that the caller can use the terminal, for example for a question.
// The caller ends the pause by calling the result, the function resume. Output that is passed to
// Write during the pause appears when the pause ends.
func (d *Display) Pause() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused++
	d.screen.draw(nil)
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.paused--; d.paused == 0 && len(d.held) > 0 {
			_, _ = d.screen.write(d.held)
			d.held = nil
		}
	}
}

// Line is one line of the output of --progress json. The section "JSON" of docs/cli.md
// describes it. Sizes are in bytes.
type Line struct {
	Type         string    `json:"type"`
	Time         time.Time `json:"time"`
	Job          string    `json:"job,omitempty"`    // in a batch
	VM           string    `json:"vm,omitempty"`     // in the copy of a VM
	Number       int       `json:"number,omitempty"` // of the disk, in the copy of a VM
	Round        int       `json:"round,omitempty"`  // in the copy of a VM
	Phase        string    `json:"phase"`
	Disk         string    `json:"disk"`
	BytesDone    int64     `json:"bytes_done"`
	BytesPlanned int64     `json:"bytes_planned"`
	BytesSkipped int64     `json:"bytes_skipped"`
	Rate         float64   `json:"rate"`        // bytes per second, mean of the last ten seconds
	ETASeconds   *float64  `json:"eta_seconds"` // nil: not known
}

// The method draw shows the present state.
func (d *Display) draw(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 {
		return
	}
	now, s := time.Now(), d.counters.Snapshot()
	p := d.recent.add(now, s)
	switch {
	case d.out.Style == JSON:
		writeLine(d.out.To, Line{Type: "progress", Time: now, Disk: d.disk}, s, p)
	case last:
		d.screen.draw(nil)
		switch {
		case d.closing != "":
			d.out.printLine(d.closing)
		case !d.ended && s.Phase != Plan: // else the copy failed before it began
			d.out.printLine(describe(s, pace{rate: p.rate}))
		}
	case d.out.Style == Bar:
		columns, rows := d.out.size()
		d.screen.draw(fit(bar(s, p, now.Sub(d.begun), columns), columns, rows))
	case now.Sub(d.line) >= 10*time.Second:
		d.line = now
		d.out.printLine(describe(s, p))
	}
}

// bar returns the lines of style Bar.
func bar(s Snapshot, p pace, elapsed time.Duration, columns int) []string {
	switch {
	case s.Phase == Plan && s.Size > 0:
		return []string{s.examination(), short(elapsed) + " elapsed"}
	case s.Phase == Plan:
		return []string{"plan, " + short(elapsed) + " elapsed"}
	}
	amount := bytesize.Format(s.Done)
	first := fmt.Sprintf("%-6s %s", s.Phase, amount)
	if s.Planned > 0 {
		amount += " of " + bytesize.Format(s.Planned)
		first = fmt.Sprintf("%-6s %s %s", s.Phase, percent(s.share()), amount)
		if columns >= wideEnough {
			// The amount has a fixed width, so that the bar does not change its length.
			const width = len("1023.9 MiB of 1023.9 MiB")
			first = fmt.Sprintf("%-6s %s %s %s", s.Phase, percent(s.share()), drawBar(s.share(), columns-width-len("verify 100% [] ")-1), amount)
		}
	}
	second := fmt.Sprintf("%s/s, %s elapsed", bytesize.Format(int64(p.rate)), short(elapsed))
	if eta := left(s, p); eta != "" {
		second += fmt.Sprintf(", %s left", eta)
	}
	lines := []string{first, second}
	if p.bound != "" {
		lines = append(lines, "bound by: "+p.bound)
	}
	return lines
}

// writeLine completes a Line with the counts of a copy, and writes it.
func writeLine(out io.Writer, line Line, s Snapshot, p pace) {
	line.Phase, line.BytesDone, line.BytesPlanned, line.BytesSkipped = s.Phase.String(), s.Done, s.Planned, s.Skipped
	line.Rate, line.ETASeconds = p.rate, timeLeft(s, p)
	writeJSON(out, line)
}

// writeJSON writes a line of JSON. It ignores write errors, because a copy must go on when its
// output was closed.
func writeJSON(out io.Writer, line any) {
	text, err := json.Marshal(line)
	if err == nil {
		_, _ = out.Write(append(printable.Bytes(text), '\n'))
	}
}

// describe returns the text of a line of style Lines.
func describe(s Snapshot, p pace) string {
	var b strings.Builder
	if s.Phase == Plan && s.Size > 0 {
		return s.examination()
	}
	fmt.Fprintf(&b, "%s: %s", s.Phase, bytesize.Format(s.Done))
	if s.Planned > 0 {
		fmt.Fprintf(&b, " of %s done (%d%%)", bytesize.Format(s.Planned), int(s.share()*100))
	} else {
		b.WriteString(" done")
	}
	if s.Skipped > 0 {
		fmt.Fprintf(&b, ", %s of holes skipped", bytesize.Format(s.Skipped))
	}
	if p.rate > 0 {
		fmt.Fprintf(&b, ", %s/s", bytesize.Format(int64(p.rate)))
	}
	if eta := left(s, p); eta != "" {
		fmt.Fprintf(&b, ", %s left", eta)
	}
	if p.bound != "" {
		fmt.Fprintf(&b, "; bound by: %s", p.bound)
	}
	return b.String()
}

// examination returns a text that says for how much of the disk the extents are known.
func (s Snapshot) examination() string {
	return fmt.Sprintf("%s: %s of %s examined (%d%%)", s.Phase, bytesize.Format(s.Examined), bytesize.Format(s.Size), int(100*float64(s.Examined)/float64(s.Size)))
}
