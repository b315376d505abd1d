package job_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// exists reports whether there is a file at the path.
func exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// heldFormats are the kinds of files that a copy can hold.
var heldFormats = map[string]job.Spec{
	"raw":              {Format: "raw"},
	"qcow2":            {Format: "qcow2"},
	"qcow2 compressed": {Format: "qcow2", Compress: "zlib"},
	"vmdk":             {Format: "vmdk"},
}

// TestHold checks that a held file keeps its .partial name until Publish is called, that its
// journal is there until Whole has returned, and that a second Publish does nothing.
func TestHold(t *testing.T) {
	for name, spec := range heldFormats {
		for _, verify := range []bool{false, true} {
			dir := t.TempDir()
			spec.Source, spec.Target, spec.Hold, spec.Verify = disk(t, dir), filepath.Join(dir, "copy"), true, verify
			partial, whole := spec.Target+".partial", ""
			spec.Whole = func(mark string) {
				whole = mark
				entries, err := journal.Load(journal.Beside(partial))
				if spec.Format != "vmdk" && (err != nil || len(entries) == 0 || entries[0].Offset != 2<<20) {
					t.Errorf("%s: the journal has the entries %v, %v", name, entries, err)
				}
			}
			r, err := job.Run(t.Context(), spec)
			if err != nil || r.Exit != 0 {
				t.Fatalf("%s: %v, report %+v", name, err, r)
			}
			if whole == "" || whole != fileid.MarkOf(partial) || exists(t, spec.Target) || exists(t, journal.Beside(partial)) {
				t.Errorf("%s: Whole got %q, the file is %q; the final name exists: %v", name, whole, fileid.MarkOf(partial), exists(t, spec.Target))
			}
			for range 2 {
				if err := job.Publish(t.Context(), spec, whole); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				if exists(t, partial) || fileid.MarkOf(spec.Target) != whole {
					t.Errorf("%s: the published file is %q, want %q", name, fileid.MarkOf(spec.Target), whole)
				}
			}
		}
	}
}

// TestHeldImages compares held and published images with their source.
func TestHeldImages(t *testing.T) {
	peer.Need(t, "qemu-img")
	for name, spec := range heldFormats {
		dir := t.TempDir()
		spec.Source, spec.Target, spec.Hold = disk(t, dir), filepath.Join(dir, "copy"), true
		mark := ""
		spec.Whole = func(m string) { mark = m }
		if _, err := job.Run(t.Context(), spec); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		compare := func(path string) {
			t.Helper()
			peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", spec.Format, spec.Source, path)
			if spec.Format == "qcow2" {
				peer.Run(t, "qemu-img", "check", path)
			}
		}
		compare(spec.Target + ".partial")
		if err := job.Publish(t.Context(), spec, mark); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		compare(spec.Target)
	}
}

