package main

import (
	"go/ast"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// texts are the texts that an expression can have, and the positions of the literals in it.
type texts struct {
	texts    []string
	literals []token.Pos
}

// maxTexts limits how many texts an expression is followed to.
const maxTexts = 24

func (t *texts) add(o texts) {
	for _, text := range o.texts {
		if !slices.Contains(t.texts, text) && len(t.texts) < maxTexts {
			t.texts = append(t.texts, text)
		}
	}
	t.literals = append(t.literals, o.literals...)
}

// context is where an expression stands.
type context struct {
	*scanner
	pack       *pack
	file       *ast.File
	function   *ast.FuncDecl       // nil: outside functions
	parameters []string            // of the function
	bound      map[string]ast.Expr // the arguments of the call that is followed
	outer      *context            // where the arguments stand
}

// assigned returns the values that a function assigns to a variable.
func (c *context) assigned(name string) []ast.Expr {
	var all []ast.Expr
	if c.function == nil || c.function.Body == nil {
		return nil
	}
	ast.Inspect(c.function.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for i, l := range n.Lhs {
				if id, ok := l.(*ast.Ident); ok && id.Name == name && len(n.Lhs) == len(n.Rhs) {
					all = append(all, n.Rhs[i])
				}
			}
		case *ast.ValueSpec:
			for i, id := range n.Names {
				if id.Name == name && i < len(n.Values) {
					all = append(all, n.Values[i])
				}
			}
		}
		return true
	})
	return all
}

// only reports whether a hint is passed on as it is: it is a parameter, a field, or the hint of an
// error.
func (c *context) only(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return slices.Contains(c.parameters, e.Name) && len(c.assigned(e.Name)) == 0
	case *ast.SelectorExpr:
		return true
	case *ast.CallExpr:
		name := last(e.Fun)
		return name == "Of" || name == "Hint"
	}
	return false
}

// resolve returns the texts that an expression can have. It follows calls and variables to the
// given depth.
func (c *context) resolve(e ast.Expr, depth int) texts {
	if depth < 0 {
		return texts{texts: []string{placeholder(e)}}
	}
	switch e := e.(type) {
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
			return texts{[]string{text}, []token.Pos{e.Pos()}}
		}
		return texts{texts: []string{e.Value}}
	case *ast.ParenExpr:
		return c.resolve(e.X, depth)
	case *ast.BinaryExpr:
		return joined(c.resolve(e.X, depth), c.resolve(e.Y, depth))
	case *ast.Ident:
		return c.identifier(e, depth)
	case *ast.UnaryExpr:
		return c.resolve(e.X, depth)
	case *ast.CompositeLit:
		return c.errorOf(e, depth)
	case *ast.CallExpr:
		return c.called(e, depth)
	}
	if x, ok := e.(*ast.SelectorExpr); ok {
		if of, ok := x.X.(*ast.Ident); ok {
			if p := c.imported(c.file, of.Name); p != nil && p.constants[x.Sel.Name] != nil {
				if l, ok := p.constants[x.Sel.Name].(*ast.BasicLit); ok {
					return c.resolve(l, 0)
				}
			}
		}
	}
	return texts{texts: []string{placeholder(e)}}
}

// joined returns all texts of a followed by those of b.
func joined(a, b texts) texts {
	var t texts
	for _, x := range a.texts {
		for _, y := range b.texts {
			t.add(texts{texts: []string{x + y}})
		}
	}
	t.literals = slices.Concat(a.literals, b.literals)
	return t
}

func (c *context) identifier(e *ast.Ident, depth int) texts {
	if v := c.bound[e.Name]; v != nil {
		return c.outer.resolve(v, depth-1)
	}
	values := c.assigned(e.Name)
	if len(values) == 0 && !slices.Contains(c.parameters, e.Name) {
		if v := c.pack.constants[e.Name]; v != nil {
			values = []ast.Expr{v}
		}
	}
	var t texts
	for _, v := range values {
		if call, ok := v.(*ast.CallExpr); ok && !c.makesText(call) {
			continue
		}
		t.add(c.resolve(v, depth-1))
	}
	if !slices.ContainsFunc(t.texts, func(s string) bool { return s != "" }) {
		t.texts = []string{placeholder(e)}
	}
	return t
}

