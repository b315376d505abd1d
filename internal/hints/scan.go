package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// module is the import path of the repository.
const module = "github.com/vddkcp/vddkcp"

// An entry is a hint with the message that it belongs to. Words in capital letters stand for what
// the program puts in their place.
type entry struct {
	file     string // path in the repository
	line     int
	messages []string
	hint     string
}

// scanner collects the hints of a repository. It knows them by names: a variable, parameter, field
// or constant whose name begins with "hint" or "advice" or ends with "Hint" has a hint, and a
// function whose name ends with "Hint" returns one.
type scanner struct {
	files    *token.FileSet
	packages map[string]*pack // by the path in the repository
	entries  []entry
	covered  map[token.Pos]bool // the literals that an entry has
}

// pack is a package: its functions, methods, types and constants.
type pack struct {
	dir       string
	files     []*ast.File
	functions map[string]*ast.FuncDecl   // "name", or "Type.name" for methods
	methods   map[string][]*ast.FuncDecl // by name without the type
	structs   map[string]*ast.StructType
	constants map[string]ast.Expr
}

var hintName = regexp.MustCompile(`^([hH]int|[aA]dvice)|Hint$`)

// isHint reports whether a name is that of a hint. The package hinted and names such as hasHint are
// not.
func isHint(name string) bool {
	return hintName.MatchString(name) && name != "hinted" && name != "hasHint"
}

// messageNames are the names of parameters and fields that have the message of a hint, the best
// ones first.
var messageNames = []string{"format", "message", "say", "what", "text", "problem", "err", "Err", "error", "Detail"}

// skipped are the folders without hints for users.
var skipped = []string{"internal/lint", "internal/hints", "testdata", "vddk/testlib", "vsphere/vspheretest", "nfc/nfctest", "testtools", "docs", "bin", ".git"}

// scan returns the hints of the repository in the folder root.
func scan(root string) ([]entry, error) {
	s := &scanner{files: token.NewFileSet(), packages: map[string]*pack{}, covered: map[token.Pos]bool{}}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if d.IsDir() && (slices.Contains(skipped, relative) || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		return s.parse(name, relative)
	})
	if err != nil {
		return nil, err
	}
	dirs := make([]string, 0, len(s.packages))
	for dir := range s.packages {
		dirs = append(dirs, dir)
	}
	slices.Sort(dirs)
	for _, dir := range dirs {
		s.sites(s.packages[dir])
	}
	for _, dir := range dirs {
		s.rest(s.packages[dir])
	}
	return s.entries, nil
}

func (s *scanner) parse(name, relative string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	file, err := parser.ParseFile(s.files, relative, text, parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	dir := filepath.ToSlash(filepath.Dir(relative))
	p := s.packages[dir]
	if p == nil {
		p = &pack{dir: dir, functions: map[string]*ast.FuncDecl{}, methods: map[string][]*ast.FuncDecl{}, structs: map[string]*ast.StructType{}, constants: map[string]ast.Expr{}}
		s.packages[dir] = p
	}
	p.files = append(p.files, file)
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil {
				p.functions[d.Name.Name] = d
			} else {
				p.functions[receiver(d)+"."+d.Name.Name] = d
				p.methods[d.Name.Name] = append(p.methods[d.Name.Name], d)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					if t, ok := spec.Type.(*ast.StructType); ok {
						p.structs[spec.Name.Name] = t
					}
				case *ast.ValueSpec:
					for i, n := range spec.Names {
						if i < len(spec.Values) {
							p.constants[n.Name] = spec.Values[i]
						}
					}
				}
			}
		}
	}
	return nil
}

// receiver returns the name of the type of a method.
func receiver(d *ast.FuncDecl) string {
	t := d.Recv.List[0].Type
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	if index, ok := t.(*ast.IndexExpr); ok {
		t = index.X
	}
	if name, ok := t.(*ast.Ident); ok {
		return name.Name
	}
	return ""
}

