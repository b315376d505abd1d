package sourcetest_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// sample is a small disk with data, zeros, an explicit zero extent, and data of a
// parent.
func sample() (content []byte, extents []source.Extent) {
	content = make([]byte, 300_007)
	rand.NewChaCha8([32]byte{}).Read(content)
	extents = []source.Extent{
		{Off: 0, Len: 70_000},
		{Off: 70_000, Len: 65_536, Kind: source.Zero, Depth: 1, Absent: true},
		{Off: 135_536, Len: 64, Kind: source.Zero},
		{Off: 135_600, Len: 100_000, Depth: 1},
		{Off: 235_600, Len: 64_407, Kind: source.Zero, Depth: 1, Absent: true},
	}
	for _, e := range extents {
		if e.Kind == source.Zero {
			clear(content[e.Off:e.End()])
		}
	}
	return content, extents
}

func TestMemory(t *testing.T) {
	content, extents := sample()
	sourcetest.Run(t, sourcetest.Config{
		Content: content,
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			return &sourcetest.Memory{Context: ctx, Bytes: content, ExtentList: extents, ID: "sample"}
		},
	})
}

func TestMemoryEmpty(t *testing.T) {
	sourcetest.Run(t, sourcetest.Config{Open: func(ctx context.Context, t testing.TB) source.Disk {
		return &sourcetest.Memory{Context: ctx}
	}})
}

// buffered is a Memory that is also an Allocator.
type buffered struct{ *sourcetest.Memory }

func (buffered) Buffer(_ context.Context, n int) ([]byte, func(), error) {
	return make([]byte, n), func() {}, nil
}

func TestBuffered(t *testing.T) {
	content, extents := sample()
	sourcetest.Run(t, sourcetest.Config{
		Content: content,
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			return buffered{&sourcetest.Memory{Context: ctx, Bytes: content, ExtentList: extents}}
		},
	})
}

func TestPattern(t *testing.T) {
	data := []source.Extent{{Off: 3, Len: 5000}, {Off: 70_001, Len: 200_000}, {Off: 1 << 20, Len: 4096}}
	size := int64(1<<20 + 9999)
	content := make([]byte, size)
	if n, err := sourcetest.Pattern(size, data...).ReadAt(content, 0); err != nil {
		t.Fatal(n, err)
	}
	seen := map[string]int{}
	for off := 70_008; off+8 < 270_001; off += 8 {
		word := string(content[off : off+8])
		if before, found := seen[word]; found || word == "\x00\x00\x00\x00\x00\x00\x00\x00" {
			t.Fatalf("%q at %d and %d", word, before, off)
		}
		seen[word] = off
	}
	sourcetest.Run(t, sourcetest.Config{
		Content: content,
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			m := sourcetest.Pattern(size, data...)
			m.Context = ctx
			return m
		},
	})
}

func TestPatternHuge(t *testing.T) {
	const size = 64 << 40
	d := sourcetest.Pattern(size, source.Extent{Off: size - 1<<20, Len: 1 << 19})
	var got []source.Extent
	for e, err := range source.Covered(t.Context(), d, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	if len(got) != 3 || got[0].Kind != source.Zero || got[1] != (source.Extent{Off: size - 1<<20, Len: 1 << 19}) || got[2].End() != size {
		t.Errorf("%+v", got)
	}
	p := make([]byte, 2<<20)
	if n, err := d.ReadAt(p, size-2<<20); n != len(p) || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := d.ReadAt(p, size-100); n != 100 || err != io.EOF {
		t.Errorf("%d, %v", n, err)
	}
}

func TestMemoryHooks(t *testing.T) {
	boom := errors.New("boom")
	content, extents := sample()
	m := &sourcetest.Memory{Bytes: content, ExtentList: extents,
		OnRead: func(off int64, n int) error {
			if off <= 1000 && 1000 < off+int64(n) {
				return boom
			}
			return nil
		},
		OnExtent: func(e source.Extent) error {
			if e.Off >= 135_536 {
				return boom
			}
			return nil
		},
	}
	if _, err := m.ReadAt(make([]byte, 100), 950); err != boom {
		t.Error(err)
	}
	if _, err := m.ReadAt(make([]byte, 100), 1001); err != nil {
		t.Error(err)
	}
	n := 0
	for _, err := range m.Extents(t.Context(), 0, m.Size()) {
		if n++; (err == boom) != (n == 3) {
			t.Error(n, err)
		}
	}
	if n != 3 {
		t.Error(n)
	}
}

func BenchmarkPattern(b *testing.B) {
	d := sourcetest.Pattern(1<<40, source.Extent{Len: 1 << 40})
	p := make([]byte, 1<<20)
	b.SetBytes(int64(len(p)))
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		if _, err := d.ReadAt(p, off); err != nil {
			b.Fatal(err)
		}
		off = (off + int64(len(p))) % d.Size()
	}
}
