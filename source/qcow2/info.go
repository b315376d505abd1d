package qcow2

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"

	"vddkcp/source"
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
	files := d.files()
	if d.backing != nil {
		files = append(files, d.backing)
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
	return fmt.Sprintf("qcow2:%x", sum.Sum(nil)), proof, nil
}

// ReadUncached forwards to all files.
func (d *Disk) ReadUncached() {
	for _, f := range append(d.files(), d.backing) {
		if f == nil {
			continue
		}
		if u, ok := source.Ability[source.Uncached](f); ok {
			u.ReadUncached()
		}
	}
}

// InFile implements source.InFile for plain clusters, in this image or a
// backing file. Places that can't be right are left out.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if off < 0 || off >= d.size || d.closed {
		return nil, 0, 0, false
	}
	r, err := d.run(off>>d.clusterShift, 1)
	if err != nil {
		return nil, 0, 0, false
	}
	s := d.stretch(&r, off, min(d.size, r.end()<<d.clusterShift))
	switch {
	case s.kind == absent && d.backing != nil && off < d.backing.Size():
		return inFile(d.backing, off, s.n)
	case s.kind == plain && s.pos+s.n <= d.dataSize:
		return inFile(d.data, s.pos, s.n)
	}
	return nil, 0, 0, false
}

// inFile asks f for its byte at off, for no more than max bytes.
func inFile(f source.Disk, off, max int64) (file *os.File, pos, n int64, ok bool) {
	i, ok := source.Ability[source.InFile](f)
	if !ok {
		return nil, 0, 0, false
	}
	file, pos, n, ok = i.InFile(off)
	if !ok || n <= 0 {
		return nil, 0, 0, false
	}
	return file, pos, min(n, max), true
}