// names returns the names of the fields of a list, with one name for each parameter.
func names(list *ast.FieldList) []string {
	var all []string
	if list == nil {
		return nil
	}
	for _, f := range list.List {
		if len(f.Names) == 0 { // an embedded field
			t := f.Type
			if star, ok := t.(*ast.StarExpr); ok {
				t = star.X
			}
			if name, ok := t.(*ast.Ident); ok {
				all = append(all, name.Name)
			} else {
				all = append(all, "")
			}
		}
		for _, n := range f.Names {
			all = append(all, n.Name)
		}
	}
	return all
}

// imported returns the package that a file imports under a name; nil: it is of another module.
func (s *scanner) imported(f *ast.File, name string) *pack {
	for _, i := range f.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		if (i.Name == nil && path.Base(p) == name || i.Name != nil && i.Name.Name == name) && strings.HasPrefix(p, module+"/") {
			return s.packages[strings.TrimPrefix(p, module+"/")]
		}
	}
	return nil
}

// parameters returns the names of the parameters of the function that a call calls; nil: unknown.
func (s *scanner) parameters(c *context, call *ast.CallExpr) []string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		if d := c.pack.functions[f.Name]; d != nil {
			return names(d.Type.Params)
		}
		for _, v := range c.assigned(f.Name) {
			if l, ok := v.(*ast.FuncLit); ok {
				return names(l.Type.Params)
			}
		}
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			if p := s.imported(c.file, x.Name); p != nil {
				if d := p.functions[f.Sel.Name]; d != nil {
					return names(d.Type.Params)
				}
				return nil
			}
		}
		if m := c.pack.methods[f.Sel.Name]; len(m) > 0 {
			return names(m[0].Type.Params)
		}
	}
	return nil
}

// sites finds the places of a package where a hint meets its message.
func (s *scanner) sites(p *pack) {
	for _, file := range p.files {
		for _, d := range file.Decls {
			c := &context{scanner: s, pack: p, file: file}
			f, _ := d.(*ast.FuncDecl)
			if f != nil {
				if f.Body == nil {
					continue
				}
				c.function, c.parameters = f, names(f.Type.Params)
				if f.Name.Name == "Hint" && f.Recv != nil {
					s.method(c, f)
				}
			}
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					s.call(c, n)
				case *ast.CompositeLit:
					s.composite(c, n, n.Type)
				}
				return true
			})
		}
	}
}

// method adds the hints of a method Hint, whose message is that of the method Error.
func (s *scanner) method(c *context, f *ast.FuncDecl) {
	var messages []string
	if e := c.pack.functions[receiver(f)+".Error"]; e != nil {
		inner := *c
		inner.function = e
		messages = inner.results(e, nil, 2).texts
	}
	hints := c.results(f, nil, 2)
	s.add(f.Pos(), messages, hints)
}

// call adds the hints of a call of a function with a parameter for a hint.
func (s *scanner) call(c *context, call *ast.CallExpr) {
	parameters := s.parameters(c, call)
	for i, name := range parameters {
		if !isHint(name) || i >= len(call.Args) {
			continue
		}
		hints := c.resolve(call.Args[i], 3)
		if c.only(call.Args[i]) {
			continue // a parameter or a field is passed on
		}
		var messages []string
		for _, m := range messageNames {
			if at := slices.Index(parameters, m); at >= 0 && at < len(call.Args) {
				if m == "format" {
					messages = c.format(call.Args[at:], 3).texts
				} else {
					messages = c.resolve(call.Args[at], 3).texts
				}
				break
			}
		}
		s.add(call.Pos(), messages, hints)
	}
}

