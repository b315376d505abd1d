// Package image contains code that the readers of several image formats share. A [Memory] caches
// tables and limits their memory. [Places] detect tables that overlap. [Merger.AddParent],
// [ReadParent] and [VisitParent] read the parent of an image in a chain.
package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// ReadFull fills p with the bytes of f from the offset off on. If f ends before p is full, the
// error is io.ErrUnexpectedEOF.
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

// PathOf returns the path of the image file that f reads. If f does not know its path, PathOf
// returns the given name.
func PathOf(f source.Disk, name string) string {
	if i, ok := source.Ability[source.Described](f); ok {
		if chain := i.Info().Chain; len(chain) > 0 {
			return chain[0]
		}
	}
	return name
}

// InFile finds the local file that holds the byte of f at the offset off. pos is the offset of
// this byte in the local file. n is the number of bytes, at most limit, that the local file holds
// without a gap from this byte on. If no local file holds the byte, ok is false and n is limit.
func InFile(f source.Disk, off, limit int64) (file *os.File, pos, n int64, ok bool) {
	i, ok := source.Ability[source.InFile](f)
	if !ok {
		return nil, 0, limit, false
	}
	file, pos, n, ok = i.InFile(off)
	if !ok || n <= 0 {
		return nil, 0, limit, false
	}
	return file, pos, min(n, limit), true
}

// Identity combines the identities of all files of an image into one. format is the format of
// the image. A file that is nil is skipped.
//
// Each identity comes with a proof, a word that says what ensures that the content is unchanged
// (see source.Identified). The proof of the image is the weakest proof of its files. It is "none"
// if a file has no identity.
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

// Weaker returns the weaker one of two proofs. A proof says what ensures that the content of a
// file is unchanged; see source.Identified.
func Weaker(proof, other string) string {
	if other == "none" || proof == "snapshot" {
		return other
	}
	return proof
}

// ReadUncached calls the method ReadUncached of the files that have the ability source.Uncached.
// A file that is nil is skipped.
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
