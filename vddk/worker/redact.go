package worker

import (
	"encoding/base64"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Redactor hides secrets in text of the library or of a server. It finds a secret as it is,
// escaped for XML, a URL, JSON or a C string, escaped twice, or in base64. Any of its characters
// may be escaped or not. The zero value hides nothing. A Redactor is safe for concurrent use.
type Redactor struct {
	secrets [][]rune
	literal []string  // secrets in base64
	first   [256]bool // bytes that a secret in any of its forms can begin with
}

const (
	// minSecret is the number of bytes from which on secrets are hidden. Stars in place of
	// every occurrence of a shorter one would reveal it.
	minSecret = 4
	hidden    = "***"
)

// NewRedactor returns a Redactor that hides the secrets. It also hides "user:secret" in base64,
// the form in HTTP headers.
func NewRedactor(user string, secrets ...string) *Redactor {
	r := new(Redactor)
	for _, s := range secrets {
		if len(s) < minSecret {
			continue
		}
		r.add(s)
		for _, text := range []string{s, user + ":" + s} {
			for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				// The last character of a secret in base64 depends on the bytes after the secret.
				if code := e.EncodeToString([]byte(text)); len(code) > 8 {
					r.literal = append(r.literal, code[:len(code)-1])
				}
			}
		}
	}
	return r
}

// add adds a secret, which must not be empty.
func (r *Redactor) add(secret string) {
	// Each byte of invalid UTF-8 becomes a negative rune, which encoded turns back into the
	// byte.
	var runes []rune
	for i := 0; i < len(secret); {
		c, n := utf8.DecodeRuneInString(secret[i:])
		if c == utf8.RuneError && n == 1 {
			c = -rune(secret[i])
		}
		runes = append(runes, c)
		i += n
	}
	r.secrets = append(r.secrets, runes)
	r.first[encoded(runes[0])[0]] = true
	for _, c := range `&%\+` { // the first characters of escapes
		r.first[c] = true
	}
}

// encoded returns the bytes of a rune that add made.
func encoded(c rune) string {
	if c < 0 {
		return string([]byte{byte(-c)})
	}
	return string(c)
}

// Redact returns text with stars in place of each secret. cut means that the text continues
// after its end; then the beginning of a secret at the end is hidden, too.
func (r *Redactor) Redact(text string, cut bool) string {
	if r == nil || len(r.secrets) == 0 {
		return text
	}
	for _, code := range r.literal {
		text = strings.ReplaceAll(text, code, hidden)
	}
	spans := r.find(text, nil, cut)
	// A text with escaped secrets may have been escaped again as a whole.
	for mark, next := range decoders {
		if strings.IndexByte(text, mark) >= 0 {
			inner, at := decode(text, mark, next)
			spans = append(spans, r.find(inner, at, cut)...)
		}
	}
	if len(spans) == 0 {
		return text
	}
	slices.SortFunc(spans, func(a, b span) int { return a.from - b.from })
	var out strings.Builder
	done := 0
	for _, s := range spans {
		if s.from >= done {
			out.WriteString(text[done:s.from] + hidden)
		}
		done = max(done, s.to)
	}
	return out.String() + text[done:]
}

// span is the range [from, to) of bytes of a text.
type span struct{ from, to int }

// find returns the spans of the secrets in text. If text was decoded from another text, at has
// the offset in the other text for each byte of text, and for its end, and the spans are those
// of the other text.
func (r *Redactor) find(text string, at []int, cut bool) (spans []span) {
	for i := 0; i < len(text); {
		end := -1
		if r.first[text[i]] {
			for _, s := range r.secrets {
				end = max(end, matchSecret(text, i, s, cut))
			}
		}
		if end < 0 {
			i++
			continue
		}
		if at == nil {
			spans = append(spans, span{i, end})
		} else {
			spans = append(spans, span{at[i], at[end]})
		}
		i = end
	}
	return spans
}

// decoders decode the escape at offset i of a text, by the first character of the escape. The
// end is 0 if there is no escape.
var decoders = map[byte]func(text string, i int) (plain string, end int){
	'&': entityAt, '%': percentAt, '\\': backslashAt,
}

// decode replaces the escapes that begin with mark. at has the offset in text of each byte of the
// result, and of its end.
func decode(text string, mark byte, next func(string, int) (string, int)) (plain string, at []int) {
	var out []byte
	for i := 0; i < len(text); {
		piece, end := text[i:i+1], i+1
		if text[i] == mark {
			if p, e := next(text, i); e > 0 {
				piece, end = p, e
			}
		}
		for range len(piece) {
			at = append(at, i)
		}
		out = append(out, piece...)
		i = end
	}
	return string(out), append(at, len(text))
}

