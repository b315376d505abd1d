package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/export"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

// keepDisk is the size of the disks of these tests.
const keepDisk = 24 << 20

// keepers are the kinds of targets that can be resumed.
var keepers = []chaosTarget{
	chaosTargets[0], chaosTargets[1], chaosTargets[2],
	{"overlay", []string{"--backing", "base.raw", "--backing-format", "raw"}, func(t *testing.T, dir string, size int) (string, string) {
		// Not a hole: each cluster is compared with it.
		if err := os.WriteFile(filepath.Join(dir, "base.raw"), bytes.Repeat([]byte("base"), size/4), 0o600); err != nil {
			t.Fatal(err)
		}
		dst := filepath.Join(dir, "out.qcow2")
		return dst, dst + ".partial.journal"
	}, func(t *testing.T, disk, dst string) {
		peer.Run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", disk, dst)
	}},
	{"block device", nil, func(t *testing.T, dir string, size int) (string, string) {
		device, _ := loop(t, int64(size), 0x5A)
		return device, filepath.Join(dir, "journal")
	}, func(t *testing.T, disk, dst string) { peer.Run(t, "cmp", disk, dst) }},
}

// standInSource is a disk behind the stand-in for VMware's library.
type standInSource struct {
	*testlib.Library
	args []string // of vddkcp, the source among them
}

func newStandInSource(t *testing.T, disk string, conf ...string) standInSource {
	t.Helper()
	lib := testlib.New(t)
	lib.AddDisk("[ds] vm/vm.vmdk", disk)
	lib.Conf(conf...)
	return standInSource{lib, []string{
		"--libdir", lib.Dir, "--server", "127.0.0.1", "--port", "9", "--user", "u", "--vm", "moref=1", "--snapshot", "snapshot-7",
		"--thumbprint", "00:11:22:33:44:55:66:77:88:99:aa:bb:cc:dd:ee:ff:00:11:22:33", "[ds] vm/vm.vmdk",
	}}
}

// keepRun runs a binary and returns its exit status and output.
func keepRun(t *testing.T, binary string, env []string, args ...string) result {
	t.Helper()
	cmd := exec.Command(binary, append([]string{"--progress", "none"}, args...)...)
	cmd.Env = append(append(os.Environ(), "VDDKCP_PASSWORD=secret"), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	return ended(t, cmd, cmd.Run(), &stderr)
}

// isKept reports which files of a stopped copy exist: the .partial file, and a journal
// with entries.
func isKept(dst, journal string) (partial, entries bool) {
	_, err := os.Lstat(dst + ".partial")
	_, journalErr := os.Lstat(journal)
	return err == nil || journal != dst+".partial.journal", journalErr == nil
}

// TestFailuresOfTheSourceKeepWork checks that a copy whose VDDK source fails
// permanently can be resumed later, for every kind of failure and of target, with and
// without an earlier checkpoint.
func TestFailuresOfTheSourceKeepWork(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "nbdkit", "cmp", "qemu-img", "losetup")
	binary := chaosBinary(t)
	if err := installWorker(filepath.Dir(binary)); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, keepDisk)
	const crash = "fault ReadAsync at=15 once do=segv"
	for i, c := range []struct {
		name   string
		faults []string
	}{
		{name: "the host is away", faults: []string{crash, "fault ConnectEx from=2 global do=fail code=18000"}},
		{name: "reads fail", faults: []string{"fault ReadAsync from=15 global do=fail code=14009"}},
		{name: "reads hang", faults: []string{"fault ReadAsync from=15 global do=hang"}},
		{name: "the password is another", faults: []string{crash, "fault ConnectEx from=2 global do=fail code=3014 log=Cannot complete login due to an incorrect user name or password."}},
		{name: "the certificate is another", faults: []string{crash, "fault Open from=2 global do=fail code=1 log=Failed to verify SSL certificate: actual thumbprint=11:22:33:44 expected=00:11"}},
		{name: "the file is not found", faults: []string{crash, "fault Open from=2 global do=fail code=4"}},
		{name: "a parameter is invalid", faults: []string{crash, "fault Open from=2 global do=fail code=3"}},
	} {
		for k, target := range keepers {
			for _, checkpoint := range []bool{false, true} {
				// All kinds of targets have the first failure, and each other one has one
				// kind: what they have to do is the same.
				if i > 0 && k != i%len(keepers) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/checkpoint %v", c.name, target.name, checkpoint), func(t *testing.T) {
					t.Parallel()
					dir := t.TempDir()
					dst, journal := target.start(t, dir, keepDisk)
					src := newStandInSource(t, disk, append([]string{"transport nbdssl"}, c.faults...)...)
					var env []string
					if checkpoint {
						env = []string{"VDDKCP_CHECKPOINT_EVERY=1ns"}
					}
					args := append([]string{"--retry-timeout", "1s", "--connections", "1", "--request-size", "1MiB"}, target.args...)
					if journal != dst+".partial.journal" {
						args = append(args, "--journal", journal)
					}
					args = append(append(args, src.args...), dst)
					r := keepRun(t, binary, env, args...)
					partial, entries := isKept(dst, journal)
					if r.exit != 75 || !partial || !entries {
						t.Fatalf("exit status %d, want 75; .partial %v, journal %v\n%s", r.exit, partial, entries, r.stderr)
					}
					if !strings.Contains(r.stderr, "run again with --resume to continue the copy at byte ") || strings.Contains(r.stderr, "at byte 0\n") {
						t.Errorf("no work is left:\n%s", r.stderr)
					}
					src.Reset("transport nbdssl")
					if r := keepRun(t, binary, nil, append([]string{"--resume"}, args...)...); r.exit != 0 {
						t.Fatalf("--resume: exit status %d\n%s", r.exit, r.stderr)
					}
					target.same(t, disk, dst)
				})
			}
		}
	}
}

