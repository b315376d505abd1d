package profile

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

// FuzzParse parses arbitrary bytes. An error must have a place in the file and must not contain a
// password. A text that is accepted must be accepted by encoding/json too, and the profiles must stay
// the same when they are written.
func FuzzParse(f *testing.F) {
	seeds, err := os.ReadDir("testdata/fuzz/FuzzParse")
	if err != nil || len(seeds) < 10 {
		f.Fatalf("%d seeds, %v", len(seeds), err)
	}
	place := regexp.MustCompile(`^f:[1-9][0-9]*:[1-9][0-9]*: .`)
	password := regexp.MustCompile(`"(password|cookie)"\s*:\s*\[?"hunter2`)
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parse(text, "f")
		if err != nil {
			if !place.MatchString(err.Error()) && len(text) <= maxFile {
				t.Errorf("no place: %v", err)
			}
			if strings.Contains(err.Error(), "hunter2") && bytes.Count(text, []byte("hunter2")) == 1 && password.Match(text) {
				t.Errorf("the error has a secret: %v", err)
			}
			return
		}
		var all struct{ Servers map[string]settings }
		if err := json.Unmarshal(text, &all); err != nil || len(all.Servers) != len(got.profiles) {
			t.Fatalf("%d profiles, want %d: %v", len(got.profiles), len(all.Servers), err)
		}
		for i, p := range got.profiles {
			if p.Server == "" || CheckName(p.Name) != nil || p.Port > 65535 || p.NFCHostPort > 65535 || got.settings[i] != all.Servers[p.Name] {
				t.Errorf("%+v of %q", p, text)
			}
		}
		written, err := got.text()
		if err != nil {
			t.Fatal(err)
		}
		again, err := parse(written, "f")
		if err != nil || len(again.profiles) != len(got.profiles) {
			t.Fatalf("%v: %s", err, written)
		}
		for i, p := range again.profiles {
			if *p != *got.profiles[i] {
				t.Errorf("%+v became %+v", got.profiles[i], p)
			}
		}
	})
}
