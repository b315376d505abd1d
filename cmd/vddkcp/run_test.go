package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
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

// writeJobs writes a job file and returns its path.
func writeJobs(t *testing.T, dir string, limits, defaults map[string]any, jobs []map[string]any) string {
	t.Helper()
	file := map[string]any{"version": 1, "jobs": jobs}
	if limits != nil {
		file["limits"] = limits
	}
	if defaults != nil {
		file["defaults"] = defaults
	}
	text, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "jobs.json")
	put(t, path, string(text))
	return path
}

func readBatchReport(t *testing.T, path string) *batch.Report {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := new(batch.Report)
	if err := json.Unmarshal(text, r); err != nil {
		t.Fatal(err)
	}
	return r
}

// vddkBatch makes a batch of disks on one host of the stand-in for VMware's library.
func vddkBatch(t *testing.T, disks int, limits, more map[string]any, conf ...string) (lib *testlib.Library, jobs, report string) {
	t.Helper()
	peer.Need(t, "gcc")
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(program)); err != nil {
		t.Fatal(err)
	}
	lib = testlib.New(t)
	thumbprint := pairs(strings.Repeat("AB", 20))
	lib.Conf(append([]string{"user u", "password p", "port 1", "thumbprint " + thumbprint, "transport nbd"}, conf...)...)
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.raw")
	random(t, disk, 1<<20)
	var list []map[string]any
	for i := range disks {
		lib.AddDisk(fmt.Sprintf("[ds] %d.vmdk", i), disk)
		list = append(list, map[string]any{"source": fmt.Sprintf("[ds] %d.vmdk", i), "target": fmt.Sprintf("out-%d.raw", i)})
	}
	defaults := map[string]any{"server": "localhost", "port": 1, "user": "u", "password": "p", "vm": "moref=1", "thumbprint": thumbprint, "libdir": lib.Dir, "host": "esxi1"}
	for key, value := range more {
		defaults[key] = value
	}
	return lib, writeJobs(t, dir, limits, defaults, list), filepath.Join(dir, "report.json")
}

// TestBatchKeepsAHostsBudget checks that many disks of one host never use more memory
// and connections than the host has.
func TestBatchKeepsAHostsBudget(t *testing.T) {
	for _, c := range []struct {
		name         string
		limits, more map[string]any
		conf         []string
		most         int64 // connections at once
	}{
		{"memory", map[string]any{"total": 60, "nfc_buffer": "16MiB"}, nil, []string{"host-memory 16", "host-connections 52"}, 4},
		{"memory of fixed connections", map[string]any{"total": 60, "nfc_buffer": "16MiB"}, map[string]any{"connections": 2}, []string{"host-memory 16"}, 4},
		{"connections", map[string]any{"total": 60, "connections": 5}, map[string]any{"nfc_buffers": "64KiBx1"}, []string{"host-connections 5"}, 5},
		{"disks", map[string]any{"total": 60, "per_host": 3}, map[string]any{"connections": 1}, []string{"host-connections 3"}, 3},
		{"disks of the server", map[string]any{"total": 60, "per_server": 2}, map[string]any{"connections": 1}, []string{"host-connections 2"}, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			lib, jobs, report := vddkBatch(t, 30, c.limits, c.more, append(c.conf, "latency read 2000")...)
			if got := vddkcp(t, "run", jobs, "--report", report, "--progress", "none"); got.exit != 0 {
				t.Fatalf("%+v", got)
			}
			f := lib.Figures()
			if f["alloc-failures"] != 0 || int64(f["max-handles"]) > c.most || f["max-handles"] == 0 {
				t.Errorf("%v", f)
			}
			r := readBatchReport(t, report)
			for _, j := range r.Jobs {
				if j.Retries != 0 || j.WorkerRestarts != 0 {
					t.Errorf("%s: %d retries, %d restarts", j.Name, j.Retries, j.WorkerRestarts)
				}
			}
		})
	}
}

