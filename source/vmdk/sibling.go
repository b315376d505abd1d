package vmdk

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// Folder is where the parent of an image may be that is known by its UUID alone,
// as that of a differencing image of VirtualBox.
type Folder interface {
	// Names returns the files that may be the parent, by names that the
	// image's source.Opener takes. It bounds their number.
	Names(ctx context.Context) ([]string, error)
	// Peek opens one of them to look at its descriptor. It keeps the rules of
	// the Opener for what an image may name.
	Peek(ctx context.Context, name string) (source.Disk, error)
}

// uuids are those by which VirtualBox knows images, "" where there is none.
type uuids struct {
	image              string // ddb.uuid.image
	modification       string // ddb.uuid.modification, of the content
	parentModification string // ddb.uuid.parentmodification
}

// maxPeeked bounds what is read of other files to find the parents of a chain, in
// bytes.
const maxPeeked = 64 << 20

// search caches the UUIDs of files while the images of one chain are opened, so
// that each file is read once.
type search struct {
	files map[string]peeked // by path
	left  int64             // bytes of maxPeeked that may still be read
}

// searchKey is the key of a *search in the context that parents are opened with.
type searchKey struct{}

// withSearch returns the search of the chain that is opened under ctx. If there is
// none, it begins one and returns a context with it.
func withSearch(ctx context.Context) (context.Context, *search) {
	if s, ok := ctx.Value(searchKey{}).(*search); ok {
		return ctx, s
	}
	s := &search{files: map[string]peeked{}, left: maxPeeked}
	return context.WithValue(ctx, searchKey{}, s), s
}

// peeked is what a file may be the parent by.
type peeked struct {
	uuid string // "": none, or the file is no image
	id   string // identity of the file, "" where it is not known
	err  error  // why the file can't be read
}

// uuidOf returns a UUID in one spelling; "" where it is missing or all zeros,
// by which VirtualBox says that there is none. Other text stays as it is: no
// image has it, so that a child that names it is refused.
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

// findByUUID returns the name of the one file in the image's folder that has
// the UUID.
func (d *Disk) findByUUID(uuid string, known *search) (name string, err error) {
	fail := func(hint, format string, args ...any) error {
		return &hintedError{fmt.Errorf("%s: its parent is the image with the UUID %s (ddb.uuid.parent): %w", d.path, quote(uuid), fmt.Errorf(format, args...)), hint}
	}
	const place = "put the parent into the folder of the image, or name the parent's folder with --allow-path; --single-link reads the image without its parent"
	if d.options.Folder == nil {
		return "", fail("unpack the appliance, so that the image and its parent lie in one folder", "there is no folder to look for it in")
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
			return "", fail("leave nothing but the images of this disk in the folder", "the descriptors in its folder have more than %d bytes", maxPeeked)
		case p.err != nil:
			if failed++; unread == nil {
				unread = p.err
			}
		case p.uuid != uuid || name != "" && p.id != "" && p.id == id:
		case name != "":
			return "", fail("move the one that does not belong to the image into another folder", "two files have it, %s and %s", quote(name), quote(candidate))
		default:
			name, id = candidate, p.id
		}
	}
	switch {
	case name != "":
		return name, nil
	case unread != nil:
		return "", fail(place, "none of %d files named *.vmdk in its folder has it (ddb.uuid.image), and %d of them could not be read, the first: %w", len(names), failed, unread)
	}
	return "", fail(place, "none of %d files named *.vmdk in its folder has it (ddb.uuid.image)", len(names))
}

// peek looks at a file of the image's folder, unless that is known.
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

// descriptorText returns the descriptor of the image whose file is f, nil where
// f has none.
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

// checkUUIDs checks that the parent at path is the one that r gives the UUID of,
// and that it has not changed since the child was made.
func (d *Disk) checkUUIDs(r reference, parent *Disk, path string) error {
	if parent == nil {
		return errors.New(d.path + ": its parent is no VMDK image")
	}
	if have := parent.uuids.image; have != r.uuid {
		return fmt.Errorf("%s: its ddb.uuid.parent is %s, the ddb.uuid.image of its parent %s is %s: the parent is another one", d.path, quote(r.uuid), path, quote(have))
	}
	want, have := d.uuids.parentModification, parent.uuids.modification
	if want != "" && have != "" && want != have {
		return &hintedError{
			fmt.Errorf("%s: its ddb.uuid.parentmodification is %s, the ddb.uuid.modification of its parent %s is %s: the parent was changed after the child was made", d.path, quote(want), path, quote(have)),
			"where VirtualBox still starts the machine, copy the disk with VBoxManage clonemedium",
		}
	}
	return nil
}
