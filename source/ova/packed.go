package ova

import (
	"bytes"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// packers are the known programs that compress a whole file. The field magic has the
// bytes with which the files of a program begin. The field unpack has the command that
// unpacks such a file. A tar archive that is not compressed begins with the name of a
// file, and therefore never with any of the magic bytes.
var packers = []struct{ magic, name, unpack string }{
	{"\x1f\x8b", "gzip", "gunzip -c %s > NAME"},
	{"PK\x03\x04", "zip", "unzip %s"},
	{"\xfd7zXZ\x00", "xz", "xz -dc %s > NAME"},
	{"\x28\xb5\x2f\xfd", "zstd", "zstd -dc %s > NAME"},
	{"BZh91AY&SY", "bzip2", "bunzip2 -c %s > NAME"},
	{"7z\xbc\xaf\x27\x1c", "7z", "7z x %s"},
}

// PackedError reports an appliance that is compressed as a whole. Such a file can be
// unpacked only from its start, not read at a given offset.
type PackedError struct {
	Path, Packer string
	unpack       string
}

func (e *PackedError) Error() string {
	return fmt.Sprintf("%s: the whole file is compressed with %s, which is not supported", e.Path, e.Packer)
}

// Hint returns the command that unpacks the appliance.
func (e *PackedError) Hint() string {
	return "unpack the file, and use the unpacked file as the source: " + fmt.Sprintf(e.unpack, e.Path)
}

// checkPacked returns a *PackedError if f is compressed as a whole.
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
