package main

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// fault is what happens to a call of the file system that [mountFaults] mounts.
// testtools/faultfs has the same type.
type fault struct {
	Call  string // "write" (of the disk), "fsync", "rename" or "read"
	At    int    // the number of the call, from 1; 0 means every call
	Errno syscall.Errno
	Do    string // with Errno 0: "drop" the call and report success, "short" writes half of it, "flip" changes a bit of the data, "delay" waits
}

// mountFaults mounts a file system with faults on top of an empty folder, and
// returns where it is mounted and the folder under it.
func mountFaults(t *testing.T, faults ...fault) (dir, below string) {
	t.Helper()
	peer.NeedRoot(t)
	peer.NeedFile(t, "/dev/fuse")
	dir, below = t.TempDir(), t.TempDir()
	list, err := json.Marshal(faults)
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd := exec.Command(testTool(t, "faultfs"), dir, below)
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("faultfs: %v\n%s", err, stderr.String())
		}
	})
	if _, err := in.Write(append(list, '\n')); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "mounted\n" {
		t.Fatalf("faultfs said %q: %v", line, err)
	}
	return dir, below
}

// TestFaultsOfTheFileSystem checks that a copy on a file system with faults ends with
// status 0 only if the target is identical.
func TestFaultsOfTheFileSystem(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 12<<20)
	for _, c := range []struct {
		name   string
		faults []fault
		args   []string
		exit   int
		says   string // on standard error
		kept   bool   // the .partial
	}{
		{name: "nothing", exit: 0},
		{name: "the first write fails", faults: []fault{{Call: "write", At: 3, Errno: syscall.EIO}}, exit: 1, says: "input/output error"},
		{name: "the last write fails", faults: []fault{{Call: "write", At: 12, Errno: syscall.EIO}}, exit: 1, says: "input/output error"},
		{name: "no space", faults: []fault{{Call: "write", At: 9, Errno: syscall.ENOSPC}}, exit: 75, says: "hint: run again with --resume", kept: true},
		{name: "quota", faults: []fault{{Call: "write", At: 9, Errno: syscall.EDQUOT}}, exit: 75, says: "quota", kept: true},
		{name: "short writes", faults: []fault{{Call: "write", Do: "short"}}, exit: 0},
		{name: "slow", faults: []fault{{Call: "write", At: 5, Do: "delay"}, {Call: "fsync", Do: "delay"}}, exit: 0},
		{name: "fsync fails", faults: []fault{{Call: "fsync", Errno: syscall.EIO}}, exit: 1, says: "fsync"},
		{name: "rename fails", faults: []fault{{Call: "rename", Errno: syscall.EIO}}, exit: 1, says: "rename"},
		{name: "a write is lost", faults: []fault{{Call: "write", At: 7, Do: "drop"}}, args: []string{"--verify"}, exit: 3, says: "does not hold what was read", kept: true},
		{name: "a bit is flipped", faults: []fault{{Call: "write", At: 11, Do: "flip"}}, args: []string{"--verify"}, exit: 3, says: "1 ranges, 1 bytes", kept: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, below := mountFaults(t, c.faults...)
			out := filepath.Join(dir, "out.raw")
			r := vddkcp(t, append(c.args, "--request-size", "1MiB", disk, out)...)
			if r.exit != c.exit || !strings.Contains(r.stderr, c.says) {
				t.Errorf("exit status %d, want %d and %q\n%s", r.exit, c.exit, c.says, r.stderr)
			}
			final := filepath.Join(below, "out.raw")
			if c.exit == 0 {
				peer.Run(t, "cmp", disk, final)
				return
			}
			if _, err := os.Lstat(final); err == nil {
				t.Error("the final name is there")
			}
			if _, err := os.Lstat(final + ".partial"); (err == nil) != c.kept {
				t.Errorf(".partial: %v", err)
			}
			if c.exit == 75 { // room was made
				copies(t, "--resume", disk, filepath.Join(below, "out.raw"))
				peer.Run(t, "cmp", disk, final)
			}
		})
	}
}
