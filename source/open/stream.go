package open

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// ErrEmptyStream is the error of a stream that ends before its first byte.
var ErrEmptyStream = errors.New("the stream is empty (0 bytes): the command that writes it may have failed")

// RawStream returns a reader of r, a raw disk, once its first bytes are there. A
// stream of another format is a *ForeignError: at once, or, for a format that is
// marked at the end, in the place of io.EOF. An empty stream is ErrEmptyStream.
// Name is what messages call the stream; luks says that it is encrypted.
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
		err = &ForeignError{name, "a " + format + " image", fmt.Sprintf("it begins with %+q", c.head[:min(len(c.head), 20)]), "copy from that"}
	}
	if err != nil {
		return nil, false, inFileFirst(err)
	}
	return &tailReader{r: b, name: name}, c.isLUKS(), nil
}

// inFileFirst changes the hint of a *ForeignError, which is for a file, to one for
// a stream.
func inFileFirst(err error) error {
	if foreign := (*ForeignError)(nil); errors.As(err, &foreign) {
		foreign.hint = "save it in a file and " + foreign.hint
	}
	return err
}

// tailReader keeps the last bytes that were read, and looks at them at the end.
type tailReader struct {
	r    io.Reader
	name string
	tail []byte
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
