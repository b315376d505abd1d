package qcow2

import (
	"context"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// describe fills in what Info returns, but for the backing files.
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
	// As qemu, which tells no holes of other images: they are not worth the
	// questions.
	d.hasHoles = d.info.Allocated < d.fileSize-d.fileSize/16
}

// files are those of the image, without its backing files.
func (d *Disk) files() []source.Disk {
	if d.data != d.file {
		return []source.Disk{d.file, d.data}
	}
	return []source.Disk{d.file}
}

// Info describes the image. Subformat is its version and what it uses of it;
// Allocated is of this image's files, without its backing files.
func (d *Disk) Info() source.Info {
	info := d.info
	info.Chain = append([]string(nil), info.Chain...)
	info.Parts = append([]source.Part(nil), info.Parts...)
	return info
}

// Warnings are what is odd about the image or its backing images, and no error:
// sentences that name the file.
func (d *Disk) Warnings() []string { return append([]string(nil), d.warnings...) }

// Identity combines those of all files, the backing files' too. It proves no
// more than the weakest of them.
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	return image.Identity(ctx, "qcow2", append(d.files(), d.backing)...)
}

// ReadUncached forwards to all files.
func (d *Disk) ReadUncached() { image.ReadUncached(append(d.files(), d.backing)...) }

// InFile implements source.InFile for plain clusters, in this image or a
// backing file. Places that can't be right are left out.
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
