// Package secret holds text that must not be printed.
package secret

import (
	"fmt"
	"log/slog"
	"strings"
)

// Secret is a password or a cookie. It prints as stars, however it is printed;
// Reveal is the only way to what it holds. The zero value is no secret at all,
// which differs from an empty one.
type Secret struct {
	text string
	set  bool
}

// New returns text as a secret.
func New(text string) Secret { return Secret{text, true} }

// IsSet says whether there is one, which may be empty.
func (s Secret) IsSet() bool { return s.set }

// Reveal returns what the secret holds.
func (s Secret) Reveal() string { return s.text }

// Odd says what no password ends in on purpose, or "".
func (s Secret) Odd() string {
	switch text := s.text; {
	case strings.HasPrefix(text, "\ufeff"), strings.HasSuffix(text, "\ufeff"), strings.HasPrefix(text, "\xff\xfe"), strings.HasPrefix(text, "\xfe\xff"):
		return "a byte order mark at one of its ends"
	case strings.HasSuffix(text, "\n"), strings.HasSuffix(text, "\r"):
		return "a newline at its end"
	case text != strings.TrimSpace(text):
		return "a blank at one of its ends"
	}
	return ""
}

func (s Secret) String() string {
	if !s.set {
		return ""
	}
	return "***"
}

// GoString implements fmt.GoStringer.
func (s Secret) GoString() string { return s.String() }

// Format implements fmt.Formatter, for every verb.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
