// Lint checks the rules of this repository that no public linter knows. Run it in the root of
// the repository:
//
//	go run ./internal/lint [FOLDER...]
//
// Lint reads the Go files and Markdown pages of the repository. If folders are given, it reads only
// the files below them. It prints one line for each violation, and its exit status is 1 if there is
// a violation. The rules:
//
//   - A package imports only the packages that imports.go allows.
//   - A Go file has at most 600 lines, unless a comment in it says "longer than 600
//     lines because" and why.
//   - A function outside of tests has at most 80 lines, unless its doc comment says
//     "longer than 80 lines because" and why.
//   - A struct outside of tests has at most 20 fields, unless its name says that it
//     holds options.
//   - A paragraph of a page has at most six lines.
//   - Comments, messages and pages do not contain the phrases in phrases.go, which
//     readers misunderstood.
package main

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
)

func main() {
	problems, err := lint(os.DirFS("."))
	if err != nil {
		fmt.Fprintln(os.Stderr, "lint:", err)
		os.Exit(2)
	}
	found := 0
	for _, p := range problems {
		if below(p.file, os.Args[1:]) {
			fmt.Printf("%s:%d: %s\n", p.file, p.line, p.text)
			found++
		}
	}
	if found > 0 {
		fmt.Fprintf(os.Stderr, "lint: %d violations; CONTRIBUTING.md has the rules\n", found)
		os.Exit(1)
	}
}

// A problem is a violation of a rule.
type problem struct {
	file string
	line int
	text string
}

// The function below reports whether a file is in one of the given folders or in one of their
// subfolders. If no folders are given, it returns true.
func below(file string, folders []string) bool {
	for _, folder := range folders {
		folder = path.Clean(folder)
		if folder == "." || file == folder || strings.HasPrefix(file, folder+"/") {
			return true
		}
	}
	return len(folders) == 0
}

// The function lint checks all files of the repository. tree is its root folder.
func lint(tree fs.FS) (problems []problem, err error) {
	err = fs.WalkDir(tree, ".", func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if file != "." && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin" || name == "bench-out") {
				return fs.SkipDir
			}
			return nil
		}
		var check func(path, text string) ([]problem, error)
		switch {
		case strings.HasPrefix(file, "internal/lint/"):
			return nil // its phrases are examples
		case strings.HasSuffix(name, ".go"):
			check = lintGo
		case strings.HasSuffix(name, ".md"):
			check = lintMarkdown
		default:
			return nil
		}
		text, err := fs.ReadFile(tree, file)
		if err != nil {
			return err
		}
		more, err := check(file, string(text))
		problems = append(problems, more...)
		return err
	})
	return problems, err
}
