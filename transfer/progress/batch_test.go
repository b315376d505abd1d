package progress_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// screen is a terminal of a given width that interprets the escape sequences of a
// BatchDisplay.
type screen struct {
	t       *testing.T
	columns int

	mu          sync.Mutex
	lines       [][]rune
	row, column int
	wraps       bool
	cleared     int // times that all of it was
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rest := string(p)
	for rest != "" {
		if after, ok := strings.CutPrefix(rest, "\x1b["); ok {
			end := strings.IndexAny(after, "AKJlh")
			s.control(after[:end], after[end])
			rest = after[end+1:]
			continue
		}
		r := []rune(rest)[0]
		rest = rest[len(string(r)):]
		switch r {
		case '\n':
			s.row, s.column = s.row+1, 0
		case '\r':
			s.column = 0
		default:
			s.put(r)
		}
	}
	return len(p), nil
}

func (s *screen) control(number string, command byte) {
	switch command {
	case 'A':
		n := 0
		fmt.Sscan(number, &n)
		if s.row -= n; s.row < 0 {
			s.t.Errorf("above the screen")
			s.row = 0
		}
	case 'K':
		s.line()
		s.lines[s.row] = s.lines[s.row][:min(s.column, len(s.lines[s.row]))]
	case 'J':
		s.line()
		s.lines = s.lines[:s.row+1]
		s.lines[s.row] = s.lines[s.row][:min(s.column, len(s.lines[s.row]))]
		if s.row == 0 && s.column == 0 {
			s.cleared++
		}
	case 'l', 'h':
		s.wraps = command == 'h'
	}
}

func (s *screen) line() {
	for len(s.lines) <= s.row {
		s.lines = append(s.lines, nil)
	}
}

func (s *screen) put(r rune) {
	wide := 1
	if r > 0x2e80 {
		wide = 2
	}
	if s.column+wide > s.columns {
		if !s.wraps {
			return
		}
		s.row, s.column = s.row+1, 0
	}
	s.line()
	for range wide {
		s.lines[s.row] = append(s.lines[s.row][:min(s.column, len(s.lines[s.row]))], r)
		s.column++
	}
}

func (s *screen) text() (lines []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.lines {
		lines = append(lines, strings.TrimRight(string(l), " "))
	}
	return lines
}

// showBatch runs the display of a batch with four jobs on out while do uses it.
func showBatch(t *testing.T, style progress.Style, out *screen, columns, rows int, do func(*progress.BatchDisplay)) {
	synctest.Test(t, func(t *testing.T) {
		d := progress.NewBatchDisplay(progress.Output{Style: style, To: out, Size: func() (int, int) { return columns, rows }}, 4)
		done, ended := make(chan struct{}), make(chan struct{})
		go func() {
			d.Run(done)
			close(ended)
		}()
		do(d)
		close(done)
		<-ended
	})
}

// begin starts a job of 100 MiB, with the given number of MiB done.
func begin(d *progress.BatchDisplay, name string, mib int64) (done func()) {
	c := new(progress.Counters)
	c.AddPlanned(100 << 20)
	c.Enter(progress.Copy)
	c.AddDone(mib << 20)
	c.AddRead((mib - mib/5) << 20)
	c.AddCloned(mib / 5 << 20 / 2)
	return d.Start(name, "disk", c)
}

func TestBatchOnATerminal(t *testing.T) {
	for _, c := range []struct {
		columns, rows int
		want          []string
	}{
		{80, 24, []string{
			"vddkcp: a message that is longer than some terminals are wide", " 45% [#########...........] 1 of 4 done, 3 running; 72.0 MiB, 36.0 MiB/s",
			" 50% [##########..........] copy   0 B/s  a", " 10% [##..................] copy   0 B/s  " + strings.Repeat("語", 38),
			" 20% [####................] copy   0 B/s  \"x\\x1b[2J\"",
		}},
		{40, 4, []string{
			"vddkcp: a message that is longer than so", "me terminals are wide", " 45% 36.0 MiB/s; 1 of 4 done, 3 running", " 50% 0 B/s  a", "  and 2 more",
		}},
	} {
		t.Run(fmt.Sprint(c.columns), func(t *testing.T) {
			s := &screen{t: t, columns: c.columns, wraps: true}
			showBatch(t, progress.Bar, s, c.columns, c.rows, func(d *progress.BatchDisplay) {
				time.Sleep(time.Second)
				done := begin(d, "done", 0)
				time.Sleep(time.Second)
				done()
				d.Ended("done")
				begin(d, "a", 50)
				begin(d, strings.Repeat("語", 30), 10)
				begin(d, "x\x1b[2J", 20)
				time.Sleep(300 * time.Millisecond)
				if _, err := d.Write([]byte("vddkcp: a message that is longer than some terminals are wide\n")); err != nil {
					t.Error(err)
				}
				got := s.text()
				if n := len(c.want); len(got) < n || !slices.Equal(got[:n], c.want) || strings.Join(got[n:], "") != "" {
					t.Errorf("%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
				}
			})
			if s.cleared > 1 { // at the end, where nothing else was
				t.Errorf("cleared %d times", s.cleared)
			}
			if last := strings.Join(s.text(), "\n"); !strings.Contains(last, "batch: 1 of 4 done") || strings.Contains(last, "[#") || strings.Contains(last, "more") {
				t.Errorf("at the end:\n%s", last)
			}
		})
	}
}

// TestBatchShowsWaiting checks that a wait before jobs are tried again is shown with
// the time that is left.
func TestBatchShowsWaiting(t *testing.T) {
	s := &screen{t: t, columns: 80, wraps: true}
	showBatch(t, progress.Bar, s, 80, 24, func(d *progress.BatchDisplay) {
		done := d.Waiting(2, 30*time.Second)
		time.Sleep(10 * time.Second)
		if got := s.text()[0]; !strings.Contains(got, "0 of 4 done, 2 tried again in 20s") {
			t.Errorf("while waiting: %q", got)
		}
		done()
		time.Sleep(time.Second)
		if got := s.text()[0]; strings.Contains(got, "tried again") {
			t.Errorf("after the wait: %q", got)
		}
	})
}

func TestBatchInLinesAndJSON(t *testing.T) {
	work := func(d *progress.BatchDisplay) {
		done := begin(d, "a\n", 50)
		begin(d, "b", 10)
		time.Sleep(25 * time.Second)
		done()
		d.Ended("failed")
	}
	s := &screen{t: t, columns: 200, wraps: true}
	showBatch(t, progress.Lines, s, 80, 24, work)
	want := []string{"batch: 0 of 4 done, 2 running; 54.0 MiB copied", "batch: 0 of 4 done, 2 running; 54.0 MiB copied", "batch: 0 of 4 done, 1 failed, 1 running; 54.0 MiB copied"}
	if got := s.text(); !slices.Equal(got, want) {
		t.Errorf("%q\nwant\n%q", got, want)
	}
	s = &screen{t: t, columns: 1000, wraps: true}
	showBatch(t, progress.JSON, s, 80, 24, work)
	jobs := map[string]int{}
	for _, text := range s.text() {
		var line progress.Line
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("%v: %s", err, text)
		}
		jobs[line.Job]++
	}
	if jobs["a\n"] < 25 || jobs["b"] < 25 || len(jobs) != 2 {
		t.Errorf("lines of jobs: %v", jobs)
	}
}

