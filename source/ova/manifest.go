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

// maxManifest bounds a manifest: a line of 4 KiB for each member.
const maxManifest = 16 << 20

// ErrNoManifest says that an appliance has no manifest, or that its manifest
// has no digest of a file: the file can't be checked.
var ErrNoManifest = errors.New("the manifest does not have its digest")

// ManifestError is a file whose content is not what the manifest says.
type ManifestError struct {
	File      string // as messages show it
	Algorithm string // "SHA1", "SHA256", "SHA384" or "SHA512"
	Want, Got string // in lower-case hexadecimal
}

func (e *ManifestError) Error() string {
	return fmt.Sprintf("%s: its %s is %s, the manifest says %s: the file is damaged or was changed", e.File, e.Algorithm, e.Got, e.Want)
}

// ExitStatus implements the interface of transfer/report.
func (*ManifestError) ExitStatus() int { return exit.Difference }

// digest is a line of a manifest.
type digest struct {
	algorithm string // in upper case
	want      string // in lower-case hexadecimal
}

// algorithms are those of DSP0243 1 (SHA1) and 2 (SHA256), and what ovftool
// writes besides. SHA1 proves no more than that nothing broke.
var algorithms = map[string]algorithm{
	"SHA1":   {sha1.Size, sha1.New},
	"SHA256": {sha256.Size, always(sha256.New)},
	"SHA384": {sha512.Size384, always(sha512.New384)},
	"SHA512": {sha512.Size, always(sha512.New)},
}

type algorithm struct {
	size int // of a digest, in bytes
	new  func() (hash.Hash, error)
}

func always(newHash func() hash.Hash) func() (hash.Hash, error) {
	return func() (hash.Hash, error) { return newHash(), nil }
}

// manifestLine is "SHA256(NAME)= HEX", with blanks between or without.
var manifestLine = regexp.MustCompile(`^\s*([A-Za-z0-9-]+)\s*\((.*)\)\s*=\s*([0-9A-Fa-f]*)\s*$`)

// parseManifest returns the digests of each file (DSP0243 1.1, section 5.1).
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
			return nil, fmt.Errorf("line %d: a %s of %d digits, want %d", n, d.algorithm, len(d.want), 2*a.size)
		}
		name := path.Clean(string(m[2]))
		digests[name] = append(digests[name], d)
	}
	return digests, nil
}

// Verify compares the descriptor and the files that were opened so far with
// their digests in the manifest, reading each from its start to its end: the
// file of a disk, or all of its chunks, and what its image names in an archive.
// More names files besides, relative to the descriptor.
//
// The manifest is the file that is named like the descriptor, with .mf, or else
// the only .mf of an archive.
//
// A difference is a *ManifestError. Where there is no manifest, or where it
// lacks one of the files, it is an ErrNoManifest.
func (a *Appliance) Verify(ctx context.Context, more ...string) error {
	digests, manifest, err := a.manifest(ctx)
	if err != nil {
		return err
	}
	for _, name := range slices.Concat([]string{a.descriptor}, a.openedFiles(), more) {
		var known []digest
		lines := digests[path.Clean(name)]
		if whole, ok := strings.CutSuffix(name, onlyChunk); ok && lines == nil && !slices.Contains(a.openedFiles(), whole+secondChunk) {
			lines = digests[path.Clean(whole)] // the only chunk is the file
		}
		for _, d := range lines {
			if _, ok := algorithms[d.algorithm]; !ok {
				return fmt.Errorf("%s: the digest of %s is a %s, want SHA1, SHA256, SHA384 or SHA512: %w", manifest, show(name), d.algorithm, ErrNoManifest)
			}
			known = append(known, d)
		}
		if len(known) == 0 {
			return fmt.Errorf("%s: no line for %s: %w", manifest, show(name), ErrNoManifest)
		}
		if err := a.verifyFile(ctx, name, known); err != nil {
			return err
		}
	}
	return nil
}

// manifest returns the digests, and the manifest's name for errors.
func (a *Appliance) manifest(ctx context.Context) (digests map[string][]digest, shown string, err error) {
	f, shown, err := a.files.manifest(ctx, strings.TrimSuffix(a.descriptor, path.Ext(a.descriptor))+".mf")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%s has no manifest (.mf): %w", a.path, ErrNoManifest)
	}
	if err != nil {
		return nil, "", fmt.Errorf("manifest of %s: %w", a.path, err)
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
