package progress

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
)

// Style says how progress is shown.
type Style int

// These are the styles of the flag --progress.
const (
	None  Style = iota // nothing
	Bar                // one line that is drawn again five times a second, for a terminal
	Lines              // a line every ten seconds, for a log
	JSON               // a line with a JSON object every second, for a program
)

// Display shows the Counters of a copy while it runs. All other output to the same
// stream must go through Write, so that a bar and a message never share a line. A
// Display is safe for concurrent use.
type Display struct {
	style    Style
	disk     string
	counters *Counters

	mu    sync.Mutex // guards the fields below
	out   io.Writer
	bar   *progressbar.ProgressBar
	meter meter
	total int64     // planned bytes when the bar was made; -1: not known
	line  time.Time // when style Lines printed its last line
	phase Phase     // in that line

	paused int    // number of pauses that have not been resumed
	held   []byte // output that was written during a pause
}

// NewDisplay returns a Display that shows the counters c and writes to out. The parameter disk is
// the name of the disk in JSON output.
func NewDisplay(style Style, out io.Writer, disk string, c *Counters) *Display {
	return &Display{style: style, out: out, disk: disk, counters: c}
}

// Run shows the progress until the channel done is closed. Then it shows the progress once more and
// returns.
func (d *Display) Run(done <-chan struct{}) {
	if d.style != None {
		d.line = time.Now()
		d.draw(false)
	}
	d.style.keepDrawing(done, d.draw)
}

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
	if d.bar != nil {
		// Errors of Clear can be ignored. If the terminal has failed, the call of d.out.Write
		// below fails too, and its error is returned. The bar need not be drawn again here,
		// because the method Run does that soon.
		_ = d.bar.Clear()
	}
	_, err := d.out.Write(printable.Bytes(p))
	return len(p), err
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
	if d.bar != nil {
		_ = d.bar.Clear() // an error of the terminal must not end the copy
	}
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.paused--; d.paused == 0 && len(d.held) > 0 {
			_, _ = d.out.Write(printable.Bytes(d.held))
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

// The method draw shows the present state. It ignores write errors, because a copy must go on when
// its terminal was closed.
func (d *Display) draw(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 {
		return
	}
	now, s := time.Now(), d.counters.Snapshot()
	rate := d.meter.add(now, s.Moved())
	eta := timeLeft(s, rate)
	switch d.style {
	case JSON:
		writeLine(d.out, Line{Type: "progress", Time: now, Disk: d.disk}, s, rate)
	case Lines:
		if last && s.Phase == Plan {
			return // the copy failed before it began
		}
		if last || now.Sub(d.line) >= 10*time.Second || s.Phase != d.phase && s.Phase == Finish {
			d.line, d.phase = now, s.Phase
			_, _ = io.WriteString(d.out, describe(s, rate, eta))
		}
	case Bar:
		d.drawBar(s, last)
	}
}

// longestETA is the longest remaining time that is shown, in seconds: over three years. A copy
// with a longer time makes no progress. An upper limit is needed because a time.Duration cannot
// hold more than 292 years.
const longestETA = 1e8

// timeLeft estimates the remaining time of a copy, in seconds. If that is not possible, it
// returns nil.
func timeLeft(s Snapshot, rate float64) *float64 {
	if rate <= 0 || s.Planned < s.Done {
		return nil
	}
	seconds := float64(s.Planned-s.Done) / rate
	return &seconds
}

// writeLine completes a Line with the counts of a copy, and writes it.
func writeLine(out io.Writer, line Line, s Snapshot, rate float64) {
	line.Phase, line.BytesDone, line.BytesPlanned, line.BytesSkipped = s.Phase.String(), s.Done, s.Planned, s.Skipped
	line.Rate, line.ETASeconds = rate, timeLeft(s, rate)
	writeJSON(out, line)
}

// writeJSON writes a line of JSON. It ignores write errors, because a copy must go on when its output
// was closed.
func writeJSON(out io.Writer, line any) {
	text, err := json.Marshal(line)
	if err == nil {
		_, _ = out.Write(append(printable.Bytes(text), '\n'))
	}
}

// describe returns the line that style Lines prints.
func describe(s Snapshot, rate float64, eta *float64) string {
	var b bytes.Buffer
	if s.Phase == Plan && s.Size > 0 {
		return s.examination() + "\n"
	}
	fmt.Fprintf(&b, "%s: %s of %s done", s.Phase, bytesize.Format(s.Done), bytesize.Format(s.Planned))
	if s.Planned > 0 {
		fmt.Fprintf(&b, " (%d%%)", s.Done*100/s.Planned)
	}
	if s.Skipped > 0 {
		fmt.Fprintf(&b, ", %s of holes skipped", bytesize.Format(s.Skipped))
	}
	if rate > 0 {
		fmt.Fprintf(&b, ", %s/s", bytesize.Format(int64(rate)))
	}
	if eta != nil && *eta > 0 && *eta < longestETA {
		fmt.Fprintf(&b, ", %s left", (time.Duration(*eta) * time.Second).String())
	}
	return b.String() + "\n"
}

// examination returns a text that says for how much of the disk the extents are known.
func (s Snapshot) examination() string {
	return fmt.Sprintf("%s: %s of %s examined (%d%%)", s.Phase, bytesize.Format(s.Examined), bytesize.Format(s.Size), int(100*float64(s.Examined)/float64(s.Size)))
}

// drawBar draws the progress bar of style Bar. The caller holds mu.
func (d *Display) drawBar(s Snapshot, last bool) {
	total := s.Planned
	if total == 0 {
		total = -1 // a spinner is drawn until the total is known
	}
	if d.bar == nil || d.total != total {
		if d.bar != nil {
			_ = d.bar.Clear()
		}
		d.total = total
		d.bar = progressbar.NewOptions64(total,
			progressbar.OptionSetWriter(d.out),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionFullWidth(),
			progressbar.OptionSetPredictTime(true),
			progressbar.OptionThrottle(0),
			// The interval is the time after which a goroutine of package progressbar draws the
			// bar again with the next image of its spinner. That goroutine would also draw over
			// messages and over a question to the user. With the interval 0 there is no such
			// goroutine.
			progressbar.OptionSetSpinnerChangeInterval(0),
		)
	}
	if last && s.Phase == Plan {
		_ = d.bar.Clear()
		return
	}
	if s.Phase == Plan && s.Size > 0 {
		d.bar.Describe(s.examination())
	} else {
		d.bar.Describe(fmt.Sprintf("%-6s", s.Phase))
	}
	_ = d.bar.Set64(s.Done)
	if last {
		_ = d.bar.Exit()
		_, _ = io.WriteString(d.out, "\n")
		d.bar = nil
	}
}
