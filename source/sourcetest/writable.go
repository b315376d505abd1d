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

// Writable tests the ability source.Writable of the disk d. The slice content must have the
// content of d at the beginning; Writable updates it with each write to d. The test writes
// ranges of any alignment. It writes from one goroutine, and from several goroutines that
// write to different bytes of the same blocks. It compares d with the expected content, and
// at the end flushes d. A trim leaves the content of a range undefined. The test therefore
// writes to a trimmed range before it compares the range.
func Writable(t *testing.T, d source.Disk, content []byte) {
	t.Helper()
	w, ok := source.Ability[source.Writable](d)
	if !ok {
		t.Fatalf("%T is not Writable", d)
	}
	if d.Size() != int64(len(content)) || len(content) < 8 {
		t.Fatalf("the disk has %d bytes, its content %d", d.Size(), len(content))
	}
	m := &model{t, d, w, content}
	m.compare("before")
	r := rand.New(rand.NewPCG(1, 2))
	for i := range 60 {
		m.compare(m.changeSomething(i, r))
	}
	m.writeTogether()
	m.compare("at once")
	m.writeOutside()
	if err := w.Flush(t.Context()); err != nil {
		t.Fatalf("flush: %v", err)
	}
	m.compare("after")
}

// The type model is the writable disk that is tested, together with the content that it is
// expected to have.
type model struct {
	t       *testing.T
	d       source.Disk
	w       source.Writable
	content []byte
}

// The method compare checks that the disk has the expected content, and that the extents which
// the disk reports fit this content.
func (m *model) compare(what string) {
	t := m.t
	t.Helper()
	got := make([]byte, len(m.content))
	if _, err := m.d.ReadAt(got, 0); err != nil && err != io.EOF {
		t.Fatalf("%s: %v", what, err)
	}
	for i := range got {
		if got[i] != m.content[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], m.content[i])
		}
	}
	off := int64(0)
	for e, err := range m.d.Extents(t.Context(), 0, m.d.Size()) {
		if err != nil {
			t.Fatalf("%s: extents: %v", what, err)
		}
		if e.Kind == source.Zero && len(bytes.Trim(m.content[e.Off:e.End()], "\x00")) > 0 {
			t.Fatalf("%s: %+v is not zero", what, e)
		}
		off = e.End()
	}
	if off != m.d.Size() {
		t.Fatalf("%s: extents end at %d of %d", what, off, m.d.Size())
	}
}

// changeSomething makes one random change of the disk, and returns a text that names the
// change. The parameter i is the number of the change.
func (m *model) changeSomething(i int, r *rand.Rand) (what string) {
	t, w := m.t, m.w
	t.Helper()
	size := int64(len(m.content))
	off := r.Int64N(size)
	n := 1 + r.Int64N(min(size-off, 1<<(1+r.IntN(20))))
	if r.IntN(2) == 0 { // whole blocks
		off, n = off&^4095, min((n+4095)&^4095, size-off&^4095)
	}
	var err error
	piece := m.content[off : off+n]
	switch r.IntN(6) {
	case 0:
		what = "zero"
		clear(piece)
		err = w.ZeroAt(t.Context(), off, n, source.ZeroFlags(r.IntN(2)))
	case 1:
		what = "zero, fast"
		err = w.ZeroAt(t.Context(), off, n, source.ZeroFlags(r.IntN(2))|source.FastOnly)
		if errors.Is(err, errors.ErrUnsupported) {
			err = w.ZeroAt(t.Context(), off, n, source.MayTrim) // a part may be zeroed already
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
	return what
}

// writeTogether writes from eight goroutines at once. The beginning of the disk is
// divided into pieces of 100 bytes. Goroutine k writes the pieces whose number is k
// modulo eight, so that several goroutines write to each block.
func (m *model) writeTogether() {
	t := m.t
	const run = 100
	var all sync.WaitGroup
	for k := range 8 {
		all.Go(func() {
			r := rand.New(rand.NewPCG(3, uint64(k)))
			for off := k * run; off+run <= len(m.content) && off < 200*run; off += 8 * run {
				piece := m.content[off : off+run]
				var err error
				if r.IntN(4) == 0 {
					clear(piece)
					err = m.w.ZeroAt(t.Context(), int64(off), run, source.MayTrim)
				} else {
					fill(r, piece)
					_, err = m.w.WriteAt(piece, int64(off))
				}
				if err != nil {
					t.Errorf("at once, at %d: %v", off, err)
				}
			}
		})
	}
	all.Wait()
}

// writeOutside checks that ranges which do not lie in the disk are refused.
func (m *model) writeOutside() {
	t, size := m.t, int64(len(m.content))
	t.Helper()
	for _, c := range []struct{ off, n int64 }{{-1, 4}, {size - 2, 4}, {size, 1}, {size + 5, 1}} {
		if _, err := m.w.WriteAt(make([]byte, c.n), c.off); err == nil {
			t.Errorf("wrote %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
		if err := m.w.ZeroAt(t.Context(), c.off, c.n, source.MayTrim); err == nil {
			t.Errorf("zeroed %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
		if err := m.w.Trim(t.Context(), c.off, c.n); err == nil {
			t.Errorf("trimmed %d bytes at %d of a disk of %d", c.n, c.off, size)
		}
	}
}

func fill(r *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}
