package printable

import (
	"io"
	"sync"
	"unicode/utf8"
)

// Writer passes text or JSON to another writer, escaped as [Bytes] does. It is safe for
// concurrent use if each call of Write has only complete lines.
type Writer struct {
	mu   sync.Mutex // guards the fields below
	w    io.Writer
	rest []byte // first bytes of a rune whose other bytes come with the next Write
}

// NewWriter returns a Writer that writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write writes p to the underlying writer. If p ends in the middle of a rune, the first bytes
// of the rune are kept and written by the next call. If the underlying writer fails, Write
// returns its error, and the returned number of written bytes may be wrong.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := p
	if len(w.rest) > 0 {
		text = append(w.rest, p...)
	}
	whole := len(text) - incomplete(text)
	n, err := w.w.Write(Bytes(text[:whole]))
	if err != nil {
		return min(n, len(p)), err
	}
	w.rest = append(w.rest[:0:0], text[whole:]...)
	return len(p), nil
}

// The function incomplete returns the number of bytes at the end of text that belong to an
// incomplete rune.
func incomplete(text []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(text); n++ {
		if tail := text[len(text)-n:]; utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}
