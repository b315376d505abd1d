package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// manPages writes the manual pages into a new folder.
func manPages(t *testing.T, environment ...string) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "man")
	c := command(t, "man", "--dir", dir)
	c.Env = append(os.Environ(), environment...)
	if out, err := c.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("vddkcp man: %v\n%s", err, out)
	}
	return dir
}

// TestManPages checks that every command has a page, that the programs which format manual pages
// have nothing to complain about, and that two runs write the same bytes.
func TestManPages(t *testing.T) {
	dir := manPages(t, "SOURCE_DATE_EPOCH=1790000000")
	pages, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, page := range pages {
		names = append(names, filepath.Base(page))
	}
	want := []string{"vddkcp.1", "vddkcp-jobs.5"}
	var c cli
	parser, err := newParser(&c, os.Stdout, os.Stderr, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range parser.Model.Children {
		if !c.Hidden {
			want = append(want, "vddkcp-"+c.Name+".1")
		}
	}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("the pages are %q, want %q", names, want)
	}
	again := manPages(t, "SOURCE_DATE_EPOCH=1790000000")
	for _, name := range names {
		text := string(read(t, filepath.Join(dir, name)))
		if text != string(read(t, filepath.Join(again, name))) {
			t.Errorf("%s differs in the second run", name)
		}
		if !strings.Contains(text, `"2026-09-21"`) {
			t.Errorf("%s does not have the date in SOURCE_DATE_EPOCH", name)
		}
	}
	peer.Need(t, "mandoc", "groff")
	for _, page := range pages {
		for _, referee := range [][]string{{"mandoc", "-T", "lint", "-W", "warning"}, {"groff", "-man", "-ww", "-z", "-Tutf8"}} {
			out, err := exec.Command(referee[0], append(referee[1:], page)...).CombinedOutput()
			if err != nil || len(out) > 0 {
				t.Errorf("%s: %v\n%s", strings.Join(referee, " "), err, out)
			}
		}
	}
}
