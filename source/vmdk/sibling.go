package vmdk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// Folder has the files among which Open searches for the parent of an image that names
// its parent only by a UUID. Differencing images of VirtualBox are such images.
type Folder interface {
	// Names returns the names of files that may be the parent. The [source.Opener] of
	// the image must accept these names. If there are too many files, Names returns an
	// error.
	Names(ctx context.Context) ([]string, error)
	// Peek opens the file with the given name, which Names returned, so that the descriptor
	// in the file can be read. The caller closes the file. Peek must refuse names that the
	// Opener of the image refuses.
	Peek(ctx context.Context, name string) (source.Disk, error)
}

// uuids are the UUIDs by which VirtualBox identifies images. A UUID that the
// descriptor does not have is "".
type uuids struct {
	image              string // ddb.uuid.image
	modification       string // ddb.uuid.modification, which changes with the content
	parentModification string // ddb.uuid.parentmodification
}

// maxPeeked limits the number of bytes that are read, from all files of a folder together,
// to find the parents of an image.
const maxPeeked = 64 << 20

// The type search remembers the UUIDs of files while an image and its parents are opened, so that
// each file is read only once.
type search struct {
	files map[string]peeked // by path
	left  int64             // bytes of maxPeeked that may still be read
}

// searchKey is the key under which a context holds a *search. The context is the one with
// which the parents of an image are opened.
type searchKey struct{}

// withSearch returns the value of the type search that is in ctx. When the first image of a
// chain is opened, ctx has no such value yet. withSearch then makes one, and returns a
// context that has it, for opening the parents.
func withSearch(ctx context.Context) (context.Context, *search) {
	if s, ok := ctx.Value(searchKey{}).(*search); ok {
		return ctx, s
	}
	s := &search{files: map[string]peeked{}, left: maxPeeked}
	return context.WithValue(ctx, searchKey{}, s), s
}

// The type peeked has the UUID and the identity of a file that may be a parent.
type peeked struct {
	uuid string // ddb.uuid.image; "" if it has none or the file is no image
	id   string // identity of the file; "" if it is not known
	err  error  // why the file cannot be read
}

// uuidOf returns a UUID in its usual spelling, in lower case and without braces. It returns
// "" if the UUID is missing or consists of zeros, by which VirtualBox says that an image
// has none. It does not check that the text is a UUID, because UUIDs are only compared with
// each other.
func uuidOf(s string) string {
	s = strings.ToLower(strings.Trim(strings.TrimSpace(s), "{}"))
	if strings.Trim(s, "0-") == "" {
		return ""
	}
	return s
}

func (d *descriptor) uuids() uuids {
	return uuids{
		image:              uuidOf(d.text("ddb.uuid.image")),
		modification:       uuidOf(d.text("ddb.uuid.modification")),
		parentModification: uuidOf(d.text("ddb.uuid.parentmodification")),
	}
}

// findByUUID returns the name of the image with the given UUID. It looks for this image in
// the files of d.options.Folder. It returns an error if no file or more than one file has
// the UUID.
func (d *Disk) findByUUID(uuid string, known *search) (name string, err error) {
	fail := func(hint, format string, args ...any) error {
		return hinted.Error(fmt.Errorf("%s: cannot find the parent, the image with the UUID %s (ddb.uuid.parent): %w", d.path, quote(uuid), fmt.Errorf(format, args...)), hint)
	}
	const place = "put the parent into the folder of the image, or name the parent's folder with --allow-path; --single-link reads the image without its parent"
	if d.options.Folder == nil {
		return "", fail("unpack the appliance, so that the image and its parent lie in one folder", "the image is in no folder where the parent could be")
	}
	names, err := d.options.Folder.Names(d.ctx)
	if err != nil {
		return "", fail(place, "%w", err)
	}
	var id string
	var unread error
	failed := 0
	for _, candidate := range names {
		if err := context.Cause(d.ctx); err != nil {
			return "", err
		}
		p := d.peek(candidate, known)
		switch {
		case known.left < 0:
			return "", fail("remove all other images from the folder", "the descriptors in the image's folder have more than %d bytes together", maxPeeked)
		case p.err != nil:
			if failed++; unread == nil {
				unread = p.err
			}
		case p.uuid != uuid || name != "" && p.id != "" && p.id == id:
		case name != "":
			return "", fail("move the file that does not belong to the image into another folder", "two files have this UUID, %s and %s", quote(name), quote(candidate))
		default:
			name, id = candidate, p.id
		}
	}
	switch {
	case name != "":
		return name, nil
	case unread != nil:
		return "", fail(place, "none of %d files named *.vmdk in the image's folder has this UUID (ddb.uuid.image), and %d of them could not be read, the first: %w", len(names), failed, unread)
	}
	return "", fail(place, "none of %d files named *.vmdk in the image's folder has this UUID (ddb.uuid.image)", len(names))
}