// TestGivingUp checks that a copy can be resumed whichever part of it notices first
// that the source has given up: the reader, the producer that waits for a buffer, or
// the query for the allocation. VDDKCP_CHAOS is the number of runs of each kind.
func TestGivingUp(t *testing.T) {
	runs := max(needChaos(t)/5, 1)
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	disk, big := filepath.Join(t.TempDir(), "disk.raw"), filepath.Join(t.TempDir(), "big.raw")
	random(t, disk, 64<<20)
	sparse(t, big, 300<<30, 20<<30)
	for _, c := range []struct {
		name, disk, ext string
		args, faults    []string
	}{
		{"one connection", disk, "raw", []string{"--connections", "1"}, []string{"fault ReadAsync at=30 once do=segv", "fault ConnectEx from=2 global do=fail code=18000"}},
		{"qcow2", disk, "qcow2", []string{"--connections", "1"}, []string{"fault ReadAsync at=30 once do=segv", "fault ConnectEx from=2 global do=fail code=18000"}},
		{"four connections", disk, "raw", []string{"--connections", "4"}, []string{"fault ReadAsync at=10 do=segv", "fault ConnectEx from=5 global do=fail code=18000"}},
		{"reads fail", disk, "raw", []string{"--connections", "1"}, []string{"fault ReadAsync from=30 global do=fail code=14009"}},
		{"in a query", big, "raw", []string{"--connections", "1"}, []string{"latency query 30000", "fault ReadAsync at=1 once do=segv", "fault ConnectEx from=2 global do=fail code=18000"}},
	} {
		for run := range runs {
			t.Run(fmt.Sprintf("%s/%d", c.name, run), func(t *testing.T) {
				t.Parallel()
				src := newStandInSource(t, c.disk, append([]string{"transport nbdssl"}, c.faults...)...)
				dst := filepath.Join(t.TempDir(), "out."+c.ext)
				r := keepRun(t, path, nil, append(append(append(c.args, "--retry-timeout", "1s", "--timeout", "1s"), src.args...), dst)...)
				if partial, journal := isKept(dst, dst+".partial.journal"); r.exit != 75 || !partial || !journal {
					t.Errorf("exit status %d, .partial %v, journal %v\n%s", r.exit, partial, journal, r.stderr)
				}
			})
		}
	}
}

// sparse makes a file of a size, with 2 MiB of data at the beginning of each interval
// of "every" bytes.
func sparse(t *testing.T, path string, size, every int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("vddkcp\n\x00"), 256<<10)
	for off := int64(0); off < size; off += every {
		if _, err := f.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSourceThatChangedRemovesWork checks that a copy is removed if its source is
// another disk when it is opened again, because the target holds parts of two disks.
// The work of an earlier run is removed as well.
func TestSourceThatChangedRemovesWork(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("VDDKCP_PASSWORD", "secret")
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, keepDisk)
	for _, earlier := range []bool{false, true} {
		src := newStandInSource(t, disk, "transport nbdssl")
		dst := filepath.Join(t.TempDir(), "out.raw")
		args := append(append([]string{"--resume", "--connections", "1"}, src.args...), dst)
		if earlier {
			cmd, wait := started(t, args...)
			cmd.Process.Signal(syscall.SIGTERM)
			if r := wait(); r.exit != 143 {
				t.Fatalf("exit status %d\n%s", r.exit, r.stderr)
			}
		}
		cmd, wait := started(t, args...)
		src.Conf("capacity 140000")
		for _, pid := range children(t, cmd.Process.Pid) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		r := wait()
		partial, journal := isKept(dst, dst+".partial.journal")
		if r.exit != 1 || partial || journal || !strings.Contains(r.stderr, "opened another disk") {
			t.Errorf("earlier run %v: exit status %d, .partial %v, journal %v\n%s", earlier, r.exit, partial, journal, r.stderr)
		}
	}
}

