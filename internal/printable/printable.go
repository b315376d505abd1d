// Package printable makes text from outside (a file name, a field of an image, the
// answer of a server) safe to show: it cannot control the terminal, hide or reorder
// other text, or look like another line. Use [Name] for a name inside a message, [Line]
// for a line, [Error] for an error, and a [Writer] for a stream.
//
// Letters, digits, punctuation, symbols and spaces of all scripts are not changed.
// Control characters, DEL, invalid UTF-8, format characters (including those that
// change the direction of text), line and paragraph separators, and unassigned code
// points are escaped.
package printable

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// safe reports whether the rune r may be shown without an escape.
func safe(r rune) bool { return strconv.IsPrint(r) || unicode.Is(unicode.Zs, r) }

// Name returns s unchanged if it is safe to show, and otherwise quoted as a Go string.
func Name(s string) string {
	if first(s, false) < 0 {
		return s
	}
	return strconv.Quote(s)
}

// Line returns s with escapes for everything that is not safe to show, including line
// ends and tabs: the result is one line.
func Line(s string) string {
	if first(s, false) < 0 {
		return s
	}
	return string(appendSafe(nil, s, false))
}

// Bytes returns text with escapes for everything that is not safe to show, except line
// ends and tabs, which come from the program itself. If text is JSON, the result is
// JSON with the same values. If there is nothing to escape, Bytes returns text itself.
func Bytes(text []byte) []byte {
	if first(text, true) < 0 {
		return text
	}
	return appendSafe(nil, text, true)
}

// Error returns the text of err as [Line] does, but keeps the line ends between joined
// errors and between the results of a method Lines of an error, because these come from
// the program itself.
func Error(err error) string {
	text := err.Error()
	if !strings.Contains(text, "\n") {
		return Line(text)
	}
	switch e := err.(type) {
	case interface{ Lines() []string }:
		lines := e.Lines()
		for i, line := range lines {
			lines[i] = Line(line)
		}
		return strings.Join(lines, "\n")
	case interface{ Unwrap() []error }:
		return around(text, e.Unwrap()...)
	case interface{ Unwrap() error }:
		return around(text, e.Unwrap())
	}
	return Line(text)
}

// around returns text, the text of an error that wraps others, with the texts of the
// wrapped errors replaced by what Error returns for them.
func around(text string, wrapped ...error) string {
	var b strings.Builder
	for i, err := range wrapped {
		if err == nil {
			continue
		}
		before, after, found := strings.Cut(text, err.Error())
		if !found {
			continue
		}
		if before == "\n" && i > 0 { // a line end of errors.Join
			b.WriteString(before)
		} else {
			b.WriteString(Line(before))
		}
		b.WriteString(Error(err))
		text = after
	}
	return b.String() + Line(text)
}

// first returns the index of the first byte of the text that must be escaped, or -1.
func first[T string | []byte](s T, keepLayout bool) int {
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c < ' ' && !(keepLayout && (c == '\n' || c == '\t')) || c == 0x7f {
				return i
			}
			i++
			continue
		}
		r, n := decode(s[i:])
		if n == 1 || !safe(r) {
			return i
		}
		i += n
	}
	return -1
}

// decode returns the first rune of s and its length in bytes, which is 1 if the rune is
// invalid.
func decode[T string | []byte](s T) (rune, int) {
	var b [utf8.UTFMax]byte
	return utf8.DecodeRune(b[:copy(b[:], s)])
}

// appendSafe appends s to b with escapes. In JSON text, where control characters are
// escaped already, it uses the escapes of JSON.
func appendSafe[T string | []byte](b []byte, s T, keepLayout bool) []byte {
	for len(s) > 0 {
		n := first(s, keepLayout)
		if n < 0 {
			return append(b, s...)
		}
		b = append(b, s[:n]...)
		s = s[n:]
		r, n := decode(s)
		switch {
		case r == '\n':
			b = append(b, `\n`...)
		case r == '\t':
			b = append(b, `\t`...)
		case r == '\r':
			b = append(b, `\r`...)
		case n == 1 && r != 0x7f: // a control character, or a byte that is not UTF-8
			b = fmt.Appendf(b, `\x%02x`, s[0])
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			b = fmt.Appendf(b, `\u%04x\u%04x`, high, low)
		default:
			b = fmt.Appendf(b, `\u%04x`, r)
		}
		s = s[n:]
	}
	return b
}
