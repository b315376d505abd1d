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

// These constants limit what an archive may contain. The archive of an appliance has a
// few members. Even an appliance with hundreds of disks stays far below the limits.
const (
	maxMembers     = 4096
	maxHeaderBytes = 16 << 20 // bytes of all headers together, extended ones included
	maxName        = 4096     // bytes, the longest path of Linux
)

// A member is a regular file in an archive. The type member says which range of the
// archive has the content of this file.
type member struct {
	off, size int64 // bytes
}

// readTar returns the regular files of the tar archive f. The keys of the result are
// their names, which are relative paths without elements such as "..". readTar reads
// only the headers (ustar, pax and GNU, as archive/tar supports them). An archive
// should end with two blocks of zeros. readTar also accepts an archive without them, if
// its last member is complete.
//
// Appliances consist of files and folders. readTar returns an error for members of any
// other type, such as links, and for names that lead out of the archive. The given name
// is used only in errors: they show it as the name of the archive.
func readTar(ctx context.Context, name string, f source.Disk) (map[string]member, error) {
	h := &headers{ctx: ctx, f: f}
	t := tar.NewReader(h)
	members, seen := map[string]member{}, map[string]bool{}
	next := int64(0) // offset of the next header in the archive
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
			return nil, bad("the file is no tar archive: it begins with %q", h.head())
		case errors.Is(err, tar.ErrHeader):
			return nil, bad("there is no valid header of a tar member: the archive is damaged")
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, bad("the archive ends in the middle of a header: the archive is truncated")
		case err != nil:
			return nil, fmt.Errorf("%s: offset %d: %w", name, at, err)
		case len(seen) == maxMembers:
			return nil, bad("the archive has more than %d members", maxMembers)
		case isSparse(header):
			return nil, bad("%s is stored as a sparse file of GNU tar, not in one piece: unpack the appliance", show(header.Name))
		}
		next = h.pos
		switch header.Typeflag {
		case tar.TypeReg, tar.TypeDir:
		case tar.TypeXGlobalHeader:
			// Other programs apply a global header to all members that follow it, but
			// archive/tar ignores it. A global header that sets the name or the size of
			// members is refused: if it were accepted, other programs would read other
			// bytes from the archive than this package.
			if header.PAXRecords["path"] != "" || header.PAXRecords["size"] != "" {
				return nil, bad("a global header sets the name or the size of all members, which is not supported")
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
			return nil, bad("there is a second member with the name %s", show(clean))
		}
		seen[clean] = true
		if !isFile {
			continue
		}
		if header.Size > f.Size()-h.pos {
			return nil, bad("%s has %d bytes from offset %d on, but the archive ends at offset %d: the archive is truncated, or the size is wrong", show(clean), header.Size, h.pos, f.Size())
		}
		members[clean] = member{off: h.pos, size: header.Size}
		next += (header.Size + 511) &^ 511
	}
}

// isSparse reports whether a member was stored as a sparse file, without its holes, in
// one of the formats of GNU tar.
func isSparse(header *tar.Header) bool {
	for key := range header.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return header.Typeflag == tar.TypeGNUSparse
}

// checkName returns an error for a name that no file of an appliance may have. A name
// must not be empty, absolute or very long, and must not lead out of the archive.
func checkName(name string) error {
	switch {
	case name == "":
		return errors.New("a member has no name")
	case len(name) > maxName:
		return fmt.Errorf("the name %s has %d bytes, want at most %d", show(name), len(name), maxName)
	case path.IsAbs(name):
		return fmt.Errorf("the name %s is an absolute path, want a relative path", show(name))
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return fmt.Errorf("the name %s leads out of the archive", show(name))
		}
	}
	return nil
}

// The type headers is the io.ReadSeeker through which package archive/tar reads the
// headers of an archive. Package archive/tar seeks past the content of the members. After
// it has read a header, the field pos is the offset where the content of the member
// begins. Read returns an error if it would read more than maxHeaderBytes bytes in total.
type headers struct {
	ctx  context.Context
	f    source.Disk // the archive
	pos  int64       // offset of the next Read, bytes
	read int64       // bytes that were read so far
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
		return 0, fmt.Errorf("cannot seek to the negative offset %d", off)
	}
	h.pos = off
	return off, nil
}

// The method head returns the first bytes of the archive, at most 16.
func (h *headers) head() []byte {
	head := make([]byte, min(h.f.Size(), 16))
	if err := image.ReadFull(h.f, head, 0); err != nil {
		return nil
	}
	return head
}
