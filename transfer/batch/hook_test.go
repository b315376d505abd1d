package batch_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/transfer/report"
)

// hooked returns a batch with one job that has these fields, in JSON. It does not run
// in a synctest bubble, because its commands are processes.
func hooked(t *testing.T, fields string) *fake {
	t.Helper()
	f := newFake(t, `"jobs":[{"name":"a/b ü","source":"s","target":"t",`+fields+`}]`)
	f.fates["a/b ü"] = []*fate{{status: report.StatusOK}, {status: report.StatusOK}}
	return f
}

func (f *fake) read(name string) string {
	text, _ := os.ReadFile(filepath.Join(f.dir, name))
	return string(text)
}

func TestHooksSeeTheJob(t *testing.T) {
	f := hooked(t, `"before":["sh","-c","echo \"$VDDKCP_JOB|$VDDKCP_STATUS|$VDDKCP_TARGET|$VDDKCP_REPORT\" >$(dirname $VDDKCP_TARGET)/before"],
		"after":["sh","-c","cd $(dirname $VDDKCP_TARGET); echo \"$VDDKCP_JOB|$VDDKCP_STATUS|$VDDKCP_TARGET\" >after; cat $VDDKCP_REPORT >report; stat -c %a $VDDKCP_REPORT >mode; echo $VDDKCP_REPORT >name; echo out; echo err >&2"]`)
	r, err := f.run(t.Context(), false)
	if err != nil || r.Exit != 0 {
		t.Fatalf("%+v, %v\n%s", r, err, f.log)
	}
	target := f.dir + "/t"
	if got, want := f.read("before"), "a/b ü||"+target+"|\n"; got != want {
		t.Errorf("before: %q, want %q", got, want)
	}
	if got, want := f.read("after"), "a/b ü|ok|"+target+"\n"; got != want {
		t.Errorf("after: %q, want %q", got, want)
	}
	if got := f.read("report"); !strings.Contains(got, `"status": "ok"`) || !strings.Contains(got, `"name": "a/b ü"`) {
		t.Errorf("report: %s", got)
	}
	if got := f.read("mode"); got != "600\n" {
		t.Errorf("mode of the report: %s", got)
	}
	if _, err := os.Stat(strings.TrimSpace(f.read("name"))); err == nil {
		t.Error("the report for the command is still there")
	}
	for _, want := range []string{"says=out", "says=err"} {
		if !strings.Contains(f.log.String(), want) {
			t.Errorf("the log lacks %q: %s", want, f.log)
		}
	}
}

// TestHooksHaveNoShell checks that no shell splits or expands the arguments of a
// command.
func TestHooksHaveNoShell(t *testing.T) {
	f := hooked(t, `"before":["touch","$HOME; x y"]`)
	t.Chdir(f.dir)
	if r, err := f.run(t.Context(), false); err != nil || r.Exit != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := os.Stat(filepath.Join(f.dir, "$HOME; x y")); err != nil {
		t.Error(err)
	}
}

func TestBeforeThatFails(t *testing.T) {
	f := hooked(t, `"before":["sh","-c","echo not now; exit 7"],"after":["sh","-c","echo $VDDKCP_STATUS >$VDDKCP_TARGET.after"]`)
	r, err := f.run(t.Context(), false)
	if err != nil || r.Exit != 1 || f.copied != nil {
		t.Errorf("%+v, %v, begun %v", r, err, f.copied)
	}
	if got, want := r.Jobs[0].Error, `before command "sh": exit status 7; its last output: "not now"`; got != want {
		t.Errorf("error %q, want %q", got, want)
	}
	if got := f.read("t.after"); got != "failed\n" {
		t.Errorf("after saw %q", got)
	}
	missing := hooked(t, `"before":["/nowhere/x"]`)
	if r, _ := missing.run(t.Context(), false); r.Exit != 1 || !strings.Contains(r.Jobs[0].Error, "no such file") {
		t.Errorf("%+v", r.Jobs[0].Report)
	}
}

