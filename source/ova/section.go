package ova

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"sort"
	"strings"
	"sync"

	"vddkcp/source"
)

// Section is the raw bytes of a file of an appliance, where they lie: in one
// piece of an archive, or in the chunks of a file that was split. Beside
// source.Disk it is Identified, Described, InFile and Uncached, as far as the
// files below are.
type Section struct {
	ctx   context.Context
	name  string
	parts []part
	size  int64

	// mu is held for reading by each call, so that Close waits for it. It is
	// never held across a yield, since the consumer may call Close.
	mu     sync.RWMutex
	closed bool
}

// part is [off, off+size) of a file, not empty.
type part struct {
	file      source.Disk
	off, size int64
	start     int64 // in the section
	owned     bool  // the file is closed with the section
}

// newSection returns the section of the parts in order, whose starts it sets.
func newSection(ctx context.Context, name string, parts ...part) *Section {
	s := &Section{ctx: ctx, name: name}
	for _, p := range parts {
		p.start = s.size
		s.size += p.size
		s.parts = append(s.parts, p)
	}
	return s
}

// Size is the size of the file in bytes.
func (s *Section) Size() int64 { return s.size }

// find returns the index of the part that has the byte at off.
func (s *Section) find(off int64) int {
	return sort.Search(len(s.parts), func(i int) bool { return s.parts[i].start+s.parts[i].size > off })
}

// usable returns why s can't be used any more, or not under ctx. The caller
// holds mu.
func (s *Section) usable(ctx context.Context) error {
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	if s.closed {
		return os.ErrClosed
	}
	return context.Cause(ctx)
}

// ReadAt implements source.Disk.
func (s *Section) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", s.name, off)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if err := s.usable(s.ctx); err != nil {
		return 0, fmt.Errorf("read %s: %w", s.name, err)
	}
	if off >= s.size {
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > s.size-off {
		p, atEnd = p[:s.size-off], io.EOF
	}
	n := 0
	for i := s.find(off); n < len(p); i++ {
		in := off + int64(n) - s.parts[i].start
		piece := p[n:min(int64(len(p)), int64(n)+s.parts[i].size-in)]
		if err := readFull(s.parts[i].file, piece, s.parts[i].off+in); err != nil {
			return n, fmt.Errorf("%s: %w", s.name, err)
		}
		n += len(piece)
	}
	return n, atEnd
}

// Extents implements source.Disk with those of the files.
func (s *Section) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > s.size {
			yield(source.Extent{}, fmt.Errorf("extents of %s: [%d, %d) is not in its %d bytes", s.name, off, end, s.size))
			return
		}
		for i := s.find(off); off < end; i++ {
			p := &s.parts[i]
			stop := min(end, p.start+p.size)
			for e, err := range p.file.Extents(ctx, p.off+off-p.start, stop-off) {
				if err == nil {
					err = s.usableNow(ctx)
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

func (s *Section) usableNow(ctx context.Context) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.usable(ctx)
}

// Close waits for calls in progress. The archive that the section is of stays
// open. Later calls return an error that wraps os.ErrClosed.
func (s *Section) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("close %s: %w", s.name, os.ErrClosed)
	}
	s.closed = true
	var errs []error
	for _, p := range s.parts {
		if p.owned {
			errs = append(errs, p.file.Close())
		}
	}
	return errors.Join(errs...)
}

// Identity tells the files, by which it is proved, and where in them the
// section lies.
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
		if by == "none" || proof == "snapshot" {
			proof = by
		}
	}
	if len(ids) == 1 {
		return ids[0], proof, nil
	}
	return fmt.Sprintf("chunks:%x", sha256.Sum256([]byte(strings.Join(ids, "+")))), proof, nil
}

// Info describes the section as a raw file. Allocated is its size, and of
// chunks what they take.
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

// InFile implements source.InFile with the positions in the files below.
func (s *Section) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= s.size {
		return nil, 0, 0, false
	}
	p := &s.parts[s.find(off)]
	file, ok := source.Ability[source.InFile](p.file)
	if !ok {
		return nil, 0, 0, false
	}
	in := off - p.start
	f, pos, n, ok = file.InFile(p.off + in)
	return f, pos, min(n, p.size-in), ok
}

// ReadUncached forwards to the files.
func (s *Section) ReadUncached() {
	for _, p := range s.parts {
		if u, ok := source.Ability[source.Uncached](p.file); ok {
			u.ReadUncached()
		}
	}
}

// empty is a disk of the appliance that has a capacity and no file: zeros.
type empty struct {
	ctx  context.Context
	name string
	size int64
	id   string

	mu     sync.RWMutex
	closed bool
}

func (d *empty) Size() int64 { return d.size }

func (d *empty) usable(ctx context.Context) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := context.Cause(d.ctx); err != nil {
		return err
	}
	if d.closed {
		return os.ErrClosed
	}
	return context.Cause(ctx)
}

func (d *empty) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", d.name, off)
	}
	if err := d.usable(d.ctx); err != nil {
		return 0, fmt.Errorf("read %s: %w", d.name, err)
	}
	if off >= d.size {
		return 0, io.EOF
	}
	if int64(len(p)) > d.size-off {
		clear(p[:d.size-off])
		return int(d.size - off), io.EOF
	}
	clear(p)
	return len(p), nil
}

func (d *empty) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		err := d.usable(ctx)
		if err == nil && (off < 0 || length < 0 || end < off || end > d.size) {
			err = fmt.Errorf("[%d, %d) is not in its %d bytes", off, end, d.size)
		}
		if err != nil {
			yield(source.Extent{}, fmt.Errorf("extents of %s: %w", d.name, err))
		} else if length > 0 {
			yield(source.Extent{Off: off, Len: length, Kind: source.Zero, Absent: true}, nil)
		}
	}
}

func (d *empty) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return fmt.Errorf("close %s: %w", d.name, os.ErrClosed)
	}
	d.closed = true
	return nil
}

func (d *empty) Info() source.Info {
	return source.Info{Format: "raw", LogicalSector: 512, Chain: []string{d.name}}
}

// Identity is what the descriptor says: there is nothing else to change.
func (d *empty) Identity(context.Context) (id, proof string, err error) { return d.id, "snapshot", nil }
