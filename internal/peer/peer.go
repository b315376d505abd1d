// Package peer runs the programs of other projects that tests compare vddkcp with, such
// as qemu-img and mke2fs.
package peer

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Need skips the test, with a reason, if one of the programs is missing. In CI, where
// the variable CI is set and everything is installed, the test fails instead.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	notShort(t)
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing(t, "needs %s (Debian: apt-get install qemu-utils e2fsprogs xfsprogs btrfs-progs libnbd-bin nbdkit nbd-server libvmdk-utils qemu-system-x86 busybox-static): %v", p, err)
		}
	}
}

// NeedRoot skips the test unless it runs as root, for mounts and loop devices. In CI
// the test fails instead.
func NeedRoot(t testing.TB) {
	t.Helper()
	notShort(t)
	if os.Geteuid() != 0 {
		missing(t, "the test needs root, but runs as user %d", os.Geteuid())
	}
}

// NeedFile skips the test if a file outside the project is missing. In CI the test
// fails instead.
func NeedFile(t testing.TB, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		missing(t, "needs a file: %v", err)
	}
}

// notShort skips the test under go test -short, which the target quick of the Makefile
// runs, because tests against other programs take minutes.
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

// Tree returns the path of a real directory tree with which tests fill disks: the
// source of Go's standard library, which every machine has that runs the tests.
func Tree(t testing.TB) string {
	t.Helper()
	return filepath.Join(strings.TrimSpace(Run(t, "go", "env", "GOROOT")), "src")
}

// Run runs a program and returns its standard output. If the program fails, the test
// fails with all of its output.
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
