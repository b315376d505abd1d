package export

import (
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// mayName reports whether clients may open the disk at the given path. The parameter
// pattern is a wildcard, the value of the word export= on the command line. A [DATASTORE]
// at the beginning of the wildcard matches the same text in the path. Without this rule,
// its brackets would mean a set of characters.
func mayName(pattern, path string) bool {
	if path == "" || slices.Contains(strings.FieldsFunc(path, func(r rune) bool { return r == '/' || r == ' ' }), "..") {
		return false // .. could lead out of the folder that the wildcard allows
	}
	if store, rest, ok := strings.Cut(pattern, "] "); ok && strings.HasPrefix(store, "[") {
		if name, ok := strings.CutPrefix(path, store+"] "); ok && wildcard(rest, name) {
			return true
		}
	}
	return wildcard(pattern, path)
}

// The function wildcard reports whether the text s matches a pattern. The patterns are
// those of fnmatch(3) without flags: * and ? also match slashes.
func wildcard(pattern, s string) bool {
	var expression strings.Builder
	expression.WriteString(`(?s)^`)
	for p := pattern; p != ""; {
		plain := strings.IndexAny(p, `*?\[`)
		if plain != 0 {
			if plain < 0 {
				plain = len(p)
			}
			expression.WriteString(regexp.QuoteMeta(p[:plain]))
			p = p[plain:]
			continue
		}
		special := p[0]
		p = p[1:]
		switch special {
		case '*':
			expression.WriteString(".*")
		case '?':
			expression.WriteString(".")
		case '\\':
			_, n := utf8.DecodeRuneInString(p)
			expression.WriteString(regexp.QuoteMeta(p[:n]))
			p = p[n:]
		case '[':
			set, rest, ok := characterSet(p)
			if !ok {
				set, rest = `\[`, p
			}
			expression.WriteString(set)
			p = rest
		}
	}
	expression.WriteString("$")
	r, err := regexp.Compile(expression.String())
	return err == nil && r.MatchString(s)
}

// characterSet converts a character set such as [a-z] from the syntax of fnmatch to the
// syntax of regular expressions. The parameter p is the part of the pattern after the
// opening bracket of the set. The result rest is the part of the pattern after the closing
// bracket. The result ok is false if no bracket closes the set.
func characterSet(p string) (set, rest string, ok bool) {
	not := ""
	if p != "" && (p[0] == '!' || p[0] == '^') {
		not, p = "^", p[1:]
	}
	if p == "" {
		return "", "", false
	}
	end := strings.IndexByte(p[1:], ']') // a ] at the first place belongs to the set
	if end < 0 {
		return "", "", false
	}
	end++
	quote := strings.NewReplacer(`\`, `\\`, `[`, `\[`, `]`, `\]`, `^`, `\^`)
	return "[" + not + quote.Replace(p[:end]) + "]", p[end+1:], true
}
