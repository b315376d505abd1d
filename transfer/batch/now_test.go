package batch_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestHooksAreNamed checks that the report of a running job says that a hook runs, because the copy
// then makes no progress.
func TestHooksAreNamed(t *testing.T) {
	f := newFake(t, `"jobs":[{"name":"a","source":"s","target":"t","before":["before"],"after":["after"]}]`)
	f.fates = map[string][]*fate{"a": {{status: report.StatusOK, do: func(_ context.Context, t *batch.Task) { t.Counters.AddPlanned(4); t.Counters.AddDone(3) }}}}
	var seen []string
	var monitor *batch.Monitor
	f.o.Watch = func(m *batch.Monitor) func() {
		monitor = m
		return func() {}
	}
	f.o.Spawn = func(func() (int, error)) (func(), error) {
		l := monitor.Now().Jobs[0].Live
		seen = append(seen, fmt.Sprintf("%s %q %d", l.Phase, l.Stage(), l.BytesDone))
		return nil, os.ErrNotExist
	}
	f.mustRun(false, 1, batch.Counts{Failed: 1})
	if want := `[before "before command" 0 after "after command" 0]`; fmt.Sprint(seen) != want {
		t.Errorf("seen %v, want %s", seen, want)
	}
}

// TestReadStateAfterKill checks the state of a batch whose process was killed, for the files that
// it may leave.
func TestReadStateAfterKill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.json")
	begun := time.Now().Add(-time.Hour)
	host, _ := os.Hostname()
	write := func(end, text string) {
		t.Helper()
		if err := os.WriteFile(path+end, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("", `{"version":1,"jobs":[]}`)
	lockOf := func(since time.Time) string {
		return fmt.Sprintf("process 1234567 on %s, since %s\n", host, since.Format(time.RFC3339))
	}
	now := fmt.Sprintf(`{"version":1,"status":"running","started":%q,"updated":%q,"jobs":[{"name":"a","status":"running","live":{"phase":"copy","bytes_done":7,"rate":9}}]}`,
		begun.Format(time.RFC3339Nano), begun.Add(time.Minute).Format(time.RFC3339Nano))
	for _, c := range []struct {
		name, now string
		since     time.Time
		jobs      int
	}{
		{"killed", now, begun, 1},
		{"killed before it wrote what runs, after another kill", now, begun.Add(2 * time.Second), 0},
		{"power failure, empty file", "", begun, 0},
		{"power failure, part of a file", now[:100], begun, 0},
	} {
		write(".now", c.now)
		write(".lock", lockOf(c.since))
		s, err := batch.ReadState(path)
		if err != nil || len(s.Jobs) != c.jobs || s.PID != 1234567 || s.Running != "no" {
			t.Errorf("%s: %+v, %v; want %d jobs", c.name, s, err, c.jobs)
			continue
		}
		if c.jobs > 0 && (s.Jobs[0].Live.BytesDone != 7 || s.Jobs[0].Live.Rate != 0) {
			t.Errorf("%s: %+v, want the bytes that were done, and no rate", c.name, s.Jobs[0].Live)
		}
	}
}
