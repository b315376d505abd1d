package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// kind is that of a JSON value, in JSON's words.
type kind string

const (
	kindNull    kind = "null"
	kindBoolean kind = "boolean"
	kindNumber  kind = "number"
	kindString  kind = "string"
	kindArray   kind = "array"
	kindObject  kind = "object"
)

// named is a kind in a sentence.
func (k kind) named() string {
	switch k {
	case kindNull:
		return "null"
	case kindArray, kindObject:
		return "an " + string(k)
	}
	return "a " + string(k)
}

// node is a JSON value and where it begins.
type node struct {
	kind    kind
	offset  int
	text    string // of a string or a number; "true" or "false"
	items   []*node
	members []member
}

// member is a field of an object, with its name's place.
type member struct {
	name   string
	offset int
	value  *node
}

// Bounds of a job file: it is read as a whole.
const (
	maxFile  = 64 << 20 // bytes
	maxDepth = 16
)

// parseTree reads the one JSON value of text. An error is a *Problem.
func parseTree(text []byte) (*node, *problem) {
	if bytes.HasPrefix(text, []byte("\ufeff")) {
		return nil, &problem{message: "a byte order mark: JSON has none; save the file as UTF-8 without it"}
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
	p := &treeParser{text: text, decoder: json.NewDecoder(bytes.NewReader(text))}
	p.decoder.UseNumber()
	return p.value(0)
}

// isUTF16 tells by the byte order mark, or by the first character, which is of ASCII
// in a job file.
func isUTF16(text []byte) bool {
	return len(text) >= 2 && (text[0] == 0xff && text[1] == 0xfe || text[0] == 0xfe && text[1] == 0xff || (text[0] == 0) != (text[1] == 0))
}

// skipped takes any JSON value and keeps nothing.
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

// explain says what people most often meant by what is no JSON. After is behind
// the byte that could not be.
func explain(text []byte, after int, err error) *problem {
	at := min(max(after-1, 0), len(text))
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
		message = fmt.Sprintf("a comma before %c: JSON has none after the last element", c)
		at = len(before) - 1
	case c == '/' || c == '#':
		message = "a comment: JSON has none"
	case c == '\'':
		message = `a single quote: JSON has its strings in double quotes`
	case c == 0:
		message = "a byte of value 0"
	case strings.Contains(message, "in string literal"):
		message = "a line's end or another control character in a string: want \\n, \\t or \\u00XX"
	case strings.Contains(message, "exceeded max depth"):
		return tooDeep(at)
	case strings.Contains(message, "after top-level value"):
		message = "something after the end of the job file"
	case (c == '"' || c == '{' || c == '[') && strings.Contains(message, "after "):
		message = "a comma is missing before this"
	}
	return &problem{offset: at, message: message}
}

func tooDeep(at int) *problem {
	return &problem{offset: at, message: fmt.Sprintf("nested deeper than %d", maxDepth)}
}

type treeParser struct {
	text    []byte
	decoder *json.Decoder
}

// next returns a token, and where it begins.
func (p *treeParser) next() (json.Token, int, error) {
	at := int(p.decoder.InputOffset())
	for at < len(p.text) && strings.IndexByte(" \t\r\n,:", p.text[at]) >= 0 {
		at++
	}
	token, err := p.decoder.Token()
	return token, at, err
}

func (p *treeParser) value(depth int) (*node, *problem) {
	token, at, err := p.next()
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, &problem{offset: at, message: err.Error()}
	}
	n := &node{offset: at}
	switch t := token.(type) {
	case nil:
		n.kind = kindNull
	case bool:
		n.kind, n.text = kindBoolean, fmt.Sprint(t)
	case json.Number:
		n.kind, n.text = kindNumber, t.String()
	case string:
		n.kind, n.text = kindString, t
	case json.Delim:
		if depth == maxDepth {
			return nil, tooDeep(at)
		}
		n.kind = kindArray
		if t == '{' {
			n.kind = kindObject
		}
		for p.decoder.More() {
			m := member{}
			if n.kind == kindObject {
				name, at, err := p.next()
				if err != nil {
					return nil, &problem{offset: at, message: err.Error()}
				}
				m.name, m.offset = fmt.Sprint(name), at
			}
			var bad *problem
			if m.value, bad = p.value(depth + 1); bad != nil {
				return nil, bad
			}
			if n.kind == kindObject {
				n.members = append(n.members, m)
			} else {
				n.items = append(n.items, m.value)
			}
		}
		if _, at, err := p.next(); err != nil {
			return nil, &problem{offset: at, message: err.Error()}
		}
	}
	return n, nil
}

// lines tells lines and columns, both from 1 and the latter in characters. Places
// are asked for in ascending order: a file may be one line of many megabytes.
type lines struct {
	text         []byte
	at           int // the last place
	line, column int // of it
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