// TestPublishTidies checks that Publish removes a journal that a killed process left, and that it
// does not replace a file unless Spec.Force is set.
func TestPublishTidies(t *testing.T) {
	dir := t.TempDir()
	spec := job.Spec{Source: disk(t, dir), Target: filepath.Join(dir, "copy"), Hold: true}
	mark, left := "", journal.Beside(spec.Target+".partial")
	spec.Whole = func(m string) {
		mark = m
		// A process that is killed now leaves the journal.
		if err := os.Link(left, left+".kept"); err != nil {
			t.Error(err)
		}
	}
	if _, err := job.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Rename(left+".kept", left), os.WriteFile(spec.Target, []byte("old"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := job.Publish(t.Context(), spec, mark); !errors.Is(err, fs.ErrExist) || !exists(t, spec.Target+".partial") {
		t.Errorf("%v", err)
	}
	spec.Force = true
	if err := job.Publish(t.Context(), spec, mark); err != nil || fileid.MarkOf(spec.Target) != mark || exists(t, left) {
		t.Errorf("%v; the journal is left: %v", err, exists(t, left))
	}
}

// TestPublishElsewhere checks Publish for targets that are not files.
func TestPublishElsewhere(t *testing.T) {
	dir := t.TempDir()
	src := disk(t, dir)
	for _, target := range []string{"null:", "-", "nbd+unix:///disk?socket=/nowhere"} {
		if err := job.Publish(t.Context(), job.Spec{Source: src, Target: target}, ""); err != nil {
			t.Errorf("%s: %v", target, err)
		}
	}
	for _, c := range []struct{ target, mark string }{
		{filepath.Join(dir, "missing", "copy"), "inode 1"}, {filepath.Join(dir, "missing", "copy"), ""},
		{filepath.Join(dir, "copy"), ""}, {"null:", "inode 1"},
	} {
		if err := job.Publish(t.Context(), job.Spec{Source: src, Target: c.target}, c.mark); err == nil {
			t.Errorf("%q, mark %q: no error", c.target, c.mark)
		}
	}
	mark := "not called"
	if _, err := job.Run(t.Context(), job.Spec{Source: src, Target: "null:", Hold: true, Whole: func(m string) { mark = m }}); err != nil || mark != "" {
		t.Errorf("%v, mark %q", err, mark)
	}
}

// TestHoldInPlace holds copies to an NBD export and to a block device. They are complete and need no
// Publish.
func TestHoldInPlace(t *testing.T) {
	t.Run("NBD export", func(t *testing.T) {
		peer.Need(t, "nbdkit", "qemu-img")
		dir := t.TempDir()
		target, socket, pid := filepath.Join(dir, "target"), filepath.Join(dir, "socket"), filepath.Join(dir, "pid")
		if err := errors.Join(os.WriteFile(target, bytes.Repeat([]byte{3}, 2<<20), 0o600), syscall.Mkfifo(pid, 0o600)); err != nil {
			t.Fatal(err)
		}
		fifo, err := os.OpenFile(pid, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer fifo.Close()
		peer.Run(t, "nbdkit", "-U", socket, "-P", pid, "file", target)
		b := make([]byte, 16)
		n, err := fifo.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		id, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(id, syscall.SIGKILL) })
		holdInPlace(t, "nbd+unix:///?socket="+socket, target)
	})
	t.Run("block device", func(t *testing.T) {
		peer.Need(t, "losetup", "qemu-img")
		peer.NeedRoot(t)
		backing := filepath.Join(t.TempDir(), "device")
		if err := os.WriteFile(backing, bytes.Repeat([]byte{3}, 2<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", backing))
		t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
		holdInPlace(t, device, device)
	})
}

// holdInPlace makes a held copy to a target that keeps its name. The path shows its content.
func holdInPlace(t *testing.T, target, path string) {
	t.Helper()
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	mark, src := "not called", disk(t, t.TempDir())
	spec := job.Spec{Source: src, Target: target, Hold: true, Verify: true, Whole: func(m string) { mark = m }}
	if _, err := job.Run(t.Context(), spec); err != nil || mark != "" {
		t.Fatalf("%v, mark %q", err, mark)
	}
	peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, path)
	if err := job.Publish(t.Context(), spec, mark); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(os.Getenv("XDG_STATE_HOME"), "*", "*.journal")); err != nil || len(left) > 0 {
		t.Errorf("journals %q, %v", left, err)
	}
}

// TestHoldIsKilled kills a process between the steps from the last checkpoint to the final name of
// the target. Another run completes the target.
func TestHoldIsKilled(t *testing.T) {
	peer.Need(t, "go", "qemu-img")
	program := filepath.Join(t.TempDir(), "hold")
	peer.Run(t, "go", "build", "-tags", "killpoints", "-o", program, "./testdata/hold")
	for name, spec := range heldFormats {
		if spec.Compress != "" {
			continue
		}
		for _, point := range []string{"slot", "slot written", "whole", "held", "publish", "rename", "renamed"} {
			if spec.Format == "vmdk" && strings.HasPrefix(point, "slot") {
				continue // a VMDK has no checkpoints
			}
			dir := t.TempDir()
			src, dst, mark := disk(t, dir), filepath.Join(dir, "copy"), filepath.Join(dir, "mark")
			run := func(env ...string) error {
				c := exec.Command(program, src, dst, spec.Format, mark)
				c.Env = append(os.Environ(), env...)
				c.Stderr = os.Stderr
				return c.Run()
			}
			var ended *exec.ExitError
			if err := run("VDDKCP_KILL_AT=" + point); !errors.As(err, &ended) || ended.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("%s: not killed at %q: %v", name, point, err)
			}
			if exists(t, dst) != (point == "renamed") {
				t.Errorf("%s, %q: the final name exists: %v", name, point, exists(t, dst))
			}
			for range 2 {
				if err := run(); err != nil {
					t.Errorf("%s, killed at %q: %v", name, point, err)
				}
			}
			peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", spec.Format, src, dst)
			if partial := dst + ".partial"; exists(t, partial) || exists(t, journal.Beside(partial)) {
				t.Errorf("%s, killed at %q: something is left", name, point)
			}
		}
	}
}
