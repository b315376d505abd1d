package ova

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/sha1"
)

// maxManifest is the largest size of a manifest in bytes. It is enough for a line of 4
// KiB for each file of an archive.
const maxManifest = 16 << 20

// ErrNoManifest means that a file cannot be checked: the appliance has no manifest, or
// its manifest has no digest of the file.
var ErrNoManifest = errors.New("there is no usable digest to compare the file with")

// ManifestError reports a file whose digest is not the one that the manifest has for
// this file.
type ManifestError struct {
	File      string // name for messages
	Algorithm string // "SHA1", "SHA256", "SHA384" or "SHA512"
	Want, Got string // in lower-case hexadecimal
}

func (e *ManifestError) Error() string {
	return fmt.Sprintf("%s: the %s of the file is %s, but the manifest has %s: the file is damaged or was changed", e.File, e.Algorithm, e.Got, e.Want)
}

// ExitStatus returns the exit status of a program that ends with this error.
func (*ManifestError) ExitStatus() int { return exit.Difference }

// digest is the content of a line of a manifest.
type digest struct {
	algorithm string // in upper case
	want      string // in lower-case hexadecimal
}

// algorithms are the algorithms of the digests in manifests. DSP0243 has SHA1 in
// version 1 and SHA256 in version 2, and ovftool also writes SHA384 and SHA512. SHA1
// detects accidental damage only: it does not protect against deliberate changes.
var algorithms = map[string]algorithm{
	"SHA1":   {sha1.Size, sha1.New},
	"SHA256": {sha256.Size, always(sha256.New)},
	"SHA384": {sha512.Size384, always(sha512.New384)},
	"SHA512": {sha512.Size, always(sha512.New)},
}

type algorithm struct {
	size int // bytes in a digest
	new  func() (hash.Hash, error)
}

func always(newHash func() hash.Hash) func() (hash.Hash, error) {
	return func() (hash.Hash, error) { return newHash(), nil }
}

// manifestLine matches a line "SHA256(NAME)= HEX", with any blanks between its parts.
var manifestLine = regexp.MustCompile(`^\s*([A-Za-z0-9-]+)\s*\((.*)\)\s*=\s*([0-9A-Fa-f]*)\s*$`)

// parseManifest returns the digests in a manifest (DSP0243 1.1, section 5.1). The keys
// of the result are the names of the files.
func parseManifest(text []byte) (map[string][]digest, error) {
	digests := map[string][]digest{}
	n := 0
	for line := range bytes.Lines(bytes.TrimPrefix(text, []byte("\ufeff"))) {
		n++
		line = bytes.TrimRight(line, "\r\n")
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		m := manifestLine.FindSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("line %d: found %s, want a line such as \"SHA256(disk1.vmdk)= 12ab...\"", n, show(string(line)))
		}
		d := digest{strings.ToUpper(strings.ReplaceAll(string(m[1]), "-", "")), strings.ToLower(string(m[3]))}
		if a, ok := algorithms[d.algorithm]; ok && len(d.want) != 2*a.size {
			return nil, fmt.Errorf("line %d: the %s digest has %d hexadecimal digits, want %d", n, d.algorithm, len(d.want), 2*a.size)
		}
		name := path.Clean(string(m[2]))
		digests[name] = append(digests[name], d)
	}
	return digests, nil
}

// Verify compares files with their digests in the manifest, and reads these files
// completely. It compares the descriptor and all files that were opened so far: the
// files of the disks with all of their chunks. In an archive, the opened files include
// the extents and other files to which the image of a disk refers. The parameter more
// has the names of further files to compare, relative to the folder of the descriptor.
//
// The manifest has the name of the descriptor, with the extension .mf instead of .ovf.
// In an archive it may have another name if it is the only .mf file.
//
// Verify returns a *ManifestError for the first file whose digest differs from the
// manifest. It returns an error that wraps ErrNoManifest if there is no manifest or if
// the manifest has no digest of one of the files.
func (a *Appliance) Verify(ctx context.Context, more ...string) error {
	digests, manifest, err := a.manifest(ctx)
	if err != nil {
		return err
	}
	for _, name := range slices.Concat([]string{a.descriptor}, a.openedFiles(), more) {
		var known []digest
		lines := digests[path.Clean(name)]
		if whole, ok := strings.CutSuffix(name, onlyChunk); ok && lines == nil && !slices.Contains(a.openedFiles(), whole+secondChunk) {
			lines = digests[path.Clean(whole)] // a single chunk is the whole file
		}
		for _, d := range lines {
			if _, ok := algorithms[d.algorithm]; !ok {
				return fmt.Errorf("%s: the digest of %s is of the type %s, want SHA1, SHA256, SHA384 or SHA512: %w", manifest, show(name), d.algorithm, ErrNoManifest)
			}
			known = append(known, d)
		}
		if len(known) == 0 {
			return fmt.Errorf("%s: the manifest has no line with a digest of %s: %w", manifest, show(name), ErrNoManifest)
		}
		if err := a.verifyFile(ctx, name, known); err != nil {
			return err
		}
	}
	return nil
}

// The method manifest reads the manifest of the appliance. It returns the digests of
// each file, with the name of the file as the key. It also returns the path that errors
// show for the manifest.
func (a *Appliance) manifest(ctx context.Context) (digests map[string][]digest, shown string, err error) {
	f, shown, err := a.files.manifest(ctx, strings.TrimSuffix(a.descriptor, path.Ext(a.descriptor))+".mf")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%s has no manifest (.mf): %w", a.path, ErrNoManifest)
	}
	if err != nil {
		return nil, "", fmt.Errorf("cannot open the manifest of %s: %w", a.path, err)
	}
	defer f.Close()
	text, err := readAll(f, maxManifest)
	if err == nil {
		digests, err = parseManifest(text)
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", shown, err)
	}
	return digests, shown, nil
}

// verifyFile computes a digest of the content of a file for each of the given digests,
// with the same algorithm. It returns a *ManifestError if a computed digest differs
// from the given one.
func (a *Appliance) verifyFile(ctx context.Context, name string, digests []digest) error {
	f, err := a.files.open(ctx, name)
	if err != nil {
		return err
	}
	defer f.Close()
	hashes := make([]hash.Hash, len(digests))
	writers := make([]io.Writer, len(digests))
	for i, d := range digests {
		if hashes[i], err = algorithms[d.algorithm].new(); err != nil {
			return fmt.Errorf("verify %s: %w", a.files.shown(name), err)
		}
		writers[i] = hashes[i]
	}
	all := io.MultiWriter(writers...)
	buf := make([]byte, min(f.Size(), 1<<20))
	for off := int64(0); off < f.Size(); {
		if err := context.Cause(ctx); err != nil {
			return fmt.Errorf("verify %s: %w", a.files.shown(name), err)
		}
		piece := buf[:min(int64(len(buf)), f.Size()-off)]
		if err := image.ReadFull(f, piece, off); err != nil {
			return err
		}
		all.Write(piece) // a hash never fails
		off += int64(len(piece))
	}
	for i, d := range digests {
		if got := hex.EncodeToString(hashes[i].Sum(nil)); got != d.want {
			return &ManifestError{File: a.files.shown(name), Algorithm: d.algorithm, Want: d.want, Got: got}
		}
	}
	return nil
}
