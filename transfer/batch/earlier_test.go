package batch_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestResumeLooksAtTargets(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c", "d"))
	f.mustRun(false, 0, batch.Counts{Done: 4})
	if err := os.Remove(filepath.Join(f.dir, "t-a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(f.dir, "t-b"), 100); err != nil {
		t.Fatal(err)
	}
	f.file.Jobs[2].Source += "x"
	f.mustRun(true, 0, batch.Counts{Done: 4})
	slices.Sort(f.copied)
	if got := strings.Join(f.copied, ""); got != "abc" {
		t.Errorf("begun: %v", f.copied)
	}
	for _, want := range []string{"its target no longer exists\" job=a", "its target has 100 bytes, but had 1 when the job was done\" job=b", "its fields have changed since the job was done\" job=c"} {
		if !strings.Contains(f.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, f.log)
		}
	}
}

// TestBackingThatChanged checks that a job whose backing has changed runs again,
// whether it was done or only copied.
func TestBackingThatChanged(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	backings := map[string]string{"a": "base at noon"}
	f.backings = backings
	f.o.Limits.Total = 1
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.mustRun(false, 0, batch.Counts{Done: 2})
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if len(f.copied) != 0 {
		t.Errorf("with the same backing: begun %v", f.copied)
	}
	backings["a"] = "base at night"
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if got := strings.Join(f.copied, ""); got != "a" || !strings.Contains(f.log.String(), "the backing of its target has changed since the job was done") {
		t.Errorf("with another backing: begun %q\n%s", got, f.log)
	}
	f.leave(killed)
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if got := strings.Join(f.copied, ""); !strings.Contains(got, "a") {
		t.Errorf("killed when it was whole, and another backing since: begun %q", got)
	}
}

// state returns the content of the state file of a run that is killed right after a
// job has begun.
func (f *fake) state() string {
	text, err := os.ReadFile(filepath.Join(f.dir, "state.json.changes"))
	if err != nil {
		f.t.Error(err)
	}
	return string(text)
}

// leave writes a state file that was returned by state.
func (f *fake) leave(state string) {
	f.t.Helper()
	for name, text := range map[string]string{"state.json": `{"version":1,"jobs":[]}`, "state.json.changes": state} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
			f.t.Error(err)
		}
	}
}

// TestKilledAfterTheCopy kills a run after a copy has ended and before the state file
// says so. The next run must not copy again.
func TestKilledAfterTheCopy(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.o.Limits.Total = 1
	f.mustRun(false, 0, batch.Counts{Done: 2})
	if !strings.Contains(killed, `"phase":"running"`) {
		t.Fatalf("state while a runs: %s", killed)
	}
	resume := func(want string) {
		t.Helper()
		f.leave(killed)
		f.mustRun(true, 0, batch.Counts{Done: 2})
		if got := strings.Join(f.copied, ""); got != want {
			t.Errorf("begun: %s, want %s", got, want)
		}
	}
	resume("b")
	// Where it is not there it is copied.
	if err := os.Remove(filepath.Join(f.dir, "t-a")); err != nil {
		t.Fatal(err)
	}
	resume("ab")
	// A file of the same name and size that another program made is not it.
	path := filepath.Join(f.dir, "t-a")
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("a"), 0o600)); err != nil {
		t.Fatal(err)
	}
	resume("ab")
}

// TestKilledWhileTheOldTargetChanged checks that a file which was at the target before
// the copy is never taken for the copy, even if the file changes while the copy runs.
func TestKilledWhileTheOldTargetChanged(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"touched":  func(path string) error { return os.Chtimes(path, time.Now(), time.Now().Add(time.Hour)) },
		"written":  func(path string) error { return os.WriteFile(path, []byte("older and longer"), 0o600) },
		"replaced": func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, `"limits":{"rounds":0},`+jobsOf("a"))
			path := filepath.Join(f.dir, "t-a")
			if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, at := range []string{"while it copies", "when it is whole"} {
				var killed string
				kill := func() {
					if err := change(path); err != nil {
						t.Fatal(err)
					}
					killed = f.state()
				}
				first := &fate{status: report.StatusFailed, exit: 75, do: func(context.Context, *batch.Task) { kill() }}
				if at == "when it is whole" {
					first = &fate{status: report.StatusOK, whole: kill}
				}
				f.fates["a"] = []*fate{first}
				os.Remove(filepath.Join(f.dir, "state.json"))
				old, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if at == "when it is whole" {
					f.mustRun(false, 0, batch.Counts{Done: 1})
					// The kill came before the rename.
					if err := errors.Join(os.Remove(path), os.WriteFile(path, old, 0o600)); err != nil {
						t.Fatal(err)
					}
				} else {
					f.mustRun(false, 75, batch.Counts{Failed: 1})
				}
				f.leave(killed)
				f.copied = nil
				f.mustRun(true, 0, batch.Counts{Done: 1})
				if len(f.copied) != 1 {
					t.Errorf("killed %s: begun: %v", at, f.copied)
				}
			}
		})
	}
}

