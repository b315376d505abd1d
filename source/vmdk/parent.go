package vmdk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// hintedError is an error and what the user can do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// Hint is what the user can do.
func (e *hintedError) Hint() string { return e.hint }

// reference is what a descriptor says of the parent of its image.
type reference struct {
	hint   string // parentFileNameHint
	cid    uint32
	hasCID bool
	uuid   string // ddb.uuid.parent, "" without one
}

// parent returns what the descriptor says of the parent; ok is false where the
// image has none.
func (d *descriptor) parent() (r reference, ok bool, err error) {
	r.hint, r.uuid = d.text("parentFileNameHint"), uuidOf(d.text("ddb.uuid.parent"))
	r.cid, r.hasCID, err = d.cid("parentCID")
	if err != nil {
		return r, false, err
	}
	r.hasCID = r.hasCID && r.cid != noParent
	return r, r.hasCID || r.hint != "" || r.uuid != "", nil
}

// finish describes the image and opens its parent.
func (d *Disk) finish(desc *descriptor, open source.Opener) error {
	d.describe(desc)
	r, ok, err := desc.parent()
	switch {
	case err != nil:
		return fmt.Errorf("%s: descriptor %w", d.path, err)
	case !ok:
		return nil
	case r.hint == "" && r.uuid == "":
		return fmt.Errorf("%s: its parentCID %08x says that it has a parent, and there is no parentFileNameHint that names its file", d.path, r.cid)
	case r.hint != "" && !r.hasCID && r.uuid == "":
		return fmt.Errorf("%s: its parentFileNameHint names the parent %s, and its parentCID (ffffffff or missing) says that it has none", d.path, quote(r.hint))
	}
	if d.options.SingleLink {
		d.lacks = source.Extent{Kind: source.Inherited}
		return nil
	}
	ctx, known := withSearch(d.ctx)
	name := r.hint
	if name == "" {
		if name, err = d.findByUUID(r.uuid, known); err != nil {
			return err
		}
	}
	return d.openParent(ctx, r, name, open)
}

// openParent opens the parent that r refers to, a file called name.
func (d *Disk) openParent(ctx context.Context, r reference, name string, open source.Opener) error {
	if object, ok := storageObject(name); ok {
		return fmt.Errorf("%s: %w", d.path, storageError("parent", name, object))
	}
	parent, err := open(ctx, d.path, name, "vmdk")
	if last, foreign := lastOfForeign(name); err != nil && foreign && r.hasCID {
		// Its own host knows the path; here the file may lie beside the image.
		var beside error
		if parent, beside = open(ctx, d.path, last, "vmdk"); beside == nil {
			d.warn("its parent %s is a path of another host: the parent is read from the file %s in the image's folder, whose CID matches", quote(name), quote(last))
			name, err = last, nil
		} else if !errors.Is(beside, fs.ErrNotExist) {
			err = beside
		} else {
			return &hintedError{
				fmt.Errorf("parent %s of %s: a path of another host, and no file %s lies in the image's folder: %w", quote(name), d.path, quote(last), fs.ErrNotExist),
				fmt.Sprintf("put the parent %s into the folder of %s; --single-link reads the image without its parent", quote(last), d.path),
			}
		}
	}
	if err != nil {
		return fmt.Errorf("parent %s of %s: %w", quote(name), d.path, err)
	}
	d.parent = parent
	info, _ := source.Ability[source.Described](parent)
	if info == nil {
		return fmt.Errorf("parent %s of %s: it is no VMDK image, it has no CID", quote(name), d.path)
	}
	d.info.Chain = append(d.info.Chain, info.Info().Chain...)
	d.inherit(info.Info())
	if have := info.Info().CID; r.hasCID && have != fmt.Sprintf("%08x", r.cid) {
		if have == "" {
			have = "missing or unreadable"
		}
		return fmt.Errorf("%s: its parentCID is %08x, the CID of its parent %s is %s: the parent is another one, or was changed after the child was made", d.path, r.cid, image.PathOf(parent, name), have)
	}
	p, _ := source.Ability[*Disk](parent)
	if r.hint == "" || !r.hasCID {
		if err := d.checkUUIDs(r, p, image.PathOf(parent, name)); err != nil {
			return err
		}
	}
	if w, ok := source.Ability[interface{ Warnings() []string }](parent); ok {
		d.warnings = append(d.warnings, w.Warnings()...)
	}
	if p != nil {
		p.share(d.mem)
	}
	return nil
}

// inherit takes over from the parent what a child's descriptor may leave out.
func (d *Disk) inherit(parent source.Info) {
	if d.info.GuestSector == 0 {
		d.info.GuestSector = parent.GuestSector
		d.info.LogicalSector = max(d.info.LogicalSector, parent.GuestSector)
	}
	if d.info.GuestPhysical == 0 {
		d.info.GuestPhysical = parent.GuestPhysical
	}
}

// explainExtent adds to err, of opening the file of an extent, what to do where
// the descriptor has a path of another host. Nothing proves which file belongs
// to it, so that the user has to say so.
func (d *Disk) explainExtent(e extentLine, open source.Opener, err error) error {
	last, foreign := lastOfForeign(e.name)
	if !foreign {
		return err
	}
	hint := fmt.Sprintf("it is a path of another host: put the file %s into the folder of %s, and write that name alone into line %d", quote(last), d.path, e.line)
	if f, missing := open(d.ctx, d.path, last, "raw"); missing == nil {
		f.Close()
		hint = fmt.Sprintf("it is a path of another host: if the file %s in the folder of %s is the one that is meant, write that name alone into line %d", quote(last), d.path, e.line)
	}
	return &hintedError{err, hint}
}

// foreignPath is a path of Windows (with a drive, or of a share), or of ESXi.
var foreignPath = regexp.MustCompile(`^[A-Za-z]:[\\/]|\\|^/vmfs/volumes/|^\[[^\]]+\] `)

// lastOfForeign returns the last name of a path that another host has; foreign
// is false where name may be a path of this host.
func lastOfForeign(name string) (last string, foreign bool) {
	if !foreignPath.MatchString(name) {
		return "", false
	}
	last = name[strings.LastIndexAny(name, `\/`)+1:]
	if _, after, ok := strings.Cut(last, "] "); ok && strings.HasPrefix(last, "[") {
		last = after
	}
	return last, last != "" && last != "." && last != ".."
}

// storageError is the error about a name in an image that is no file but object.
func storageError(what, name, object string) error {
	return &hintedError{
		fmt.Errorf("%s %s is %s, not a file", what, quote(name), object),
		"copy the disk through its server ('[DATASTORE] DIR/DISK.vmdk' with --server), or export the virtual machine as an OVF appliance",
	}
}

// storageObject reports whether a name is that of an object of a storage system
// that ESXi reaches without a file, and what it is.
func storageObject(name string) (what string, ok bool) {
	name = strings.ToLower(name)
	switch {
	case strings.HasPrefix(name, "vsan://"):
		return "an object of a vSAN datastore", true
	case strings.HasPrefix(name, "vvol://"):
		return "a virtual volume (vVol) of a storage array", true
	}
	return "", false
}
