// Package workertest builds the worker program for tests.
package workertest

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// Build compiles the worker program and returns its path, for Program in worker.Config. It skips
// the test on machines that are not x86-64.
func Build(t testing.TB) string { return build(t) }

// BuildSanitized is Build with AddressSanitizer and UBSan, which abort the program when they find
// an error.
func BuildSanitized(t testing.TB) string { return build(t, "-sanitize") }

func build(t testing.TB, args ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("VDDK needs x86-64")
	}
	peer.Need(t, "gcc")
	_, self, _, _ := runtime.Caller(0)
	dir := filepath.Dir(filepath.Dir(self))
	// go test runs a cached test again only if files have changed that the test itself reads,
	// and not those that gcc reads.
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
