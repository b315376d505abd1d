package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestNoSnapshotWithoutLibrary checks that a missing library of VDDK is noticed before a snapshot
// is made.
func TestNoSnapshotWithoutLibrary(t *testing.T) {
	v := newNFC(t)
	empty := filepath.Join(v.dir, "empty")
	put(t, filepath.Join(empty, "README"), "no library")
	put(t, v.path("jobs.json"), fmt.Sprintf(`{"version": 1, "defaults": {"server": %q, "port": %s, "user": %q, "thumbprint": %q, "via": "vddk", "libdir": %q},
		"jobs": [{"source": "vm:web01#1", "target": "job.raw"}]}`, v.server.Host, strconv.Itoa(int(v.server.Port)), v.server.User, v.server.Thumbprint(), empty))
	flags := slices.Concat(v.login()[:len(v.login())-2], []string{"--via", "vddk", "--libdir", empty})
	for _, args := range [][]string{
		{"vm", "web01", "images/", "--progress", "none"},
		{"vm", "web01", "images/", "--dry-run"},
		{"copy", "vm:web01#1", "one.raw", "--progress", "none"},
		{"copy", "vm:web01#1", "one.raw", "--dry-run"},
		{"export", "vm:web01#1", "--run", "true"},
		{"map", "vm:web01#1"},
		{"verify", "vm:web01#1", "vm:web01#2"},
		{"run", "jobs.json", "--progress", "none"},
		{"run", "jobs.json", "--check"},
	} {
		if args[0] != "run" {
			args = append(args, flags...)
		}
		p := v.startLine(nil, nil, args...)
		if r := p.wait(); r.exit == 0 || !strings.Contains(r.stderr+p.stdout.String(), "no VDDK library found") {
			t.Errorf("vddkcp %s: exit status %d\n%s%s", strings.Join(args, " "), r.exit, r.stderr, &p.stdout)
		}
	}
	for call, n := range v.server.Calls() {
		if strings.Contains(call, "Snapshot_Task") || strings.Contains(call, "SnapshotEx_Task") {
			t.Errorf("%d calls of %s", n, call)
		}
	}
	v.left(0)
	if v.hasFiles() {
		t.Error("files were made")
	}
}
