package worker

import (
	"encoding/base64"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"html"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

var nastySecrets = []string{
	"S3cret-marker&<%>\"x", `a\b\\c"d'e/f`, "&&&&&&&&", `\\\\\\\\`, "%41%42%43", "pässwörd & ü", "emoji 😀 word", "tab\tand\nline", "plain",
	"a b+c d", "\xff\xfe\xfd\xfc", "$`!?", "'quoted'",
}

func escapers(t testing.TB) map[string]func(string) string {
	return map[string]func(string) string{
		"plain": func(s string) string { return s },
		"xml": func(s string) string {
			var b strings.Builder
			if err := xml.EscapeText(&b, []byte(s)); err != nil {
				t.Fatal(err)
			}
			return b.String()
		},
		"html":  html.EscapeString,
		"names": strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", `"`, "&quot;", "'", "&apos;").Replace,
		"some":  strings.NewReplacer("&", "&amp;", "<", "&lt;").Replace,
		"hex": func(s string) string {
			var b strings.Builder
			for _, r := range s {
				fmt.Fprintf(&b, "&#x%04X;", r)
			}
			return b.String()
		},
		"query": url.QueryEscape,
		"path":  url.PathEscape,
		"lower": func(s string) string {
			var b strings.Builder
			for i := range len(s) {
				fmt.Fprintf(&b, "%%%02x", s[i])
			}
			return b.String()
		},
		"json": func(s string) string {
			text, err := json.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			return string(text[1 : len(text)-1])
		},
		"go":    func(s string) string { q := strconv.Quote(s); return q[1 : len(q)-1] },
		"ascii": func(s string) string { q := strconv.QuoteToASCII(s); return q[1 : len(q)-1] },
		"slash": strings.NewReplacer("/", `\/`, `"`, `\"`, `\`, `\\`).Replace,
	}
}

// Each form of a secret is hidden, escaped once or twice, and the text around it stays.
func TestRedact(t *testing.T) {
	for _, secret := range nastySecrets {
		r := NewRedactor("root", secret, "abc")
		for once, inner := range escapers(t) {
			for twice, outer := range escapers(t) {
				form := outer(inner(secret))
				if lossy := []string{"xml", "hex", "json"}; !utf8.ValidString(secret) && (slices.Contains(lossy, once) || slices.Contains(lossy, twice)) {
					continue // these escapes replace invalid UTF-8
				}
				if got := r.Redact("<p>"+form+"</p> abc "+form, false); got != "<p>***</p> abc ***" {
					t.Errorf("%q as %s in %s: %q became %q", secret, once, twice, form, got)
				}
			}
		}
		for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding, base64.RawStdEncoding} {
			for _, text := range []string{secret, "root:" + secret} {
				code := e.EncodeToString([]byte(text))
				if got := r.Redact("Basic "+code+" end", false); len(code) > 9 && strings.Contains(got, code[:len(code)-3]) {
					t.Errorf("%q: %q", secret, got)
				}
			}
		}
	}
	for _, text := range []string{"", "a line & another %41 \\u0041", "plai", "&amp;", strings.Repeat("&", 100)} {
		if got := NewRedactor("", "plainer", "&#x41;b").Redact(text, false); got != text {
			t.Errorf("%q became %q", text, got)
		}
	}
	if got := new(Redactor).Redact("text", true); got != "text" {
		t.Error(got)
	}
}

// The beginning of a secret at the end of a cut line is hidden.
func TestRedactCut(t *testing.T) {
	r := NewRedactor("", `secret"word`)
	for text, want := range map[string]string{
		"x secret&quot;wo": "x ***", "x secr": "x ***", "x sec": "x sec", "x secret": "x ***", "x secretly": "x secretly",
	} {
		if got := r.Redact(text, true); got != want {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
	if got := r.Redact("x secr", false); got != "x secr" {
		t.Error(got)
	}
}

// A secret is hidden even if it was cut because a line of the worker was too long.
func TestLinesHideTornSecrets(t *testing.T) {
	var l logger
	l.hide(&OpenRequest{User: "root", Password: `secret"word`})
	for _, text := range []string{strings.Repeat("x", MaxLine-6) + `secret`, strings.Repeat("x", MaxLine-12) + `secret\"...`, `<p>secret&quot;word</p>`} {
		if got := l.redact(text); strings.Contains(got, "secr") || !strings.Contains(got, "***") {
			t.Errorf("%q", got[max(0, len(got)-40):])
		}
	}
}

// Text with very many beginnings of secrets is redacted in little time.
func TestRedactIsBounded(t *testing.T) {
	r := NewRedactor("", strings.Repeat(`\`, 64), strings.Repeat("&", 64)+"x")
	began := time.Now()
	r.Redact(strings.Repeat(`\`, MaxLine), false)
	r.Redact(strings.Repeat("&amp;", MaxLine/5), false)
	r.Redact(strings.Repeat("&", MaxLine), false)
	t.Logf("took %v", time.Since(began))
}

func BenchmarkRedact(b *testing.B) {
	r := NewRedactor("root", "S3cret-marker&<%>\"x", strings.Repeat("cookie", 20))
	line := strings.Repeat("2026-11-30T12:00:00.000Z info -[12345] [Originator@6876 sub=Default] DISKLIB-LINK : Opened '[ds] vm/vm.vmdk' (0x1e) ", 2)
	b.SetBytes(int64(len(line)))
	for range b.N {
		r.Redact(line, false)
	}
}
