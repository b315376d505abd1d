package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"testing/fstest"
)

func TestLint(t *testing.T) {
	file := func(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }
	lines := func(n int) string { return strings.Repeat("\tx()\n", n) }
	fields := func(n int) (s string) {
		for i := range n {
			s += fmt.Sprintf("\tF%d int\n", i)
		}
		return s
	}
	tree := fstest.MapFS{
		"long.go":             file("package p\n" + strings.Repeat("\n", 600)),
		"reason.go":           file("// Package p is longer than 600\n// lines because it is a table.\npackage p\n" + strings.Repeat("\n", 600)),
		"function.go":         file("package p\n\nfunc f() {\n" + lines(79) + "}\n"),
		"function80.go":       file("package p\n\nfunc f() {\n" + lines(78) + "}\n"),
		"functionreason.go":   file("package p\n\n// f is longer than 80 lines because it is one loop.\nfunc f() {\n" + lines(79) + "}\n"),
		"function_test.go":    file("package p\n\nfunc f() {\n" + lines(79) + "}\n"),
		"struct.go":           file("package p\n\ntype state struct {\n" + fields(21) + "}\n"),
		"struct20.go":         file("package p\n\ntype state struct {\n" + fields(20) + "}\n"),
		"options.go":          file("package p\n\ntype CopyOptions struct {\n" + fields(21) + "}\n"),
		"comment.go":          file("package p\n\n// f reports damage when it is\n// come to.\nfunc f() {}\n"),
		"sentence.go":         file("package p\n\n// f reads. Of a disk, that is all.\nfunc f() {}\n"),
		"name.go":             file("package p\n\n// Of returns a name, or none.\nfunc Of() {}\n"),
		"message.go":          file("package p\n\nvar m = \"no file or folder\"\n"),
		"sink/raw/bad.go":     file("package raw\n\nimport _ \"github.com/vddkcp/vddkcp/transfer\"\n"),
		"sink/raw/b_test.go":  file("package raw\n\nimport _ \"github.com/vddkcp/vddkcp/transfer\"\n"),
		"sink/raw/good.go":    file("package raw\n\nimport _ \"github.com/vddkcp/vddkcp/source\"\n"),
		"nbd/other/room.go":   file("package other\n\nimport _ \"github.com/vddkcp/vddkcp/source\"\n"),
		"page.md":             file("A page.\n\nAll `but for` is quoted.\n\nAll but for one.\n\n```\nbut for\n```\n"),
		"paragraph.md":        file(strings.Repeat("A line.\n", 7)),
		"list.md":             file("A list:\n" + strings.Repeat("- An item.\n", 7)),
		"testdata/skipped.go": file("not Go"),
		".git/skipped.go":     file("not Go"),
	}
	problems, err := lint(tree)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range problems {
		got[p.file] += fmt.Sprintf(":%d: %s", p.line, p.text)
	}
	want := map[string]string{
		"long.go":           ":1: the file has 601 lines",
		"function.go":       ":3: function f has 81 lines",
		"struct.go":         ":3: struct state has 21 fields",
		"comment.go":        `:3: the comment has "is come to"`,
		"sentence.go":       `:3: the comment has ". Of a disk,"`,
		"message.go":        `:3: the text has "no file or folder"`,
		"sink/raw/bad.go":   ":3: sink/raw may not import transfer; it may import: sink source source/raw",
		"nbd/other/room.go": ":3: nbd/other may not import source",
		"page.md":           `:5: the page has "but for"`,
		"paragraph.md":      ":1: the paragraph has 7 lines",
	}
	for name := range tree {
		if (want[name] == "") != (got[name] == "") || !strings.HasPrefix(got[name], want[name]) {
			t.Errorf("%s: found %q, want %q", name, got[name], want[name])
		}
	}
}

func TestLintRefusesBrokenGo(t *testing.T) {
	if _, err := lint(fstest.MapFS{"x.go": {Data: []byte("package")}}); err == nil {
		t.Error("a file that is not Go passed")
	}
}

// The repository follows its rules of imports, which make test checks too, since a
// wrong import is costly to undo.
func TestImports(t *testing.T) {
	problems, err := lint(os.DirFS("../.."))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.Contains(p.text, "may not import") {
			t.Errorf("%s:%d: %s", p.file, p.line, p.text)
		}
	}
}
