package sourcetest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// Writable writes to d, whose content is given, as source.Writable allows, and
// holds what is read against a model: at any alignment, and by several at once
// that share blocks but no bytes. It leaves d flushed, and content as it is then.
// What was trimmed is not looked at before it is written again.
func Writable(t *testing.T, d source.Disk, content []byte) {
	t.Helper()
	w, ok := source.Ability[source.Writable](d)
	if !ok {
		t.Fatalf("%T is not Writable", d)
	}
	if d.Size() != int64(len(content)) || len(content) < 8 {
		t.Fatalf("the disk has %d bytes, its content %d", d.Size(), len(content))
	}
	readAll := func(what string) {
		t.Helper()
		got := make([]byte, len(content))
		if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
			t.Fatalf("%s: %v", what, err)
		}
		for i := range got {
			if got[i] != content[i] {
				t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], content[i])
			}
		}
		off := int64(0)
		for e, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil {
				t.Fatalf("%s: extents: %v", what, err)
			}
			if e.Kind == source.Zero && len(bytes.Trim(content[e.Off:e.End()], "\x00")) > 0 {
				t.Fatalf("%s: %+v is not zero", what, e)
			}
			off = e.End()
		}
		if off != d.Size() {
			t.Fatalf("%s: extents end at %d of %d", what, off, d.Size())
		}
	}
	readAll("before")

	r := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		size := int64(len(content))
		off := r.Int64N(size)
		n := 1 + r.Int64N(min(size-off, 1<<(1+r.IntN(20))))
		if r.IntN(2) == 0 { // whole blocks
			off, n = off&^4095, min((n+4095)&^4095, size-off&^4095)
		}
		var err error
		what := ""
		piece := content[off : off+n]
		switch r.IntN(6) {
		case 0:
			what = "zero"
			clear(piece)
			err = w.ZeroAt(t.Context(), off, n, source.ZeroFlags(r.IntN(2)))
		case 1:
			what = "zero, fast"
			err = w.ZeroAt(t.Context(), off, n, source.ZeroFlags(r.IntN(2))|source.FastOnly)
			if errors.Is(err, errors.ErrUnsupported) {
				err = w.ZeroAt(t.Context(), off, n, source.MayTrim) // it may have come half-way
			}
			clear(piece)
		case 2:
			what = "trim"
			if err = w.Trim(t.Context(), off, n); err == nil {
				fill(r, piece)
				_, err = w.WriteAt(piece, off)
			}
		case 3:
			what = "flush"
			err = w.Flush(t.Context())
		default:
			what = "write"
			fill(r, piece)
			_, err = w.WriteAt(piece, off)
		}
		if err != nil {
			t.Fatalf("%d: %s [%d, %d): %v", i, what, off, off+n, err)
		}
		readAll(what)
	}

	// Eight at once, each with the bytes whose number it is modulo eight, in
	// runs that are shorter than any block.
	const run = 100
	var all sync.WaitGroup
	for k := range 8 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(k)))
			for off := k * run; off+run <= len(content) && off < 200*run; off += 8 * run {
				piece := content[off : off+run]
				var err error
				if r.IntN(4) == 0 {
					clear(piece)
					err = w.ZeroAt(t.Context(), int64(off), run, source.MayTrim)
				} else {
					fill(r, piece)
					_, err = w.WriteAt(piece, int64(off))
				}
				if err != nil {
					t.Errorf("at once, at %d: %v", off, err)
				}
			}
		})
	}
	all.Wait()
	readAll("at once")

	// What does not lie in the disk.
	size := int64(len(content))
	for _, c := range []struct{ off, n int64 }{{-1, 4}, {size - 2, 4}, {size, 1}, {size + 5, 1}} {
		if _, err := w.WriteAt(make([]byte, c.n), c.off); err == nil {
			t.Errorf("wrote %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
		if err := w.ZeroAt(t.Context(), c.off, c.n, source.MayTrim); err == nil {
			t.Errorf("zeroed %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
		if err := w.Trim(t.Context(), c.off, c.n); err == nil {
			t.Errorf("trimmed %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
	}
	if err := w.Flush(t.Context()); err != nil {
		t.Fatalf("flush: %v", err)
	}
	readAll("after")
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}
