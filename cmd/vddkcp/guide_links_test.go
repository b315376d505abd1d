package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestGuideLinks checks that the files and headings to which the pages for users link exist, and
// that the index of the guide names each of its pages.
func TestGuideLinks(t *testing.T) {
	pages := pagesOf(t, "../../docs/guide/*.md")
	link := regexp.MustCompile(`\]\(([^)#:]*)(#[^)]*)?\)`)
	index, err := os.ReadFile("../../docs/guide/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range slices.Concat(pages, pagesOf(t, "../../*.md"), pagesOf(t, "../../docs/*.md"), pagesOf(t, "../../examples/*.md")) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		if name := filepath.Base(page); slices.Contains(pages, page) && name != "README.md" && !strings.Contains(string(index), "("+name+")") {
			t.Errorf("the index of the guide has no link to %s", name)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			to := page
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(page), m[1])
			}
			target, _ := os.ReadFile(to) // it may be a folder
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %v", page, err)
				continue
			}
			if m[2] != "" && !hasHeading(string(target), m[2][1:]) {
				t.Errorf("%s: %s has no heading for %s", page, to, m[2])
			}
		}
	}
}

func pagesOf(t *testing.T, pattern string) []string {
	t.Helper()
	pages, err := filepath.Glob(pattern)
	if err != nil || len(pages) == 0 {
		t.Fatalf("%s: %d pages: %v", pattern, len(pages), err)
	}
	return pages
}

// hasHeading reports whether a page has a heading with the given anchor, as GitHub makes it.
func hasHeading(page, anchor string) bool {
	drop := regexp.MustCompile("[^a-z0-9 _-]")
	for _, line := range strings.Split(page, "\n") {
		if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			if strings.ReplaceAll(drop.ReplaceAllString(strings.ToLower(title), ""), " ", "-") == anchor {
				return true
			}
		}
	}
	return false
}

// TestGuideNamesTests checks that the tests which security.md names for its statements exist.
func TestGuideNamesTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/guide/security.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("`(Test\\w+)(?:/(\\w+))?`\\s+in\\s+`([^`]+)`").FindAllStringSubmatch(string(text), -1)
	for _, m := range named {
		if m[2] != "" {
			if _, err := os.Stat(filepath.Join("testdata/script", m[2]+".txtar")); err != nil {
				t.Error(err)
			}
			continue
		}
		files, err := filepath.Glob(filepath.Join("../..", m[3], "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, f := range files {
			source, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			found = found || strings.Contains(string(source), "\nfunc "+m[1]+"(")
		}
		if !found {
			t.Errorf("there is no test %s in %s", m[1], m[3])
		}
	}
	if sections := strings.Count(string(text), "\n## "); strings.Count(string(text), "\nTests: ") != sections || len(named) < 2*sections {
		t.Errorf("%d tests for %d sections", len(named), sections)
	}
}
