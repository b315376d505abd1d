package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sort"
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
		return nil, &problem{message: "a byte order mark: JSON has none"}
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
	case strings.Contains(message, "in string literal"):
		message = "a line's end or another control character in a string: want \\n, \\t or \\u00XX"
	case strings.Contains(message, "after top-level value"):
		message = "something after the end of the job file"
	case (c == '"' || c == '{' || c == '[') && strings.Contains(message, "after "):
		message = "a comma is missing before this"
	}
	return &problem{offset: at, message: message}
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
			return nil, &problem{offset: at, message: fmt.Sprintf("nested deeper than %d", maxDepth)}
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

// lines tells lines and columns, both from 1 and the latter in characters.
type lines struct {
	text   []byte
	starts []int
}

func newLines(text []byte) *lines {
	l := &lines{text: text, starts: []int{0}}
	for i, c := range text {
		if c == '\n' {
			l.starts = append(l.starts, i+1)
		}
	}
	return l
}

func (l *lines) of(offset int) (line, column int) {
	offset = min(max(offset, 0), len(l.text))
	line = sort.SearchInts(l.starts, offset+1)
	return line, utf8.RuneCount(l.text[l.starts[line-1]:offset]) + 1
}
