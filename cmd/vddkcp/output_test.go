package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// streams lists the files that may write to standard output and standard error
// directly, with the reasons. All other files write text with output.go, which escapes
// it.
var streams = map[string]string{
	"cmd/vddkcp/output.go":                  "it escapes what is written",
	"cmd/vddkcp/internal/export/command.go": "the command of --run has them as its own",
	"sink/open/stream.go":                   "a raw stream, for DST -",
}

// notInVddkcp are the folders with code for builds and tests, which is not a part of vddkcp.
var notInVddkcp = []string{"scripts", "testtools", "packaging", "internal/lint", "internal/hints", "vddk/testlib", "nfc/nfctest", "vsphere/vspheretest"}

func TestOneWriterOfText(t *testing.T) {
	root := filepath.Join("..", "..")
	used := map[string]bool{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, path)
		if d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || slices.Contains(notInVddkcp, name) || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, 0)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(file.Imports, func(s *ast.ImportSpec) bool { return s.Path.Value == `"log"` }) {
			t.Errorf("%s imports log, which writes on standard error", name)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			x, ok := s.X.(*ast.Ident)
			direct := ok && (x.Name == "os" && (s.Sel.Name == "Stdout" || s.Sel.Name == "Stderr") || x.Name == "fmt" && strings.HasPrefix(s.Sel.Name, "Print"))
			if direct && streams[name] == "" {
				t.Errorf("%s: %s.%s: text goes through textOutput, errorOutput or a display", set.Position(s.Pos()), x.Name, s.Sel.Name)
			}
			used[name] = used[name] || direct
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range streams {
		if !used[name] {
			t.Errorf("%s uses neither: leave it out", name)
		}
	}
}
