package printable

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestNameAndLine(t *testing.T) {
	for _, c := range []struct{ in, name, line string }{
		{"web01.vmdk", "web01.vmdk", "web01.vmdk"},
		{"ümlaut 日本　語 עברית ½ 🙂 a\u00a0b", "ümlaut 日本　語 עברית ½ 🙂 a\u00a0b", "ümlaut 日本　語 עברית ½ 🙂 a\u00a0b"},
		{`C:\disks\"x"`, `C:\disks\"x"`, `C:\disks\"x"`},
		{"x\x1b[31my", `"x\x1b[31my"`, `x\x1b[31my`},
		{"a\nvddkcp: b", `"a\nvddkcp: b"`, `a\nvddkcp: b`},
		{"a\rb\tc\x00", `"a\rb\tc\x00"`, `a\rb\tc\x00`},
		{"del\x7f", `"del\x7f"`, `del\u007f`},
		{"c1\u009b31m", `"c1\u009b31m"`, `c1\u009b31m`},
		{"raw\x9b31m", `"raw\x9b31m"`, `raw\x9b31m`},
		{"\u202egpj.exe", `"\u202egpj.exe"`, `\u202egpj.exe`},
		{"a\u2028b\u2029c\u200d\ufeff", `"a\u2028b\u2029c\u200d\ufeff"`, `a\u2028b\u2029c\u200d\ufeff`},
		{"tag\U000e0001", `"tag\U000e0001"`, `tag\udb40\udc01`},
		{"half\xe6\x97", `"half\xe6\x97"`, `half\xe6\x97`},
		{"", "", ""},
	} {
		if got := Name(c.in); got != c.name {
			t.Errorf("Name(%q) = %s, want %s", c.in, got, c.name)
		}
		if got := Line(c.in); got != c.line {
			t.Errorf("Line(%q) = %s, want %s", c.in, got, c.line)
		}
	}
}

type listError struct{ lines []string }

func (e *listError) Error() string   { return strings.Join(e.lines, "\n") }
func (e *listError) Lines() []string { return append([]string(nil), e.lines...) }

// TestWord checks with a shell that it reads the result of Word as one word, and that plain
// paths stay as they are.
func TestWord(t *testing.T) {
	for _, s := range []string{"", "a b", "a'b", "$(x) `y` \\ \"z\" '' \n é", "-n", "~", "#", "a;b", "/vms/web-01.vmdk"} {
		out, err := exec.Command("sh", "-c", "printf %s "+Word(s)+"\"\"").Output()
		if err != nil || string(out) != s {
			t.Errorf("%q: the shell reads %q, %v", s, out, err)
		}
	}
	if got, want := Word("/vms/web-01_é.vmdk"), "/vms/web-01_é.vmdk"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestErrorKeepsOwnLines(t *testing.T) {
	foreign := errors.New("bad\nhint: rm -r")
	list := &listError{[]string{"2 problems:", "1:1: a\x1b", "2:1: b\nc"}}
	for _, c := range []struct {
		err  error
		want string
	}{
		{foreign, `bad\nhint: rm -r`},
		{&fs.PathError{Op: "open", Path: "a\nb", Err: fs.ErrNotExist}, `open a\nb: file does not exist`},
		{errors.Join(foreign, errors.New("two")), "bad\\nhint: rm -r\ntwo"},
		{fmt.Errorf("x\n: %w", errors.Join(foreign, nil, foreign)), "x\\n: bad\\nhint: rm -r\nbad\\nhint: rm -r"},
		{list, "2 problems:\n1:1: a\\x1b\n2:1: b\\nc"},
		{fmt.Errorf("load: %w", list), "load: 2 problems:\n1:1: a\\x1b\n2:1: b\\nc"},
		{fmt.Errorf("%w: at \n %w\n", foreign, list), "bad\\nhint: rm -r: at \\n 2 problems:\n1:1: a\\x1b\n2:1: b\\nc\\n"},
	} {
		if got := Error(c.err); got != c.want {
			t.Errorf("%q:\n%s\nwant\n%s", c.err, got, c.want)
		}
	}
}

// TestWriter tests that the output does not depend on the lengths of the pieces in
// which text is written.
func TestWriter(t *testing.T) {
	text := []byte("日本 ü\x1b[2J\n\tend\u202e\u009b\xff\xe6\x97 🙂\n")
	want := `日本 ü\x1b[2J` + "\n\tend" + `\u202e\u009b\xff\xe6\x97 🙂` + "\n"
	for size := 1; size <= len(text); size++ {
		var out bytes.Buffer
		w := NewWriter(&out)
		for i := 0; i < len(text); i += size {
			piece := text[i:min(i+size, len(text))]
			if n, err := w.Write(piece); n != len(piece) || err != nil {
				t.Fatal(n, err)
			}
		}
		if out.String() != want {
			t.Errorf("pieces of %d: %q, want %q", size, out.String(), want)
		}
	}
}

// TestJSON tests that escaped JSON is still JSON with the same value.
func TestJSON(t *testing.T) {
	var all strings.Builder
	for r := rune(0); r <= unicode.MaxRune; r++ {
		if utf8.ValidRune(r) && !unicode.Is(unicode.Co, r) {
			all.WriteRune(r)
		}
	}
	text, err := json.Marshal(all.String())
	if err != nil {
		t.Fatal(err)
	}
	escaped := Bytes(text)
	for _, r := range string(escaped) {
		if !safe(r) {
			t.Fatalf("%U is not escaped", r)
		}
	}
	var back string
	if err := json.Unmarshal(escaped, &back); err != nil || back != all.String() {
		t.Errorf("other text comes back: %v", err)
	}
	if plain := []byte(`{"a":"ü"}`); &Bytes(plain)[0] != &plain[0] {
		t.Error("text without anything to escape was copied")
	}
}

func BenchmarkBytes(b *testing.B) {
	text := bytes.Repeat([]byte(`{ "start": 123456, "length": 65536, "depth": 0 },`+"\n"), 1000)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		Bytes(text)
	}
}
