package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// testTools holds the programs of testtools that were built, by name. The folder
// of [binary] has them.
var testTools struct {
	sync.Mutex
	built map[string]bool
}

// testTool builds a program of testtools, once, and returns its path. These
// programs are a module of their own: their dependencies are not vddkcp's.
func testTool(t *testing.T, name string) string {
	t.Helper()
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(filepath.Dir(program), "testtools", name)
	testTools.Lock()
	defer testTools.Unlock()
	if testTools.built[name] {
		return path
	}
	build := exec.Command("go", "build", "-C", "../../testtools", "-o", path, "./"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build ./%s: %v\n%s", name, err, out)
	}
	if testTools.built == nil {
		testTools.built = map[string]bool{}
	}
	testTools.built[name] = true
	return path
}
