package manual

import (
	"strings"
	"testing"
)

func TestInline(t *testing.T) {
	for text, want := range map[string]string{
		"plain text":           `plain text`,
		"`--resume` of *DST*.": `\fB\-\-resume\fR of \fIDST\fR.`,
		"a half-open range":    `a half-open range`,
		"a dash - and -1":      `a dash \- and \-1`,
		`C:\x "q" it's ~ ^`:    `C:\ex \(dqq\(dq it\(aqs \(ti \(ha`,
		"ü":                    `\[u00FC]`,
	} {
		if got := inline(text); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

func TestHelpText(t *testing.T) {
	for text, want := range map[string]string{
		"the same as --log-level debug":    `the same as \fB\-\-log\-level\fR debug`,
		"* and `x` stay as they are":       "* and \\(gax\\(ga stay as they are",
		`"-" asks, with --quiesce=try too`: `\(dq\-\(dq asks, with \fB\-\-quiesce\fR=try too`,
	} {
		if got := helpText(text); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
}

// A line of text must not become a macro.
func TestLinesOfText(t *testing.T) {
	p := new(page)
	p.section("NAME")
	p.paragraph(plain(".partial is a name. 'tis one. And another."))
	p.example(".br", "a\\b")
	want := ".SH NAME\n\\&.partial is a name.\n\\(aqtis one.\nAnd another.\n.PP\n.RS 4\n.EX\n\\&.br\na\\eb\n.EE\n.RE\n"
	if got := p.text.String(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestProse(t *testing.T) {
	const text = "A paragraph\nof two lines.\n\n- one\n- two\n  lines\n\n## FILES\n\n*a*\n: the first\n\n`b`, `c`\n: the others,\nwhich follow\n\n### More\n\n```\nx  y\n```\n"
	texts, err := parseProse(text)
	if err != nil {
		t.Fatal(err)
	}
	p := new(page)
	p.section("DESCRIPTION")
	p.blocks(texts.description)
	p.sections(texts, "FILES")
	want := strings.Join([]string{
		".SH DESCRIPTION", "A paragraph of two lines.", `.IP \(bu 2`, "one", `.IP \(bu 2`, "two lines",
		".SH FILES", ".TP", `\fIa\fR`, "the first", ".TP", `\fBb\fR, \fBc\fR`, "the others, which follow",
		".SS More", ".RS 4", ".EX", "x  y", ".EE", ".RE", "",
	}, "\n")
	if got := p.text.String(); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	if _, err := parseProse("## TITLE\ntext"); err == nil {
		t.Error("a heading without an empty line after it was accepted")
	}
}