// TestFailuresOfTheTargetKeepWork checks that a failure of the target removes the copy
// only before the first checkpoint.
func TestFailuresOfTheTargetKeepWork(t *testing.T) {
	binary := chaosBinary(t)
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 12<<20)
	for _, c := range []struct {
		name  string
		fault fault
	}{
		{"EIO", fault{Call: "write", At: 9, Errno: syscall.EIO}},
		{"EROFS", fault{Call: "write", At: 9, Errno: syscall.EROFS}},
		{"EFBIG", fault{Call: "write", At: 9, Errno: syscall.EFBIG}},
		{"rename", fault{Call: "rename", Errno: syscall.EACCES}},
	} {
		for _, checkpoint := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/checkpoint %v", c.name, checkpoint), func(t *testing.T) {
				dir, below := mountFaults(t, c.fault)
				out := filepath.Join(dir, "out.raw")
				want, env := 1, []string(nil)
				if checkpoint {
					want, env = 75, []string{"VDDKCP_CHECKPOINT_EVERY=1ns"}
				}
				// Slow enough for a checkpoint to be durable before the fault.
				r := keepRun(t, binary, env, "--request-size", "1MiB", "--rate-limit", "40MiB", disk, out)
				kept := filepath.Join(below, "out.raw")
				partial, journal := isKept(kept, kept+".partial.journal")
				if r.exit != want || partial != checkpoint || journal != checkpoint {
					t.Fatalf("exit status %d, want %d; .partial %v, journal %v\n%s", r.exit, want, partial, journal, r.stderr)
				}
				if checkpoint {
					if r := keepRun(t, binary, nil, "--resume", disk, kept); r.exit != 0 {
						t.Fatalf("--resume: exit status %d\n%s", r.exit, r.stderr)
					}
					peer.Run(t, "cmp", disk, kept)
				}
			})
		}
	}
}

// TestVanishedTargetKeepsWork checks that a copy can be resumed if the server of its
// target disappears, or refuses to be opened again.
func TestVanishedTargetKeepsWork(t *testing.T) {
	peer.Need(t, "nbdkit", "cmp")
	dir := t.TempDir()
	disk, file, journal := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "target"), filepath.Join(dir, "journal")
	random(t, disk, 32<<20)
	peer.Run(t, "truncate", "-s", "32M", file)
	for _, refuse := range []bool{false, true} {
		p := newPlace(t, false)
		kill := nbdkit(t, p, "file", file)
		_, wait := started(t, "--journal", journal, "--retry-timeout", "1s", disk, p.uri(""))
		kill()
		if refuse {
			os.Remove(p.socket())
			nbdkit(t, p, "-r", "file", file) // it can't be written any more
		}
		r := wait()
		if _, err := os.Lstat(journal); r.exit != 75 || err != nil {
			t.Errorf("refused %v: exit status %d, journal %v\n%s", refuse, r.exit, err, r.stderr)
		}
		os.Remove(journal)
	}
}

// TestSignalsKeepWork checks that the first signal of each kind ends a copy so that it
// can be resumed, for every kind of target, even if the source does not answer.
func TestSignalsKeepWork(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "nbdkit", "cmp", "qemu-img", "losetup")
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, keepDisk)
	for signal, exit := range map[syscall.Signal]int{syscall.SIGHUP: 129, syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		for i, target := range keepers {
			if signal == syscall.SIGTERM && target.name == "raw" || signal == syscall.SIGHUP && i > 1 {
				continue // TestSignals has it; one signal is as good as another
			}
			t.Run(fmt.Sprint(exit, "/", target.name), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				dst, journal := target.start(t, dir, keepDisk)
				args := target.args
				if journal != dst+".partial.journal" {
					args = append(args, "--journal", journal)
				}
				cmd, wait := started(t, append(args, disk, dst)...)
				if err := cmd.Process.Signal(signal); err != nil {
					t.Fatal(err)
				}
				r := wait()
				if partial, entries := isKept(dst, journal); r.exit != exit || !partial || !entries || strings.Contains(r.stderr, "at byte 0\n") {
					t.Fatalf("exit status %d, want %d; .partial %v, journal %v\n%s", r.exit, exit, partial, entries, r.stderr)
				}
				copies(t, append(append([]string{"--resume"}, args...), disk, dst)...)
				target.same(t, disk, dst)
			})
		}
	}
}

