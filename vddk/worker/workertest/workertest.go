// Package workertest builds the worker program for tests.
package workertest

import (
	"path/filepath"
	"runtime"
	"testing"

	"vddkcp/internal/peer"
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
	out := filepath.Join(t.TempDir(), "vddkcp-vddk-worker")
	peer.Run(t, filepath.Join(filepath.Dir(self), "../build"), append([]string{out}, args...)...)
	return out
}
