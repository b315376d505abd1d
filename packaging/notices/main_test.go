package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNotices prints the licences in the executable of this test.
func TestNotices(t *testing.T) {
	executable := filepath.Join(t.TempDir(), "notices")
	if _, err := goCommand(nil, "build", "-o", executable, "."); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := run(executable, &out); err != nil {
		t.Fatal(err)
	}
	if text := out.String(); !strings.HasPrefix(text, "notices contains") || !strings.Contains(text, "\nGo go1.") || !strings.Contains(text, "file LICENSE:\n\nCopyright") {
		t.Errorf("notices: %s", text)
	}
}

func TestLicencesOfAModule(t *testing.T) {
	for name, test := range map[string]struct {
		files []string
		want  string // files in the output, in this order
		fails bool
	}{
		"one":            {files: []string{"LICENSE"}, want: "LICENSE"},
		"other names":    {files: []string{"COPYING.txt", "PATENTS", "README", "NOTICE"}, want: "COPYING.txt NOTICE PATENTS"},
		"taken over":     {files: []string{"LICENSE", "a/b/LICENSE.txt", "other/LICENSE"}, want: "LICENSE a/b/LICENSE.txt"},
		"none":           {files: []string{"README", "NOTICE"}, fails: true},
		"only in a part": {files: []string{"a/LICENSE"}, fails: true},
		"source code":    {files: []string{"LICENCE", "license.go", "licenses_test.go"}, want: "LICENCE"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, file := range test.files {
				path := filepath.Join(dir, file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte("text of "+file+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			m := module{path: "example.com/m", version: "v1.0.0", dir: dir, packages: []string{filepath.Join(dir, "a/b")}}
			var out bytes.Buffer
			if err := m.print(&out); (err != nil) != test.fails {
				t.Fatalf("%v, want an error: %v", err, test.fails)
			}
			var found []string
			for line := range strings.Lines(out.String()) {
				if file, ok := strings.CutPrefix(line, "text of "); ok {
					found = append(found, strings.TrimSpace(file))
				}
			}
			if got := strings.Join(found, " "); !test.fails && got != test.want {
				t.Errorf("licences in %q, want %q", got, test.want)
			}
		})
	}
}