// TestAfterThatFails checks that a copy whose after command fails is kept, and that
// the next run runs only the command.
func TestAfterThatFails(t *testing.T) {
	f := hooked(t, `"after":["sh","-c","echo $VDDKCP_STATUS >>$VDDKCP_TARGET.after; test -e $VDDKCP_TARGET.may"]`)
	r, err := f.run(t.Context(), false)
	if err != nil || r.Exit != 1 || r.Jobs[0].Error != `after command "sh": exit status 1` || !strings.Contains(r.Jobs[0].Hint, "--resume") {
		t.Errorf("%+v, %v", r.Jobs[0].Report, err)
	}
	if err := os.WriteFile(filepath.Join(f.dir, "t.may"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err = f.run(t.Context(), true)
	if err != nil || r.Exit != 0 || f.copied != nil || r.Jobs[0].Attempts != 1 {
		t.Errorf("%+v, %v, begun %v", r.Jobs[0].Report, err, f.copied)
	}
	if got := f.read("t.after"); got != "ok\nok\n" {
		t.Errorf("after saw %q", got)
	}
	if r, err = f.run(t.Context(), true); err != nil || r.Exit != 0 || f.read("t.after") != "ok\nok\n" {
		t.Errorf("a job that is done ran again: %+v, %v", r, err)
	}
}

// TestAfterOfAFailure checks that the after command runs after a failed copy, and that
// its own failure does not change the result.
func TestAfterOfAFailure(t *testing.T) {
	f := hooked(t, `"after":["sh","-c","echo $VDDKCP_STATUS >$VDDKCP_TARGET.after; exit 1"]`)
	f.o.Limits.Rounds = 0
	f.fates["a/b ü"] = []*fate{{status: report.StatusFailed, exit: 75}}
	r, err := f.run(t.Context(), false)
	if err != nil || r.Exit != 75 || f.read("t.after") != "failed\n" || len(r.Jobs[0].Warnings) != 1 {
		t.Errorf("%+v, %v", r.Jobs[0].Report, err)
	}
}

// TestAfterThatMovesTheTarget checks that an after command may move the target away.
func TestAfterThatMovesTheTarget(t *testing.T) {
	f := hooked(t, `"after":["sh","-c","mv $VDDKCP_TARGET $VDDKCP_TARGET.moved"]`)
	if r, err := f.run(t.Context(), false); err != nil || r.Exit != 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	if r, err := f.run(t.Context(), true); err != nil || r.Exit != 0 || f.copied != nil {
		t.Errorf("%+v, %v, begun %v", r, err, f.copied)
	}
}

// TestHookThatHangs checks that a command that hangs is killed together with the
// processes that it started.
func TestHookThatHangs(t *testing.T) {
	// A machine that has much to do may need longer to begin the command.
	for timeout := 300 * time.Millisecond; ; timeout *= 2 {
		f := hooked(t, fmt.Sprintf(`"hook_timeout":"%s","before":["sh","-c","sleep 1000 & echo $! >$VDDKCP_TARGET.pid; wait"]`, timeout))
		r, err := f.run(t.Context(), false)
		if err != nil || r.Exit != 1 || !strings.Contains(r.Jobs[0].Error, "the command did not end within hook_timeout, "+timeout.String()) {
			t.Fatalf("%+v, %v", r, err)
		}
		text := f.read("t.pid")
		if !strings.HasSuffix(text, "\n") && timeout < time.Minute {
			continue
		}
		pid, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			t.Fatalf("the command did not begin: %v", err)
		}
		for begun := time.Now(); lives(pid); time.Sleep(time.Millisecond) {
			if time.Since(begun) > time.Minute {
				_ = unix.Kill(pid, unix.SIGKILL)
				t.Fatalf("process %d lives", pid)
			}
		}
		return
	}
}

// lives reports whether a process exists. A zombie, which waits for init, does not
// count.
func lives(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z") && !strings.Contains(string(stat), ") X")
}

// TestHookThatLeavesSomething has a command that ends in time and leaves a process
// running that holds its output open. The process must not count as a timeout.
func TestHookThatLeavesSomething(t *testing.T) {
	for exit, want := range map[int]string{0: "", 3: `before command "sh": exit status 3`} {
		f := hooked(t, fmt.Sprintf(`"hook_timeout":"3s","before":["sh","-c","sleep 3.5 & exit %d"]`, exit))
		r, err := f.run(t.Context(), false)
		if err != nil || r.Jobs[0].Error != want {
			t.Errorf("%+v, %v; want %q", r.Jobs[0].Report, err, want)
		}
	}
}
