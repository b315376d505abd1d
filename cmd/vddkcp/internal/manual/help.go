package manual

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/alecthomas/kong"
)

// widest is the greatest width of a left column, in columns of the terminal. A longer text there
// has a line for itself.
const widest = 27

// narrow is the width of a terminal below which there is no room for two columns.
const narrow = 60

// Help returns what --help prints for a command, or for the program if c is the node of the
// program. No line is longer than width, as far as the words allow.
func (b *Book) Help(c *kong.Node, width int) string {
	h := &help{width: max(width, 20)}
	children := slices.DeleteFunc(slices.Clone(c.Children), func(c *kong.Node) bool { return c.Hidden })
	for i, l := range wrap(usage(c), h.width-len("Usage: ")) {
		h.line([]string{"Usage: ", "       "}[min(i, 1)] + l)
	}
	h.line("")
	h.paragraphs(c.Help)
	h.paragraphs(c.Detail)
	if len(c.Positional) > 0 {
		var rows []row
		for _, a := range c.Positional {
			rows = append(rows, row{a.Name, a.Help})
		}
		h.section("Arguments:", rows)
	}
	for _, g := range groups(children, func(c *kong.Node) *kong.Group { return c.Group }) {
		var rows []row
		for _, c := range g.members {
			rows = append(rows, row{strings.TrimPrefix(c.FullPath(), b.App.Name+" "), c.Help})
		}
		h.section(orDefault(g.title, "Commands")+":", rows)
	}
	for _, g := range flagGroups(c.Flags) {
		h.section(orDefault(g.title, "Flags")+":", flagRows(g.members))
	}
	if c.Parent != nil {
		h.section("Common flags:", flagRows(slices.Concat(c.Parent.AllFlags(true)...)))
	} else {
		var rows []row
		for _, s := range b.Statuses {
			rows = append(rows, row{s.Status, s.Meaning})
		}
		h.section("Exit status:", rows)
		h.paragraphs(b.App.Name + " COMMAND --help lists the flags of a command. man " + b.App.Name + " and man " + b.App.Name + "-COMMAND say more.")
	}
	h.examples(b.examplesOf(c))
	return strings.TrimRight(h.text.String(), "\n") + "\n"
}

// The function usage returns the command line of a command in short.
func usage(c *kong.Node) string {
	words := []string{c.FullPath()}
	if len(c.Children) > 0 {
		words = append(words, "COMMAND")
	}
	for _, a := range c.Positional {
		if a.Required {
			words = append(words, a.Name)
		} else {
			words = append(words, "["+a.Name+"]")
		}
	}
	for _, f := range c.Flags {
		if f.Required {
			words = append(words, "--"+f.Name+"="+placeholder(f))
		}
	}
	return strings.Join(append(words, "[flags]"), " ")
}

func orDefault(title, otherwise string) string {
	if title == "" {
		return otherwise
	}
	return title
}

// A row has the texts of two columns.
type row struct{ left, right string }

func flagRows(flags []*kong.Flag) (rows []row) {
	short := slices.ContainsFunc(flags, func(f *kong.Flag) bool { return f.Short != 0 })
	for _, f := range flags {
		left := "--" + f.Name
		if !f.IsBool() {
			left += "=" + placeholder(f)
		}
		if f.Short != 0 {
			left = "-" + string(f.Short) + ", " + left
		} else if short {
			left = "    " + left
		}
		right := description(f)
		if len(f.Envs) > 0 {
			right = strings.TrimSuffix(right, ".") + " ($" + f.Envs[0] + ")."
		}
		rows = append(rows, row{left, right})
	}
	return rows
}

// The type help is a help text that is being composed.
type help struct {
	width int
	text  strings.Builder
}

func (h *help) line(text string) { h.text.WriteString(text + "\n") }

func (h *help) paragraphs(text string) {
	for _, p := range strings.Split(text, "\n\n") {
		if p = strings.TrimSpace(p); p != "" {
			h.lines("", wrap(p, h.width))
			h.line("")
		}
	}
}

func (h *help) lines(indent string, lines []string) {
	for _, l := range lines {
		h.line(indent + l)
	}
}

// The method section appends rows below a title. On a narrow terminal, the right column is below
// the left one.
func (h *help) section(title string, rows []row) {
	if len(rows) == 0 {
		return
	}
	h.line(title)
	left := 0
	for _, r := range rows {
		if n := utf8.RuneCountInString(r.left); n <= widest {
			left = max(left, n)
		}
	}
	for _, r := range rows {
		if h.width < narrow {
			h.line("  " + strings.TrimSpace(r.left))
			h.lines("      ", wrap(r.right, h.width-6))
			continue
		}
		indent := strings.Repeat(" ", 2+left+2)
		lines := wrap(r.right, h.width-len(indent))
		if n := utf8.RuneCountInString(r.left); n <= left {
			h.line("  " + r.left + strings.Repeat(" ", left-n+2) + lines[0])
			lines = lines[1:]
		} else {
			h.line("  " + r.left)
		}
		h.lines(indent, lines)
	}
	h.line("")
}

// The method examples appends examples. Their lines are never broken, so that they can be copied.
func (h *help) examples(all []Example) {
	if len(all) == 0 {
		return
	}
	h.line("Examples:")
	for i, e := range all {
		if i > 0 {
			h.line("")
		}
		h.lines("  ", wrap(e.About, h.width-2))
		h.line("    " + e.Line)
	}
}

// The function wrap breaks a text at spaces into lines of at most width characters. A longer word
// is not broken.
func wrap(text string, width int) (lines []string) {
	line, length := "", 0
	for _, word := range strings.Fields(text) {
		n := utf8.RuneCountInString(word)
		if length > 0 && length+1+n > width {
			lines, line, length = append(lines, line), "", 0
		}
		if length > 0 {
			line, length = line+" ", length+1
		}
		line, length = line+word, length+n
	}
	return append(lines, line)
}
