package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"

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
	checkProse(t, parser.Model, string(read(t, filepath.Join(dir, "vddkcp.1"))))
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

// checkProse checks that the prose is about commands that exist, and that the page of the program
// has the environment variables of all flags.
func checkProse(t *testing.T, app *kong.Application, program string) {
	t.Helper()
	files, err := os.ReadDir("internal/manual/prose")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(f.Name(), ".md")
		if name != "vddkcp" && name != "job-file" && commandNamed(app, name) == nil {
			t.Errorf("internal/manual/prose/%s is about no command", f.Name())
		}
	}
	err = kong.Visit(app, func(node kong.Visitable, next kong.Next) error {
		if flag, ok := node.(*kong.Flag); ok {
			for _, name := range flag.Envs {
				if !strings.Contains(program, `\fB`+name+`\fR`) {
					t.Errorf("vddkcp(1) does not have the environment variable %s", name)
				}
			}
		}
		return next(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestManExampleOfJobFile loads the job file in the manual as vddkcp run does.
func TestManExampleOfJobFile(t *testing.T) {
	page := string(read(t, filepath.Join(manPages(t), "vddkcp-jobs.5")))
	_, text, _ := strings.Cut(page, ".EX\n")
	text, _, found := strings.Cut(text, ".EE\n")
	if !found {
		t.Fatalf("the page has no example:\n%s", page)
	}
	text = strings.NewReplacer(`\-`, "-", `\(dq`, `"`).Replace(text)
	dir := completionFolder(t)
	t.Setenv("HOME", filepath.Join(dir, "home"))
	t.Setenv("XDG_CONFIG_HOME", "")
	path := filepath.Join(dir, "example.json")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	parser, err := newJobParser(new(servers))
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.jobsFile(t.Context(), path, func(string) {})
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if len(file.Jobs) != 3 || len(file.Warnings) > 0 {
		t.Errorf("%d jobs, warnings %q", len(file.Jobs), file.Warnings)
	}
}
