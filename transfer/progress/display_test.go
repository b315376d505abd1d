package progress_test

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// show runs a display while do updates the counters, and returns what was drawn. The
// clock is that of a synctest bubble.
func show(t *testing.T, style progress.Style, do func(*progress.Counters, *progress.Display)) string {
	var out bytes.Buffer
	synctest.Test(t, func(t *testing.T) {
		c := new(progress.Counters)
		d := progress.NewDisplay(progress.Output{Style: style, To: &out}, "disk", c)
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
	// The message replaces the first line of the bar.
	if before, after, _ := strings.Cut(out, "vddkcp: warning: look"); !strings.HasSuffix(before, "A\r") || !strings.HasPrefix(after, "\x1b[K\n") {
		t.Errorf("the message shares a line with the bar: %q", out)
	}
	if !strings.HasSuffix(out, "\n") {
		t.Errorf("the last line is not ended: %q", out)
	}
}

// TestPause checks that a paused display draws nothing, and shows the output that was
// written meanwhile when it is resumed.
func TestPause(t *testing.T) {
	for _, style := range []progress.Style{progress.Bar, progress.Lines, progress.JSON} {
		var out syncbuffer.Buffer
		synctest.Test(t, func(t *testing.T) {
			c := new(progress.Counters)
			d := progress.NewDisplay(progress.Output{Style: style, To: &out}, "disk", c)
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

// onScreen runs a Display on a terminal while do uses it.
func onScreen(t *testing.T, s *screen, columns, rows int, do func(*progress.Counters, *progress.Display)) {
	synctest.Test(t, func(t *testing.T) {
		c := new(progress.Counters)
		d := progress.NewDisplay(progress.Output{Style: progress.Bar, To: s, Size: func() (int, int) { return columns, rows }}, "disk", c)
		done, ended := make(chan struct{}), make(chan struct{})
		go func() {
			d.Run(done)
			close(ended)
		}()
		do(c, d)
		close(done)
		<-ended
	})
}

// TestCopyOnATerminal checks the lines of a copy on terminals of two sizes, with a message above
// them, and the closing line at the end.
func TestCopyOnATerminal(t *testing.T) {
	const message = "vddkcp: warning: the disk is on fire"
	for _, c := range []struct {
		columns, rows int
		want          []string
	}{
		{80, 24, []string{
			message, "copy    30% [############............................] 12.0 GiB of 40.0 GiB",
			"1.1 GiB/s, 12s elapsed, 25s left", "bound by: source, 3 connections",
		}},
		{40, 24, []string{message, "copy    30% 12.0 GiB of 40.0 GiB", "1.1 GiB/s, 12s elapsed, 25s left", "bound by: source, 3 connections"}},
		{20, 3, []string{"vddkcp: warning: the", " disk is on fire", "copy    30% 12.0 Gi", "1.1 GiB/s, 12s elap"}},
	} {
		s := &screen{t: t, columns: c.columns, wraps: true}
		onScreen(t, s, c.columns, c.rows, func(n *progress.Counters, d *progress.Display) {
			n.SetConnections(3)
			n.AddPlanned(40 << 30)
			n.Enter(progress.Copy)
			time.Sleep(100 * time.Millisecond) // the display draws between the steps of the copy
			for range 12 {
				n.Begin(progress.WaitSource)
				time.Sleep(900 * time.Millisecond)
				n.End(progress.WaitSource)
				n.Begin(progress.WaitTarget)
				time.Sleep(50 * time.Millisecond)
				n.End(progress.WaitTarget)
				time.Sleep(50 * time.Millisecond)
				n.AddDone(1 << 30)
			}
			if _, err := d.Write([]byte(message + "\n")); err != nil {
				t.Error(err)
			}
			time.Sleep(250 * time.Millisecond)
			got := s.text()
			if n := len(c.want); len(got) < n || !slices.Equal(got[:n], c.want) || strings.Join(got[n:], "") != "" {
				t.Errorf("%d columns:\n%s\nwant\n%s", c.columns, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
			d.End("disk.raw: 40.0 GiB in 40 s")
		})
		if s.cleared > 0 {
			t.Errorf("%d columns: cleared %d times", c.columns, s.cleared)
		}
		if last := strings.Join(s.text(), "\n"); strings.Contains(last, "copy") || strings.Contains(last, "bound") || !strings.Contains(last, "disk.raw: 40.0 GiB") {
			t.Errorf("%d columns, at the end:\n%s", c.columns, last)
		}
	}
}

// TestUnknownSize checks that no share of a stream is shown while its size is not known.
func TestUnknownSize(t *testing.T) {
	s := &screen{t: t, columns: 80, wraps: true}
	onScreen(t, s, 80, 24, func(n *progress.Counters, _ *progress.Display) {
		time.Sleep(1300 * time.Millisecond)
		if got := s.text()[0]; got != "plan, 1s elapsed" {
			t.Errorf("while planning: %q", got)
		}
		n.Enter(progress.Copy)
		n.AddDone(5 << 20)
		time.Sleep(time.Second + 50*time.Millisecond)
		if got := s.text(); got[0] != "copy   5.0 MiB" || strings.Contains(strings.Join(got, ""), "left") {
			t.Errorf("%q", got)
		}
	})
	if got := s.text()[0]; !strings.HasPrefix(got, "copy: 5.0 MiB done, ") {
		t.Errorf("after a failure: %q", got)
	}
}

// TestClosingLine checks that only people get the closing line, and that lines of a log have a
// stamp.
func TestClosingLine(t *testing.T) {
	for style, want := range map[progress.Style]string{progress.None: "", progress.Lines: "12:00 done\n", progress.Bar: "done\n", progress.JSON: ""} {
		var out bytes.Buffer
		d := progress.NewDisplay(progress.Output{Style: style, To: &out, Stamp: func() string { return "12:00 " }}, "disk", new(progress.Counters))
		d.End("done")
		done := make(chan struct{})
		close(done)
		d.Run(done)
		if got := out.String(); style != progress.JSON && !strings.HasSuffix(got, want) || strings.Contains(got, "done\n") != (want != "") {
			t.Errorf("style %d: %q, want %q", style, got, want)
		}
	}
}
