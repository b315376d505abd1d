package ova

import (
	"bytes"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// packers are programs that pack a file as a whole, by what the file begins
// with, and what unpacks it. A tar archive begins with the name of a member,
// which is no such text.
var packers = []struct{ magic, name, unpack string }{
	{"\x1f\x8b", "gzip", "gunzip -c %s > NAME"},
	{"PK\x03\x04", "zip", "unzip %s"},
	{"\xfd7zXZ\x00", "xz", "xz -dc %s > NAME"},
	{"\x28\xb5\x2f\xfd", "zstd", "zstd -dc %s > NAME"},
	{"BZh91AY&SY", "bzip2", "bunzip2 -c %s > NAME"},
	{"7z\xbc\xaf\x27\x1c", "7z", "7z x %s"},
}

// PackedError is an appliance that is packed as a whole, so that it can't be
// read in place.
type PackedError struct {
	Path, Packer string
	unpack       string
}

func (e *PackedError) Error() string {
	return fmt.Sprintf("%s: the whole file is packed by %s, which is not read in place", e.Path, e.Packer)
}

// Hint is what the user can do.
func (e *PackedError) Hint() string {
	return "unpack it first, and open what comes out: " + fmt.Sprintf(e.unpack, e.Path)
}

// checkPacked returns a *PackedError where f is packed as a whole.
func checkPacked(path string, f source.Disk) error {
	head := make([]byte, min(f.Size(), 16))
	if err := image.ReadFull(f, head, 0); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, p := range packers {
		if bytes.HasPrefix(head, []byte(p.magic)) {
			return &PackedError{path, p.name, p.unpack}
		}
	}
	return nil
}
