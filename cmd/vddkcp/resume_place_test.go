package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// loopDevice attaches a file to a loop device. The returned function detaches it, and
// so does the end of the test.
func loopDevice(t *testing.T, device, path string) (string, func()) {
	t.Helper()
	if device == "" {
		device = strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", path))
	} else {
		peer.Run(t, "losetup", device, path)
	}
	attached := true
	detach := func() {
		if attached {
			attached = false
			peer.Run(t, "losetup", "--detach", device)
		}
	}
	t.Cleanup(detach)
	return device, detach
}

// failedCopy runs a copy whose source changes as soon as the target is written.
func failedCopy(t *testing.T, src, written string, args ...string) {
	t.Helper()
	cmd := command(t, append([]string{"--progress", "none"}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	waitFor(t, "the copy", func() bool { return len(bytes.Trim(read(t, written), "\x00")) > 0 || len(ended) > 0 })
	if err := os.Chtimes(src, time.Now(), time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	<-ended
	if got := cmd.ProcessState.ExitCode(); got != 1 {
		t.Fatalf("the copy of a source that changed ended with %d, want 1", got)
	}
}

// matches reports whether text matches a regular expression.
func matches(t *testing.T, pattern, text string) bool {
	t.Helper()
	ok, err := regexp.MatchString(pattern, text)
	if err != nil {
		t.Fatal(err)
	}
	return ok
}

// sparseDisk makes a disk of 8 MiB with 2 MiB of data at an offset and holes around
// it.
func sparseDisk(t *testing.T, dir string, data int) (src string, disk []byte) {
	t.Helper()
	disk = make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{3}).Read(disk[data : data+2<<20])
	src = filepath.Join(dir, "src.raw")
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(disk))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(disk[data:data+2<<20], int64(data)); err != nil {
		t.Fatal(err)
	}
	return src, disk
}

// TestResumeOnADevice checks that a copy to a device is not resumed on another device
// with the same name, and that zeros on the device prove nothing.
func TestResumeOnADevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	for _, c := range []struct {
		name  string
		data  int    // where the data of the disk begins; holes are before and behind it
		point string // where the first run is killed
		other string // what is attached then; "": the same
		exit  int
		says  string
	}{
		{"another device", 0, firstInPlace, "b", 2, "is not the target of the copy that stopped: it is the loop device of .*/b"},
		{"another device after zeros", 6 << 20, firstInPlace, "b", 2, "is not the target of the copy that stopped"},
		{"another device before the first checkpoint", 0, "sync:1", "b", 2, "is not the target of the copy that stopped"},
		{"another size", 0, firstInPlace, "large", 2, "of 16777216 bytes, but the target of that copy was .* of 8388608 bytes"},
		{"the same after zeros", 6 << 20, firstInPlace, "", 0, "the checkpoint at byte .* is not used: nothing proves .*; the copy starts over"},
		{"the same before the first checkpoint", 0, "sync:1", "", 0, ""},
		{"the same", 0, firstInPlace, "", 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("XDG_STATE_HOME", filepath.Join(dir, "state"))
			src, disk := sparseDisk(t, dir, c.data)
			put(t, filepath.Join(dir, "a"), strings.Repeat("A", len(disk)))
			put(t, filepath.Join(dir, "b"), strings.Repeat("B", len(disk)))
			put(t, filepath.Join(dir, "large"), strings.Repeat("L", 2*len(disk)))
			device, detach := loopDevice(t, "", filepath.Join(dir, "a"))
			killedAt(t, c.point, "1us", "--sparse", "64KiB", src, device)
			file := filepath.Join(dir, "a")
			if c.other != "" {
				detach()
				file = filepath.Join(dir, c.other)
				device, detach = loopDevice(t, device, file)
			}
			before := read(t, file)
			r := vddkcp(t, "--resume", "--progress", "none", src, device)
			if r.exit != c.exit || !matches(t, c.says, r.stderr) {
				t.Errorf("exit status %d, want %d and %q\n%s", r.exit, c.exit, c.says, r.stderr)
			}
			detach()
			want := disk
			if c.exit != 0 {
				want = before
			}
			if !bytes.Equal(read(t, file), want) {
				t.Error("the device has another content")
			}
		})
	}
}