// TestChangesOfAKilledRun checks the file of changes that a killed run left: a change
// that was cut off does not count, and no change counts if the state file was removed.
func TestChangesOfAKilledRun(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c"))
	var killed string
	f.fates["c"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.o.Limits.Total = 1
	f.mustRun(false, 0, batch.Counts{Done: 3})
	for _, c := range []struct{ name, changes, copied string }{
		{"whole", killed, ""}, // c was noted as whole
		{"cut, and more behind it", killed[:10] + "\n" + killed, ""},
		{"cut", killed[:len(killed)-10], "c"}, // the note that c became whole
	} {
		f.leave(c.changes)
		f.mustRun(true, 0, batch.Counts{Done: 3})
		if got := strings.Join(f.copied, ""); got != c.copied {
			t.Errorf("%s: begun %s, want %s", c.name, got, c.copied)
		}
	}
	f.leave(killed)
	if err := os.Remove(filepath.Join(f.dir, "state.json")); err != nil {
		t.Fatal(err)
	}
	f.mustRun(false, 0, batch.Counts{Done: 3})
	if got := strings.Join(f.copied, ""); got != "abc" {
		t.Errorf("anew: begun %s", got)
	}
	if left, err := filepath.Glob(filepath.Join(f.dir, "state.json?*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	f.leave(`{"name":"a","phase":"eh"}`)
	if _, err := batch.OpenStore(filepath.Join(f.dir, "state.json")); err == nil || !strings.Contains(err.Error(), `state.json.changes: the entry has the phase "eh": want running`) {
		t.Errorf("error %v", err)
	}
}

// TestKilledBeforeTheCopyReplaced checks that a file which the copy should have
// replaced is not taken for the copy.
func TestKilledBeforeTheCopyReplaced(t *testing.T) {
	f := newFake(t, `"limits":{"rounds":0},`+jobsOf("a"))
	if err := os.WriteFile(filepath.Join(f.dir, "t-a"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusFailed, exit: 75, do: func(context.Context, *batch.Task) { killed = f.state() }}}
	f.mustRun(false, 75, batch.Counts{Failed: 1})
	f.leave(killed)
	f.mustRun(true, 0, batch.Counts{Done: 1})
	if len(f.copied) != 1 {
		t.Errorf("begun: %v", f.copied)
	}
}

func TestStateIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	first, err := batch.OpenStore(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = batch.OpenStore(path)
	var used *batch.UsedError
	if want := fmt.Sprintf("process %d on ", os.Getpid()); !errors.As(err, &used) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one that names %q", err, want)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	second, err := batch.OpenStore(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestBadState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	for text, want := range map[string]string{
		"":                                      "unexpected end of JSON input; expected the complete state file of an earlier run",
		`{"version":2,"jobs":[]}`:               "the state file has the format version 2, but this vddkcp reads only version 1",
		`{"version":2,"jobs":"none"}`:           "the state file has the format version 2, but this vddkcp reads only version 1",
		`{"version":1,"jobs":[{"phase":"eh"}]}`: `job 0: the entry has the phase "eh": want running`,
		`{"version":1,"jobs":[7]}`:              "job 0: json: cannot unmarshal number",
		`{"version":1,"jobs":[{"name":"a","phase":"done"}]}`:               "job 0: the entry has the phase done but no report",
		`{"version":1,"jobs":[{"name":"a","phase":"copied","report":{}}]}`: "job 0: the entry has the phase copied but no report",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		store, err := batch.OpenStore(path)
		if err == nil {
			store.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: error %v, want %q", text, err, want)
		}
	}
}

// TestStateThatCantBeWritten checks that copies succeed although the state file cannot
// be written, and that the run ends with an error.
func TestStateThatCantBeWritten(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	state := filepath.Join(f.dir, "d")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := batch.OpenStore(filepath.Join(state, "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := os.Mkdir(filepath.Join(state, "state.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.o.Store = store
	r, err := batch.Run(t.Context(), f.file.Jobs, f.o)
	if err == nil || r == nil || r.Counts.Done != 2 || !strings.Contains(f.log.String(), "the state file cannot be written") {
		t.Errorf("report %+v, error %v\n%s", r, err, f.log)
	}
}
