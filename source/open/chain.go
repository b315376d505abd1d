package open

import (
	"fmt"
	"os"
)

// maxChain is the largest number of images in a chain. VMware's own limit is 32.
const maxChain = 256

// The type chain lists the images of a chain that are open so far: the image that the user
// named, its parent or backing file, the parent of this parent, and so on. In a faulty
// chain, an image may be its own ancestor. Only the method extend detects this. The
// readers of the image formats do not detect it.
type chain []link

// link identifies an image in a chain. The image is a local file or a file in an
// archive.
type link struct {
	file   os.FileInfo // nil for a file in an archive
	member string      // name in the archive
}

// The method equals reports whether both links identify the same image.
func (l link) equals(other link) bool {
	if l.file != nil && other.file != nil {
		return same(l.file, other.file)
	}
	return l.file == nil && other.file == nil && l.member == other.member
}

// The method extend appends the image l, which was opened under the given path, to the
// chain. It returns an error if the chain already has this image, or if the chain gets
// too long.
func (c chain) extend(path string, l link) (chain, error) {
	for _, earlier := range c {
		if earlier.equals(l) {
			return nil, fmt.Errorf("%s: the chain of images loops: the file is already in the chain as an earlier image", path)
		}
	}
	if len(c) >= maxChain {
		return nil, fmt.Errorf("%s: the chain of images is too long: it has %d images up to this file, want at most %d", path, len(c)+1, maxChain)
	}
	return append(c[:len(c):len(c)], l), nil
}
