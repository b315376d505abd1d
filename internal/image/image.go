// Package image has what the readers of image formats share: a [Memory] that caches
// tables within a bound, [Places] to detect tables that overlap, and
// [Merger.AddParent], [ReadParent] and [VisitParent] for the images below an image in a
// chain.
package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// ReadFull reads all of p at off. The end of the file within p is io.ErrUnexpectedEOF.
func ReadFull(f source.Disk, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// PathOf returns the path of the image that f reads, or name if f does not know its
// path.
func PathOf(f source.Disk, name string) string {
	if i, ok := source.Ability[source.Described](f); ok {
		if chain := i.Info().Chain; len(chain) > 0 {
			return chain[0]
		}
	}
	return name
}

// InFile returns the local file that holds the byte at off of f, the position pos of
// the byte in that file, and the number n of bytes, at most max, that follow each other
// there. If no local file holds the byte, ok is false and n is max.
func InFile(f source.Disk, off, max int64) (file *os.File, pos, n int64, ok bool) {
	i, ok := source.Ability[source.InFile](f)
	if !ok {
		return nil, 0, max, false
	}
	file, pos, n, ok = i.InFile(off)
	if !ok || n <= 0 {
		return nil, 0, max, false
	}
	return file, pos, min(n, max), true
}

// Identity combines the identities of all files of an image of the given format. The
// proof is the weakest of their proofs. Files that are nil are skipped.
func Identity(ctx context.Context, format string, files ...source.Disk) (id, proof string, err error) {
	sum := sha256.New()
	proof = "snapshot"
	for _, f := range files {
		if f == nil {
			continue
		}
		i, ok := source.Ability[source.Identified](f)
		if !ok {
			proof = "none"
			continue
		}
		id, p, err := i.Identity(ctx)
		if err != nil {
			return "", "", err
		}
		fmt.Fprintf(sum, "%d:%s", len(id), id)
		proof = Weaker(proof, p)
	}
	return fmt.Sprintf("%s:%x", format, sum.Sum(nil)), proof, nil
}

// Weaker returns the weaker of two proofs of an identity, see source.Identified.
func Weaker(proof, other string) string {
	if other == "none" || proof == "snapshot" {
		return other
	}
	return proof
}

// ReadUncached calls ReadUncached of each file that has the ability source.Uncached.
// Files that are nil are skipped.
func ReadUncached(files ...source.Disk) {
	for _, f := range files {
		if f == nil {
			continue
		}
		if u, ok := source.Ability[source.Uncached](f); ok {
			u.ReadUncached()
		}
	}
}
