// Package secret holds text that must not be printed, such as a password:
//
//	password := secret.New(text)
//	log.Print(password)          // prints ***
//	login(user, password.Reveal())
package secret

import (
	"fmt"
	"log/slog"
	"strings"
)

// Secret is a text that prints as "***" with every verb of package fmt, in logs and in
// JSON. Only Reveal returns the text. The zero value means that there is no secret, which
// is not the same as an empty one. A Secret is safe for concurrent use.
type Secret struct {
	text string
	set  bool
}

// New returns text as a secret.
func New(text string) Secret { return Secret{text, true} }

// IsSet reports whether there is a secret. It may be empty.
func (s Secret) IsSet() bool { return s.set }

// Reveal returns the text.
func (s Secret) Reveal() string { return s.text }

// Odd describes a beginning or an end of the text that nobody chooses on purpose, such as
// "a newline at its end", without showing the text. It returns "" if there is none.
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

// String returns "***", or "" if there is no secret.
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
