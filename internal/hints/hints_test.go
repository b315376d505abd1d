package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// TestPageIsUpToDate checks that the page has every hint of the source.
func TestPageIsUpToDate(t *testing.T) {
	text, err := tables(root)
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		t.Fatal(err)
	}
	updated, err := replace(string(old), text)
	if err != nil {
		t.Fatal(err)
	}
	if updated != string(old) {
		t.Errorf("%s is not up to date: run go run ./internal/hints -w", page)
	}
}

// TestHintsOfScriptsAreInThePage checks that the page has the hints that the test scripts of vddkcp
// expect. The scripts run the real program, so this finds hints that the scan misses.
func TestHintsOfScriptsAreInThePage(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, page))
	if err != nil {
		t.Fatal(err)
	}
	content := strings.NewReplacer(`\`, "", "<br>", " ").Replace(string(text))
	scripts, err := filepath.Glob(filepath.Join(root, "cmd/vddkcp/testdata/script/*.txtar"))
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	hint := regexp.MustCompile(`(?m)^stderr '.*hint: (.*)'$`)
	literal := regexp.MustCompile(`[a-zA-Z ,]{14,}`) // the words between what a regular expression matches
	found := 0
	for _, script := range scripts {
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range hint.FindAllStringSubmatch(string(text), -1) {
			for _, words := range literal.FindAllString(m[1], -1) {
				found++
				words = strings.TrimSpace(words)
				last := strings.LastIndexByte(words, ' ') // the last word may be the beginning of a name
				if words != "all, both, plain" && !strings.Contains(content, words) && (last < 10 || !strings.Contains(content, words[:last])) {
					t.Errorf("%s: the page does not have %q", filepath.Base(script), words)
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("the scripts have only %d hints", found)
	}
}

func TestScan(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	entries, err := scan(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, strings.Join(e.messages, " / ")+" => "+e.hint)
	}
	slices.Sort(got)
	want := []string{
		" => look into the log",
		"a bad word => use a good one",
		"cannot open NAME: REASON => check the name of the file NAME",
		"no space on VOLUME => make room: rm FILE",
		"wrong N, want 7 => first advice",
		"wrong N, want 7 => second advice",
		"x is closed => open it again",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, err := complete(entries, nil); err == nil || !strings.Contains(err.Error(), "look into the log") {
		t.Errorf("a hint without a message is no error: %v", err)
	}
	if _, err := complete(entries, map[string]string{"look": "m", "other": "m"}); err == nil || !strings.Contains(err.Error(), "other") {
		t.Errorf("a message without a hint is no error: %v", err)
	}
}

const source = `package a

import "fmt"

func fail(hint, format string, args ...any) error { return nil }
func wrap(err error, hint string) error { return nil }

func calls(name string, n int, err error) error {
	if err != nil {
		return wrap(fmt.Errorf("cannot open %q: %w", name, err), "check the name of the file "+name)
	}
	hint := "first advice"
	if n > 8 {
		hint = "second advice"
	}
	return fail(hint, "wrong %d, want %d", n, 7)
}

type closed struct{}

func (closed) Error() string { return "x is closed" }
func (closed) Hint() string  { return "open it again" }

type meaning struct{ say, hint string }

const hintRoom = "make room: " + remove

const remove = "rm FILE"

var meanings = []meaning{{"a bad word", "use a good one"}}

func explain(volume string) meaning {
	return meaning{say: fmt.Sprintf("no space on %s", volume), hint: hintRoom}
}

func passes(err error, hint string) error { return wrap(err, hint) }

func set(m *meaning) { m.hint = "look into the log" }
`
