package main

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestProbeOfABoundHost checks that --probe finds the limit that the stand-in host was
// given.
func TestProbeOfABoundHost(t *testing.T) {
	for _, c := range []struct {
		name         string
		limits, more map[string]any
		conf         []string
		least        time.Duration
		binds        string
	}{
		{"alone", map[string]any{"total": 4}, map[string]any{"connections": 1}, []string{"bandwidth 1"}, time.Second, "each disk's own rate binds it"},
		{"total", map[string]any{"total": 1}, map[string]any{"connections": 1}, []string{"bandwidth 8"}, 3 * time.Second, "limits.total, 1 disks at once, binds it"},
		{"memory", map[string]any{"total": 4, "nfc_buffer": "4MiB"}, map[string]any{"connections": 1}, []string{"bandwidth 8", "host-memory 4"}, 3 * time.Second, "esxi1's limits.nfc_buffer, 4.0 MiB, binds it"},
		{"connections", map[string]any{"total": 4, "connections": 1}, map[string]any{"connections": 1}, []string{"bandwidth 8", "host-connections 1"}, 3 * time.Second, "esxi1's limits.connections, 1, binds it"},
		{"host", map[string]any{"total": 4}, map[string]any{"connections": 1}, []string{"host-bandwidth 8"}, 3 * time.Second, "what esxi1 gives to several disks at once"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.more["request_size"] = "64KiB"
			lib, jobs, _ := vddkBatch(t, 4, c.limits, c.more, c.conf...)
			disk := filepath.Join(filepath.Dir(jobs), "disk.raw")
			random(t, disk, 8<<20) // the stand-in's disks are links to it
			out, err := command(t, "run", jobs, "--check", "--probe", "1MiB").Output()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			m := regexp.MustCompile(`estimate: (\S+), until .{16}; (.*); (\d) ends last`).FindStringSubmatch(string(out))
			if m == nil {
				t.Fatalf("%s", out)
			}
			if !strings.HasPrefix(m[2], c.binds) {
				t.Errorf("%s, want %s", m[2], c.binds)
			}
			said, err := time.ParseDuration(m[1])
			if err != nil {
				t.Fatal(err)
			}
			if f := lib.Figures(); f["alloc-failures"] != 0 {
				t.Errorf("%v", f)
			}
			// A busy machine only makes it longer.
			if said < c.least {
				t.Errorf("it takes %s by the estimate, and %s or more by what the host was made to give", said, c.least)
			}
		})
	}
}
