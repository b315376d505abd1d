package secret_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
)

func TestNeverPrinted(t *testing.T) {
	s := secret.New("hunter2")
	inJSON, err := json.Marshal(map[string]any{"password": s})
	if err != nil {
		t.Fatal(err)
	}
	for _, printed := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %s %q %x %d", s, s, s, s, s, s, s), fmt.Sprintf("%#v", &struct{ S secret.Secret }{s}), s.LogValue().String(), string(inJSON)} {
		if strings.Contains(printed, "hunter2") || strings.Contains(printed, fmt.Sprintf("%x", "hunter2")) {
			t.Errorf("%s", printed)
		}
	}
	if s.Reveal() != "hunter2" || !s.IsSet() || s.String() != "***" {
		t.Errorf("%q, set %v, printed as %q", s.Reveal(), s.IsSet(), s)
	}
	var none secret.Secret
	if none.IsSet() || none.String() != "" || !secret.New("").IsSet() {
		t.Error("no secret is not told apart from an empty one")
	}
}

func TestOdd(t *testing.T) {
	for text, want := range map[string]string{
		"hunter2": "", "": "", "two words": "",
		"hunter2\n": "newline", "hunter2\r\n": "newline", " hunter2": "blank", "hunter2\t": "blank",
		"\ufeffhunter2": "byte order mark", "\xff\xfeh\x00": "byte order mark",
	} {
		if got := secret.New(text).Odd(); !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