// formatting are functions whose first argument is a format.
var formatting = []string{"Sprintf", "Errorf"}

// quoting are functions that write a text in another form.
var quoting = []string{"Name", "Word", "Line", "quote", "Format", "Base", "Dir", "Text", "string", "String", "Error", "shortened", "FormatInt", "Itoa", "Quote", "Sprint", "Path", "ToSlash", "Clean"}

// makesText reports whether a call makes a text or an error that resolve understands.
func (c *context) makesText(call *ast.CallExpr) bool {
	name := last(call.Fun)
	if slices.Contains(formatting, name) || name == "New" || isHint(name) || name == "Permanent" || name == "append" {
		return true
	}
	id, ok := call.Fun.(*ast.Ident)
	return ok && c.pack.functions[id.Name] != nil
}

func (c *context) called(e *ast.CallExpr, depth int) texts {
	name := last(e.Fun)
	x, _ := e.Fun.(*ast.SelectorExpr)
	of := ""
	if x != nil {
		of = last(x.X)
	}
	switch {
	case slices.Contains(formatting, name) && len(e.Args) > 0:
		return c.format(e.Args, depth)
	case of == "errors" && name == "New", of == "usage" && name == "New", of == "hinted" && name == "Error", name == "Permanent", of == "usage" && name == "WithHint", of == "usage" && name == "Wrap":
		return c.resolve(e.Args[0], depth)
	case of == "usage" && name == "Errorf":
		return c.format(e.Args, depth)
	case of == "strings" && name == "ReplaceAll":
		return c.resolve(e.Args[0], depth)
	case of == "strings" && name == "Join":
		return c.resolve(e.Args[0], depth)
	case of == "hinted" && name == "Of":
		return texts{texts: []string{""}}
	case name == "append":
		return c.resolve(e.Args[len(e.Args)-1], depth)
	}
	if id, ok := e.Fun.(*ast.Ident); ok {
		if f := c.pack.functions[id.Name]; f != nil && depth > 0 && returnsText(f) {
			return c.results(f, e.Args, depth-1)
		}
	}
	if x != nil && isHint(name) && depth > 0 {
		if m := c.pack.methods[name]; len(m) == 1 && name != "Hint" {
			return c.results(m[0], e.Args, depth-1)
		}
	}
	return texts{texts: []string{placeholder(e)}}
}

// returnsText reports whether the first result of a function is a string or an error.
func returnsText(f *ast.FuncDecl) bool {
	r := f.Type.Results
	if r == nil || len(r.List) == 0 || f.Body == nil {
		return false
	}
	t, ok := r.List[0].Type.(*ast.Ident)
	return ok && (t.Name == "string" || t.Name == "error") && !slices.Contains(quoting, f.Name.Name)
}

// results returns the texts that a function can return, with the arguments of a call.
func (c *context) results(f *ast.FuncDecl, args []ast.Expr, depth int) texts {
	inner := &context{scanner: c.scanner, pack: c.pack, file: c.file, function: f, parameters: names(f.Type.Params), bound: map[string]ast.Expr{}, outer: c}
	for i, name := range inner.parameters {
		if i < len(args) {
			inner.bound[name] = args[i]
		}
	}
	var t texts
	ast.Inspect(f.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.ReturnStmt:
			if len(n.Results) > 0 {
				t.add(inner.resolve(n.Results[0], depth))
			}
		case *ast.CallExpr: // an error text that is written to a strings.Builder
			if last(n.Fun) == "WriteString" && len(n.Args) == 1 {
				t.add(inner.resolve(n.Args[0], depth))
			} else if last(n.Fun) == "Fprintf" && len(n.Args) > 1 {
				t.add(inner.format(n.Args[1:], depth))
			}
		}
		return true
	})
	return t
}

// errorOf returns the texts of the method Error of a literal of a struct.
func (c *context) errorOf(l *ast.CompositeLit, depth int) texts {
	name, ok := l.Type.(*ast.Ident)
	if !ok || depth == 0 {
		return texts{texts: []string{"REASON"}}
	}
	f := c.pack.functions[name.Name+".Error"]
	if f == nil || f.Body == nil {
		return texts{texts: []string{"REASON"}}
	}
	return c.results(f, nil, depth-1)
}