// TestVM shows the copy of a VM, with a task of the server at its end.
func TestVM(t *testing.T) {
	work := func(d *progress.BatchDisplay) {
		d.ShowVM("web\n01", 2)
		d.Phase("web\n01", "snapshot", -1)
		d.Phase("web\n01", "copy", -1)
		c := new(progress.Counters)
		c.AddPlanned(4 << 20)
		c.Enter(progress.Copy)
		done := d.StartDisk("web\n01", 2, "vm:web01#2", c)
		time.Sleep(time.Second)
		done()
		d.Ended("done")
		d.Phase("web\n01", "remove", 40)
		time.Sleep(12 * time.Second)
	}
	s := &screen{t: t, columns: 200, wraps: true}
	showBatch(t, progress.Lines, s, 80, 24, work)
	if got, want := s.text(), `"web\n01": 1 of 2 done, remove 40%`; len(got) != 2 || !strings.HasPrefix(got[0], want) || strings.Contains(got[1], "remove") {
		t.Errorf("lines %q, expected %q first, and no phase at the end", got, want)
	}
	s = &screen{t: t, columns: 1000, wraps: true}
	showBatch(t, progress.JSON, s, 80, 24, work)
	phases, disk, percent := []string{}, false, 0.0
	for _, text := range s.text() {
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); err != nil || line["vm"] != "web\n01" {
			t.Fatalf("%v: %s", err, text)
		}
		if line["number"] == 2.0 {
			disk = line["round"] == 1.0 && line["disk"] == "vm:web01#2" && line["bytes_planned"] == 4194304.0
			continue
		}
		phases = append(phases, line["phase"].(string))
		percent, _ = line["percent"].(float64)
	}
	if !slices.Equal(phases, []string{"snapshot", "copy", "remove"}) || !disk || percent != 40 {
		t.Errorf("phases %q, disk %t, percent %v", phases, disk, percent)
	}
}

// TestBatchSaysWhatBinds checks that the line of a job says what limits the job as far as there is
// room.
func TestBatchSaysWhatBinds(t *testing.T) {
	for name, want := range map[string]string{
		"a":                     "  a  (source, 2 connections)",
		strings.Repeat("b", 20): "  " + strings.Repeat("b", 20) + "  (source)",
		strings.Repeat("c", 35): "  " + strings.Repeat("c", 35),
	} {
		s := &screen{t: t, columns: 80, wraps: true}
		showBatch(t, progress.Bar, s, 80, 24, func(d *progress.BatchDisplay) {
			c := new(progress.Counters)
			c.AddPlanned(100 << 20)
			c.Enter(progress.Copy)
			c.SetConnections(2)
			d.Start(name, "disk", c)
			time.Sleep(300 * time.Millisecond)
			c.Begin(progress.WaitSource)
			time.Sleep(200 * time.Millisecond)
			c.End(progress.WaitSource)
			if got := s.text()[1]; !strings.HasSuffix(got, want) {
				t.Errorf("%q, want %q at its end", got, want)
			}
		})
	}
}

// TestBatchClosingLine checks that the text of End replaces the summary.
func TestBatchClosingLine(t *testing.T) {
	for text, want := range map[string]string{"all is done": "all is done", "": ""} {
		s := &screen{t: t, columns: 80, wraps: true}
		showBatch(t, progress.Bar, s, 80, 24, func(d *progress.BatchDisplay) {
			begin(d, "a", 50)
			time.Sleep(time.Second)
			d.Ended("done")
			d.End(text)
		})
		if got := strings.Join(s.text(), ""); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
