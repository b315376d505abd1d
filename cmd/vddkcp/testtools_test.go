package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
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
	path, err := buildTestTool(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func buildTestTool(name string) (string, error) {
	program, err := binary()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(program), "testtools", name)
	testTools.Lock()
	defer testTools.Unlock()
	if testTools.built[name] {
		return path, nil
	}
	build := exec.Command("go", "build", "-C", "../../testtools", "-o", path, "./"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./%s: %w\n%s", name, err, out)
	}
	if testTools.built == nil {
		testTools.built = map[string]bool{}
	}
	testTools.built[name] = true
	return path, nil
}

// cmdTestTool builds programs of testtools and puts them in PATH: testtool NAME...
func cmdTestTool(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: testtool NAME...")
	}
	for _, name := range args {
		path, err := buildTestTool(name)
		ts.Check(err)
		dir := filepath.Dir(path)
		if !slices.Contains(filepath.SplitList(ts.Getenv("PATH")), dir) {
			ts.Setenv("PATH", ts.Getenv("PATH")+string(os.PathListSeparator)+dir)
		}
	}
}