// TestResumeOnAnExport checks that a copy to an NBD export is not resumed if the
// server now serves another disk by the same name.
func TestResumeOnAnExport(t *testing.T) {
	peer.Need(t, "nbdkit")
	for _, c := range []struct {
		name string
		data int    // where the data of the disk begins
		file string // that is served then
		exit int
		says string
	}{
		{"another after zeros", 6 << 20, "b", 0, "the checkpoint at byte .* is not used: nothing proves"},
		{"another", 0, "b", 2, "does not hold the data that was written last according to its journal"},
		{"another size", 0, "large", 2, "is not the target .* of 16777216 bytes, but the target of that copy was export \"\" of the server at .* of 8388608 bytes"},
		{"the same", 0, "a", 0, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			src, disk := sparseDisk(t, dir, c.data)
			put(t, filepath.Join(dir, "a"), strings.Repeat("A", len(disk)))
			put(t, filepath.Join(dir, "b"), strings.Repeat("B", len(disk)))
			put(t, filepath.Join(dir, "large"), strings.Repeat("L", 2*len(disk)))
			uri := "nbd+unix:///?socket=" + filepath.Join(dir, "s")
			stop := serveFile(t, dir, "a")
			killedAt(t, firstInPlace, "1us", "--journal", filepath.Join(dir, "j"), src, uri)
			stop()
			stop = serveFile(t, dir, c.file)
			before := read(t, filepath.Join(dir, c.file))
			r := vddkcp(t, "--resume", "--progress", "none", "--journal", filepath.Join(dir, "j"), src, uri)
			if r.exit != c.exit || !matches(t, c.says, r.stderr) {
				t.Errorf("exit status %d, want %d and %q\n%s", r.exit, c.exit, c.says, r.stderr)
			}
			stop()
			want := disk
			if c.exit != 0 {
				want = before
			}
			if !bytes.Equal(read(t, filepath.Join(dir, c.file)), want) {
				t.Error("the export has another content")
			}
		})
	}
}

// serveFile serves a file of the folder dir at the socket s in that folder, until stop
// is called.
func serveFile(t *testing.T, dir, file string) (stop func()) {
	t.Helper()
	socket, pid := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "-P", pid, "file", filepath.Join(dir, file))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
			os.Remove(socket)
			os.Remove(pid)
		}
	}
	t.Cleanup(stop)
	waitFor(t, "nbdkit", func() bool { _, err := os.Stat(pid); return err == nil })
	return stop
}

// TestTargetIsZeroOnlyOnce checks that data which an earlier run wrote to a device is
// zeroed, even if --target-is-zero is given.
func TestTargetIsZeroOnlyOnce(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	for _, c := range []struct {
		name  string
		point string // where the first run is killed; "": it fails
		every string // time between checkpoints
		again bool   // a second run, without --target-is-zero, fails
		args  []string
	}{
		{"killed, and another name", "checkpoint", "300ms", false, []string{"--resume"}},
		{"killed before the first checkpoint", "checkpoint", "300ms", false, []string{"--resume"}},
		{"killed after a checkpoint, and not resumed", "slot:3", "100ms", false, nil},
		{"killed before the first checkpoint, and not resumed", "checkpoint", "300ms", false, nil},
		{"failed", "", "", false, []string{"--resume"}},
		{"killed, and then failed without it", "checkpoint", "300ms", true, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			t.Setenv("XDG_STATE_HOME", filepath.Join(dir, "state"))
			const size = 8 << 20
			file, src := filepath.Join(dir, "a"), filepath.Join(dir, "src.raw")
			put(t, file, "")
			if err := os.Truncate(file, size); err != nil {
				t.Fatal(err)
			}
			device, detach := loopDevice(t, "", file)
			content(t, src, 1, size)
			if c.point != "" {
				killedAt(t, c.point, c.every, "--target-is-zero", "--rate-limit", "2MiB", src, device)
			} else {
				failedCopy(t, src, device, "--target-is-zero", "--rate-limit", "4MiB", src, device)
			}
			if c.again {
				peer.Run(t, "dd", "if=/dev/zero", "of="+device, "bs=1M", "count=8", "oflag=direct", "status=none")
				failedCopy(t, src, device, "--rate-limit", "4MiB", src, device)
			}
			// The disk is empty now: a hole everywhere.
			if err := os.Truncate(src, 0); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(src, size); err != nil {
				t.Fatal(err)
			}
			name := device
			if strings.Contains(c.name, "another name") {
				name = filepath.Join(dir, "disk")
				peer.Run(t, "ln", "-s", device, name)
			}
			r := vddkcp(t, append(c.args, "--target-is-zero", "--progress", "none", src, name)...)
			detach()
			if r.exit != 0 || !strings.Contains(r.stderr, "--target-is-zero is ignored") {
				t.Errorf("exit status %d, want 0 and that --target-is-zero is ignored\n%s", r.exit, r.stderr)
			}
			if !bytes.Equal(read(t, file), make([]byte, size)) {
				t.Error("what the first run wrote shows through")
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "state", "vddkcp", "*")); len(left) > 0 && name == device {
				t.Errorf("left: %v", left)
			}
		})
	}
}
