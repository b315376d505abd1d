package worker

import (
	"slices"
	"testing"
	"time"
)

// TestLateOutput reads the pipe of a worker after the read deadline has passed. The
// lines that are in the pipe by then must be read, and nothing that another process
// writes later.
func TestLateOutput(t *testing.T) {
	ours, theirs, err := outputPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close() // a child of the worker may keep it open
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