// The method peek returns the UUID and the identity of a file of d.options.Folder. It remembers
// both in the parameter known, so that it reads no file twice.
func (d *Disk) peek(name string, known *search) peeked {
	path := name
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(d.path), name)
	}
	p, ok := known.files[path]
	if ok {
		return p
	}
	f, err := d.options.Folder.Peek(d.ctx, name)
	if err != nil {
		p.err = err
	} else {
		p = d.peekAt(f, name, known)
		f.Close()
	}
	known.files[path] = p
	return p
}

// peekAt reads the UUID from the descriptor of f. The parameter name is the file name that
// errors show.
func (d *Disk) peekAt(f source.Disk, name string, known *search) (p peeked) {
	text, err := descriptorText(f)
	known.left -= int64(headSize + len(text))
	if err != nil || text == nil {
		p.err = err
		return p
	}
	desc, err := parseDescriptor(text)
	if err != nil {
		p.err = fmt.Errorf("%s: descriptor %w", name, err)
		return p
	}
	p.uuid = desc.uuids().image
	if i, ok := source.Ability[source.Identified](f); ok {
		p.id, _, _ = i.Identity(d.ctx)
	}
	return p
}

// descriptorText returns the text of the descriptor of the image in f, or nil if f
// has no descriptor.
func descriptorText(f source.Disk) ([]byte, error) {
	head := make([]byte, min(f.Size(), headSize))
	if err := image.ReadFull(f, head, 0); err != nil {
		return nil, err
	}
	switch probe(head) {
	case kindDescriptor:
		text := make([]byte, min(f.Size(), maxDescriptor+1))
		return text, image.ReadFull(f, text, 0)
	case kindSparse:
		h, err := readHeader(f)
		if err != nil || h.descriptorOffset == 0 || h.descriptorSize == 0 {
			return nil, err
		}
		return h.readDescriptor(f)
	}
	return nil, nil
}

// checkUUIDs returns an error if the parent does not have the UUID that the child names, or
// if the parent was changed after the child was made. path is the path of the parent.
func (d *Disk) checkUUIDs(r reference, parent *Disk, path string) error {
	if parent == nil {
		return errors.New(d.path + ": the parent is not a VMDK image")
	}
	if have := parent.uuids.image; have != r.uuid {
		return fmt.Errorf("%s: the ddb.uuid.parent is %s, but the ddb.uuid.image of %s is %s: that image is not the parent", d.path, quote(r.uuid), path, quote(have))
	}
	want, have := d.uuids.parentModification, parent.uuids.modification
	if want != "" && have != "" && want != have {
		return hinted.Error(
			fmt.Errorf("%s: the ddb.uuid.parentmodification is %s, but the ddb.uuid.modification of the parent %s is %s: the parent was changed after the child was made", d.path, quote(want), path, quote(have)),
			"if VirtualBox still starts the machine, copy the disk with VBoxManage clonemedium",
		)
	}
	return nil
}
