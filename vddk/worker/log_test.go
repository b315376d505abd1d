package worker

import (
	"slices"
	"testing"
	"time"
)

// A worker's last words are in its pipe when it has ended, and are read also by
// who comes late. What a process of the library's writes after that is left alone.
func TestLateOutput(t *testing.T) {
	ours, theirs, err := outputPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close() // another process may keep it open
	if _, err := theirs.WriteString("one\ntwo\nthe half of three"); err != nil {
		t.Fatal(err)
	}
	ours.SetReadDeadline(time.Unix(1, 0))
	l := logger{write: func(Level, string) { theirs.WriteString("more\n") }}
	l.readOutput(&outputReader{pipe: ours})
	if want := []string{"one", "two", "the half of three"}; !slices.Equal(l.last(), want) {
		t.Errorf("%q, want %q", l.last(), want)
	}
}