// TestBatchThatMayGoOn checks that a batch in which every job fails by a transient
// error ends with exit status 75 after its rounds, and can be resumed.
func TestBatchThatMayGoOn(t *testing.T) {
	const disks = 3
	// Each attempt opens a library, whose second read fails: two rounds of three.
	lib, jobs, report := vddkBatch(t, disks, map[string]any{"rounds": 1, "total": 2}, map[string]any{"retries": 0, "connections": 1, "request_size": "64KiB"},
		"fault ReadAsync at=2 do=fail code=14009 times=6")
	got := vddkcp(t, "run", jobs, "--report", report, "--progress", "none")
	r := readBatchReport(t, report)
	if got.exit != 75 || r.Exit != 75 || r.Counts != (batch.Counts{Failed: disks}) {
		t.Fatalf("%+v\n%+v", r.Counts, got)
	}
	for _, j := range r.Jobs {
		if j.Attempts != 2 || j.Exit != 75 {
			t.Errorf("%s: %d attempts, exit %d", j.Name, j.Attempts, j.Exit)
		}
	}
	if got := vddkcp(t, "run", jobs, "--resume", "--report", report, "--progress", "none"); got.exit != 0 {
		t.Fatalf("%+v", got)
	}
	for i := range disks {
		peer.Run(t, "cmp", lib.Disk(fmt.Sprintf("[ds] %d.vmdk", i)), filepath.Join(filepath.Dir(jobs), fmt.Sprintf("out-%d.raw", i)))
	}
}

