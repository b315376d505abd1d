package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/sync/errgroup"

	"vddkcp/source"
)

// overlay is the memory with which what is written is compared.
type overlay struct {
	backing []byte
	jobs    []job
}

// job is a cluster to compress.
type job struct {
	code  []byte
	plain bool
}

// compareSize is how much is read of the backing at once, in bytes.
const compareSize = 2 << 20

// writeDifferent stores those clusters of p that the backing does not have.
func (d *disk) writeDifferent(p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), compareSize)
		same, err := d.readBacking(off, n)
		if err != nil {
			return err
		}
		for start := int64(0); start < n; {
			end := min(start+d.cluster, n)
			equal := bytes.Equal(p[start:end], same[start:end])
			for end < n {
				next := min(end+d.cluster, n)
				if bytes.Equal(p[end:next], same[end:next]) != equal {
					break
				}
				end = next
			}
			if !equal {
				if err := d.store(p[start:end], off+start); err != nil {
					return err
				}
			}
			start = end
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readBacking returns n bytes of the backing, behind whose end are zeros, until
// the next call.
func (d *disk) readBacking(off, n int64) ([]byte, error) {
	if int64(cap(d.overlay.backing)) < n {
		d.overlay.backing = make([]byte, n)
	}
	b := d.overlay.backing[:n]
	has := max(0, min(n, d.o.Backing.Size()-off))
	clear(b[has:])
	if has == 0 {
		return b, nil
	}
	got, err := d.o.Backing.ReadAt(b[:has], off)
	if int64(got) == has {
		return b, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return nil, fmt.Errorf("backing %s, [%d, %d): %w", d.o.BackingName, off, off+has, err)
}

// hide makes [off, off+n) read as zeros: by nothing where the backing is known
// to have zeros, else by clusters of zeros.
func (d *disk) hide(ctx context.Context, off, n int64) error {
	end := off + n
	has := min(end, d.o.Backing.Size())
	if off >= has {
		return nil
	}
	next := off >> d.shift // the first cluster that nothing was done about
	for e, err := range source.Covered(ctx, d.o.Backing, off, has-off) {
		if err != nil {
			return fmt.Errorf("backing %s: %w", d.o.BackingName, err)
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

// store writes clusters, compressed where the image is. It compresses several
// at once: they did not come through an Encoding.
func (d *disk) store(p []byte, off int64) error {
	if d.o.Compression == None {
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
	for len(d.overlay.jobs) < all {
		d.overlay.jobs = append(d.overlay.jobs, job{})
	}
	unit := func(i int) []byte { return p[i<<d.shift : min((i+1)<<d.shift, len(p))] }
	workers := min(len(d.encodings), all)
	var g errgroup.Group
	for w, e := range d.encodings[:workers] {
		g.Go(func() (err error) {
			for i := w; i < all && err == nil; i += workers {
				j := &d.overlay.jobs[i]
				j.code, j.plain, err = e.Encode(j.code[:0], unit(i))
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for i := range all {
		j, u := &d.overlay.jobs[i], unit(i)
		code := j.code
		if j.plain {
			code = u
		}
		if err := d.place(off+int64(i)<<d.shift, code, j.plain, int64(len(u))); err != nil {
			return err
		}
	}
	return nil
}
