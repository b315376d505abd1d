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

func TestNear(t *testing.T) {
	names := []string{"copy", "export", "map", "run", "verify"}
	for word, want := range map[string]string{
		"exprot": "export", "cpoy": "copy", "mpa": "map", "rnu": "run", "verfy": "verify", "exports": "export", "map": "map",
		"raw": "", "disk": "", "nap": "map", "expert": "export", "import": "export", "": "", "nothing": "",
	} {
		if got, ok := Near(word, names); ok != (want != "") || ok && got != want {
			t.Errorf("Near(%q) = %q, %t, want %q", word, got, ok, want)
		}
	}
}
