package vmdk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// reference has what a descriptor says about the parent of its image.
type reference struct {
	hint   string // parentFileNameHint, the name of a file; may be ""
	cid    uint32 // parentCID
	hasCID bool
	uuid   string // ddb.uuid.parent; "" if the descriptor has none
}

// The method parent returns the reference to the parent. The result ok is false if the image has no
// parent.
func (d *descriptor) parent() (r reference, ok bool, err error) {
	r.hint, r.uuid = d.text("parentFileNameHint"), uuidOf(d.text("ddb.uuid.parent"))
	r.cid, r.hasCID, err = d.cid("parentCID")
	if err != nil {
		return r, false, err
	}
	r.hasCID = r.hasCID && r.cid != noParent
	return r, r.hasCID || r.hint != "" || r.uuid != "", nil
}

// The method finish completes an image whose extents are open: it sets what Info returns and opens
// the parent.
func (d *Disk) finish(desc *descriptor, open source.Opener) error {
	d.describe(desc)
	r, ok, err := desc.parent()
	switch {
	case err != nil:
		return fmt.Errorf("%s: descriptor %w", d.path, err)
	case !ok:
		return nil
	case r.hint == "" && r.uuid == "":
		return fmt.Errorf("%s: the parentCID %08x says that the image has a parent, but there is no parentFileNameHint with the parent's file name", d.path, r.cid)
	case r.hint != "" && !r.hasCID && r.uuid == "":
		return fmt.Errorf("%s: the parentFileNameHint names the parent %s, but the parentCID (ffffffff or missing) says that the image has no parent", d.path, quote(r.hint))
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

// openParent opens the file with the given name as the parent. It checks that the file is the
// image to which the reference r refers.
func (d *Disk) openParent(ctx context.Context, r reference, name string, open source.Opener) error {
	if object, ok := storageObject(name); ok {
		return fmt.Errorf("%s: %w", d.path, storageError("parent", name, object))
	}
	parent, err := open(ctx, d.path, name, "vmdk")
	if last, foreign := lastOfForeign(name); err != nil && foreign && r.hasCID {
		// The path of the parent is valid only on another machine. Perhaps the file at that path
		// was copied to the folder of the image.
		var local error
		if parent, local = open(ctx, d.path, last, "vmdk"); local == nil {
			d.warn("the path of the parent, %s, belongs to another host: the file %s in the image's folder is used instead, because its CID is the parentCID of the image", quote(name), quote(last))
			name, err = last, nil
		} else if !errors.Is(local, fs.ErrNotExist) {
			err = local
		} else {
			return hinted.Error(
				fmt.Errorf("cannot open parent %s of %s: the path belongs to another host, and the image's folder has no file %s: %w", quote(name), d.path, quote(last), fs.ErrNotExist),
				fmt.Sprintf("put the parent %s into the folder of %s; --single-link reads the image without its parent", quote(last), d.path),
			)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot open parent %s of %s: %w", quote(name), d.path, err)
	}
	d.parent = parent
	info, _ := source.Ability[source.Described](parent)
	if info == nil {
		return fmt.Errorf("parent %s of %s is no VMDK image: it has no CID", quote(name), d.path)
	}
	d.info.Chain = append(d.info.Chain, info.Info().Chain...)
	d.inherit(info.Info())
	if have := info.Info().CID; r.hasCID && have != fmt.Sprintf("%08x", r.cid) {
		if have == "" {
			have = "missing or unreadable"
		}
		return fmt.Errorf("%s: the parentCID is %08x, but the CID of the parent %s is %s: the parent is another image, or was changed after the child was made", d.path, r.cid, image.PathOf(parent, name), have)
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

// The method inherit sets the sector sizes that the descriptor of the child does not have. It takes
// them from the parent.
func (d *Disk) inherit(parent source.Info) {
	if d.info.GuestSector == 0 {
		d.info.GuestSector = parent.GuestSector
		d.info.LogicalSector = max(d.info.LogicalSector, parent.GuestSector)
	}
	if d.info.GuestPhysical == 0 {
		d.info.GuestPhysical = parent.GuestPhysical
	}
}

// explainExtent adds a hint to err, which says that the file of an extent could not be opened. It
// adds the hint only if the descriptor names the file by a path of another machine. The folder of
// the image may have a file with the name at the end of that path. The hint then mentions this
// file. Nothing proves that this file is the right one, so the user must decide.
func (d *Disk) explainExtent(e extentLine, open source.Opener, err error) error {
	last, foreign := lastOfForeign(e.name)
	if !foreign {
		return err
	}
	hint := fmt.Sprintf("the path belongs to another host: put the file %s into the folder of %s, and replace the path in line %d of the descriptor by the name of the file", quote(last), d.path, e.line)
	if f, missing := open(d.ctx, d.path, last, "raw"); missing == nil {
		f.Close()
		hint = fmt.Sprintf("the path belongs to another host: if the file %s in the folder of %s is the right extent, replace the path in line %d of the descriptor by the name of the file", quote(last), d.path, e.line)
	}
	return hinted.Error(err, hint)
}

// foreignPath matches paths of other machines: those of Windows, which have a drive, a share or
// backslashes, and those of ESXi.
var foreignPath = regexp.MustCompile(`^[A-Za-z]:[\\/]|\\|^/vmfs/volumes/|^\[[^\]]+\] `)

// lastOfForeign returns the last element of name if name is a path of another machine. The result
// foreign is false if name may be a path of this machine, or if its last element is not the name of
// a file.
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

// storageError returns the error for a name in an image that refers to an object of a
// storage system instead of a file. role is the role of the named file, such as "parent".
func storageError(role, name, object string) error {
	return hinted.Error(
		fmt.Errorf("%s %s is %s, not a file", role, quote(name), object),
		"copy the disk through its server ('[DATASTORE] DIR/DISK.vmdk' with --server), or export the virtual machine as an OVF appliance",
	)
}

// storageObject reports whether a name refers to an object of a storage system. ESXi
// can read such objects, but they are not files. storageObject also returns a
// description of the object for errors.
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