// TestSignalWhileTheSourceIsAway checks that a signal makes a copy write a last
// checkpoint while its source hangs or waits to be opened again.
func TestSignalWhileTheSourceIsAway(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, keepDisk)
	for name, faults := range map[string][]string{
		"reads hang":    {"fault ReadAsync from=15 global do=hang"},
		"waits":         {"fault ReadAsync at=15 once do=segv", "fault ConnectEx from=2 global do=fail code=18000"},
		"opening hangs": {"fault ReadAsync at=15 once do=segv", "fault ConnectEx from=2 global do=hang"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			src := newStandInSource(t, disk, append([]string{"transport nbdssl", "latency read 1000"}, faults...)...)
			dst := filepath.Join(t.TempDir(), "out.raw")
			args := append(append([]string{"--connections", "1"}, src.args...), dst)
			cmd := exec.Command(path, append([]string{"--progress", "none"}, args...)...)
			cmd.Env = append(os.Environ(), "VDDKCP_PASSWORD=secret")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for calls := map[string]int64{}; calls["ReadAsync"] < 15; calls = src.Calls() {
				if cmd.ProcessState != nil {
					t.Fatal("it ended")
				}
			}
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			r := ended(t, cmd, cmd.Wait(), &stderr)
			if r.exit != 143 || !strings.Contains(r.stderr, "run again with --resume to continue the copy at byte ") || strings.Contains(r.stderr, "at byte 0\n") {
				t.Errorf("exit status %d\n%s", r.exit, r.stderr)
			}
		})
	}
}

// TestIgnoredHangup checks that vddkcp ignores SIGHUP if it was ignored when vddkcp
// started, as under nohup.
func TestIgnoredHangup(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	fifo, out := filepath.Join(dir, "fifo"), filepath.Join(dir, "out.raw")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `trap "" HUP; exec "$@" <"$0"`, fifo, path, "--progress", "none", "-", out)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := w.Write(make([]byte, 1<<20)); err != nil { // it reads
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if r := ended(t, cmd, cmd.Wait(), &stderr); r.exit != 0 {
		t.Errorf("exit status %d\n%s", r.exit, r.stderr)
	}
}

// TestResumeOfWhatIsGone checks that a copy which no later run can continue ends with
// exit status 2 and is kept.
func TestResumeOfWhatIsGone(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, keepDisk)
	for _, c := range []struct {
		name, conf, says string
		before           func(t *testing.T, dst string)
	}{
		{name: "the snapshot", conf: "snapshot snapshot-9", says: "hint: the snapshot no longer exists"},
		{name: "the size", conf: "capacity 140000", says: "the source has 71680000 bytes (68.4 MiB), but had 25165824 bytes (24.0 MiB) when the earlier copy stopped"},
		{name: "the end of .partial", conf: "trace", says: "has 1 bytes, but the copy had written ", before: func(t *testing.T, dst string) {
			if err := os.Truncate(dst+".partial", 1); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := newStandInSource(t, disk, "transport nbdssl", "fault ReadAsync at=15 once do=segv", "fault ConnectEx from=2 global do=fail code=18000")
			dst := filepath.Join(t.TempDir(), "out.raw")
			args := append(append([]string{"--connections", "1", "--retry-timeout", "1s"}, src.args...), dst)
			if r := keepRun(t, path, nil, args...); r.exit != 75 {
				t.Fatalf("exit status %d\n%s", r.exit, r.stderr)
			}
			src.Reset("transport nbdssl", c.conf)
			if c.before != nil {
				c.before(t, dst)
			}
			for range 2 {
				r := keepRun(t, path, nil, append([]string{"--resume"}, args...)...)
				partial, journal := isKept(dst, dst+".partial.journal")
				if r.exit != 2 || !strings.Contains(r.stderr, c.says) || !strings.Contains(r.stderr, "--force and without --resume") || !partial || !journal {
					t.Errorf("exit status %d, .partial %v, journal %v\n%s", r.exit, partial, journal, r.stderr)
				}
			}
		})
	}
}

