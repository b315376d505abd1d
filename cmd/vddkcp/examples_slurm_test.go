package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

const (
	slurmExamples = examples + "/slurm"
	slurmUp       = "../../../shared/tools/slurm-up"
)

// eventually waits until what holds, and fails when that takes too long.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("it never came: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// slurm is a Slurm cluster that consists of this machine.
type slurm struct {
	t   *testing.T
	dir string // its state and logs
	env []string
}

// startSlurm starts a cluster. It ends with the test, and so do all its jobs. Tasks
// find vddkcp in their PATH.
func startSlurm(t *testing.T) *slurm {
	t.Helper()
	peer.NeedRoot(t)
	peer.Need(t, "bash", "sbatch", "scontrol", "scancel", "slurmctld", "slurmd", "munged")
	peer.NeedFile(t, slurmUp)
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir: munged, which is not root, must get there.
	dir, err := os.MkdirTemp("", "vddkcp-slurm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &slurm{t: t, dir: dir, env: append(os.Environ(), "SLURM_CONF="+filepath.Join(dir, "slurm.conf"),
		"PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))}
	t.Cleanup(s.stop)
	if out, err := exec.Command(slurmUp, dir).CombinedOutput(); err != nil {
		t.Fatalf("slurm-up: %v\n%s", err, out)
	}
	// A cluster takes its time between tasks, this one need not; what is to be
	// requeued must say so.
	conf, err := os.OpenFile(filepath.Join(dir, "slurm.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = conf.WriteString("SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1\nJobRequeue=0\n")
	if err := errors.Join(err, conf.Close()); err != nil {
		t.Fatal(err)
	}
	s.must("scontrol", "reconfigure")
	return s
}

func (s *slurm) stop() {
	if s.t.Failed() {
		logs, _ := filepath.Glob(filepath.Join(s.dir, "log", "*"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			s.t.Logf("%s:\n%s", log, text[max(0, len(text)-4000):])
		}
	}
	s.run("scancel", "--signal=KILL", "--full", "--state=RUNNING")
	s.run("scancel", "--state=PENDING")
	eventually(s.t, "an end of all jobs", func() bool {
		out, err := s.run("squeue", "-h")
		return out == "" || err != nil
	})
	var pids []int
	for _, name := range []string{"munged", "slurmctld", "slurmd"} {
		text, _ := os.ReadFile(filepath.Join(s.dir, name+".pid"))
		if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			pids = append(pids, pid)
		}
	}
	if out, err := exec.Command(slurmUp, "-s", s.dir).CombinedOutput(); err != nil {
		s.t.Errorf("slurm-up -s: %v\n%s", err, out)
	}
	for _, pid := range pids {
		eventually(s.t, "an end of Slurm", func() bool {
			words, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			return len(words) == 0 // gone, or nobody waits for it
		})
	}
}

// run runs a program of Slurm's.
func (s *slurm) run(program string, args ...string) (stdout string, err error) {
	cmd := exec.Command(program, args...)
	cmd.Env = s.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out)), err
}

func (s *slurm) must(program string, args ...string) {
	s.t.Helper()
	if _, err := s.run(program, args...); err != nil {
		s.t.Fatal(err)
	}
}

// submit runs submit.sh in the job file's folder.
func (s *slurm) submit(jobs string, args ...string) (array, merge string) {
	s.t.Helper()
	script, err := filepath.Abs(filepath.Join(slurmExamples, "submit.sh"))
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(script, append([]string{jobs}, args...)...)
	cmd.Env, cmd.Dir = append(s.env, "VDDKCP_PASSWORD=other-geheim"), filepath.Dir(jobs)
	out, err := cmd.CombinedOutput()
	if _, scan := fmt.Sscan(string(out), &array, &merge); err != nil || scan != nil {
		s.t.Fatalf("submit.sh: %v\n%s", err, out)
	}
	return array, merge
}

// job returns the properties of a job or a task that Slurm reports, such as JobState
// and Restarts.
func (s *slurm) job(id string) map[string]string {
	s.t.Helper()
	out, err := s.run("scontrol", "show", "job", "-o", id)
	if err != nil {
		s.t.Fatal(err)
	}
	facts := map[string]string{}
	for _, word := range strings.Fields(out) {
		if key, value, ok := strings.Cut(word, "="); ok {
			facts[key] = value
		}
	}
	return facts
}

// ended waits for the end of a job.
func (s *slurm) ended(id string) map[string]string {
	s.t.Helper()
	var job map[string]string
	eventually(s.t, "an end of job "+id, func() bool {
		job = s.job(id)
		return !slices.Contains([]string{"PENDING", "RUNNING", "COMPLETING"}, job["JobState"])
	})
	return job
}

// shardState is what the tests know of a state file.
type shardState struct {
	Jobs []struct {
		Name, Phase string
		Attempts    int
	}
}

func readShardState(path string) (s shardState) {
	if text, err := os.ReadFile(path); err == nil {
		json.Unmarshal(text, &s) // it is replaced as a whole: what is there is right
	}
	return s
}

func (s shardState) count(phase string) (n int) {
	for _, j := range s.Jobs {
		if j.Phase == phase {
			n++
		}
	}
	return n
}

func parentOf(t *testing.T, pid int) (parent int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, after, _ := strings.Cut(string(text), "\nPPid:")
	if _, scan := fmt.Sscan(after, &parent); err != nil || scan != nil {
		t.Fatalf("parent of process %d: %v", pid, err)
	}
	return parent
}

// nameIn returns a name with this prefix that is in a shard.
func nameIn(prefix string, shard, shards int) string {
	for i := 0; ; i++ {
		if name := fmt.Sprintf("%s %d", prefix, i); batch.Shard(name, shards) == shard {
			return name
		}
	}
}

// TestExampleSlurm runs thirty jobs in four shards on a real Slurm. During copies, the
// time of one task expires, an operator requeues another task, and the vddkcp of a
// third is killed. The report must have each job once, and no finished job may run
// again.
func TestExampleSlurm(t *testing.T) {
	peer.Need(t, "qemu-img", "gcc")
	s := startSlurm(t)
	if err := installWorker(filepath.Dir(binaryDir + "/vddkcp")); err != nil {
		t.Fatal(err)
	}
	const shards = 4
	dir := t.TempDir()
	thumbprint := pairs(strings.Repeat("AB", 20))
	login := []string{"user u", "password geheim", "port 1", "thumbprint " + thumbprint, "transport nbd"}
	put(t, filepath.Join(dir, "pw"), "geheim\n")

	type disk struct{ path, format string } // that a target must equal
	want := map[string]disk{}
	targets := map[string]string{}
	inShard := make([]int, shards)
	var list []map[string]any
	add := func(name string, equal disk, target string, fields map[string]any) {
		fields["name"], fields["target"] = name, target
		want[name], targets[name] = equal, filepath.Join(dir, target)
		inShard[batch.Shard(name, shards)]++
		list = append(list, fields)
	}
	vddk := func(lib *testlib.Library, file string, size int) (disk, map[string]any) {
		path := filepath.Join(dir, file)
		random(t, path, size)
		lib.AddDisk("[ds] "+file+".vmdk", path)
		return disk{path, "raw"}, map[string]any{
			"source": "[ds] " + file + ".vmdk", "server": "localhost", "port": 1, "user": "u", "password": "+pw", "vm": "moref=1",
			"thumbprint": thumbprint, "libdir": lib.Dir, "connections": 1, "request_size": "64KiB",
		}
	}
	// Three copies stand still in the middle: what they have in flight takes
	// longer than a task waits before it looks whether a signal has come
	// through. The one to be killed is in the task whose job id is that of the
	// whole array: the last one.
	const warned, requeued, killed = 0, 1, shards - 1
	slow := map[int]*testlib.Library{warned: testlib.New(t), requeued: testlib.New(t), killed: testlib.New(t)}
	slowName := map[int]string{}
	for shard, lib := range slow {
		lib.Reset(append(login, "latency read 2500000")...)
		slowName[shard] = nameIn("slow", shard, shards)
		equal, fields := vddk(lib, fmt.Sprintf("slow-%d", shard), 16<<20)
		add(slowName[shard], equal, fmt.Sprintf("slow-%d.raw", shard), fields)
	}
	fast := testlib.New(t)
	fast.Reset(login...)
	for i := range 5 {
		equal, fields := vddk(fast, fmt.Sprintf("vm-%d", i), 1<<20)
		add(fmt.Sprintf("vm/%d", i), equal, fmt.Sprintf("vm-%d.qcow2", i), fields)
	}
	for _, name := range []string{"streamOptimizedWithMarkers", "twoGbMaxExtentSparse", "vmfs_thick", "plaso_image", "dfvfs_ext2"} {
		sample, err := filepath.Abs(filepath.Join("../../../shared/samples", name+".vmdk"))
		if err != nil {
			t.Fatal(err)
		}
		peer.NeedFile(t, sample)
		add("sample/"+name, disk{sample, "vmdk"}, name+".qcow2", map[string]any{"source": sample, "compress": "zstd"})
	}
	for i := len(list); i < 30; i++ {
		file := filepath.Join(dir, fmt.Sprintf("disk-%d", i))
		random(t, file, 256<<10+i*4096)
		add(fmt.Sprintf("disk %d", i), disk{file, "raw"}, fmt.Sprintf("disk-%d.raw", i), map[string]any{"source": file, "verify": true})
	}
	jobs := writeJobs(t, dir, map[string]any{"total": 2}, nil, list)
	state := func(shard int) string {
		return filepath.Join(dir, fmt.Sprintf("jobs.state.%d-of-%d.json", shard, shards))
	}

	array, merge := s.submit(jobs, strconv.Itoa(shards))
	task := func(shard int) string { return fmt.Sprintf("%s_%d", array, shard) }

	// In the middle: all others of the shard are done, and of the slow one some
	// is written and more is being read.
	middle := func(shard int) bool {
		st := readShardState(state(shard))
		return st.count("running") == 1 && st.count("done") == inShard[shard]-1 && slow[shard].Calls()["ReadAsync"] > 4
	}
	before := map[string]os.FileInfo{} // targets that were done then
	interrupt := func(shard int) {
		for name, path := range targets {
			if fi, err := os.Stat(path); err == nil && batch.Shard(name, shards) == shard {
				before[path] = fi
			}
		}
		owner, err := os.ReadFile(state(shard) + ".lock")
		if err != nil {
			t.Fatal(err)
		}
		var pid int
		if _, err := fmt.Sscanf(string(owner), "process %d ", &pid); err != nil {
			t.Fatalf("%q: %v", owner, err)
		}
		switch shard {
		case warned: // to the script alone, as --signal=B: does
			err = syscall.Kill(parentOf(t, pid), syscall.SIGUSR1)
		case requeued:
			s.must("scontrol", "requeue", task(shard))
		case killed:
			err = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const running, interrupted, requeues, released = 0, 1, 2, 3
	step := map[int]int{} // of the slow shards
	eventually(t, "an end of all shards", func() bool {
		for shard := range slow {
			switch step[shard] {
			case running:
				if middle(shard) {
					interrupt(shard)
					step[shard] = interrupted
				}
			case interrupted:
				if job := s.job(task(shard)); job["JobState"] != "PENDING" || job["Restarts"] != "1" {
					continue
				}
				step[shard] = requeues
				phase := map[bool]string{true: "running", false: "interrupted"}[shard == killed]
				if st := readShardState(state(shard)); st.count(phase) != 1 || st.count("done") != inShard[shard]-1 {
					t.Errorf("shard %d, when it was interrupted: %+v", shard, st)
				}
				slow[shard].Reset(login...)
			case requeues:
				// Slurm has it wait for two minutes, until its credential is
				// void. That is by seconds: at once it would not be launched.
				if _, err := s.run("scontrol", "update", "JobId="+task(shard), "StartTime=now+3seconds"); err == nil {
					step[shard] = released
				}
			}
		}
		return s.job(merge)["JobState"] != "PENDING"
	})
	for shard := range slow {
		if step[shard] != released {
			t.Errorf("shard %d came to step %d only", shard, step[shard])
		}
	}
	if job := s.ended(merge); job["JobState"] != "COMPLETED" || job["ExitCode"] != "0:0" {
		logs, _ := filepath.Glob(filepath.Join(dir, "*.log"))
		for _, log := range logs {
			text, _ := os.ReadFile(log)
			t.Logf("%s:\n%s", log, text)
		}
		t.Fatalf("merge: %v", job)
	}

	// Each job once, and whole.
	r := readBatchReport(t, filepath.Join(dir, "jobs.report.json"))
	if r.Counts != (batch.Counts{Done: 30}) || r.Exit != 0 || len(r.Jobs) != 30 {
		t.Errorf("the report: exit %d, %+v of %d jobs", r.Exit, r.Counts, len(r.Jobs))
	}
	page, err := os.ReadFile(filepath.Join(dir, "jobs.report.html"))
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range r.Jobs {
		equal, ok := want[j.Name]
		if !ok {
			t.Errorf("%s: not a job, or twice", j.Name)
			continue
		}
		delete(want, j.Name)
		attempts := 1
		for shard, name := range slowName {
			if j.Name == name {
				attempts = 2
				if shard != killed && (j.ResumedFrom <= 0 || j.BytesRead >= j.VirtualSize) {
					t.Errorf("%s: resumed from %d, %d bytes were read: the journal was not written", j.Name, j.ResumedFrom, j.BytesRead)
				}
			}
		}
		if j.Status != report.StatusOK || j.Attempts != attempts {
			t.Errorf("%s: %s after %d attempts, want %d", j.Name, j.Status, j.Attempts, attempts)
		}
		if !strings.Contains(string(page), j.Name) {
			t.Errorf("%s is not on the page", j.Name)
		}
		format := "raw"
		if filepath.Ext(targets[j.Name]) == ".qcow2" {
			format = "qcow2"
		}
		peer.Run(t, "qemu-img", "compare", "-q", "-f", equal.format, "-F", format, equal.path, targets[j.Name])
	}
	for name := range want {
		t.Errorf("%s is not in the report", name)
	}
	done := 0
	for shard := range slow {
		done += inShard[shard] - 1
	}
	if len(before) != done {
		t.Errorf("%d targets were done before, want %d", len(before), done)
	}
	for path, was := range before {
		if fi, err := os.Stat(path); err != nil || !os.SameFile(was, fi) || !fi.ModTime().Equal(was.ModTime()) {
			t.Errorf("%s was made again", path)
		}
	}
	for shard := range shards {
		restarts := map[bool]string{true: "1", false: "0"}[slow[shard] != nil]
		if job := s.job(task(shard)); job["JobState"] != "COMPLETED" || job["Restarts"] != restarts {
			t.Errorf("shard %d: %s, %s restarts, want %s", shard, job["JobState"], job["Restarts"], restarts)
		}
	}
	if log, err := os.ReadFile(filepath.Join(dir, "vddkcp-"+task(killed)+".log")); err != nil || !strings.Contains(string(log), "Killed") {
		t.Errorf("the log does not have the first run: %v\n%s", err, log)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*partial*"))
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}

	// A job file that is wrong ends each task, and the merge says which are missing.
	wrong := filepath.Join(dir, "wrong.json")
	put(t, wrong, `{"version":1,"jobs":[{"source":"a","targt":"b"}]}`)
	array, merge = s.submit(wrong, "2")
	if job := s.ended(merge); job["ExitCode"] != "1:0" {
		t.Errorf("merge of nothing: %v", job)
	}
	for shard := range 2 {
		if job := s.job(task(shard)); job["JobState"] != "FAILED" || job["ExitCode"] != "2:0" || job["Restarts"] != "0" {
			t.Errorf("a wrong job file: %s, %s, %s restarts", job["JobState"], job["ExitCode"], job["Restarts"])
		}
	}
	if log, err := os.ReadFile(filepath.Join(dir, "vddkcp-merge-"+merge+".log")); err != nil || !strings.Contains(string(log), "no report of shards 0,1 of 2") {
		t.Errorf("merge of nothing: %v\n%s", err, log)
	}

	// Slurm keeps environments and scripts: no secret among them.
	err = filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // files of Slurm's come and go
		}
		if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), "geheim") {
			t.Errorf("%s has the password", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