// TestBatchSecretsStayInside checks that the password in a job file appears in no
// argument, environment, log, report or state file, and that the password in the
// environment is used for one server only.
func TestBatchSecretsStayInside(t *testing.T) {
	const marker = "m4rk3r-0f-a-job"
	lib, jobs, report := vddkBatch(t, 1, nil, map[string]any{"password": marker, "before": []string{"env"}}, "hostile-log", "log-reads")
	lib.Conf("password "+marker, "fault ReadAsync at=1 do=hang")
	logs := filepath.Join(filepath.Dir(jobs), "logs")
	cmd := command(t, "run", jobs, "--report", report, "--progress", "none", "--log-dir", logs, "-v")
	cmd.Env = append(os.Environ(), "VDDKCP_PASSWORD=other-"+marker)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	for lib.Calls()["ReadAsync"] == 0 {
		select {
		case <-ended:
			t.Fatalf("it ended: %s", stderr.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	if workers := findSecret(t, marker, cmd.Process.Pid); workers == 0 {
		t.Error("no worker was seen")
	}
	cmd.Process.Signal(syscall.SIGTERM)
	<-ended
	if got := cmd.ProcessState.ExitCode(); got != 143 {
		t.Errorf("exit status %d, want 143\n%s", got, stderr.String())
	}
	shown := stderr.String()
	files, err := filepath.Glob(filepath.Join(filepath.Dir(jobs), "*"))
	if err != nil {
		t.Fatal(err)
	}
	more, _ := filepath.Glob(filepath.Join(logs, "*"))
	for _, name := range append(files, more...) {
		if text, err := os.ReadFile(name); err == nil && name != jobs {
			shown += string(text)
		}
	}
	if strings.Contains(shown, marker) {
		t.Error("the output of the batch or a file contains the secret")
	}
	if !strings.Contains(shown, "VDDKCP_JOB=0") {
		t.Error("the output does not contain the environment of the command")
	}
}

// TestSecondSignalEndsCommands checks that an after command continues after the first
// signal, and that the second signal ends it together with its child processes and
// vddkcp.
func TestSecondSignalEndsCommands(t *testing.T) {
	dir := t.TempDir()
	random(t, filepath.Join(dir, "disk"), 4096)
	pids := filepath.Join(dir, "pids")
	hook := []string{"sh", "-c", `trap "" TERM INT; sleep 1000 & echo "$$ $!" >$1.new; mv $1.new $1; wait`, "-", pids}
	jobs := writeJobs(t, dir, nil, nil, []map[string]any{{"source": "disk", "target": "out", "after": hook}})
	cmd := command(t, "run", jobs, "--progress", "none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var text []byte
	for begun := time.Now(); len(text) == 0; time.Sleep(5 * time.Millisecond) {
		if text, _ = os.ReadFile(pids); time.Since(begun) > time.Minute {
			cmd.Process.Kill()
			t.Fatal("the command did not begin")
		}
	}
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Error(err)
		}
	}
	cmd.Wait()
	if got := cmd.ProcessState.ExitCode(); got != 143 && got != 130 {
		t.Errorf("exit status %d", got)
	}
	for _, pid := range strings.Fields(string(text)) {
		alive := func() bool {
			stat, err := os.ReadFile("/proc/" + pid + "/stat")
			return err == nil && !strings.Contains(string(stat), ") Z")
		}
		for begun := time.Now(); alive(); time.Sleep(5 * time.Millisecond) {
			if time.Since(begun) > 10*time.Second {
				t.Errorf("process %s lives", pid)
				n, _ := strconv.Atoi(pid)
				syscall.Kill(n, syscall.SIGKILL)
				break
			}
		}
	}
}

// TestBatchSurvivesKills kills a batch again and again. At the end all jobs are done,
// each target was made once, and no other files are left.
func TestBatchSurvivesKills(t *testing.T) {
	dir := t.TempDir()
	var list []map[string]any
	const disks = 12
	for i := range disks {
		name := fmt.Sprintf("disk-%d", i)
		random(t, filepath.Join(dir, name), 2<<20+i*4096)
		list = append(list, map[string]any{"name": fmt.Sprintf("job %d", i), "source": name, "target": fmt.Sprintf("out-%d", i)})
	}
	jobs := writeJobs(t, dir, map[string]any{"total": 3, "rate": "40MiB"}, map[string]any{"request_size": "64KiB"}, list)
	reportFile := filepath.Join(dir, "report.json")
	made := map[string]os.FileInfo{}
	look := func() {
		for i := range disks {
			name := fmt.Sprintf("out-%d", i)
			fi, err := os.Stat(filepath.Join(dir, name))
			if err != nil {
				continue
			}
			if before, ok := made[name]; ok && !os.SameFile(before, fi) {
				t.Errorf("%s was made again", name)
			}
			made[name] = fi
		}
	}
	r := rand.New(rand.NewPCG(16, 1))
	kills := 0
	for n := 0; ; n++ {
		cmd := command(t, "run", jobs, "--resume", "--report", reportFile, "--progress", "none")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if n < 8 {
			timer := time.AfterFunc(time.Duration(30+r.IntN(150))*time.Millisecond, func() { cmd.Process.Kill() })
			cmd.Wait()
			timer.Stop()
		} else {
			cmd.Wait()
		}
		look()
		if cmd.ProcessState.Exited() {
			if cmd.ProcessState.ExitCode() != 0 {
				t.Fatalf("%s", stderr.String())
			}
			break
		}
		kills++
	}
	if kills < 3 {
		t.Errorf("only %d kills", kills)
	}
	if got := readBatchReport(t, reportFile); got.Counts != (batch.Counts{Done: disks}) || len(made) != disks {
		t.Errorf("%+v, %d targets", got.Counts, len(made))
	}
	for i := range disks {
		peer.Run(t, "cmp", filepath.Join(dir, fmt.Sprintf("disk-%d", i)), filepath.Join(dir, fmt.Sprintf("out-%d", i)))
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if strings.Contains(f.Name(), "partial") || strings.Contains(f.Name(), ".lock") || strings.Contains(f.Name(), ".changes") || strings.Contains(f.Name(), ".new") {
			t.Errorf("%s is left", f.Name())
		}
	}
}

// TestBatchOnAFullFileSystem checks that a full file system fails only the jobs that
// do not fit, and that these can be resumed.
func TestBatchOnAFullFileSystem(t *testing.T) {
	peer.NeedRoot(t)
	dir, full := t.TempDir(), filepath.Join(t.TempDir(), "full")
	if err := os.Mkdir(full, 0o700); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", full)
	t.Cleanup(func() { peer.Run(t, "umount", full) })
	random(t, filepath.Join(dir, "disk"), 4<<20)
	var list []map[string]any
	for i := range 6 {
		list = append(list, map[string]any{"source": "disk", "target": fmt.Sprintf("%s/%d", full, i)})
	}
	list = append(list, map[string]any{"source": "disk", "target": "elsewhere"})
	jobs := writeJobs(t, dir, map[string]any{"total": 7, "rate": "40MiB", "rounds": 1}, nil, list)
	reportFile := filepath.Join(dir, "report.json")
	got := vddkcp(t, "run", jobs, "--report", reportFile, "--progress", "none")
	r := readBatchReport(t, reportFile)
	if got.exit != 4 || r.Jobs[6].Status != report.StatusOK || r.Counts.Done+r.Counts.Failed != 7 || r.Counts.Failed < 4 {
		t.Fatalf("%+v\n%+v", r.Counts, got)
	}
	// As long as there is no room they still can.
	got = vddkcp(t, "run", jobs, "--resume", "--report", reportFile, "--progress", "none")
	for _, j := range readBatchReport(t, reportFile).Jobs {
		// A job that began when the others had taken all the room has done nothing.
		if _, err := os.Stat(filepath.Join(full, j.Name) + ".partial"); err != nil {
			continue
		}
		if j.Status == report.StatusFailed && (j.Exit != 75 || !strings.Contains(j.Hint, "--resume")) {
			t.Errorf("without room %s ends with %d: %s (%s)", j.Name, j.Exit, j.Error, j.Hint)
		}
	}
	if got.exit != 4 {
		t.Errorf("%+v", got)
	}
	peer.Run(t, "mount", "-o", "remount,size=40m", full)
	if got := vddkcp(t, "run", jobs, "--resume", "--report", reportFile, "--progress", "none"); got.exit != 0 {
		t.Fatalf("%+v", got)
	}
	for i := range 6 {
		peer.Run(t, "cmp", filepath.Join(dir, "disk"), fmt.Sprintf("%s/%d", full, i))
	}
}

// TestBatchKilledAtTheRename kills a batch right before or after a target gets its
// name. The next run must end with the copy at the target, even if the old file there
// was modified.
func TestBatchKilledAtTheRename(t *testing.T) {
	binary := chaosBinary(t)
	for _, target := range []string{"out.raw", "out.qcow2", "out.vmdk"} {
		for point, made := range map[string]bool{"rename": false, "renamed": true} {
			t.Run(target+" killed at "+point, func(t *testing.T) {
				dir := t.TempDir()
				src, dst, report := filepath.Join(dir, "disk"), filepath.Join(dir, target), filepath.Join(dir, "report.json")
				random(t, src, 1<<20)
				put(t, dst, strings.Repeat("O", 1<<20))
				jobs := writeJobs(t, dir, nil, nil, []map[string]any{{"source": "disk", "target": target, "force": true}})
				run := func(env string, args ...string) (status int, stderr string) {
					cmd := exec.Command(binary, append([]string{"run", jobs, "--progress", "none", "--report", report}, args...)...)
					cmd.Env = append(os.Environ(), env)
					out, err := cmd.CombinedOutput()
					if err != nil && cmd.ProcessState == nil {
						t.Fatal(err)
					}
					return cmd.ProcessState.ExitCode(), string(out)
				}
				if status, text := run("VDDKCP_KILL_AT=" + point); status != -1 {
					t.Fatalf("exit status %d, want to be killed\n%s", status, text)
				}
				// Somebody uses the old target, or already the new one.
				if err := os.Chtimes(dst, time.Now(), time.Now().Add(time.Second)); err != nil {
					t.Fatal(err)
				}
				before, err := os.Stat(dst)
				if err != nil {
					t.Fatal(err)
				}
				if status, text := run("", "--resume"); status != 0 {
					t.Fatalf("--resume: exit status %d\n%s", status, text)
				}
				after, err := os.Stat(dst)
				if err != nil {
					t.Fatal(err)
				}
				if os.SameFile(before, after) != made {
					t.Errorf("the target is the file that was there: %v, want %v", os.SameFile(before, after), made)
				}
				if got := vddkcp(t, "verify", src, dst); got.exit != 0 {
					t.Errorf("the target is not the source: %+v", got)
				}
				if left, _ := filepath.Glob(dst + ".*"); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}

// TestBatchWhoseBackingChanged checks that a job which was done runs again if the
// backing of its target has changed.
func TestBatchWhoseBackingChanged(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	content(t, filepath.Join(dir, "src"), 1, 1<<20)
	content(t, filepath.Join(dir, "base"), 1, 1<<19)
	jobs := writeJobs(t, dir, nil, nil, []map[string]any{{"source": "src", "target": "o.qcow2", "backing": "base", "backing_format": "raw"}})
	run := func(args ...string) string {
		t.Helper()
		r := vddkcp(t, append([]string{"run", jobs, "--progress", "none"}, args...)...)
		if r.exit != 0 {
			t.Fatalf("%+v", r)
		}
		peer.Run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", filepath.Join(dir, "src"), filepath.Join(dir, "o.qcow2"))
		return r.stderr
	}
	run()
	if said := run("--resume"); strings.Contains(said, "runs again") {
		t.Errorf("with the same backing: %s", said)
	}
	content(t, filepath.Join(dir, "base"), 2, 1<<19)
	if said := run("--resume"); !strings.Contains(said, "the job runs again: the backing of its target has changed since the job was done") {
		t.Errorf("with another backing: %s", said)
	}
}
