package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// kind is the type of a JSON value, in the words of RFC 8259.
type kind string

const (
	kindNull    kind = "null"
	kindBoolean kind = "boolean"
	kindNumber  kind = "number"
	kindString  kind = "string"
	kindArray   kind = "array"
	kindObject  kind = "object"
)

// The method named returns the kind with its article, such as "a string", for messages.
func (k kind) named() string {
	switch k {
	case kindNull:
		return "null"
	case kindArray, kindObject:
		return "an " + string(k)
	}
	return "a " + string(k)
}

// node is a JSON value and the offset at which it begins.
type node struct {
	kind    kind
	offset  int
	text    string // of a string or a number; "true" or "false"
	items   []*node
	members []member
	unread  []int32 // offsets of the elements of the array "jobs", which are not parsed yet
}

// member is a member of an object, with the offset of its name.
type member struct {
	name   string
	offset int
	value  *node
}

// The method find returns the member of an object that has the given name. If several members of
// the object have this name, find returns the last of them.
func (n *node) find(name string) (m member, ok bool) {
	for _, m := range slices.Backward(n.members) {
		if m.name == name {
			return m, true
		}
	}
	return member{}, false
}

// Limits for the size and the nesting of a job file. They are needed because the whole file is
// read into memory.
const (
	maxFile  = 64 << 20 // bytes
	maxDepth = 16
)

// parseTree parses text, which is one JSON value, into a tree. It records only the offsets of the
// elements of the array "jobs". The function expand parses these elements later, one by one,
// because a tree of all jobs of a large file would need too much memory.
func parseTree(text []byte) (*node, *problem) {
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return nil, &problem{message: "a byte order mark, which JSON does not allow: save the file as UTF-8 without it"}
	}
	if isUTF16(text) {
		return nil, &problem{message: "UTF-16: want UTF-8"}
	}
	if bad := invalidUTF8(text); bad >= 0 {
		return nil, &problem{offset: bad, message: "not UTF-8"}
	}
	var syntax *json.SyntaxError
	if err := json.Unmarshal(text, new(skipped)); errors.As(err, &syntax) {
		return nil, explain(text, int(syntax.Offset), syntax)
	}
	p := &treeParser{text: string(text)}
	return p.value(0, false)
}

// isUTF16 recognises UTF-16 by its byte order mark, or by exactly one zero byte among the first two
// bytes. Every job file begins with an ASCII character. In UTF-16 such a character is a zero byte
// and another byte.
func isUTF16(text []byte) bool {
	return len(text) >= 2 && (text[0] == 0xff && text[1] == 0xfe || text[0] == 0xfe && text[1] == 0xff || (text[0] == 0) != (text[1] == 0))
}

// The type skipped accepts any JSON value when json.Unmarshal decodes it, and stores nothing.
type skipped struct{}

func (*skipped) UnmarshalJSON([]byte) error { return nil }

