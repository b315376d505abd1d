// Package image is what the readers of image formats share: tables kept in bounded
// memory, and what lies below an image in a chain.
package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// ReadFull reads all of p.
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

// PathOf returns the path of the file that f is of, name where it doesn't say.
func PathOf(f source.Disk, name string) string {
	if i, ok := source.Ability[source.Described](f); ok {
		if chain := i.Info().Chain; len(chain) > 0 {
			return chain[0]
		}
	}
	return name
}

// InFile asks f for its byte at off, for no more than max bytes. Where that is
// in no file that is said of max bytes.
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

// Identity combines those of all files that an image of the format is made of;
// nil is none. It proves no more than the weakest of them.
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

// Weaker returns what two proofs of an identity prove together.
func Weaker(proof, other string) string {
	if other == "none" || proof == "snapshot" {
		return other
	}
	return proof
}

// ReadUncached forwards source.Uncached to all files that have it; nil is none.
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
