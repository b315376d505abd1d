// Package peer runs the programs of others that tests hold vddkcp against:
// qemu-img, mke2fs and so on.
package peer

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Need makes the test depend on programs. Where one is missing the test is
// skipped with the reason, except in CI (CI set and not empty), where it
// fails: there everything is installed, and what does not run proves nothing.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	notShort(t)
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing(t, "needs %s (Debian: apt-get install qemu-utils e2fsprogs xfsprogs btrfs-progs libnbd-bin nbdkit nbd-server libvmdk-utils qemu-system-x86 busybox-static): %v", p, err)
		}
	}
}

// NeedRoot makes the test depend on being root (mounts, loop devices), by the
// same rule.
func NeedRoot(t testing.TB) {
	t.Helper()
	notShort(t)
	if os.Geteuid() != 0 {
		missing(t, "needs root, runs as user %d", os.Geteuid())
	}
}

// NeedFile makes the test depend on a file outside the project, by the same rule.
func NeedFile(t testing.TB, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		missing(t, "needs a file: %v", err)
	}
}

// notShort skips the test under go test -short, which make quick runs: tests
// against other programs take minutes.
func notShort(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped by -short: needs other programs or root")
	}
}

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Tree returns a real directory tree to fill disks from: the sources of Go's
// own library, which every machine that runs the tests has.
func Tree(t testing.TB) string {
	t.Helper()
	return filepath.Join(strings.TrimSpace(Run(t, "go", "env", "GOROOT")), "src")
}

// Run runs a program and returns what it wrote to standard output; a failure
// of it is the test's, with all that it wrote.
func Run(t testing.TB, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String()
}
