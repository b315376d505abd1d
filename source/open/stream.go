package open

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// ErrEmptyStream is the error of a stream that ends before its first byte.
var ErrEmptyStream = errors.New("the stream is empty (0 bytes): the command that writes it may have failed")

// RawStream checks that the stream r is a raw disk. It waits for the first bytes of r
// and returns a reader that yields all bytes of r, including the first ones. If the
// first bytes show another format, RawStream returns a *ForeignError. Some formats can
// be recognized only by their last bytes. For these formats, the reader returns a
// *ForeignError instead of io.EOF. For an empty stream, RawStream returns an
// ErrEmptyStream.
//
// Messages call the stream by the given name. The result luks reports whether the disk
// is encrypted with LUKS.
func RawStream(r io.Reader, name string) (_ io.Reader, luks bool, err error) {
	b := bufio.NewReaderSize(r, textSize+1)
	var c content
	for _, n := range []int{headSize, textSize + 1} {
		c.head, err = b.Peek(n)
		if err != nil && err != io.EOF {
			return nil, false, fmt.Errorf("read %s: %w", name, err)
		}
		c.whole = err == io.EOF
		if c.whole || !c.mayBeJSON() {
			break
		}
	}
	if len(c.head) == 0 {
		return nil, false, fmt.Errorf("%s: %w", name, ErrEmptyStream)
	}
	format, err := c.probe(name)
	if err == nil && format != "raw" {
		err = &ForeignError{name, "a " + format + " image", fmt.Sprintf("it begins with %+q", c.head[:min(len(c.head), 20)]), "use it as the source"}
	}
	if err != nil {
		return nil, false, inFileFirst(err)
	}
	return &tailReader{r: b, name: name}, c.isLUKS(), nil
}

// inFileFirst changes the hint of a *ForeignError about a stream. The original hint
// says what to do with a file. The new hint says that the user must first save the
// stream in a file.
func inFileFirst(err error) error {
	if foreign := (*ForeignError)(nil); errors.As(err, &foreign) {
		foreign.hint = "save the stream in a file, then do this with the file: " + foreign.hint
	}
	return err
}

// tailReader keeps the last bytes that were read. At the end of the stream, it checks
// them for formats that are recognized by their last bytes.
type tailReader struct {
	r    io.Reader
	name string // for messages
	tail []byte // up to tailSize bytes
}

func (t *tailReader) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.tail = append(t.tail, p[max(0, n-tailSize):n]...)
	t.tail = append(t.tail[:0], t.tail[max(0, len(t.tail)-tailSize):]...)
	if err == io.EOF {
		if foreign := (content{tail: t.tail}).foreignTail(t.name); foreign != nil {
			return n, inFileFirst(foreign)
		}
	}
	return n, err
}
