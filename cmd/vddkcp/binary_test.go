package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// binary returns the path of vddkcp, built as make builds it. The first call builds it.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "vddkcp-test")
	if err != nil {
		return "", err
	}
	binaryDir = dir
	path := filepath.Join(dir, "vddkcp")
	build := exec.Command("go", "build", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// binaryDir is the directory with the programs of binary; "": none was built yet.
var binaryDir string

func removeBinary() {
	if binaryDir != "" {
		os.RemoveAll(binaryDir)
	}
}

// result is the exit status and the output of a run of vddkcp.
type result struct {
	exit   int
	stderr string
}

// command returns a command that runs vddkcp with args and is killed at the end of the
// test.
func command(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, path, args...)
}

// vddkcp runs vddkcp with args and returns the result.
func vddkcp(t *testing.T, args ...string) result {
	t.Helper()
	cmd := command(t, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	return ended(t, cmd, cmd.Run(), &stderr)
}

func ended(t *testing.T, cmd *exec.Cmd, err error, stderr *bytes.Buffer) result {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stderr.String()}
}

// copies runs a copy and fails the test if the copy fails.
func copies(t *testing.T, args ...string) result {
	t.Helper()
	r := vddkcp(t, args...)
	if r.exit != 0 {
		t.Fatalf("vddkcp %s: exit status %d\n%s", strings.Join(args, " "), r.exit, r.stderr)
	}
	return r
}

// refuses runs a copy that must fail with exit status 1, print want, and leave no dst.
func refuses(t *testing.T, want, dst string, args ...string) {
	t.Helper()
	r := vddkcp(t, args...)
	if r.exit != 1 || !strings.Contains(r.stderr, want) {
		t.Errorf("vddkcp %s: exit status %d, want 1 and %q\n%s", strings.Join(args, " "), r.exit, want, r.stderr)
	}
	leavesNothing(t, dst)
}

func leavesNothing(t *testing.T, dst string) {
	t.Helper()
	for _, path := range []string{dst, dst + ".partial"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s was left", path)
		}
	}
}

// ext4 creates a realistic disk: a file system with the files of a directory tree.
func ext4(t *testing.T, path string) {
	t.Helper()
	peer.Run(t, "mke2fs", "-q", "-t", "ext4", "-d", filepath.Join(peer.Tree(t), "net"), path, "60M")
}

// random writes a file of n random bytes.
func random(t *testing.T, path string, n int) {
	t.Helper()
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// loop attaches a new file of the given size as a block device.
func loop(t *testing.T, size int64, fill byte) (device, backing string) {
	t.Helper()
	peer.Need(t, "losetup")
	peer.NeedRoot(t)
	backing = filepath.Join(t.TempDir(), "device")
	f, err := os.Create(backing)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	piece := bytes.Repeat([]byte{fill}, 1<<20)
	for left := size; left > 0; left -= int64(len(piece)) {
		if _, err := f.Write(piece[:min(left, int64(len(piece)))]); err != nil {
			t.Fatal(err)
		}
	}
	device = strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", backing))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	return device, backing
}

func must(s string, err error) string {
	if err != nil {
		panic(err)
	}
	return s
}

func sh(t *testing.T, format string, args ...any) {
	t.Helper()
	peer.Run(t, "sh", "-c", fmt.Sprintf(format, args...))
}

// mount runs mount with args on a new directory, and unmounts it at the end of the
// test.
func mount(t *testing.T, args ...string) (folder string) {
	t.Helper()
	peer.NeedRoot(t)
	folder = t.TempDir()
	peer.Run(t, "mount", append(args, folder)...)
	t.Cleanup(func() { peer.Run(t, "umount", folder) })
	return folder
}

// started starts a slow copy and returns after it has begun to copy. wait waits for its
// end.
func started(t *testing.T, args ...string) (cmd *exec.Cmd, wait func() result) {
	t.Helper()
	cmd = command(t, append([]string{"--progress", "json", "--rate-limit", "4MiB", "--request-size", "64KiB"}, args...)...)
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(pipe)
	var stderr bytes.Buffer
	for {
		line, err := lines.ReadString('\n')
		stderr.WriteString(line)
		if err != nil {
			t.Fatalf("it ended before it began: %v\n%s", err, stderr.String())
		}
		if strings.Contains(line, `"phase":"copy"`) && !strings.Contains(line, `"bytes_done":0,`) {
			break
		}
	}
	return cmd, func() result {
		io.Copy(&stderr, lines)
		return ended(t, cmd, cmd.Wait(), &stderr)
	}
}

// opens reports whether a thread of the process is in the system call openat with the
// given path. It reads the arguments of the call from the memory of the process.
func opens(t *testing.T, pid int, path string) bool {
	t.Helper()
	calls, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", pid))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return false
	}
	defer memory.Close()
	for _, call := range calls {
		text, err := os.ReadFile(call)
		var number int
		var folder, name uint64
		if _, scanned := fmt.Sscanf(string(text), "%d %v %v", &number, &folder, &name); err != nil || scanned != nil || number != syscall.SYS_OPENAT {
			continue
		}
		got := make([]byte, len(path))
		if _, err := memory.ReadAt(got, int64(name)); err == nil && string(got) == path {
			return true
		}
	}
	return false
}
