// Package workertest builds the worker program for tests.
package workertest

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// Build compiles the worker program and returns its path, for worker.Config's
// Program. It skips on what is not x86-64.
func Build(t testing.TB) string { return build(t) }

// BuildSanitized likewise builds one that runs under AddressSanitizer and
// UBSan, and dies of what they find.
func BuildSanitized(t testing.TB) string { return build(t, "-sanitize") }

func build(t testing.TB, args ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("VDDK needs x86-64")
	}
	peer.Need(t, "gcc")
	_, self, _, _ := runtime.Caller(0)
	dir := filepath.Dir(filepath.Dir(self))
	// That gcc reads them is no reason for go test to run again when they change.
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
