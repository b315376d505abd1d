package progress

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// Output says where and how a display shows the progress.
type Output struct {
	Style Style
	To    io.Writer
	// Size returns the size of the terminal; nil: To is not a terminal.
	Size func() (columns, rows int)
	// Stamp returns the text that each line of style Lines begins with, such as a time; nil: none.
	Stamp func() string
}

// size returns the size of the terminal, 80 columns and 24 rows if there is none.
func (o *Output) size() (columns, rows int) {
	if o.Size == nil {
		return 80, 24
	}
	return o.Size()
}

// printLine writes a line of text. It ignores write errors, because a copy must go on when its
// terminal was closed.
func (o *Output) printLine(text string) {
	if o.Style == Lines && o.Stamp != nil {
		text = o.Stamp() + text
	}
	_, _ = io.WriteString(o.To, text+"\n")
}

// screen draws lines at the bottom of a terminal, and writes messages above them. It is not safe
// for concurrent use.
type screen struct {
	out   io.Writer
	shown []string // the lines on the terminal, which the next draw replaces
}

// The method draw replaces the lines on the terminal. A single write draws the new lines over the
// old ones, without clearing them first, so that nothing flickers. The method ignores write errors,
// because a copy must go on when its terminal was closed.
func (s *screen) draw(lines []string) {
	if len(lines) == 0 && len(s.shown) == 0 {
		return
	}
	_, _ = io.WriteString(s.out, s.back()+inLines(lines))
	s.shown = lines
}

// The method write writes whole lines above those that draw has drawn. Control characters are
// replaced by visible escapes.
func (s *screen) write(p []byte) (int, error) {
	text := printable.Bytes(p)
	if len(s.shown) > 0 {
		above := bytes.ReplaceAll(text, []byte("\n"), []byte("\x1b[K\n"))
		text = []byte(s.back() + string(above) + inLines(s.shown))
	}
	if _, err := s.out.Write(text); err != nil {
		return 0, err
	}
	return len(p), nil
}

// The method back returns the escape sequence that moves the cursor to the first of the lines that
// draw has drawn.
func (s *screen) back() string {
	if len(s.shown) == 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\r", len(s.shown))
}

// inLines returns a text that draws the given lines over those on the terminal. It makes the
// terminal cut long lines instead of wrapping them, because only the terminal knows the width
// of all characters.
func inLines(lines []string) string {
	var b strings.Builder
	b.WriteString("\x1b[?7l")
	for _, line := range lines {
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[?7h\x1b[J")
	return b.String()
}

// fit shortens lines so that they fit on a terminal of the given size. One row is left for the
// cursor.
func fit(lines []string, columns, rows int) []string {
	lines = lines[:min(len(lines), max(rows-1, 1))]
	for i, line := range lines {
		lines[i] = cut(line, columns)
	}
	return lines
}

// The function cut shortens s so that it fits on one line of a terminal with the given number of
// columns.
func cut(s string, columns int) string {
	if columns < 1 || utf8.RuneCountInString(s) < columns {
		return s
	}
	return string([]rune(s)[:columns-1])
}

// drawBar returns a bar of the given number of columns between brackets, of which a share is full.
func drawBar(share float64, columns int) string {
	full := int(min(max(share, 0), 1) * float64(columns))
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", columns-full) + "]"
}

// percent returns a share as a percentage of three columns. It is 100 only when all is done.
func percent(share float64) string { return fmt.Sprintf("%3d%%", int(min(max(share, 0), 1)*100)) }

// wideEnough is the smallest number of columns for which a display draws bars.
const wideEnough = 70
