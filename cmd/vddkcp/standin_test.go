package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdStandIn installs a stand-in for VMware's library in a directory, and the worker
// program next to vddkcp: standin DIR [OPTIONS...], with the options of
// vddk/testlib/build.
func cmdStandIn(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: standin DIR [OPTIONS...]")
	}
	dir := ts.MkAbs(args[0])
	ts.Check(compile("../../vddk/testlib/build", append(args[1:], dir)...))
	ts.Check(installWorker(vddkcpDir(ts)))
}

// vddkcpDir returns the folder in PATH that has vddkcp.
func vddkcpDir(ts *testscript.TestScript) string {
	for _, path := range filepath.SplitList(ts.Getenv("PATH")) {
		if _, err := os.Stat(filepath.Join(path, "vddkcp")); err == nil {
			return path
		}
	}
	ts.Fatalf("no vddkcp in PATH")
	return ""
}

var installing sync.Mutex

// installWorker builds the worker program in a directory, unless it exists.
func installWorker(dir string) error {
	installing.Lock()
	defer installing.Unlock()
	path := filepath.Join(dir, "vddkcp-vddk-worker")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := compile("../../vddk/worker/build", path+".new"); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func compile(script string, args ...string) error {
	if out, err := exec.Command(script, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", script, strings.Join(args, " "), err, out)
	}
	return nil
}