func invalidUTF8(text []byte) int {
	for i := 0; i < len(text); {
		r, n := utf8.DecodeRune(text[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// The function explain turns a syntax error into a message about the mistake that usually causes
// the error. errorEnd is the offset of the byte after the byte at which the error was found.
func explain(text []byte, errorEnd int, err error) *problem {
	at := min(max(errorEnd-1, 0), len(text))
	if len(bytes.TrimSpace(text)) == 0 {
		return &problem{message: "empty: want a job file"}
	}
	if at >= len(text) || strings.Contains(err.Error(), "unexpected end") {
		return &problem{offset: len(text), message: "the file ends in the middle: a bracket, brace or quote is not closed"}
	}
	message := err.Error()
	before := bytes.TrimRight(text[:at], " \t\r\n")
	switch c := text[at]; {
	case (c == '}' || c == ']') && bytes.HasSuffix(before, []byte(",")):
		message = fmt.Sprintf("a comma before %c: JSON allows no comma after the last element", c)
		at = len(before) - 1
	case c == '/' || c == '#':
		message = "a comment: JSON has no comments"
	case c == '\'':
		message = `a single quote: JSON strings are in double quotes`
	case c == 0:
		message = "a byte of value 0"
	case strings.Contains(message, "in string literal"):
		message = "a line break or another control character in a string: want \\n, \\t or \\u00XX"
	case strings.Contains(message, "exceeded max depth"):
		return tooDeep(at)
	case strings.Contains(message, "after top-level value"):
		message = "text after the end of the job file"
	case (c == '"' || c == '{' || c == '[') && strings.Contains(message, "after "):
		message = "a comma is missing before this"
	}
	return &problem{offset: at, message: message}
}

func tooDeep(at int) *problem {
	return &problem{offset: at, message: fmt.Sprintf("values are nested deeper than %d levels", maxDepth)}
}

// treeParser parses text, which must be valid JSON, into a tree.
type treeParser struct {
	text string
	at   int
}

// The function expand parses a JSON value into a tree. The value begins at the given offset in the
// text. depth is the number of JSON values that enclose it.
func expand(text string, offset, depth int) *node {
	p := &treeParser{text, offset}
	n, bad := p.value(depth, false)
	if bad != nil {
		panic(bad) // skip has checked the depth
	}
	return n
}

func (p *treeParser) space() {
	for p.at < len(p.text) {
		switch p.text[p.at] {
		case ' ', '\t', '\r', '\n', ',', ':': // json.Unmarshal has checked the separators
			p.at++
		default:
			return
		}
	}
}

// The method value parses the next JSON value. depth is the number of JSON values that enclose it.
// If the parameter unread is true, the next value must be an array. The elements of this array are
// then not parsed: only their offsets are recorded.
func (p *treeParser) value(depth int, unread bool) (*node, *problem) {
	p.space()
	n := &node{offset: p.at}
	switch c := p.text[p.at]; c {
	case '{', '[':
		if depth == maxDepth {
			return nil, tooDeep(p.at)
		}
		p.at++
		n.kind = kindArray
		if c == '{' {
			n.kind = kindObject
		}
		return n, p.elements(n, depth, unread)
	case '"':
		n.kind, n.text = kindString, p.string()
	case 'n':
		n.kind = kindNull
		p.scalar()
	case 't', 'f':
		n.kind, n.text = kindBoolean, p.scalar()
	default:
		n.kind, n.text = kindNumber, p.scalar()
	}
	return n, nil
}

// The method elements parses the elements of the array or object n, and the closing bracket.
func (p *treeParser) elements(n *node, depth int, unread bool) *problem {
	for {
		p.space()
		if c := p.text[p.at]; c == '}' || c == ']' {
			p.at++
			return nil
		}
		m := member{offset: p.at}
		if n.kind == kindObject {
			m.name = p.string()
		}
		var bad *problem
		if unread {
			n.unread = append(n.unread, int32(p.at))
			if bad := p.skip(depth + 1); bad != nil {
				return bad
			}
			continue
		}
		jobs := depth == 0 && n.kind == kindObject && m.name == "jobs"
		if m.value, bad = p.value(depth+1, jobs && p.peek() == '['); bad != nil {
			return bad
		}
		if n.kind == kindObject {
			n.members = append(n.members, m)
		} else {
			n.items = append(n.items, m.value)
		}
	}
}

// The method peek returns the first byte of the next value.
func (p *treeParser) peek() byte {
	p.space()
	return p.text[p.at]
}

// The method skip skips the next value. depth is the number of values that enclose it.
func (p *treeParser) skip(depth int) *problem {
	for inside := depth; ; {
		p.space()
		switch p.text[p.at] {
		case '{', '[':
			if inside == maxDepth {
				return tooDeep(p.at)
			}
			inside++
			p.at++
		case '}', ']':
			inside--
			p.at++
		case '"':
			p.quoted()
		default:
			p.scalar()
		}
		if inside == depth {
			return nil
		}
	}
}

// The method scalar parses a number, true, false or null, and returns its text.
func (p *treeParser) scalar() string {
	begin := p.at
	for p.at < len(p.text) && strings.IndexByte(" \t\r\n,:]}", p.text[p.at]) < 0 {
		p.at++
	}
	return p.text[begin:p.at]
}

// The method quoted parses a string. It returns the text with its quotes, and whether the string
// has escape sequences.
func (p *treeParser) quoted() (text string, escaped bool) {
	begin := p.at
	for p.at++; p.text[p.at] != '"'; p.at++ {
		if p.text[p.at] == '\\' {
			escaped = true
			p.at++
		}
	}
	p.at++
	return p.text[begin:p.at], escaped
}

// The method string parses a string and returns its value.
func (p *treeParser) string() string {
	text, escaped := p.quoted()
	if !escaped {
		return text[1 : len(text)-1]
	}
	var value string
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		panic(err) // parseTree has checked the syntax
	}
	return value
}

// The type lines translates offsets in a text to lines and columns, both counted from 1. A column
// is a character, not a byte. Offsets must be passed in ascending order, because the counting
// continues from the offset that was passed last.
type lines struct {
	text         []byte
	at           int // the last offset
	line, column int // of the last offset
}

func newLines(text []byte) *lines { return &lines{text: text, line: 1, column: 1} }

func (l *lines) of(offset int) (line, column int) {
	offset = min(max(offset, l.at), len(l.text))
	skipped := l.text[l.at:offset]
	if last := bytes.LastIndexByte(skipped, '\n'); last >= 0 {
		l.line += bytes.Count(skipped, []byte("\n"))
		l.column = 1
		skipped = skipped[last+1:]
	}
	l.column += utf8.RuneCount(skipped)
	l.at = offset
	return l.line, l.column
}
