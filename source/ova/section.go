package ova

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"os"
	"sort"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// Section has the raw bytes of a file of an appliance: a range of an archive, or the
// chunks of a file that was split. It is a [source.Disk] and safe for concurrent use.
// It has the abilities [source.Identified], [source.Described], [source.InFile] and
// [source.Uncached]. If a file from which the section reads lacks one of these
// abilities, the method of the section for this ability returns less or does nothing.
// For example, InFile returns no position, and Identity returns the proof "none", which
// says that the content can change while the identity stays the same.
type Section struct {
	name  string
	parts []part
	size  int64
	life  life.Life
}

// part is the range [off, off+size) of a file. The range is not empty.
type part struct {
	file      source.Disk
	off, size int64 // bytes
	start     int64 // offset of the part in the section, bytes
	owned     bool  // the section closes the file
}

// newSection returns the section that consists of the given parts, one after another.
// newSection sets the field start of each part.
func newSection(ctx context.Context, name string, parts ...part) *Section {
	s := &Section{name: name, life: life.Life{Context: ctx, Name: name}}
	for _, p := range parts {
		p.start = s.size
		s.size += p.size
		s.parts = append(s.parts, p)
	}
	return s
}

// Size returns the size of the section in bytes.
func (s *Section) Size() int64 { return s.size }

// The method find returns the index of the part that has the byte at the given offset.
func (s *Section) find(off int64) int {
	return sort.Search(len(s.parts), func(i int) bool { return s.parts[i].start+s.parts[i].size > off })
}

// ReadAt implements [source.Disk].
func (s *Section) ReadAt(p []byte, off int64) (int, error) {
	return s.life.ReadAt(p, off, s.size, func(p []byte) (n int, err error) {
		for i := s.find(off); n < len(p); i++ {
			in := off + int64(n) - s.parts[i].start
			piece := p[n:min(int64(len(p)), int64(n)+s.parts[i].size-in)]
			if err := image.ReadFull(s.parts[i].file, piece, s.parts[i].off+in); err != nil {
				return n, fmt.Errorf("%s: %w", s.name, err)
			}
			n += len(piece)
		}
		return n, nil
	})
}

// Extents implements [source.Disk]. It returns the extents of the files that the
// section consists of.
func (s *Section) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		if !life.InDisk(off, length, s.size) {
			yield(source.Extent{}, fmt.Errorf("extents of %s: the range [%d, %d) is outside the disk of %d bytes", s.name, off, end, s.size))
			return
		}
		for i := s.find(off); off < end; i++ {
			p := &s.parts[i]
			stop := min(end, p.start+p.size)
			for e, err := range p.file.Extents(ctx, p.off+off-p.start, stop-off) {
				if err == nil {
					err = s.life.Check(ctx)
				}
				if err != nil {
					yield(source.Extent{}, fmt.Errorf("extents of %s: %w", s.name, err))
					return
				}
				e.Off += p.start - p.off
				if !yield(e, nil) {
					return
				}
			}
			off = stop
		}
	}
}

// Close waits for calls in progress. If the file was split, Close closes the chunks. If
// the section is a range of an archive, the archive stays open. Later calls return an
// error that wraps os.ErrClosed.
func (s *Section) Close() error {
	return s.life.Close(func() error {
		var errs []error
		for _, p := range s.parts {
			if p.owned {
				errs = append(errs, p.file.Close())
			}
		}
		return errors.Join(errs...)
	})
}

// Identity implements [source.Identified]. It combines the identities of the files from
// which the section reads with the ranges that it reads. Each file returns an identity
// and a proof, which says whether the identity changes with the content. The section
// returns the weakest of these proofs.
func (s *Section) Identity(ctx context.Context) (id, proof string, err error) {
	proof = "snapshot"
	ids := make([]string, len(s.parts))
	for i, p := range s.parts {
		ids[i] = fmt.Sprintf("?:%d:%d", p.off, p.size)
		file, ok := source.Ability[source.Identified](p.file)
		if !ok {
			proof = "none"
			continue
		}
		id, by, err := file.Identity(ctx)
		if err != nil {
			return "", "", err
		}
		ids[i] = fmt.Sprintf("%s:%d:%d", id, p.off, p.size)
		proof = image.Weaker(proof, by)
	}
	if len(ids) == 1 {
		return ids[0], proof, nil
	}
	return fmt.Sprintf("chunks:%x", sha256.Sum256([]byte(strings.Join(ids, "+")))), proof, nil
}

// Info implements [source.Described]. It describes the section as a raw file. If the
// file was split, Allocated is the sum of the allocated sizes of the chunks. If the
// section is a range of an archive, Allocated is the size of the range.
func (s *Section) Info() source.Info {
	info := source.Info{Format: "raw", LogicalSector: 512, Chain: []string{s.name}}
	for _, p := range s.parts {
		allocated := p.size
		if d, ok := source.Ability[source.Described](p.file); ok && p.owned {
			allocated = d.Info().Allocated
		}
		info.Allocated += allocated
	}
	return info
}

// InFile implements [source.InFile]. It returns positions in the archive or in the
// chunks.
func (s *Section) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= s.size {
		return nil, 0, 0, false
	}
	p := &s.parts[s.find(off)]
	in := off - p.start
	return image.InFile(p.file, p.off+in, p.size-in)
}

// ReadUncached implements [source.Uncached] for the archive or the chunks.
func (s *Section) ReadUncached() {
	for _, p := range s.parts {
		image.ReadUncached(p.file)
	}
}

// empty is a disk with a capacity but without a file. It reads as zeros.
type empty struct {
	name string
	size int64
	id   string
	life life.Life
}

func (d *empty) Size() int64 { return d.size }

func (d *empty) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.size, func(p []byte) (int, error) {
		clear(p)
		return len(p), nil
	})
}

func (d *empty) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.name, d.size, off, length, func(out *image.Merger) error {
		if err := d.life.Check(ctx); err != nil || length == 0 {
			return err
		}
		return out.Add(source.Extent{Off: off, Len: length, Kind: source.Zero, Absent: true})
	})
}

func (d *empty) Close() error { return d.life.Close(func() error { return nil }) }

func (d *empty) Info() source.Info {
	return source.Info{Format: "raw", LogicalSector: 512, Chain: []string{d.name}}
}

// Identity implements [source.Identified]. Disks without a file differ only in their
// capacity and their address. The identity therefore consists of the capacity and the
// address. The proof is "snapshot", which says that the content can never change.
func (d *empty) Identity(context.Context) (id, proof string, err error) { return d.id, "snapshot", nil }
