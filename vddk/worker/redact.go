package worker

import (
	"encoding/base64"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Redactor hides secrets in texts of the library or of a server. It finds a secret in these
// forms: as it is; escaped for XML, a URL, JSON or a C string; escaped twice; and in base64. It
// also finds a secret of which only some characters are escaped. The zero value hides nothing. A
// Redactor is safe for concurrent use.
type Redactor struct {
	secrets [][]rune
	literal []string  // secrets in base64
	first   [256]bool // bytes that a secret in any of its forms can begin with
}

const (
	// minSecret is a number of bytes. A secret with fewer bytes is not hidden: it often appears in
	// texts by chance, and stars in all these places would reveal it.
	minSecret = 4
	hidden    = "***"
)

// NewRedactor returns a Redactor that hides the given secrets, except those of fewer than minSecret
// bytes. It also hides "user:secret" in base64, which HTTP headers contain.
func NewRedactor(user string, secrets ...string) *Redactor {
	r := new(Redactor)
	for _, s := range secrets {
		if len(s) < minSecret {
			continue
		}
		r.add(s)
		for _, text := range []string{s, user + ":" + s} {
			for _, e := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
				// The last character of the base64 text is left out, because it also depends on the
				// bytes that follow the secret.
				if code := e.EncodeToString([]byte(text)); len(code) > 8 {
					r.literal = append(r.literal, code[:len(code)-1])
				}
			}
		}
	}
	return r
}

// The method add adds a secret to r. The secret must not be empty.
func (r *Redactor) add(secret string) {
	// Bytes that are not valid UTF-8 become negative runes. The function encoded turns these
	// back into bytes.
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

// The function encoded returns the bytes that stand for the rune c. A negative rune stands for a
// byte of invalid UTF-8; Redactor.add writes such runes.
func encoded(c rune) string {
	if c < 0 {
		return string([]byte{byte(-c)})
	}
	return string(c)
}

// Redact returns text with stars in place of each secret. The parameter cut says that text is only
// the beginning of a longer text. Then its last characters may be the first characters of a secret,
// and Redact hides them, too.
func (r *Redactor) Redact(text string, cut bool) string {
	if r == nil || len(r.secrets) == 0 {
		return text
	}
	for _, code := range r.literal {
		text = strings.ReplaceAll(text, code, hidden)
	}
	spans := r.find(text, nil, cut)
	// The text may contain escaped secrets and then have been escaped again as a whole.
	for mark, next := range decoders {
		if strings.IndexByte(text, mark) >= 0 {
			inner, offsets := decode(text, mark, next)
			spans = append(spans, r.find(inner, offsets, cut)...)
		}
	}
	if len(spans) == 0 {
		return text
	}
	slices.SortFunc(spans, func(a, b span) int { return a.start - b.start })
	var out strings.Builder
	done := 0
	for _, s := range spans {
		if s.start >= done {
			out.WriteString(text[done:s.start] + hidden)
		}
		done = max(done, s.end)
	}
	return out.String() + text[done:]
}

// span is a range [start, end) of bytes of a text.
type span struct{ start, end int }

// The method find returns the spans of the secrets in text.
//
// If text was decoded from another text, offsets is not nil: for each byte of text, and for its
// end, it has the offset in that other text. In this case the returned spans are ranges of the
// other text.
func (r *Redactor) find(text string, offsets []int, cut bool) (spans []span) {
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
		if offsets == nil {
			spans = append(spans, span{i, end})
		} else {
			spans = append(spans, span{offsets[i], offsets[end]})
		}
		i = end
	}
	return spans
}

// The map decoders has a function for each character with which an escape can begin. Each function
// decodes the escape at offset i of text. It returns the decoded text and the end of the escape.
// The end is 0 if no escape begins there.
var decoders = map[byte]func(text string, i int) (plain string, end int){
	'&': entityAt, '%': percentAt, '\\': backslashAt,
}

// The function decode returns text with one kind of escapes decoded. escapeByte is the character
// with which these escapes begin, and decodeEscape is the function that decodes one of them (see
// decoders). offsets has for each byte of the result, and for the end of the result, the offset in
// text.
func decode(text string, escapeByte byte, decodeEscape func(string, int) (string, int)) (plain string, offsets []int) {
	var out []byte
	for i := 0; i < len(text); {
		piece, end := text[i:i+1], i+1
		if text[i] == escapeByte {
			if p, e := decodeEscape(text, i); e > 0 {
				piece, end = p, e
			}
		}
		for range len(piece) {
			offsets = append(offsets, i)
		}
		out = append(out, piece...)
		i = end
	}
	return string(out), append(offsets, len(text))
}

// matchSecret looks for the secret at offset i of text. It returns the end of the longest form
// of the secret there, or -1 if no form of the secret begins at i.
func matchSecret(text string, i int, secret []rune, cut bool) int {
	starts := []int{i} // offsets at which the next rune may begin, without duplicates
	for k, c := range secret {
		var next []int
		for _, pos := range starts {
			if cut && k >= minSecret && pos == len(text) {
				return pos
			}
			for _, end := range matchRune(text, pos, c) {
				if !slices.Contains(next, end) {
					next = append(next, end)
				}
			}
		}
		if starts = next; len(starts) == 0 {
			return -1
		}
	}
	return slices.Max(starts)
}

// matchRune looks for the rune c at offset i of text, plain or escaped. It returns the ends of
// all forms of c that begin there.
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

// entityAt decodes the XML or HTML entity at offset i of text. The result end is 0 if there is no
// entity.
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

// backslashAt decodes the escape of JSON, C or Go at offset i of text. The result end is 0 if there
// is no such escape.
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

// hexAt parses the given number of hexadecimal digits, which begin at offset i of text. The result
// end is 0 if there are fewer digits.
func hexAt(text string, i, number int) (n uint64, end int) {
	if len(text) < i+number {
		return 0, 0
	}
	n, err := strconv.ParseUint(text[i:i+number], 16, 32)
	if err != nil {
		return 0, 0
	}
	return n, i + number
}

// percentAt decodes the byte at offset i of text that is escaped for a URL (%41). The result end is
// 0 if there is no such escape.
func percentAt(text string, i int) (plain string, end int) {
	n, end := hexAt(text, i+1, 2)
	if end == 0 {
		return "", 0
	}
	return string([]byte{byte(n)}), end
}

// matchPercent compares text, from offset i on, with another string, value. In text, each byte of
// value must be escaped for a URL (%41). The result is the offset after the last escape, or 0 if
// text differs.
func matchPercent(text string, i int, value string) (end int) {
	for k := range len(value) {
		if i == len(text) || text[i] != '%' {
			return 0
		}
		p, end := percentAt(text, i)
		if end == 0 || p[0] != value[k] {
			return 0
		}
		i = end
	}
	return i
}
