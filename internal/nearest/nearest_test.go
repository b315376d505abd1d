package nearest

import "testing"

func TestOf(t *testing.T) {
	names := []string{"compress", "connections", "config", "cookie"}
	for word, want := range map[string]string{
		"compres": "compress", "conections": "connections", "cofnig": "config", "cooky": "cookie", "": "config", "compress": "compress",
	} {
		if got := Of(word, names); got != want {
			t.Errorf("Of(%q) = %q, want %q", word, got, want)
		}
	}
}
