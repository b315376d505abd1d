package vmdk

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// The method describe sets those fields of d.info that do not depend on the parents of the
// image.
func (d *Disk) describe(desc *descriptor) {
	d.uuids = desc.uuids()
	d.info = source.Info{
		Format:        "vmdk",
		Subformat:     desc.text("createType"),
		AdapterType:   desc.text("ddb.adapterType"),
		HWVersion:     desc.text("ddb.virtualHWVersion"),
		ToolsVersion:  desc.text("ddb.toolsVersion"),
		UUID:          desc.text("ddb.uuid"),
		LogicalSector: sectorSize,
		Geometry: [3]int64{
			desc.number("ddb.geometry.cylinders"),
			desc.number("ddb.geometry.heads"),
			desc.number("ddb.geometry.sectors"),
		},
		Chain: []string{d.path},
		Parts: d.info.Parts, // set when the extents were opened
	}
	logical, physical, warnings := desc.sectorSizes()
	for _, w := range warnings {
		d.warn("descriptor %s", w)
	}
	d.info.GuestSector, d.info.GuestPhysical = logical, physical
	d.info.LogicalSector = max(logical, sectorSize)
	switch cid, ok, err := desc.cid("CID"); {
	case err != nil:
		// An invalid CID is only a warning. The CID of this image is needed only when a child
		// of this image is opened.
		d.warn("descriptor %w: the value is ignored", err)
	case ok:
		d.info.CID = fmt.Sprintf("%08x", cid)
	}
	for _, e := range d.extents {
		if x, ok := e.extent.(*sparse); ok {
			d.info.ClusterSize = max(d.info.ClusterSize, x.grainSize)
		}
	}
	for _, f := range d.files {
		if i, ok := source.Ability[source.Described](f); ok {
			d.info.Allocated += i.Info().Allocated
		}
	}
}

// The method warn adds a warning about the image. The text is formatted as by fmt.Errorf.
func (d *Disk) warn(format string, args ...any) {
	d.warnings = append(d.warnings, fmt.Sprintf("%s: %v", d.path, fmt.Errorf(format, args...)))
}

// Warnings returns sentences about faults of the image and its parents. The disk can be
// read in spite of these faults. Each sentence begins with the name of a file.
func (d *Disk) Warnings() []string { return slices.Clone(d.warnings) }

// Info implements [source.Described]. In the result, the field Subformat is the createType as
// the descriptor has it. The field ClusterSize is the size of a grain, or 0 if all extents are
// flat. The field Allocated counts the files of this image, without those of its parents.
func (d *Disk) Info() source.Info {
	info := d.info
	info.Chain = append([]string(nil), info.Chain...)
	info.Parts = append([]source.Part(nil), info.Parts...)
	return info
}

// describePart adds an extent to the parts that Info returns. The parameter f is the file
// of the extent. It is nil if the extent has no file, or if its file was not opened.
func (d *Disk) describePart(e extentLine, f source.Disk) {
	p := source.Part{Kind: e.kind, Size: e.sectors * sectorSize, Path: e.name}
	if f != nil {
		p.Path = image.PathOf(f, e.name)
	}
	if e.kind == "FLAT" || e.kind == "VMFS" {
		p.Offset = e.offset * sectorSize
	}
	d.info.Parts = append(d.info.Parts, p)
}

// Identity implements [source.Identified]. It combines the identities of all files of the image
// and its parents. Each file has an identity and a proof. The proof says whether the identity
// changes with the content. Identity returns the weakest of these proofs.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	return image.Identity(ctx, "vmdk", append(d.files[:len(d.files):len(d.files)], d.parent)...)
}

// ReadUncached implements [source.Uncached] for the files of the image and its
// parents.
func (d *Disk) ReadUncached() {
	image.ReadUncached(append(d.files[:len(d.files):len(d.files)], d.parent)...)
}

// InFile implements [source.InFile] for flat extents and for grains that are not compressed, in
// this image or a parent. For a grain whose table entry is damaged, the result ok is false.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= d.size {
		return nil, 0, 0, false
	}
	if d.life.Begin(d.ctx) != nil {
		return nil, 0, 0, false
	}
	defer d.life.End()
	e := &d.extents[d.find(off)]
	if x, isLocated := e.extent.(located); isLocated {
		f, pos, n, ok = x.inFile(off - e.start)
	}
	if !ok {
		return nil, 0, 0, false
	}
	return f, pos, n, true
}
