package vmdk

import (
	"bytes"
	"encoding/binary"
)

// magic of the kinds of file that an image is made of.
const (
	magicSparse   = "KDMV"     // hosted sparse and streamOptimized: "VMDK" as a little-endian number
	magicCOWD     = "COWD"     // vmfsSparse, the delta disk of older ESXi
	magicSESparse = 0xcafebabe // the first 8 bytes of a seSparse extent, little-endian
)

// kind is what a file is by its first bytes.
type kind int

const (
	kindUnknown kind = iota
	kindDescriptor
	kindSparse
	kindCOWD
	kindSESparse
)

// Probe reports whether head, the first bytes of a file (512 suffice but for
// long comments), begins a VMDK: a descriptor, a sparse extent with a
// descriptor in it, or an extent of ESXi.
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
	// A descriptor begins with a comment that says so. VMware's own reader and
	// qemu go without it where the first line that is no comment is a version.
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
