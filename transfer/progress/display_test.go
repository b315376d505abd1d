package progress_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// show runs a display while do updates the counters, and returns what was drawn. The
// clock is that of a synctest bubble.
func show(t *testing.T, style progress.Style, do func(*progress.Counters, *progress.Display)) string {
	var out bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		c := new(progress.Counters)
		d := progress.NewDisplay(style, &out, "disk", c)
		done, ended := make(chan struct{}), make(chan struct{})
		go func() {
			d.Run(done)
			close(ended)
		}()
		do(c, d)
		close(done)
		<-ended
	})
	return out.String()
}

// copyFor simulates a copy of 1 MiB per second, with a Finish phase of 5 seconds.
func copyFor(seconds int) func(*progress.Counters, *progress.Display) {
	return func(c *progress.Counters, _ *progress.Display) {
		time.Sleep(1500 * time.Millisecond)
		c.AddPlanned(int64(seconds) << 20)
		c.AddSkipped(5 << 20)
		c.Enter(progress.Copy)
		for range seconds {
			time.Sleep(time.Second)
			c.AddDone(1 << 20)
		}
		c.Enter(progress.Finish)
		time.Sleep(5 * time.Second)
	}
}

func TestJSONMovesEachSecondInEveryPhase(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(show(t, progress.JSON, copyFor(30))), "\n")
	var last progress.Line
	phases := map[string]int{}
	for i, text := range lines {
		var line progress.Line
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("line %d: %v: %s", i, err, text)
		}
		if i > 0 && line.Time.Sub(last.Time) > time.Second {
			t.Errorf("line %d comes %s after the one before", i, line.Time.Sub(last.Time))
		}
		if line.BytesDone < last.BytesDone || line.Type != "progress" || line.Disk != "disk" {
			t.Errorf("line %d: %s after %+v", i, text, last)
		}
		phases[line.Phase]++
		if i == 20 && (line.Rate != 1<<20 || line.ETASeconds == nil || *line.ETASeconds < 10 || *line.ETASeconds > 13) {
			t.Errorf("line %d: rate and time left: %s", i, text)
		}
		last = line
	}
	if phases["plan"] < 2 || phases["copy"] < 29 || phases["finish"] < 5 {
		t.Errorf("lines by phase: %v", phases)
	}
	if last.BytesDone != 30<<20 || last.BytesPlanned != 30<<20 || last.BytesSkipped != 5<<20 {
		t.Errorf("last line %+v", last)
	}
}

func TestLinesComeEveryTenSeconds(t *testing.T) {
	out := show(t, progress.Lines, copyFor(30))
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) < 4 || len(lines) > 6 {
		t.Errorf("%d lines:\n%s", len(lines), out)
	}
	if want := "copy: 8.0 MiB of 30.0 MiB done (26%), 5.0 MiB of holes skipped, 819.2 KiB/s, 27s left"; lines[0] != want {
		t.Errorf("first line %q, want %q", lines[0], want)
	}
	if got := lines[len(lines)-1]; !strings.HasPrefix(got, "finish: 30.0 MiB of 30.0 MiB done (100%)") {
		t.Errorf("last line %q", got)
	}
}

// TestNothingIsShownOfAFailedPlan checks that nothing is shown for a copy that fails
// before it begins.
func TestNothingIsShownOfAFailedPlan(t *testing.T) {
	for _, style := range []progress.Style{progress.None, progress.Lines} {
		if out := show(t, style, func(*progress.Counters, *progress.Display) { time.Sleep(time.Second) }); out != "" {
			t.Errorf("style %d: %q", style, out)
		}
	}
}

func TestBarAndMessagesShareNoLine(t *testing.T) {
	out := show(t, progress.Bar, func(c *progress.Counters, d *progress.Display) {
		c.AddPlanned(10 << 20)
		c.Enter(progress.Copy)
		c.AddDone(5 << 20)
		time.Sleep(time.Second)
		if _, err := d.Write([]byte("vddkcp: warning: look\n")); err != nil {
			t.Error(err)
		}
		c.AddDone(5 << 20)
		c.Enter(progress.Finish)
		time.Sleep(time.Second)
	})
	for _, want := range []string{"50%", "100%", "finish"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	// The line is cleared before the message, with spaces and a carriage return.
	if before, _, _ := strings.Cut(out, "vddkcp: warning"); !strings.HasSuffix(before, "\r") {
		t.Errorf("the message shares a line with the bar: %q", out)
	}
	if !strings.HasSuffix(out, "\n") {
		t.Errorf("the last line is not ended: %q", out)
	}
}

// lockedBuffer is a buffer for concurrent use.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestPause checks that a paused display draws nothing, and shows the output that was
// written meanwhile when it is resumed.
func TestPause(t *testing.T) {
	for _, style := range []progress.Style{progress.Bar, progress.Lines, progress.JSON} {
		var out lockedBuffer
		synctest.Test(t, func(t *testing.T) {
			c := new(progress.Counters)
			d := progress.NewDisplay(style, &out, "disk", c)
			done, ended := make(chan struct{}), make(chan struct{})
			go func() {
				d.Run(done)
				close(ended)
			}()
			time.Sleep(15 * time.Second)
			c.Enter(progress.Copy)
			resume := d.Pause()
			before := len(out.String())
			if _, err := d.Write([]byte("a message\n")); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Minute)
			if len(out.String()) != before {
				t.Errorf("style %d: while paused: %q", style, out.String()[before:min(len(out.String()), before+200)])
			}
			resume()
			if got := out.String()[before:]; got != "a message\n" {
				t.Errorf("style %d: after it: %q", style, got)
			}
			time.Sleep(15 * time.Second)
			if len(out.String()) == before+len("a message\n") {
				t.Errorf("style %d: nothing is drawn again", style)
			}
			close(done)
			<-ended
		})
	}
}

// TestExaminationIsShown checks that the share of the disk is shown while its extents
// are queried.
func TestExaminationIsShown(t *testing.T) {
	out := show(t, progress.Lines, func(c *progress.Counters, _ *progress.Display) {
		c.Examined(4<<40, 16<<40)
		time.Sleep(11 * time.Second)
	})
	if want := "plan: 4.0 TiB of 16.0 TiB examined (25%)\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
}