var verb = regexp.MustCompile(`%[-+# 0]*[0-9.]*(\[[0-9]+\])?[a-zA-Z%]`)

// format returns the texts of a format with its arguments.
func (c *context) format(args []ast.Expr, depth int) texts {
	formats := c.resolve(args[0], depth)
	result := texts{literals: formats.literals}
	for _, f := range formats.texts {
		t := texts{texts: []string{""}}
		n, at := 0, 0
		for _, m := range verb.FindAllStringSubmatchIndex(f, -1) {
			t = joined(t, texts{texts: []string{f[at:m[0]]}})
			at = m[1]
			if f[m[0]:m[1]] == "%%" {
				t = joined(t, texts{texts: []string{"%"}})
				continue
			}
			if m[2] >= 0 {
				n, _ = strconv.Atoi(f[m[2]+1 : m[3]-1])
				n--
			}
			n++
			switch {
			case n >= len(args):
				t = joined(t, texts{texts: []string{"VALUE"}})
			case c.isText(args[n]):
				t = joined(t, c.resolve(args[n], depth-1))
			default:
				t = joined(t, texts{texts: []string{placeholder(args[n])}})
			}
		}
		result.add(joined(t, texts{texts: []string{f[at:]}}))
	}
	return result
}

// isText reports whether an argument of a format is followed: it is a literal or another format.
func (c *context) isText(e ast.Expr) bool {
	switch e := e.(type) {
	case *ast.Ident:
		return c.bound[e.Name] != nil
	case *ast.BasicLit:
		return true
	case *ast.CallExpr:
		return slices.Contains(formatting, last(e.Fun))
	}
	return false
}

// reasons are names of variables with errors. The placeholder for them only says that a reason
// follows.
var reasons = []string{"err", "Err", "e", "cause", "why", "reason", "Reason", "all", "refused", "fault", "Trust"}

// placeholder returns the word in capital letters that stands for an expression.
func placeholder(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return capitals(e.Name)
	case *ast.SelectorExpr:
		return capitals(e.Sel.Name)
	case *ast.IndexExpr:
		return placeholder(e.X)
	case *ast.SliceExpr:
		return placeholder(e.X)
	case *ast.StarExpr:
		return placeholder(e.X)
	case *ast.ParenExpr:
		return placeholder(e.X)
	case *ast.UnaryExpr:
		return placeholder(e.X)
	case *ast.CallExpr:
		name := last(e.Fun)
		x, _ := e.Fun.(*ast.SelectorExpr)
		switch {
		case name == "len" || name == "Perm" || name == "Geteuid":
			return "N"
		case name == "Cause":
			return "REASON"
		case len(e.Args) > 0 && (slices.Contains(quoting, name) || name == "Join"):
			return placeholder(e.Args[0])
		case x != nil && len(e.Args) == 0 && slices.Contains(quoting, name):
			return placeholder(x.X)
		}
		return capitals(name)
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil {
			return text
		}
		return e.Value
	}
	return "VALUE"
}

// capitals returns a name in capital letters, with blanks between its words.
func capitals(name string) string {
	if slices.Contains(reasons, name) {
		return "REASON"
	}
	var b strings.Builder
	var before rune
	for i, r := range name {
		if i > 0 && unicode.IsUpper(r) && unicode.IsLower(before) {
			b.WriteByte(' ')
		}
		b.WriteRune(unicode.ToUpper(r))
		before = r
	}
	return b.String()
}

// reports returns the messages of the errors that the function makes.
func (c *context) reports() []string {
	if c.function == nil || c.function.Body == nil {
		return nil
	}
	var t texts
	ast.Inspect(c.function.Body, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			switch last(call.Fun) {
			case "Errorf":
				t.add(c.format(call.Args, 2))
			case "New":
				if len(call.Args) > 0 {
					t.add(c.resolve(call.Args[0], 2))
				}
			}
		}
		return true
	})
	return t.texts
}
