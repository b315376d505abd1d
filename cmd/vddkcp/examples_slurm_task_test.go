package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// slurmTask runs one of the scripts as Slurm does, with fake programs vddkcp and
// scontrol that record their arguments. The fake vddkcp ends with the first signal.
type slurmTask struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
	out bytes.Buffer
}

func newSlurmTask(t *testing.T, script string, args, env []string) *slurmTask {
	t.Helper()
	peer.Need(t, "bash")
	task := &slurmTask{t: t, dir: t.TempDir()}
	programs := t.TempDir()
	for name, text := range map[string]string{
		"vddkcp": "#!/bin/bash\ntrap 'echo TERM >>calls; exit 143' TERM\necho vddkcp \"$@\" >>calls\n" +
			"case $STATUS in wait) while :; do sleep 0.05; done ;; kill) kill -KILL $$ ;; esac\nexit $STATUS\n",
		"scontrol": "#!/bin/sh\necho scontrol \"$@\" >>calls\n",
	} {
		put(t, filepath.Join(programs, name), text)
		if err := os.Chmod(filepath.Join(programs, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path, err := filepath.Abs(filepath.Join(slurmExamples, script))
	if err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(task.dir, "jobs.json"), "{}")
	task.cmd = exec.Command("bash", append([]string{path}, args...)...)
	task.cmd.Dir, task.cmd.Stdout, task.cmd.Stderr = task.dir, &task.out, &task.out
	task.cmd.Env = append([]string{"PATH=" + programs + ":" + os.Getenv("PATH"), "STATUS=0"}, env...)
	return task
}

// ended returns the exit status, the calls of programs, and what was printed.
func (s *slurmTask) ended() (status int, calls, out string) {
	s.t.Helper()
	var exit *exec.ExitError
	if err := s.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return s.cmd.ProcessState.ExitCode(), s.calls(), s.out.String()
}

func (s *slurmTask) calls() string {
	text, _ := os.ReadFile(filepath.Join(s.dir, "calls"))
	return string(text)
}

func taskEnv(id, last int, more ...string) []string {
	return append([]string{
		"SLURM_JOB_ID=70", "SLURM_ARRAY_JOB_ID=70", fmt.Sprintf("SLURM_ARRAY_TASK_ID=%d", id), fmt.Sprintf("SLURM_ARRAY_TASK_MIN=%d", id),
		fmt.Sprintf("SLURM_ARRAY_TASK_MAX=%d", last), "SLURM_ARRAY_TASK_COUNT=1",
	}, more...)
}

// How a task of the array ends, and what is requeued.
func TestExampleSlurmShard(t *testing.T) {
	const (
		call    = "vddkcp run jobs.json --shard 2/4 --resume --report jobs.4-shards/2.json\n"
		requeue = "scontrol requeue 70_2\n"
	)
	given := []string{"jobs.json", "4"}
	for name, c := range map[string]struct {
		args, env []string
		signal    syscall.Signal // to the script alone, when vddkcp runs
		status    int
		calls     string
		says      string
	}{
		"done":                     {given, taskEnv(2, 3), 0, 0, call, ""},
		"alone":                    {given, taskEnv(2, 2), 0, 0, call, ""},
		"with flags":               {given, taskEnv(2, 3, "VDDKCP_FLAGS=--label wave=1"), 0, 0, strings.Replace(call, "run", "run --label wave=1", 1), ""},
		"may pass":                 {given, taskEnv(2, 3, "STATUS=75"), 0, 75, call + requeue, ""},
		"may pass, again":          {given, taskEnv(2, 3, "STATUS=75", "SLURM_RESTART_COUNT=4"), 0, 75, call + requeue, ""},
		"may pass, too often":      {given, taskEnv(2, 3, "STATUS=75", "SLURM_RESTART_COUNT=5"), 0, 75, call, "no more than MAX_RESTARTS=5"},
		"may pass, never":          {given, taskEnv(2, 3, "STATUS=75", "MAX_RESTARTS=0"), 0, 75, call, "no more than MAX_RESTARTS=0"},
		"killed":                   {given, taskEnv(2, 3, "STATUS=kill"), 0, 137, call + requeue, "Killed"},
		"some failed":              {given, taskEnv(2, 3, "STATUS=4"), 0, 4, call, ""},
		"all failed":               {given, taskEnv(2, 3, "STATUS=1"), 0, 1, call, ""},
		"wrong job file":           {given, taskEnv(2, 3, "STATUS=2"), 0, 2, call, ""},
		"stopped by itself":        {given, taskEnv(2, 3, "STATUS=143"), 0, 143, call, ""},
		"time is up":               {given, taskEnv(2, 3, "STATUS=wait"), syscall.SIGUSR1, 143, call + "TERM\n" + requeue, ""},
		"time is up, too often":    {given, taskEnv(2, 3, "STATUS=wait", "SLURM_RESTART_COUNT=7"), syscall.SIGUSR1, 143, call + "TERM\n", "no more than"},
		"scancel":                  {given, taskEnv(2, 3, "STATUS=wait"), syscall.SIGTERM, 143, call + "TERM\n", ""},
		"no number of shards":      {[]string{"jobs.json"}, taskEnv(2, 3), 0, 2, "", "want a job file and the number of shards"},
		"no arguments":             {nil, taskEnv(2, 3), 0, 2, "", "want a job file and the number of shards"},
		"an odd number of shards":  {[]string{"jobs.json", "0x4"}, taskEnv(2, 3), 0, 2, "", `number of shards: "0x4"`},
		"an array from 1":          {given, taskEnv(2, 4), 0, 2, "", "want sbatch --array=0-3"},
		"fewer shards than tasks":  {[]string{"jobs.json", "2"}, taskEnv(0, 3), 0, 2, "", "the array goes to 3"},
		"no array":                 {given, nil, 0, 2, "", "this is no task of an array"},
		"a secret for all to read": {given, taskEnv(2, 3, "VDDKCP_PASSWORD=x"), 0, 2, "", "unset it"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			task := newSlurmTask(t, "shard.sbatch", c.args, c.env)
			old := filepath.Join(task.dir, "jobs.4-shards/2.json")
			put(t, old, "of an earlier run")
			if err := task.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if c.signal != 0 {
				eventually(t, "a call of vddkcp", func() bool { return task.calls() != "" })
				task.cmd.Process.Signal(c.signal)
			}
			status, calls, out := task.ended()
			if status != c.status || calls != c.calls || !strings.Contains(out, c.says) || c.says == "" && out != "" {
				t.Errorf("exit status %d, calls\n%s%s", status, calls, out)
			}
			if _, err := os.Stat(old); (err == nil) != (c.calls == "") {
				t.Errorf("the report of an earlier run: %v", err)
			}
		})
	}
}

// A merge is not complete without every shard's report.
func TestExampleSlurmMerge(t *testing.T) {
	for name, c := range map[string]struct {
		args, reports, env []string
		status             int
		call, says         string
	}{
		"all":         {[]string{"jobs.json", "2"}, []string{"0", "1"}, nil, 0, "report", ""},
		"some failed": {[]string{"jobs.json", "2"}, []string{"0", "1"}, []string{"STATUS=4"}, 4, "report", ""},
		"one missing": {[]string{"jobs.json", "4"}, []string{"0", "2"}, nil, 1, "incomplete", "no report of shards 1,3 of 4: submit them again with --array=1,3"},
		"no number":   {[]string{"jobs.json"}, nil, nil, 2, "", "want a job file and the number of shards"},
		"odd number":  {[]string{"jobs.json", "04"}, nil, nil, 2, "", `number of shards: "04"`},
	} {
		t.Run(name, func(t *testing.T) {
			task := newSlurmTask(t, "merge.sbatch", c.args, c.env)
			for _, i := range c.reports {
				put(t, filepath.Join(task.dir, "jobs."+c.args[1]+"-shards", i+".json"), "{}")
			}
			old := filepath.Join(task.dir, "jobs.report.html")
			put(t, old, "of an earlier run")
			want := ""
			if c.call != "" {
				want = fmt.Sprintf("vddkcp run --merge-reports jobs.%s-shards --report jobs.%s.json --report jobs.%[2]s.html\n", c.args[1], c.call)
			}
			if err := task.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			status, calls, out := task.ended()
			if status != c.status || calls != want || !strings.Contains(out, c.says) || c.says == "" && out != "" {
				t.Errorf("exit status %d, calls\n%s%s", status, calls, out)
			}
			if _, err := os.Stat(old); (err == nil) != (c.call == "") {
				t.Errorf("the report of an earlier run: %v", err)
			}
		})
	}
}

// Nothing is submitted of what is wrong, and no report removed.
func TestExampleSlurmSubmitRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		args   []string
		status int
		says   string
	}{
		"no number":   {[]string{"jobs.json"}, 2, "usage: "},
		"odd number":  {[]string{"jobs.json", "--array=0-3"}, 2, `number of shards: "--array=0-3"`},
		"none":        {[]string{"jobs.json", "0"}, 2, `number of shards: "0"`},
		"no job file": {[]string{"nowhere.json", "4"}, 1, "nowhere.json"},
	} {
		t.Run(name, func(t *testing.T) {
			task := newSlurmTask(t, "submit.sh", c.args, nil)
			report := filepath.Join(task.dir, "jobs.4-shards/0.json")
			put(t, report, "{}")
			if err := task.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			status, _, out := task.ended()
			if status != c.status || !strings.Contains(out, c.says) {
				t.Errorf("exit status %d\n%s", status, out)
			}
			if _, err := os.Stat(report); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestExampleSlurmDirectives checks the directives of the array: without them a
// requeue loses the log or is refused.
func TestExampleSlurmDirectives(t *testing.T) {
	f, err := os.Open(filepath.Join(slurmExamples, "shard.sbatch"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if directive, ok := strings.CutPrefix(lines.Text(), "#SBATCH "); ok {
			got = append(got, directive)
		}
	}
	for _, want := range []string{"--requeue", "--open-mode=append", "--signal=B:USR1@120"} {
		if !slices.Contains(got, want) {
			t.Errorf("shard.sbatch lacks %s", want)
		}
	}
}
