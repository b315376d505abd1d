package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

// The chaos tests kill copies again and again. VDDKCP_CHAOS is the number of copies.
// `make chaos` runs many copies of a larger disk, which has VDDKCP_CHAOS_SIZE bytes.
const (
	chaosRuns  = 15
	chaosSize  = 192 << 20
	chaosRate  = 60 << 20 // bytes a second, of the source
	chaosEvery = 200 * time.Millisecond
)

func chaosSetting(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return otherwise
}

// needChaos returns the number of copies to run. It skips the test with -short, or if
// VDDKCP_CHAOS is 0.
func needChaos(t *testing.T) int {
	t.Helper()
	runs := chaosSetting("VDDKCP_CHAOS", chaosRuns)
	if testing.Short() || runs == 0 {
		t.Skip("chaos takes its time: not with -short or VDDKCP_CHAOS=0")
	}
	return runs
}

// chaosTarget is the target of a copy.
type chaosTarget struct {
	name  string
	args  []string
	start func(t *testing.T, dir string, size int) (dst, journal string)
	same  func(t *testing.T, disk, dst string)
}

var chaosTargets = []chaosTarget{
	{"raw", nil, func(t *testing.T, dir string, _ int) (string, string) {
		dst := filepath.Join(dir, "out.raw")
		return dst, dst + ".partial.journal"
	}, func(t *testing.T, disk, dst string) { peer.Run(t, "cmp", disk, dst) }},
	{"nbd", nil, func(t *testing.T, dir string, size int) (string, string) {
		file, socket, pid := filepath.Join(dir, "target"), filepath.Join(dir, "s"), filepath.Join(dir, "pid")
		peer.Run(t, "truncate", "-s", strconv.Itoa(size), file)
		peer.Run(t, "nbdkit", "-U", socket, "-P", pid, "file", file)
		t.Cleanup(func() { exec.Command("sh", "-c", "kill $(cat "+pid+")").Run() })
		return "nbd+unix:///?socket=" + socket, filepath.Join(dir, "journal")
	}, func(t *testing.T, disk, dst string) {
		peer.Run(t, "cmp", disk, filepath.Join(filepath.Dir(strings.TrimPrefix(dst, "nbd+unix:///?socket=")), "target"))
	}},
	{"qcow2", []string{"--compress", "zlib", "--cluster-size", "4KiB"}, func(t *testing.T, dir string, _ int) (string, string) {
		dst := filepath.Join(dir, "out.qcow2")
		return dst, dst + ".partial.journal"
	}, func(t *testing.T, disk, dst string) {
		peer.Run(t, "qemu-img", "check", "-q", dst)
		peer.Run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", disk, dst)
	}},
}

// chaosBinary returns the path of a vddkcp that kills itself at points that a test
// chooses. The first call builds it.
func chaosBinary(t *testing.T) string {
	t.Helper()
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	chaosBuilt.Do(func() {
		path := filepath.Join(filepath.Dir(program), "killpoints", "vddkcp")
		build := exec.Command("go", "build", "-tags", "killpoints", "-o", path, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			chaosBuildError = fmt.Errorf("go build: %w\n%s", err, out)
		}
		chaosPath = path
	})
	if chaosBuildError != nil {
		t.Fatal(chaosBuildError)
	}
	return chaosPath
}

var (
	chaosBuilt      sync.Once
	chaosPath       string
	chaosBuildError error
)

// chaosCopy is a copy that a test kills.
func chaosCopy(t *testing.T, binary string, target chaosTarget, disk, dst, journal string, env ...string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	args := append([]string{"--resume", "--progress", "none", "--rate-limit", strconv.Itoa(chaosRate), "--report", filepath.Join(filepath.Dir(journal), "report.json")}, target.args...)
	if target.name == "nbd" {
		args = append(args, "--journal", journal)
	}
	cmd := exec.Command(binary, append(args, disk, dst)...)
	cmd.Env = append(append(os.Environ(), "VDDKCP_CHECKPOINT_EVERY="+chaosEvery.String()), env...)
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	return cmd, stderr
}

