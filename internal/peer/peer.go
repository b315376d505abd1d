// Package peer runs programs of other projects in tests, such as qemu-img and mke2fs. The tests
// compare vddkcp with them.
package peer

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Need skips the test if one of the given programs is not installed. In CI, where the
// environment variable CI is set and all programs are installed, the test fails instead.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	notShort(t)
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing(t, "the test needs the program %s (Debian: apt-get install qemu-utils e2fsprogs xfsprogs btrfs-progs libnbd-bin nbdkit nbd-server libvmdk-utils qemu-system-x86 busybox-static debootstrap lintian rpm skopeo umoci): %v", p, err)
		}
	}
}

// NeedRoot skips the test if it does not run as root. Tests that mount file systems or use loop
// devices need root. In CI the test fails instead.
func NeedRoot(t testing.TB) {
	t.Helper()
	notShort(t)
	if os.Geteuid() != 0 {
		missing(t, "the test needs root, but runs as user %d", os.Geteuid())
	}
}

// NeedFile skips the test if the file with the given path does not exist. The file is not part of
// the project, so it may be missing. In CI the test fails instead.
func NeedFile(t testing.TB, path string) {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		missing(t, "the test needs a file outside the project: %v", err)
	}
}

// notShort skips the test if go test runs with -short, as "make quick" does. The reason is that
// tests which run other programs take minutes.
func notShort(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped by -short: the test needs other programs or root")
	}
}

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Tree returns the path of a folder with many real files, which tests copy into disks. It is the
// source of Go's standard library, because every machine that runs the tests has it.
func Tree(t testing.TB) string {
	t.Helper()
	return filepath.Join(strings.TrimSpace(Run(t, "go", "env", "GOROOT")), "src")
}

// Run runs a program and returns its standard output. If the program fails, Run ends the test
// with an error that shows everything that the program printed.
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
