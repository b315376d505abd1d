package vmdk

import (
	"bytes"
	"encoding/binary"
)

// These are the first bytes (magic) of the kinds of files of which an image can
// consist.
const (
	magicSparse   = "KDMV"     // hosted sparse and streamOptimized: "VMDK" as a little-endian number
	magicCOWD     = "COWD"     // vmfsSparse, the delta disk of older ESXi
	magicSESparse = 0xcafebabe // the first 8 bytes of a seSparse extent, little-endian
)

// kind says what a file of an image is, as its first bytes show.
type kind int

const (
	kindUnknown kind = iota
	kindDescriptor
	kindSparse
	kindCOWD
	kindSESparse
)

// Probe reports whether head, the first bytes of a file, belongs to a VMDK image: a
// descriptor or a sparse extent of any kind. 512 bytes are enough, unless the
// descriptor begins with long comments.
func Probe(head []byte) bool { return probe(head) != kindUnknown }

func probe(head []byte) kind {
	switch {
	case bytes.HasPrefix(head, []byte(magicSparse)):
		return kindSparse
	case bytes.HasPrefix(head, []byte(magicCOWD)):
		return kindCOWD
	case len(head) >= 8 && binary.LittleEndian.Uint64(head) == magicSESparse:
		return kindSESparse
	}
	// A descriptor begins with the comment "# Disk DescriptorFile". Like VMware's reader and qemu,
	// the function probe also accepts a file that does not begin with this comment. The first line
	// of such a file that is neither empty nor a comment must be "version=" and a number.
	for line := range bytes.Lines(bytes.TrimPrefix(head, []byte(bom))) {
		line = bytes.ToLower(bytes.Join(bytes.Fields(line), nil))
		switch {
		case bytes.Equal(line, []byte("#diskdescriptorfile")):
			return kindDescriptor
		case len(line) == 0 || line[0] == '#':
		default:
			version, ok := bytes.CutPrefix(line, []byte("version="))
			if ok && len(version) > 0 && version[0] >= '1' && version[0] <= '9' {
				return kindDescriptor
			}
			return kindUnknown
		}
	}
	return kindUnknown
}
