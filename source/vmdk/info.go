package vmdk

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"

	"vddkcp/source"
)

// describe fills in what Info returns, but for the parents.
func (d *Disk) describe(desc *descriptor) error {
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
		Parts: d.info.Parts, // since the extents were opened
	}
	cid, ok, err := desc.cid("CID")
	if err != nil {
		return err
	}
	if ok {
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
	return nil
}

// Info describes the image. Subformat is createType as it is written;
// ClusterSize is the size of a grain, 0 where all extents are flat; Allocated
// is of this image's files, without its parents.
func (d *Disk) Info() source.Info {
	info := d.info
	info.Chain = append([]string(nil), info.Chain...)
	info.Parts = append([]source.Part(nil), info.Parts...)
	return info
}

// describePart adds an extent of the descriptor to what Info returns. F is its
// file, nil where it has none or where that is not opened.
func (d *Disk) describePart(e extentLine, f source.Disk) {
	p := source.Part{Kind: e.kind, Size: e.sectors * sectorSize, Path: e.name}
	if f != nil {
		p.Path = pathOf(f, e.name)
	}
	if e.kind == "FLAT" || e.kind == "VMFS" {
		p.Offset = e.offset * sectorSize
	}
	d.info.Parts = append(d.info.Parts, p)
}

// Identity combines those of all files, the parents' too. It proves no more
// than the weakest of them.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	files := d.files
	if d.parent != nil {
		files = append(files[:len(files):len(files)], d.parent)
	}
	sum := sha256.New()
	proof = "snapshot"
	for _, f := range files {
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
		if p == "none" || proof == "snapshot" {
			proof = p
		}
	}
	return fmt.Sprintf("vmdk:%x", sum.Sum(nil)), proof, nil
}

// ReadUncached forwards to all files.
func (d *Disk) ReadUncached() {
	for _, f := range d.files {
		if u, ok := source.Ability[source.Uncached](f); ok {
			u.ReadUncached()
		}
	}
	if u, ok := source.Ability[source.Uncached](d.parent); ok {
		u.ReadUncached()
	}
}

// InFile implements source.InFile for flat extents and for grains that are not
// compressed, in this image or a parent. Places that can't be right are left
// out.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off < 0 || off >= d.size || d.closed {
		return nil, 0, 0, false
	}
	e := &d.extents[d.find(off)]
	if x, isLocated := e.extent.(located); isLocated {
		f, pos, n, ok = x.inFile(off - e.start)
	}
	if !ok {
		return nil, 0, 0, false
	}
	return f, pos, n, true
}

// inFile asks f for its byte at off, for no more than max bytes.
func inFile(f source.Disk, off, max int64) (file *os.File, pos, n int64, ok bool) {
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

func (x *flat) inFile(off int64) (f *os.File, pos, n int64, ok bool) {
	return inFile(x.file, x.start+off, x.size-off)
}

// inFile looks no further than to the end of the entries at hand.
func (s *sparse) inFile(off int64) (f *os.File, pos, n int64, ok bool) {
	g := off >> s.grainShift
	r, err := s.run(g, 1, nil)
	if err != nil {
		return nil, 0, s.part(g) - off&(s.grainSize-1), false
	}
	kind, start, next := s.stretch(&r, 0, r.n)
	n = min(s.size, (g+next)<<s.grainShift) - off
	switch {
	case kind == absentGrain && s.disk.parent != nil && s.base+off < s.disk.parent.Size():
		return inFile(s.disk.parent, s.base+off, n)
	case kind == dataGrain && !s.compressed():
		pos = start + off&(s.grainSize-1)
		if s.checkPlace(start, pos+n, off) != nil {
			return nil, 0, n, false
		}
		return inFile(s.file, pos, n)
	}
	return nil, 0, n, false
}
