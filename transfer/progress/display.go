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

// Style is how progress is shown.
type Style int

// The styles of --progress.
const (
	None  Style = iota
	Bar         // one line, drawn again and again: for a terminal
	Lines       // a line every ten seconds: for a log
	JSON        // an object a line, each second: for a program
)

// Display shows Counters while a copy runs, and is the one writer of the
// stream that it draws on: what others write goes through it, so that a bar
// and a message never share a line. It is safe for concurrent use.
type Display struct {
	style    Style
	disk     string
	counters *Counters

	mu    sync.Mutex // guards what follows
	out   io.Writer
	bar   *progressbar.ProgressBar
	meter meter
	total int64     // planned bytes when the bar was made
	line  time.Time // of the last of Lines
	phase Phase

	paused int
	held   []byte // written while it was paused
}

// NewDisplay returns a Display of the copy of a disk, drawing on out.
func NewDisplay(style Style, out io.Writer, disk string, c *Counters) *Display {
	return &Display{style: style, out: out, disk: disk, counters: c}
}

// Run shows progress until done is closed, and then once more.
func (d *Display) Run(done <-chan struct{}) {
	if d.style != None {
		d.line = time.Now()
		d.draw(false)
	}
	d.style.keepDrawing(done, d.draw)
}

// keepDrawing draws now and then until done is closed, and then for the last
// time.
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

// Write writes whole lines between those of the display, with escapes in place
// of all that could steer a terminal.
func (d *Display) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 && len(d.held) < maxHeld {
		d.held = append(d.held, p...)
		return len(p), nil
	}
	if d.bar != nil {
		// The bar is drawn again at its next tick; an error of the terminal
		// shows in the write below.
		_ = d.bar.Clear()
	}
	_, err := d.out.Write(printable.Bytes(p))
	return len(p), err
}

// maxHeld is how many bytes of output a paused Display keeps.
const maxHeld = 1 << 20

// Pause takes what is drawn off the terminal, for a question or for other text,
// until resume is called. What others write meanwhile is shown then.
func (d *Display) Pause() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused++
	if d.bar != nil {
		_ = d.bar.Clear() // as in Write
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

// Line is what --progress json prints, by docs/cli.md, "JSON". Sizes are bytes.
type Line struct {
	Type         string    `json:"type"`
	Time         time.Time `json:"time"`
	Job          string    `json:"job,omitempty"` // in a batch
	Phase        string    `json:"phase"`
	Disk         string    `json:"disk"`
	BytesDone    int64     `json:"bytes_done"`
	BytesPlanned int64     `json:"bytes_planned"`
	BytesSkipped int64     `json:"bytes_skipped"`
	Rate         float64   `json:"rate"`        // bytes a second, of the last ten seconds
	ETASeconds   *float64  `json:"eta_seconds"` // null: not known
}

// draw shows the present state. Errors of the stream are not the copy's: a
// terminal that went away must not end it.
func (d *Display) draw(last bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.paused > 0 {
		return
	}
	now, s := time.Now(), d.counters.Snapshot()
	rate := d.meter.add(now, s.Done)
	eta := timeLeft(s, rate)
	switch d.style {
	case JSON:
		writeJSON(d.out, now, "", d.disk, s, rate)
	case Lines:
		if last && s.Phase == Plan {
			return // it failed before there was anything to tell
		}
		if last || now.Sub(d.line) >= 10*time.Second || s.Phase != d.phase && s.Phase == Finish {
			d.line, d.phase = now, s.Phase
			_, _ = io.WriteString(d.out, describe(s, rate, eta))
		}
	case Bar:
		d.drawBar(s, last)
	}
}

// longestETA is the longest remaining time that is shown, in seconds. A copy that
// needs over three years makes no progress, and a time.Duration cannot hold 293
// years.
const longestETA = 1e8

// timeLeft is in seconds, or nil where it is not known.
func timeLeft(s Snapshot, rate float64) *float64 {
	if rate <= 0 || s.Planned < s.Done {
		return nil
	}
	seconds := float64(s.Planned-s.Done) / rate
	return &seconds
}

func writeJSON(out io.Writer, now time.Time, job, disk string, s Snapshot, rate float64) {
	text, err := json.Marshal(Line{"progress", now, job, s.Phase.String(), disk, s.Done, s.Planned, s.Skipped, rate, timeLeft(s, rate)})
	if err == nil {
		_, _ = out.Write(append(printable.Bytes(text), '\n'))
	}
}

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

// examination says how far a plan is.
func (s Snapshot) examination() string {
	return fmt.Sprintf("%s: %s of %s examined (%d%%)", s.Phase, bytesize.Format(s.Examined), bytesize.Format(s.Size), int(100*float64(s.Examined)/float64(s.Size)))
}

func (d *Display) drawBar(s Snapshot, last bool) {
	total := s.Planned
	if total == 0 {
		total = -1 // a spinner, until it is known
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
			// A goroutine of the bar's would draw a spinner between our messages,
			// and over a prompt.
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