// composite adds the hints of a literal of a struct. Elements of slices and maps inherit its type.
func (s *scanner) composite(c *context, l *ast.CompositeLit, kind ast.Expr) {
	switch t := kind.(type) {
	case nil:
		return // an element, which its slice or map has handled
	case *ast.ArrayType:
		for _, e := range l.Elts {
			if inner, ok := e.(*ast.CompositeLit); ok && inner.Type == nil {
				s.composite(c, inner, t.Elt)
			}
		}
		return
	case *ast.StarExpr:
		kind = t.X
	}
	values := map[string]ast.Expr{}
	name, _ := kind.(*ast.Ident)
	for i, e := range l.Elts {
		if kv, ok := e.(*ast.KeyValueExpr); ok {
			if key, ok := kv.Key.(*ast.Ident); ok {
				values[key.Name] = kv.Value
			}
		} else if name != nil && c.pack.structs[name.Name] != nil {
			if fields := names(c.pack.structs[name.Name].Fields); i < len(fields) {
				values[fields[i]] = e
			}
		}
	}
	for _, field := range slices.Sorted(maps.Keys(values)) {
		v := values[field]
		if !isHint(field) || c.only(v) {
			continue
		}
		hints := c.resolve(v, 3)
		var messages []string
		for _, m := range messageNames {
			if e := values[m]; e != nil {
				messages = c.resolve(e, 3).texts
				break
			}
		}
		if len(messages) == 0 {
			messages = librarySays(c, values)
		}
		s.add(l.Pos(), messages, hints)
	}
}

// librarySays returns what an element of the table of VDDK's errors applies to.
func librarySays(c *context, values map[string]ast.Expr) []string {
	of := func(name string) string {
		e := values[name]
		if call, ok := e.(*ast.CallExpr); ok && len(call.Args) == 1 {
			e = call.Args[0] // of regexp.MustCompile
		}
		if e == nil {
			return ""
		}
		return strings.Join(c.resolve(e, 2).texts, "")
	}
	var parts []string
	if op := of("op"); op != "" {
		parts = append(parts, op)
	}
	if code := of("code"); code != "" {
		parts = append(parts, "VDDK error "+code)
	}
	if line := of("line"); line != "" {
		line = strings.NewReplacer("(?i)", "", `\b`, "", `\s*`, " ", `\.`, ".", ".{0,60}", " ... ", ".*", " ... ", ":?", ":", " ?", " ", "()", "").Replace(line)
		parts = append(parts, "VDDK says: "+line)
	}
	if len(parts) == 0 {
		return nil
	}
	return []string{strings.Join(parts, ", ")}
}

// rest adds the hints that no site has: assignments to fields and variables, and tables. Their
// message is the one that the function reports.
func (s *scanner) rest(p *pack) {
	for _, file := range p.files {
		for _, d := range file.Decls {
			c := &context{scanner: s, pack: p, file: file}
			if f, ok := d.(*ast.FuncDecl); ok {
				c.function, c.parameters = f, names(f.Type.Params)
			}
			add := func(at token.Pos, v ast.Expr) {
				hints := c.resolve(v, 3)
				if slices.ContainsFunc(hints.literals, func(p token.Pos) bool { return !s.covered[p] }) {
					s.add(at, c.reports(), hints)
				}
			}
			ast.Inspect(d, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.AssignStmt:
					for i, l := range n.Lhs {
						if isHint(last(l)) && i < len(n.Rhs) {
							add(n.Pos(), n.Rhs[i])
						}
					}
				case *ast.ValueSpec:
					for i, name := range n.Names {
						if isHint(name.Name) && i < len(n.Values) {
							add(n.Pos(), n.Values[i])
						}
					}
				case *ast.ReturnStmt:
					if f := c.function; f != nil && isHint(f.Name.Name) {
						for _, r := range n.Results {
							add(n.Pos(), r)
						}
					}
				}
				return true
			})
		}
	}
}

// last returns the last name of a variable or field.
func last(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return e.Sel.Name
	}
	return ""
}

// add adds an entry for each hint that has words of its own.
func (s *scanner) add(at token.Pos, messages []string, hints texts) {
	for _, l := range hints.literals {
		s.covered[l] = true
	}
	position := s.files.Position(at)
	var kept []string
	for _, m := range messages {
		if m = strings.TrimSpace(m); hasWords(m) && !strings.ContainsAny(m[:1], ";,(") {
			kept = append(kept, m)
		}
	}
	for _, h := range hints.texts {
		h = strings.Trim(h, " ;")
		if hasWords(h) {
			s.entries = append(s.entries, entry{position.Filename, position.Line, kept, h})
		}
	}
}

// hasWords reports whether a text has words besides placeholders.
func hasWords(text string) bool { return regexp.MustCompile(`[a-z]{2,}`).MatchString(text) }
