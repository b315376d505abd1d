package charset_test

import (
	"testing"

	"github.com/vddkcp/vddkcp/internal/charset"
)

func TestGet(t *testing.T) {
	for name, want := range map[string]string{
		"ISO-8859-1": "é\u0080", "iso_8859-1": "é\u0080", "latin1": "é\u0080",
		"windows-1252": "é€", "CP1252": "é€", "Windows-1251": "йЂ", "ISO-8859-15": "é\ufffd", "IBM437": "ΘÇ", "KOI8-R": "И─",
		"UTF-8": "", "UTF-16": "", "Shift_JIS": "", "GBK": "", "": "", "x": "",
	} {
		e, ok := charset.Get(name)
		if ok != (want != "") {
			t.Errorf("%q: %v", name, ok)
		}
		if !ok {
			continue
		}
		if got, err := e.NewDecoder().String("\xe9\x80"); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", name, got, err, want)
		}
	}
}
