package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/source"
)

// The type overlay compares clusters with the backing disk of an image. It is not
// safe for concurrent use.
type overlay struct {
	backing source.Disk
	name    string
	start   int64  // offset of read in the backing, bytes
	read    []byte // the bytes that were read last, with zeros behind the end of the backing
}

// compareSize is the minimum number of bytes that are read from the backing disk at
// once.
const compareSize = 64 << 10

// The method has reports whether the bytes of the backing disk at the given offset are
// equal to p.
func (v *overlay) has(p []byte, off int64) (bool, error) {
	if off < v.start || off+int64(len(p)) > v.start+int64(len(v.read)) {
		if err := v.fill(off, max(len(p), compareSize)); err != nil {
			return false, err
		}
	}
	return bytes.Equal(p, v.read[off-v.start:][:len(p)]), nil
}

// The method fill reads n bytes of the backing disk, from the given offset on, into
// the buffer v.read.
func (v *overlay) fill(off int64, n int) error {
	if cap(v.read) < n {
		v.read = make([]byte, n)
	}
	b := v.read[:n]
	v.start, v.read = off, b[:0] // empty until the read has succeeded
	has := max(0, min(int64(n), v.backing.Size()-off))
	clear(b[has:])
	if has > 0 {
		got, err := v.backing.ReadAt(b[:has], off)
		if int64(got) < has {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("cannot read bytes [%[2]d, %[3]d) of the backing file %[1]s: %[4]w", v.name, off, off+has, err)
		}
	}
	v.read = b
	return nil
}

// The method hide makes [off, off+n) of the disk read as zeros, whatever the backing
// disk contains in this range. For this purpose it stores zero clusters in the
// image. Ranges that are already zeros according to the extents of the backing disk
// need no zero clusters.
func (d *disk) hide(ctx context.Context, off, n int64) error {
	end := off + n
	has := min(end, d.o.Backing.Size())
	if off >= has {
		return nil
	}
	next := off >> d.shift // the first cluster that is not handled yet
	for e, err := range source.Covered(ctx, d.o.Backing, off, has-off) {
		if err != nil {
			return fmt.Errorf("cannot list the extents of the backing file %s: %w", d.o.BackingName, err)
		}
		if e.Kind == source.Zero {
			continue
		}
		for g := max(next, e.Off>>d.shift); g < d.ceil(e.End(), d.shift); g++ {
			if g%(1<<d.l2Shift) == 0 {
				if err := d.life.Stopped(ctx); err != nil {
					return err
				}
			}
			if err := d.zero(g); err != nil {
				return err
			}
			next = g + 1
		}
	}
	return nil
}

// The type job holds the results of the method Encode for one cluster.
type job struct {
	code  []byte
	plain bool
}

// The method store writes clusters on behalf of WriteAt. If clusters must be encoded
// before they are written, store encodes several of them concurrently.
func (d *disk) store(p []byte, off int64) error {
	if !d.o.encodes() {
		return d.add(off>>d.shift, p)
	}
	for len(d.encodings) < runtime.GOMAXPROCS(0) {
		e, err := newEncoding(d.o)
		if err != nil {
			return err
		}
		d.encodings = append(d.encodings, e)
	}
	all := int(d.ceil(int64(len(p)), d.shift))
	for len(d.jobs) < all {
		d.jobs = append(d.jobs, job{})
	}
	unit := func(i int) []byte { return p[i<<d.shift : min((i+1)<<d.shift, len(p))] }
	at := func(i int) int64 { return off + int64(i)<<d.shift }
	workers := min(len(d.encodings), all)
	var g errgroup.Group
	for w, e := range d.encodings[:workers] {
		g.Go(func() (err error) {
			for i := w; i < all && err == nil; i += workers {
				j := &d.jobs[i]
				j.code, j.plain, err = e.Encode(j.code[:0], unit(i), at(i))
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range all {
		j, u := &d.jobs[i], unit(i)
		code := j.code
		switch {
		case j.plain:
			code = u
		case len(code) == 0:
			continue // the backing has the same content
		}
		if err := d.place(at(i), code, j.plain, int64(len(u))); err != nil {
			return err
		}
	}
	return nil
}