// TestChaosKills kills copies at random moments, again and again. The target must be
// identical in the end, and only little data may be read twice.
func TestChaosKills(t *testing.T) {
	peer.Need(t, "nbdkit", "cmp", "qemu-img")
	runs, size := needChaos(t), chaosSetting("VDDKCP_CHAOS_SIZE", chaosSize)
	binary := chaosBinary(t)
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, size)
	kills, most := 0, int64(0)
	for run := range runs {
		r := rand.New(rand.NewPCG(uint64(run), 1))
		target := chaosTargets[run%len(chaosTargets)]
		dir := t.TempDir()
		dst, journal := target.start(t, dir, size)
		for counted := 0; ; {
			from, tail := lastCheckpoint(journal)
			cmd, stderr := chaosCopy(t, binary, target, disk, dst, journal)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			var kill <-chan time.Time
			if counted < 3 { // each within the first half of the rest
				left := float64(int64(size)-from) / chaosRate
				kill = time.After(time.Duration((0.1 + r.Float64()*0.4) * left * float64(time.Second)))
			}
			var err error
			read := int64(0)
			select {
			case <-kill:
				read = bytesRead(t, cmd.Process.Pid)
				cmd.Process.Kill()
				err = <-ended
			case err = <-ended:
			}
			if err == nil {
				break
			}
			if cmd.ProcessState.ExitCode() != -1 {
				t.Fatalf("run %d (%s): %v\n%s", run, target.name, err, stderr)
			}
			to, _ := lastCheckpoint(journal)
			if to > int64(size)/20 && to < int64(size)*19/20 {
				counted++
				kills++
			}
			// Data above the checkpoint that was read before is read again.
			// The data of the tail was read from the target.
			again := read - tail - (to - from)
			most = max(most, again)
		}
		target.same(t, disk, dst)
		for _, left := range []string{journal, dst + ".partial"} {
			if _, err := os.Lstat(left); err == nil {
				t.Errorf("run %d (%s): %s was left", run, target.name, left)
			}
		}
	}
	t.Logf("%d runs, %d kills, all identical; at most %d bytes were read again", runs, kills, most)
	if kills < 3*runs {
		t.Errorf("only %d kills in %d runs", kills, runs)
	}
	// An interval's, those that were being made durable meanwhile, and what is in
	// flight and read ahead.
	if bound := int64(4*chaosEvery.Seconds()*chaosRate) + 32<<20; most > bound {
		t.Errorf("%d bytes were read again after one kill, want at most %d", most, bound)
	}
}

// TestChaosKillPoints kills a copy at each of the most critical points. It must be
// resumable.
func TestChaosKillPoints(t *testing.T) {
	peer.Need(t, "nbdkit", "cmp", "qemu-img")
	needChaos(t)
	binary := chaosBinary(t)
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 48<<20)
	for _, target := range chaosTargets {
		for _, point := range []string{"checkpoint", "sync", "slot", "slot written", "rename", "renamed", "l2"} {
			for _, pass := range []int{1, 2} {
				name := fmt.Sprintf("%s, killed at %s:%d", target.name, point, pass)
				dir := t.TempDir()
				dst, journal := target.start(t, dir, 48<<20)
				cmd, stderr := chaosCopy(t, binary, target, disk, dst, journal, fmt.Sprintf("VDDKCP_KILL_AT=%s:%d", point, pass))
				switch err := cmd.Run(); {
				case err == nil: // it does not come by there
				case cmd.ProcessState.ExitCode() != -1:
					t.Errorf("%s: %v\n%s", name, err, stderr)
				case point == "renamed":
					// It is whole and has its name.
				default:
					again, stderr := chaosCopy(t, binary, target, disk, dst, journal)
					if err := again.Run(); err != nil {
						t.Errorf("%s: --resume: %v\n%s", name, err, stderr)
						continue
					}
				}
				target.same(t, disk, dst)
			}
		}
	}
}

// lastCheckpoint returns the offset at which a copy would resume, and how many bytes
// before it would be read from the target.
func lastCheckpoint(path string) (offset, tail int64) {
	entries, err := journal.Load(path)
	if err != nil || len(entries) == 0 {
		return 0, 0
	}
	for _, s := range entries[0].Tail {
		tail += s.Len
	}
	return entries[0].Offset, tail
}

