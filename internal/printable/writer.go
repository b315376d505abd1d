package printable

import (
	"io"
	"sync"
	"unicode/utf8"
)

// Writer writes text, or JSON, to another writer as [Bytes] returns it. It is
// safe for concurrent use, if each Write is of whole lines.
type Writer struct {
	mu   sync.Mutex // guards what follows
	w    io.Writer
	rest []byte // begins a rune whose other bytes the next Write has
}

// NewWriter returns a Writer that writes to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write writes p, except for the bytes of an incomplete rune at its end, which
// it writes with the next p. An error is that of the writer below; the count is
// then a guess.
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

// incomplete returns how many bytes at the end of text begin a rune that goes on
// after it.
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
