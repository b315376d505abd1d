package ova

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// Bounds of an archive. An appliance has a handful of members; a real one with
// hundreds of disks stays far below.
const (
	maxMembers     = 4096
	maxHeaderBytes = 16 << 20 // of all headers, extended ones too
	maxName        = 4096     // Linux's longest path
)

// member is a regular file of an archive, whose bytes lie there as they are.
type member struct {
	off, size int64 // bytes, in the archive
}

// readTar returns the regular files of the tar archive f by their names, which
// are clean relative paths. Only headers are read: ustar, pax and GNU ones, as
// archive/tar knows them. An archive without the two blocks of zeros at its end
// is as good as one that has them, if its last member is whole.
//
// Appliances have files and folders; whatever else a tar can hold is an error,
// and so is what names anything outside of it. The name of f is for errors.
func readTar(ctx context.Context, name string, f source.Disk) (map[string]member, error) {
	h := &headers{ctx: ctx, f: f}
	t := tar.NewReader(h)
	members, seen := map[string]member{}, map[string]bool{}
	next := int64(0) // where the next header is
	for {
		at := next
		bad := func(format string, args ...any) error {
			return fmt.Errorf("%s: offset %d: %s", name, at, fmt.Sprintf(format, args...))
		}
		header, err := t.Next()
		switch {
		case err == io.EOF:
			return members, nil
		case errors.Is(err, tar.ErrHeader) && at == 0:
			return nil, bad("no tar archive: it begins with %q", h.head())
		case errors.Is(err, tar.ErrHeader):
			return nil, bad("want the header of a tar member, found something else or a damaged one")
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, bad("the archive ends in the middle of a header: it is cut off")
		case err != nil:
			return nil, fmt.Errorf("%s: offset %d: %w", name, at, err)
		case len(seen) == maxMembers:
			return nil, bad("more than %d members", maxMembers)
		case isSparse(header):
			return nil, bad("%s is stored as a sparse file of GNU tar, not in one piece: unpack the appliance", show(header.Name))
		}
		next = h.pos
		switch header.Typeflag {
		case tar.TypeReg, tar.TypeDir:
		case tar.TypeXGlobalHeader:
			// archive/tar does not apply it, other readers do.
			if header.PAXRecords["path"] != "" || header.PAXRecords["size"] != "" {
				return nil, bad("a global header sets the name or the size of all members")
			}
			continue
		case tar.TypeLink, tar.TypeSymlink:
			return nil, bad("%s is a link to %s, want regular files and folders only", show(header.Name), show(header.Linkname))
		default:
			return nil, bad("%s is of type %q, want regular files and folders only", show(header.Name), header.Typeflag)
		}
		if err := checkName(header.Name); err != nil {
			return nil, bad("%v", err)
		}
		clean := path.Clean(header.Name)
		isFile := header.Typeflag == tar.TypeReg
		if seen[clean] && isFile {
			return nil, bad("a second member of the name %s", show(clean))
		}
		seen[clean] = true
		if !isFile {
			continue
		}
		if header.Size > f.Size()-h.pos {
			return nil, bad("%s has %d bytes from offset %d on, the archive ends at %d: it is cut off, or the size is wrong", show(clean), header.Size, h.pos, f.Size())
		}
		members[clean] = member{off: h.pos, size: header.Size}
		next += (header.Size + 511) &^ 511
	}
}

// isSparse reports whether a member is in one of the forms in which GNU tar
// leaves out holes.
func isSparse(header *tar.Header) bool {
	for key := range header.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return header.Typeflag == tar.TypeGNUSparse
}

// checkName returns an error for a name that no file of an appliance has.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a member without a name")
	case len(name) > maxName:
		return fmt.Errorf("the name %s has %d bytes, want at most %d", show(name), len(name), maxName)
	case path.IsAbs(name):
		return fmt.Errorf("the name %s is absolute, want one in the archive", show(name))
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return fmt.Errorf("the name %s leads out of the archive", show(name))
		}
	}
	return nil
}

// headers reads an archive from header to header. It is an io.ReadSeeker, with
// which archive/tar leaves out what lies between, and its own place is where
// the bytes of a member begin. What is read is bounded.
type headers struct {
	ctx  context.Context
	f    source.Disk
	pos  int64
	read int64
}

func (h *headers) Read(p []byte) (int, error) {
	if err := context.Cause(h.ctx); err != nil {
		return 0, err
	}
	if h.pos >= h.f.Size() || len(p) == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), h.f.Size()-h.pos)]
	if h.read += int64(len(p)); h.read > maxHeaderBytes {
		return 0, fmt.Errorf("the headers have more than %d bytes", maxHeaderBytes)
	}
	if err := image.ReadFull(h.f, p, h.pos); err != nil {
		return 0, err
	}
	h.pos += int64(len(p))
	return len(p), nil
}

func (h *headers) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += h.pos
	case io.SeekEnd:
		off += h.f.Size()
	}
	if off < 0 {
		return 0, fmt.Errorf("seek to %d", off)
	}
	h.pos = off
	return off, nil
}

// head returns the first bytes of the archive.
func (h *headers) head() []byte {
	head := make([]byte, min(h.f.Size(), 16))
	if err := image.ReadFull(h.f, head, 0); err != nil {
		return nil
	}
	return head
}