// bytesRead returns how many bytes a process has read so far.
func bytesRead(t *testing.T, pid int) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	if _, err := fmt.Sscanf(string(text), "rchar: %d", &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestChaosOfVDDK reads a disk with a library whose processes die, hang and slow down
// at random, and are killed by the test. The copy must be complete in the end.
func TestChaosOfVDDK(t *testing.T) {
	runs := needChaos(t)
	peer.Need(t, "cmp")
	binary := chaosBinary(t)
	if err := installWorker(filepath.Dir(binary)); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 64<<20)
	kills, restarts := 0, int64(0)
	for run := range max(runs/3, 1) {
		r := rand.New(rand.NewPCG(uint64(run), 2))
		lib := testlib.New(t)
		lib.AddDisk("[ds] vm/vm.vmdk", disk)
		// Processes that were killed in the middle of a call left things behind.
		lib.Conf("bandwidth 60", "latency read 1000",
			fmt.Sprintf("fault ReadAsync at=%d do=segv times=2", 10+r.IntN(30)),
			fmt.Sprintf("fault ReadAsync at=%d do=hang once", 10+r.IntN(30)),
			fmt.Sprintf("fault ReadAsync every=%d do=fail code=1", 11+r.IntN(20)),
			fmt.Sprintf("fault QueryAllocatedBlocks at=%d do=abort once", 1+r.IntN(2)),
			"fault Open at=1 do=abort once")
		dir := t.TempDir()
		out, reportFile := filepath.Join(dir, "out.raw"), filepath.Join(dir, "report.json")
		cmd := exec.Command(binary, "--resume", "--progress", "none", "--report", reportFile, "--timeout", "2s", "--connections", strconv.Itoa(1+r.IntN(3)),
			"--libdir", lib.Dir, "--server", "127.0.0.1", "--port", "9", "--user", "u", "--vm", "moref=1",
			"--thumbprint", "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33", "[ds] vm/vm.vmdk", out)
		cmd.Env = append(os.Environ(), "VDDKCP_PASSWORD=secret")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		var err error
		for running := true; running; {
			select {
			case err = <-ended:
				running = false
			case <-time.After(time.Duration(100+r.IntN(400)) * time.Millisecond):
				signal := syscall.SIGKILL
				if r.IntN(2) == 0 {
					signal = syscall.SIGSTOP // it hangs
				}
				for _, pid := range children(t, cmd.Process.Pid) {
					if r.IntN(2) == 0 && kills < 4*(run+1) && (signal == syscall.SIGKILL || executed(pid, cmd.Process.Pid)) {
						syscall.Kill(pid, signal)
						kills++
					}
				}
			}
		}
		if err != nil {
			t.Fatalf("run %d: %v\n%s", run, err, &stderr)
		}
		peer.Run(t, "cmp", disk, out)
		var got report.Report
		text, err := os.ReadFile(reportFile)
		if err := errors.Join(err, json.Unmarshal(text, &got)); err != nil {
			t.Fatal(err)
		}
		restarts += got.WorkerRestarts
		if got.WorkerRestarts < 3 {
			t.Errorf("run %d: %d workers were replaced, want 3 or more\n%s", run, got.WorkerRestarts, text)
		}
	}
	t.Logf("%d runs, %d workers killed or stopped, %d replaced, all identical", max(runs/3, 1), kills, restarts)
}

// executed reports whether a child process runs another program than its parent. Until
// then the thread that started the child waits in the kernel (CLONE_VFORK), so the
// parent would hang if the child were stopped earlier.
func executed(child, parent int) bool {
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", parent))
	if err != nil {
		return false
	}
	other, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", child))
	return err == nil && other != own
}

// children returns the IDs of the child processes of a process.
func children(t *testing.T, pid int) (pids []int) {
	t.Helper()
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		text, _ := os.ReadFile(path) // the thread may have ended
		for _, field := range strings.Fields(string(text)) {
			if n, err := strconv.Atoi(field); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}