// TestExportAfterAnOutage checks that a server whose source was away for longer than
// --retry-timeout serves the next request when the source is back.
func TestExportAfterAnOutage(t *testing.T) {
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(path)); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 4<<20)
	for _, flags := range [][]string{nil, {"--cow"}, {"--rw"}} {
		t.Run("flags"+strings.Join(flags, ""), func(t *testing.T) {
			src := newStandInSource(t, disk, "transport nbdssl")
			socket := filepath.Join(t.TempDir(), "s")
			args := append([]string{"export", "--listen", "unix:" + socket, "--retry-timeout", "1s", "--connections", "1"}, flags...)
			cmd := exec.Command(path, append(args, src.args...)...)
			cmd.Env = append(os.Environ(), "VDDKCP_PASSWORD=secret")
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				cmd.Process.Signal(syscall.SIGTERM)
				if err := cmd.Wait(); err != nil {
					t.Errorf("the server ended with %v\n%s", err, &stderr)
				}
			}()
			if _, err := stdout.Read(make([]byte, 100)); err != nil { // the URI: it listens
				t.Fatal(err)
			}
			uri := "nbd+unix:///?socket=" + socket
			read := func() int {
				r := vddkcp(t, "--retries", "0", uri, "null:")
				t.Log(r.stderr)
				return r.exit
			}
			if exit := read(); exit != 0 {
				t.Fatalf("before: exit status %d", exit)
			}
			if slices.Contains(flags, "--rw") {
				// The server closes the disk after its last client has left. A worker that
				// is killed before that makes the server end with an error, since it may
				// have had writes.
				waitFor(t, "end of the worker", func() bool { return len(children(t, cmd.Process.Pid)) == 0 })
			}
			src.Conf("port 1")
			for _, pid := range children(t, cmd.Process.Pid) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			if exit := read(); exit == 0 {
				t.Errorf("while the host is away: exit status %d", exit)
			}
			src.Reset("transport nbdssl")
			if exit := read(); exit != 0 {
				t.Errorf("there again: exit status %d\n%s", exit, &stderr)
			}
		})
	}
}

// TestLostOpeningIsWorthARound checks that a job whose library crashes or hangs when
// it opens the disk is tried again in a round, after a wait.
func TestLostOpeningIsWorthARound(t *testing.T) {
	for name, fault := range map[string]string{"crash": "fault Open times=3 global do=segv", "hang": "fault Open times=1 global do=hang"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, jobs, report := vddkBatch(t, 1, map[string]any{"rounds": 1}, map[string]any{"connections": 1, "timeout": "200ms"}, fault)
			r := vddkcp(t, "run", jobs, "--report", report, "--progress", "none")
			if r.exit != 0 || !strings.Contains(r.stderr, "waiting before trying failed jobs again") {
				t.Errorf("exit status %d\n%s", r.exit, r.stderr)
			}
			var got struct{ Jobs []struct{ Attempts int } }
			text, err := os.ReadFile(report)
			if err := errors.Join(err, json.Unmarshal(text, &got)); err != nil || len(got.Jobs) != 1 || got.Jobs[0].Attempts != 2 {
				t.Errorf("%v: %s", err, text)
			}
		})
	}
}

// TestOutcomes checks the status and the exit status for each kind of error.
func TestOutcomes(t *testing.T) {
	boom := errors.New("boom")
	resumable := func(err error) error { return fmt.Errorf("copy: %w", &transfer.ResumableError{Err: err}) }
	for _, c := range []struct {
		err    error
		status report.Status
		exit   int
	}{
		{nil, report.StatusOK, 0},
		{boom, report.StatusFailed, 1},
		{usage.Wrap(boom), report.StatusFailed, 2},
		{resumable(boom), report.StatusFailed, 75},
		{resumable(usage.Wrap(boom)), report.StatusFailed, 75},
		{resumable(&signalError{syscall.SIGHUP}), report.StatusInterrupted, 129},
		{&signalError{syscall.SIGINT}, report.StatusInterrupted, 130},
		{&signalError{syscall.SIGTERM}, report.StatusInterrupted, 143},
		{&transfer.MismatchError{}, report.StatusMismatch, 3},
		{errors.Join(&transfer.MismatchError{}, &signalError{syscall.SIGTERM}), report.StatusMismatch, 3},
		{&export.CommandStatus{Status: 7}, report.StatusFailed, 7},
		{&batchError{exit: 4}, report.StatusFailed, 4},
	} {
		if got := report.Of(c.err); got.Status != c.status || got.Exit != c.exit {
			t.Errorf("%v (%T): %+v, want %s, %d", c.err, c.err, got, c.status, c.exit)
		}
	}
}
