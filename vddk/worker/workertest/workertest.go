// Package workertest builds the worker program for tests.
package workertest

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// Build compiles the worker program and returns its path, for the field Program of
// worker.Config. On machines that are not x86-64 it skips the test.
func Build(t testing.TB) string { return build(t) }

// BuildSanitized is like Build, but compiles the program with AddressSanitizer and UBSan. They
// abort the program when they find an error.
func BuildSanitized(t testing.TB) string { return build(t, "-sanitize") }

func build(t testing.TB, args ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("VDDK needs x86-64")
	}
	peer.Need(t, "gcc")
	_, self, _, _ := runtime.Caller(0)
	dir := filepath.Dir(filepath.Dir(self))
	// go test reuses the result of an earlier run of a test, until a file changes that the test
	// process itself has read. Files that only gcc has read do not count. Therefore this function
	// reads the sources of the program.
	sources, _ := filepath.Glob(filepath.Join(dir, "program/*"))
	for _, f := range sources {
		if _, err := os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "vddkcp-vddk-worker")
	peer.Run(t, filepath.Join(dir, "build"), append([]string{out}, args...)...)
	return out
}