// matchSecret returns the end of the longest form of the secret that begins at offset i, or -1 if
// there is none.
func matchSecret(text string, i int, secret []rune, cut bool) int {
	at := []int{i} // offsets at which the next rune may begin, without duplicates
	for k, c := range secret {
		var next []int
		for _, pos := range at {
			if cut && k >= minSecret && pos == len(text) {
				return pos
			}
			for _, end := range matchRune(text, pos, c) {
				if !slices.Contains(next, end) {
					next = append(next, end)
				}
			}
		}
		if at = next; len(at) == 0 {
			return -1
		}
	}
	return slices.Max(at)
}

// matchRune returns the ends of all forms of the rune c that begin at offset i.
func matchRune(text string, i int, c rune) (ends []int) {
	if i == len(text) {
		return nil
	}
	plain := encoded(c)
	if strings.HasPrefix(text[i:], plain) {
		ends = append(ends, i+len(plain))
	}
	switch text[i] {
	case '+':
		if c == ' ' {
			ends = append(ends, i+1)
		}
	case '&':
		if p, end := entityAt(text, i); end > 0 && p == plain {
			ends = append(ends, end)
		}
	case '\\':
		if p, end := backslashAt(text, i); end > 0 && p == plain {
			ends = append(ends, end)
		}
	case '%':
		if end := matchPercent(text, i, plain); end > 0 {
			ends = append(ends, end)
		}
	}
	return ends
}

var entities = map[string]string{"amp": "&", "lt": "<", "gt": ">", "quot": `"`, "apos": "'", "nbsp": "\u00a0", "Tab": "\t", "NewLine": "\n"}

// entityAt decodes the XML or HTML entity at offset i.
func entityAt(text string, i int) (plain string, end int) {
	rest := text[i+1 : min(len(text), i+14)]
	semicolon := strings.IndexByte(rest, ';')
	if semicolon < 0 {
		return "", 0
	}
	name := rest[:semicolon]
	end = i + 1 + semicolon + 1
	if plain, ok := entities[name]; ok {
		return plain, end
	}
	digits, ok := strings.CutPrefix(name, "#")
	base := 10
	if len(digits) > 0 && digits[0]|0x20 == 'x' {
		digits, base = digits[1:], 16
	}
	n, err := strconv.ParseUint(digits, base, 32)
	if !ok || err != nil || n > utf8.MaxRune {
		return "", 0
	}
	return string(rune(n)), end
}

var controls = map[byte]string{'a': "\a", 'b': "\b", 't': "\t", 'n': "\n", 'v': "\v", 'f': "\f", 'r': "\r", 'e': "\x1b"}

// backslashAt decodes the escape of JSON, C or Go at offset i.
func backslashAt(text string, i int) (plain string, end int) {
	if i++; i == len(text) {
		return "", 0
	}
	if plain, ok := controls[text[i]]; ok {
		return plain, i + 1
	}
	digits, ok := map[byte]int{'u': 4, 'U': 8, 'x': 2}[text[i]]
	if !ok {
		if text[i] >= '0' && text[i] <= '9' || text[i]|0x20 >= 'a' && text[i]|0x20 <= 'z' || text[i] >= 0x80 {
			return "", 0
		}
		return text[i : i+1], i + 1
	}
	n, end := hexAt(text, i+1, digits)
	switch {
	case end == 0 || n > utf8.MaxRune:
		return "", 0
	case digits == 2:
		return string([]byte{byte(n)}), end
	case utf16.IsSurrogate(rune(n)) && strings.HasPrefix(text[end:], `\u`):
		if low, after := hexAt(text, end+2, 4); after > 0 {
			return string(utf16.DecodeRune(rune(n), rune(low))), after
		}
	}
	return string(rune(n)), end
}

// hexAt parses the given number of hexadecimal digits at offset i. end is 0 if they are not there.
func hexAt(text string, i, digits int) (n uint64, end int) {
	if len(text) < i+digits {
		return 0, 0
	}
	n, err := strconv.ParseUint(text[i:i+digits], 16, 32)
	if err != nil {
		return 0, 0
	}
	return n, i + digits
}

// percentAt decodes the byte at offset i that is escaped for a URL.
func percentAt(text string, i int) (plain string, end int) {
	n, end := hexAt(text, i+1, 2)
	if end == 0 {
		return "", 0
	}
	return string([]byte{byte(n)}), end
}

// matchPercent returns the end of plain at offset i, with each byte escaped for a URL, or 0.
func matchPercent(text string, i int, plain string) (end int) {
	for k := range len(plain) {
		if i == len(text) || text[i] != '%' {
			return 0
		}
		p, end := percentAt(text, i)
		if end == 0 || p[0] != plain[k] {
			return 0
		}
		i = end
	}
	return i
}
