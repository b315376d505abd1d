package qcow2

import (
	"context"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// The method describe sets those fields of d.info that do not depend on the backing
// files.
func (d *Disk) describe() {
	d.info = source.Info{Format: "qcow2", Subformat: fmt.Sprintf("version %d", d.version), LogicalSector: 512, ClusterSize: d.cluster, Chain: []string{d.path}}
	if d.has(featureExtendedL2) {
		d.info.Subformat += ", extended L2 entries"
	}
	if d.compression == compressZstd {
		d.info.Subformat += ", zstd"
	}
	for _, f := range d.files() {
		if i, ok := source.Ability[source.Described](f); ok {
			d.info.Allocated += i.Info().Allocated
		}
	}
	if d.data != d.file {
		d.info.Subformat += ", data file"
		d.info.Parts = []source.Part{{Kind: "DATA", Size: d.size, Path: d.dataPath}}
		return
	}
	// Like qemu, this package looks for holes only in files that have many of them,
	// which means that more than 1/16 of the file is not allocated. In other files,
	// asking the file system for holes would take more time than it saves.
	d.hasHoles = d.info.Allocated < d.fileSize-d.fileSize/16
}

// The method files returns the files of the image, without its backing files.
func (d *Disk) files() []source.Disk {
	if d.data != d.file {
		return []source.Disk{d.file, d.data}
	}
	return []source.Disk{d.file}
}

// Info implements [source.Described]. In the result, the field Subformat has the version
// and the optional features that the image uses. The field Allocated counts the files of
// this image, without its backing files.
func (d *Disk) Info() source.Info {
	info := d.info
	info.Chain = append([]string(nil), info.Chain...)
	info.Parts = append([]source.Part(nil), info.Parts...)
	return info
}

// Warnings returns sentences about faults of the image and its backing files. The disk
// can be read in spite of these faults. Each sentence begins with the name of a file.
func (d *Disk) Warnings() []string { return append([]string(nil), d.warnings...) }

// Identity implements [source.Identified]. It combines the identities of all files of
// the image and its backing files. Each file returns an identity and a proof, which says
// whether the identity changes with the content. Identity returns the weakest of these
// proofs.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	return image.Identity(ctx, "qcow2", append(d.files(), d.backing)...)
}

// ReadUncached implements [source.Uncached] for the files of the image and its
// backing files.
func (d *Disk) ReadUncached() { image.ReadUncached(append(d.files(), d.backing)...) }

// InFile implements [source.InFile] for clusters that this image or a backing file stores
// uncompressed. For a cluster whose table entry is damaged, the result ok is false.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= d.size {
		return nil, 0, 0, false
	}
	if d.life.Begin(d.ctx) != nil {
		return nil, 0, 0, false
	}
	defer d.life.End()
	r, err := d.run(off>>d.clusterShift, 1)
	if err != nil {
		return nil, 0, 0, false
	}
	s := d.stretch(&r, off, min(d.size, r.end()<<d.clusterShift))
	switch {
	case s.kind == absent && d.backing != nil && off < d.backing.Size():
		f, pos, n, ok = image.InFile(d.backing, off, s.n)
	case s.kind == plain && s.pos+s.n <= d.dataSize:
		f, pos, n, ok = image.InFile(d.data, s.pos, s.n)
	}
	if !ok {
		return nil, 0, 0, false
	}
	return f, pos, n, true
}
