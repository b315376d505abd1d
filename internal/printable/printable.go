// Package printable makes text from outside safe to show, such as a file name, a field of an
// image or the answer of a server. The result cannot control the terminal, hide or reorder other
// text, or look like another line. Use [Name] for a name inside a message, [Line] for a line,
// [Error] for an error, and a [Writer] for a stream.
//
// Letters, digits, punctuation, symbols and spaces of all scripts are not changed. These are
// escaped: control characters, DEL, invalid UTF-8, format characters (such as those that change
// the direction of text), line and paragraph separators, and unassigned code points.
package printable

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// The function safe reports whether the rune r can be shown as it is.
func safe(r rune) bool { return strconv.IsPrint(r) || unicode.Is(unicode.Zs, r) }

// Name returns s as it is if that is safe to show. Otherwise it returns s quoted as a Go string.
func Name(s string) string {
	if first(s, false) < 0 {
		return s
	}
	return strconv.Quote(s)
}

// Word returns s as one word of a shell's command line, for hints that users copy. If s has
// characters with a meaning for the shell, Word returns s between single quotes.
func Word(s string) string {
	special := func(r rune) bool {
		return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("/._-+,:@%=", r)
	}
	if s != "" && !strings.ContainsFunc(s, special) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// Line returns s as one line: everything that is not safe to show is escaped, including line
// ends and tabs.
func Line(s string) string {
	if first(s, false) < 0 {
		return s
	}
	return string(appendSafe(nil, s, false))
}

// Bytes returns text with escapes for everything that is not safe to show. Line ends and tabs are
// not escaped, because the program itself has written them. The program has already escaped the
// line ends and tabs that came from outside. If text is JSON, the result is JSON with the same
// values. If nothing has to be escaped, Bytes returns text itself.
func Bytes(text []byte) []byte {
	if first(text, true) < 0 {
		return text
	}
	return appendSafe(nil, text, true)
}

// Error returns the text of err, escaped as [Line] does. Line ends that come from the program
// itself are kept. There are two kinds of them: line ends between joined errors and, if an error
// has a method Lines, line ends between the lines that this method returns.
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

// The function around returns the text of an error that wraps other errors. The texts of the
// wrapped errors are escaped by Error, and the text around them by Line.
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

// The function first returns the index of the first byte of s that must be escaped. It is -1 if
// there is none. If keepLayout is set, line ends and tabs are not escaped.
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

// decode returns the first rune of s and its length in bytes. For invalid UTF-8, the length is
// 1.
func decode[T string | []byte](s T) (rune, int) {
	var b [utf8.UTFMax]byte
	return utf8.DecodeRune(b[:copy(b[:], s)])
}

// appendSafe appends s to b with escapes. If s is JSON, the result must be JSON, too. Therefore
// characters that may occur in JSON text without an escape, such as DEL, get an escape that is
// valid in JSON. Most control characters and invalid UTF-8 cannot occur in JSON text. They get an
// escape such as \x1b, which is not valid in JSON.
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
