package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strconv"
	"strings"
)

const (
	maxFile     = 600 // lines
	maxFunction = 80  // lines
	maxFields   = 20
)

// lintGo checks a Go file. path is its name, and text its content.
func lintGo(path, text string) (problems []problem, err error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, text, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	report := func(pos token.Pos, format string, args ...any) {
		problems = append(problems, problem{path, fset.Position(pos).Line, fmt.Sprintf(format, args...)})
	}
	test := strings.HasSuffix(path, "_test.go")
	for _, spec := range file.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return nil, err
		}
		if wrong := lintImport(path, imported); wrong != "" {
			report(spec.Pos(), "%s", wrong)
		}
	}

	if lines := strings.Count(text, "\n"); lines > maxFile && !explained(file, "longer than 600 lines because") {
		report(file.Package, "the file has %d lines, more than %d: split it, or say why it is \"longer than 600 lines because\"", lines, maxFile)
	}
	for _, group := range file.Comments {
		for _, found := range phrasesIn(plain(group.Text())) {
			report(group.Pos(), "the comment has %s", found)
		}
	}
	if test {
		return problems, nil
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if lines := length(fset, n); lines > maxFunction && !strings.Contains(plain(n.Doc.Text()), "longer than 80 lines because") {
				report(n.Pos(), "function %s has %d lines, more than %d", n.Name.Name, lines, maxFunction)
			}
		case *ast.TypeSpec:
			if s, ok := n.Type.(*ast.StructType); ok && s.Fields.NumFields() > maxFields && !holdsOptions(n.Name.Name) {
				report(n.Pos(), "struct %s has %d fields, more than %d", n.Name.Name, s.Fields.NumFields(), maxFields)
			}
		case *ast.ImportSpec:
			return false
		case *ast.BasicLit:
			if s, err := strconv.Unquote(n.Value); n.Kind == token.STRING && err == nil {
				for _, found := range phrasesIn(plain(s)) {
					report(n.Pos(), "the text has %s", found)
				}
			}
		}
		return true
	})
	return problems, nil
}

// The function explained reports whether a comment of the file explains why the file breaks a rule.
// Such a comment contains the given phrase, for example "longer than 600 lines because". The phrase
// may continue on the next line of the comment.
func explained(file *ast.File, phrase string) bool {
	for _, group := range file.Comments {
		if strings.Contains(plain(group.Text()), phrase) {
			return true
		}
	}
	return false
}

// The function length returns the number of lines of a function. Its doc comment is not counted.
func length(fset *token.FileSet, f *ast.FuncDecl) int {
	return fset.Position(f.End()).Line - fset.Position(f.Type.Pos()).Line + 1
}

// holdsOptions reports whether a struct with the given name contains options that a user can set.
// The name of such a struct has an ending such as Options or Flags.
func holdsOptions(name string) bool {
	name = strings.ToLower(name)
	for _, suffix := range []string{"options", "flags", "command", "spec", "params"} {
		if strings.HasSuffix(name, suffix) {
			return true
		}
	}
	return false
}

// The function plain returns text in one line, with single spaces in place of line ends. Therefore
// a phrase is found even if it continues on the next line.
func plain(text string) string { return strings.Join(strings.Fields(text), " ") }
