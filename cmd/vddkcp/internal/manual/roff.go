package manual

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// A page is a manual page in the language roff with the macros man(7), which groff and mandoc
// format. Its methods append to the page. Their texts are roff, which the functions inline,
// helpText and literal make.
type page struct {
	text strings.Builder
	// empty is true if the current section has no text yet. A macro for a new paragraph there would
	// have no effect, and mandoc warns of it.
	empty bool
}

// The method title begins the page. A page without a date has an empty one.
func (p *page) title(name, section, date, version string) {
	fmt.Fprintf(&p.text, ".TH \"%s\" \"%s\" \"%s\" \"%s\" \"User Manuals\"\n", literal(strings.ToUpper(name)), section, date, literal(version))
	p.line(".nh") // a reader searches for whole words, and copies them
	p.line(".ad l")
}

func (p *page) section(name string) {
	p.line(".SH " + literal(strings.ToUpper(name)))
	p.empty = true
}

func (p *page) subsection(name string) {
	p.line(".SS " + literal(name))
	p.empty = true
}

// The method paragraph appends a paragraph of text.
func (p *page) paragraph(text string) {
	if !p.empty {
		p.line(".PP")
	}
	p.body(text)
}

// The method item appends a paragraph with a tag, such as a flag with its description.
func (p *page) item(tag, text string) {
	p.line(".TP")
	p.body(tag)
	p.body(text)
}

// The method bullet appends a paragraph of a list without tags.
func (p *page) bullet(text string) {
	p.line(`.IP \(bu 2`)
	p.body(text)
}

// The method example appends lines that are printed as they are.
func (p *page) example(lines ...string) {
	if !p.empty {
		p.line(".PP")
	}
	p.line(".RS 4")
	p.line(".EX")
	for _, l := range lines {
		p.line(guard(literal(l)))
	}
	p.line(".EE")
	p.line(".RE")
	p.empty = false
}

// The method body appends a text, with a line for each sentence. A change of the text then changes
// few lines of the page.
func (p *page) body(text string) {
	for _, l := range strings.Split(sentenceEnd.ReplaceAllString(text, "$1\n$2"), "\n") {
		p.line(guard(l))
	}
	p.empty = false
}

// sentenceEnd matches the end of a sentence and the beginning of the next one.
var sentenceEnd = regexp.MustCompile(`(\S[.?]) ([A-Z\\])`)

func (p *page) line(text string) {
	p.text.WriteString(text)
	p.text.WriteByte('\n')
}

// The function guard makes a line of text that roff does not take for a macro.
func guard(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}

// The function inline turns a text in Markdown into roff. Text between backquotes is bold, and text
// between asterisks is italic.
func inline(text string) string {
	var out strings.Builder
	for i, span := range strings.Split(text, "`") {
		if i%2 == 1 {
			out.WriteString(bold(span))
			continue
		}
		for j, part := range strings.Split(span, "*") {
			if j%2 == 1 {
				out.WriteString(italic(part))
			} else {
				out.WriteString(plain(part))
			}
		}
	}
	return out.String()
}

// The function helpText turns a help text, which has no markup because a terminal shows it as it
// is, into roff. Flags in it are bold.
func helpText(text string) string {
	var out strings.Builder
	end := 0
	for _, flag := range flagInText.FindAllStringIndex(text, -1) {
		out.WriteString(plain(text[end:flag[0]]) + bold(text[flag[0]:flag[1]]))
		end = flag[1]
	}
	return out.String() + plain(text[end:])
}

func bold(text string) string   { return `\fB` + literal(text) + `\fR` }
func italic(text string) string { return `\fI` + literal(text) + `\fR` }

// flagInText matches a flag such as --log-level in a text.
var flagInText = regexp.MustCompile(`--[a-z](?:[a-z0-9-]*[a-z0-9])?`)

// The function literal escapes a text that must be printed exactly, such as a command line. In
// roff, a plain - is a hyphen, which is another character than the one that begins a flag.
func literal(text string) string { return escape(text, func(int) bool { return false }) }

// The function plain escapes a text in a sentence. A - between two letters stays a hyphen.
func plain(text string) string {
	letter := func(i int) bool { return i >= 0 && i < len(text) && unicode.IsLetter(rune(text[i])) }
	return escape(text, func(i int) bool { return letter(i-1) && letter(i+1) })
}

func escape(text string, hyphen func(i int) bool) string {
	var out strings.Builder
	for i, r := range text {
		switch {
		case r == '-' && hyphen(i):
			out.WriteRune('-')
		case escapes[r] != "":
			out.WriteString(escapes[r])
		case r > unicode.MaxASCII:
			fmt.Fprintf(&out, `\[u%04X]`, r)
		default:
			out.WriteRune(r)
		}
	}
	return out.String()
}

// escapes are the characters that roff would print as another character or take for a command.
var escapes = map[rune]string{
	'\\': `\e`, '-': `\-`, '\'': `\(aq`, '"': `\(dq`, '`': `\(ga`, '^': `\(ha`, '~': `\(ti`,
}
