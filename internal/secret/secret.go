// Package secret has a type for text that must not be printed, such as a password:
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

// Secret is a text that is printed as "***": with every verb of package fmt, in logs and in
// JSON. Only Reveal returns the text. The zero value means that there is no secret. This is
// not the same as a secret whose text is empty. A Secret is safe for concurrent use.
type Secret struct {
	text string
	set  bool
}

// New returns a Secret with the given text.
func New(text string) Secret { return Secret{text, true} }

// IsSet reports whether there is a secret. Its text may be empty.
func (s Secret) IsSet() bool { return s.set }

// Reveal returns the text of the secret.
func (s Secret) Reveal() string { return s.text }

// Odd returns a description of a likely mistake at the beginning or the end of the text, such as
// "a newline at its end". The description does not contain the text. It is "" if nothing looks
// wrong.
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

// String returns "***". If there is no secret, it returns "".
func (s Secret) String() string {
	if !s.set {
		return ""
	}
	return "***"
}

// GoString implements fmt.GoStringer. It returns what String returns.
func (s Secret) GoString() string { return s.String() }

// Format implements fmt.Formatter. It prints what String returns, with every verb.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue implements slog.LogValuer. It returns what String returns.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler. It returns what String returns.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }
