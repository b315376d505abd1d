package transfer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// allocated returns a disk with the content. Some of its zeros are holes of random
// lengths, and the others data.
func allocated(r *rand.Rand, content []byte) *sourcetest.Memory {
	m := &sourcetest.Memory{Bytes: content, ID: "constant"}
	for off := 0; off < len(content); {
		data := len(bytes.TrimLeft(content[off:], "\x00"))
		zeros := len(content) - off - data
		e := source.Extent{Off: int64(off), Kind: source.Zero}
		switch {
		case zeros > 0 && r.IntN(3) > 0:
			e.Len = int64(min(zeros, 1+r.IntN(1<<(1+r.IntN(18)))))
		default:
			e.Kind = source.Data
			e.Len = int64(min(1+r.IntN(1<<(1+r.IntN(18))), len(content)-off))
		}
		off += int(e.Len)
		m.ExtentList = append(m.ExtentList, e)
	}
	return m
}

// naive compares two disks of one size byte by byte.
func naive(a, b *sourcetest.Memory) *transfer.Difference {
	d := &transfer.Difference{SourceSize: a.Size(), TargetSize: b.Size()}
	kind := func(m *sourcetest.Memory) []source.Kind {
		var k []source.Kind
		for _, e := range m.ExtentList {
			k = append(k, slices.Repeat([]source.Kind{e.Kind}, int(e.Len))...)
		}
		return k
	}
	ka, kb := kind(a), kind(b)
	within, withinAllocation := false, false
	for i := range a.Bytes {
		differs := a.Bytes[i] != b.Bytes[i]
		if differs {
			if d.Ranges == 0 {
				d.First, d.Source, d.Target = int64(i), a.Bytes[i], b.Bytes[i]
			}
			if !within {
				d.Ranges++
			}
			d.Bytes++
		}
		within = differs
		differs = ka[i] != kb[i]
		if differs {
			l := &d.Allocation
			if l.Ranges == 0 {
				l.First, l.Source, l.Target = int64(i), ka[i], kb[i]
			}
			if !withinAllocation {
				l.Ranges++
			}
			l.Bytes++
		}
		withinAllocation = differs
	}
	return d
}

func TestCompareAgreesWithANaiveOne(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	seen := map[string]int{}
	for i := range 300 {
		size := r.IntN(1 << (4 + r.IntN(17)))
		content := randomDisk(r, int64(size), 1+int64(r.IntN(4096))).Bytes
		other := bytes.Clone(content)
		for range r.IntN(4) * r.IntN(6) {
			from := r.IntN(size + 1)
			part := other[from:min(size, from+r.IntN(1<<(1+r.IntN(16))))]
			switch r.IntN(4) {
			case 0:
				clear(part)
			case 1:
				for i := range part {
					part[i] = byte(r.Uint32())
				}
			case 2: // every byte differs
				for i := range part {
					part[i] ^= 0x80
				}
			default:
				for i := range part {
					part[i] ^= byte(r.IntN(2)) << r.IntN(8)
				}
			}
		}
		a, b := allocated(r, content), allocated(r, other)
		o := transfer.CompareOptions{
			RequestSize: 512 << r.IntN(8), Requests: 1 + r.IntN(6),
			Strict: r.IntN(2) == 0, Counters: new(progress.Counters),
		}
		if r.IntN(3) == 0 {
			o.TargetMayBeLonger = true
			tail := bytes.Repeat([]byte{1}, r.IntN(70000))
			b.Bytes = append(b.Bytes, tail...)
			if len(tail) > 0 {
				b.ExtentList = append(b.ExtentList, source.Extent{Off: int64(size), Len: int64(len(tail))})
			}
		}
		want := naive(a, b)
		if !o.Strict {
			want.Allocation = transfer.AllocationDifference{}
		}
		seen[fmt.Sprint(want.Ranges > 0, want.Allocation.Ranges > 0)]++
		got, err := transfer.Compare(t.Context(), a, b, o)
		if err != nil {
			t.Fatalf("pair %d: %v", i, err)
		}
		if want.Ranges == 0 && want.Allocation.Ranges == 0 {
			if got != nil {
				t.Errorf("pair %d: %+v, want none", i, got)
			}
		} else if got == nil || *got != *want {
			t.Errorf("pair %d of %d bytes: got  %+v\nwant %+v", i, size, got, want)
		}
		if s := o.Counters.Snapshot(); s.Done != s.Planned || s.Done+s.Skipped != int64(size) || s.Phase != progress.Verify {
			t.Errorf("pair %d of %d bytes: %+v", i, size, s)
		}
	}
	if len(seen) != 4 {
		t.Errorf("cases: %v", seen)
	}
}

func TestCompareReadsWhatIsData(t *testing.T) {
	const k = 1024
	disk := func(log *reads, list ...source.Extent) *sourcetest.Memory {
		return &sourcetest.Memory{Bytes: make([]byte, 1024*k), ExtentList: list, OnRead: log.add}
	}
	var a, b reads
	src := disk(&a,
		source.Extent{Off: 0, Len: 300 * k},
		source.Extent{Off: 300 * k, Len: 20 * k, Kind: source.Zero}, // short: read with the data around it
		source.Extent{Off: 320 * k, Len: 80 * k},
		source.Extent{Off: 400 * k, Len: 300 * k, Kind: source.Zero},
		source.Extent{Off: 700 * k, Len: 100 * k},
		source.Extent{Off: 800 * k, Len: 33 * k, Kind: source.Zero}, // longer than 32 KiB: not read
		source.Extent{Off: 833 * k, Len: 67 * k},
		source.Extent{Off: 900 * k, Len: 124 * k, Kind: source.Zero})
	dst := disk(&b,
		source.Extent{Off: 0, Len: 100 * k, Kind: source.Zero},
		source.Extent{Off: 100 * k, Len: 300 * k},
		source.Extent{Off: 400 * k, Len: 624 * k, Kind: source.Zero})
	counters := new(progress.Counters)
	diff, err := transfer.Compare(t.Context(), src, dst, transfer.CompareOptions{RequestSize: 256 * k, Requests: 1, Counters: counters})
	if diff != nil || err != nil {
		t.Errorf("%v, %v", diff, err)
	}
	if got, want := a.String(), "[0K, 100K) [100K, 256K) [256K, 400K) [700K, 768K) [768K, 800K) [833K, 900K)"; got != want {
		t.Errorf("source: %s\nwant:   %s", got, want)
	}
	if got, want := b.String(), "[100K, 256K) [256K, 400K)"; got != want {
		t.Errorf("target: %s\nwant:   %s", got, want)
	}
	a.Reset()
	if _, err := transfer.Sum(t.Context(), src, digest.Blksum, transfer.CompareOptions{RequestSize: 250 * k, Requests: 1}); err != nil {
		t.Error(err)
	}
	if got, want := a.String(), "[0K, 256K) [256K, 400K) [700K, 768K) [768K, 800K) [833K, 900K)"; got != want {
		t.Errorf("sum:  %s\nwant: %s", got, want)
	}
	if s := counters.Snapshot(); s.Read != 867*k || s.Planned != 567*k {
		t.Errorf("%+v", s)
	}
}

// reads is a log of the reads of one goroutine.
type reads struct{ strings.Builder }

func (r *reads) add(off int64, n int) error {
	if r.Len() > 0 {
		r.WriteByte(' ')
	}
	fmt.Fprintf(r, "[%dK, %dK)", off/1024, (off+int64(n))/1024)
	return nil
}

func TestDifferenceLines(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 1000)
	change := func(at ...int) *sourcetest.Memory {
		b := bytes.Clone(content)
		for _, i := range at {
			b[i] = 0xFE
		}
		return &sourcetest.Memory{Bytes: b}
	}
	zeros := func(n int64, kind source.Kind) *sourcetest.Memory {
		return &sourcetest.Memory{Bytes: make([]byte, n), ExtentList: []source.Extent{{Len: max(n, 1), Kind: kind}}}
	}
	strict := transfer.CompareOptions{Strict: true}
	longer := transfer.CompareOptions{TargetMayBeLonger: true}
	for _, c := range []struct {
		name string
		a, b *sourcetest.Memory
		o    transfer.CompareOptions
		want string
	}{
		{"same", change(), change(), strict, ""},
		{"empty", zeros(0, source.Data), zeros(0, source.Data), strict, ""},
		{"one", change(), change(511), transfer.CompareOptions{RequestSize: 512}, "first difference at byte 511: source 0x31, target 0xFE; 1 ranges, 1 bytes"},
		{"over a border", change(), change(4, 510, 511, 512, 513, 9999), transfer.CompareOptions{RequestSize: 512}, "first difference at byte 4: source 0x34, target 0xFE; 3 ranges, 6 bytes"},
		{"other way", change(7, 8), change(), strict, "first difference at byte 7: source 0xFE, target 0x37; 1 ranges, 2 bytes"},
		{"shorter", change(), &sourcetest.Memory{Bytes: content[:9999]}, longer, "sizes differ: source 10000 bytes, target 9999 bytes"},
		{"longer", &sourcetest.Memory{Bytes: content[:9999]}, change(), strict, "sizes differ: source 9999 bytes, target 10000 bytes"},
		{"longer device", &sourcetest.Memory{Bytes: content[:9999]}, change(9999), longer, ""},
		{"longer device differs", &sourcetest.Memory{Bytes: content[:9999]}, change(9998), longer, "first difference at byte 9998: source 0x38, target 0xFE; 1 ranges, 1 bytes"},
		{"hole", zeros(100, source.Data), zeros(100, source.Zero), transfer.CompareOptions{}, ""},
		{"strict hole", zeros(100, source.Data), zeros(100, source.Zero), strict, "first allocation difference at byte 0: source data, target hole; 1 ranges, 100 bytes"},
		{"strict data", zeros(100, source.Zero), zeros(100, source.Data), strict, "first allocation difference at byte 0: source hole, target data; 1 ranges, 100 bytes"},
		{"strict neighbours",
			&sourcetest.Memory{Bytes: make([]byte, 100), ExtentList: []source.Extent{{Len: 30, Kind: source.Zero}, {Off: 30, Len: 20}, {Off: 50, Len: 50, Kind: source.Zero}}},
			&sourcetest.Memory{Bytes: make([]byte, 100), ExtentList: []source.Extent{{Len: 10, Kind: source.Zero}, {Off: 10, Len: 20}, {Off: 30, Len: 50, Kind: source.Zero}, {Off: 80, Len: 20}}},
			strict, "first allocation difference at byte 10: source hole, target data; 2 ranges, 60 bytes"},
		{"content before allocation", zeros(10000, source.Zero), change(), strict, "first difference at byte 0: source 0x00, target 0x30; 1 ranges, 10000 bytes"},
	} {
		diff, err := transfer.Compare(t.Context(), c.a, c.b, c.o)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := ""
		if diff != nil {
			got = diff.String()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestCompareErrorsNameTheSide(t *testing.T) {
	good := func() *sourcetest.Memory { return &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 3<<20)} }
	for _, c := range []struct {
		name string
		bad  func(m *sourcetest.Memory) source.Disk
		want string
	}{
		{"read", func(m *sourcetest.Memory) source.Disk {
			m.OnRead = func(off int64, n int) error { return boomAt(off > 1<<20) }
			return m
		}, "boom"},
		{"extents", func(m *sourcetest.Memory) source.Disk {
			m.OnExtent = func(source.Extent) error { return errBoom }
			return m
		}, "cannot query the extents of the disk: boom"},
		{"extents that end early", func(m *sourcetest.Memory) source.Disk {
			return lyingDisk{m, func(off, n int64) iter.Seq2[source.Extent, error] { return source.WholeData(off, n-1) }}
		}, "extents of [0, 3145728): the disk returned extents only up to offset 3145727"},
		{"single link", func(m *sourcetest.Memory) source.Disk {
			m.ExtentList = []source.Extent{{Len: 1 << 20}, {Off: 1 << 20, Len: 2 << 20, Kind: source.Inherited}}
			return m
		}, "2097152 bytes of the disk are in a parent image"},
		{"short reads", func(m *sourcetest.Memory) source.Disk { return shortDisk{m} }, "no error"},
		{"changed", func(m *sourcetest.Memory) source.Disk {
			var once atomic.Bool
			m.ID = "one"
			return changing{m, &once}
		}, "its identity was one and is now two"},
	} {
		for i, side := range []string{"source: ", "target: "} {
			disks := [2]source.Disk{good(), good()}
			disks[i] = c.bad(good())
			diff, err := transfer.Compare(t.Context(), disks[0], disks[1], transfer.CompareOptions{})
			if diff != nil || err == nil || !strings.HasPrefix(err.Error(), side) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s%s: %v, error %v, want %q", side, c.name, diff, err, c.want)
			}
			if (c.name == "changed") != errors.Is(err, transfer.ErrDiskChanged) {
				t.Errorf("%s%s: error %v", side, c.name, err)
			}
		}
		value, err := transfer.Sum(t.Context(), c.bad(good()), digest.Blksum, transfer.CompareOptions{})
		if value != "" || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("sum, %s: %q, error %v, want %q", c.name, value, err, c.want)
		}
	}
}

// shortDisk returns one byte less than it is asked for, without an error.
type shortDisk struct{ *sourcetest.Memory }

func (d shortDisk) ReadAt(p []byte, off int64) (int, error) {
	return d.Memory.ReadAt(p[:len(p)-1], off)
}

// changing is a disk whose identity changes after the first query.
type changing struct {
	*sourcetest.Memory
	asked *atomic.Bool
}

func (d changing) Identity(context.Context) (id, proof string, err error) {
	if d.asked.Swap(true) {
		return "two", "mtime", nil
	}
	return "one", "mtime", nil
}

func TestCompareAndSumEndWithTheirContext(t *testing.T) {
	cause := errors.New("stopped by a signal")
	for name, f := range map[string]func(ctx context.Context, d source.Disk) error{
		"compare": func(ctx context.Context, d source.Disk) error {
			_, err := transfer.Compare(ctx, &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 16<<20)}, d, transfer.CompareOptions{})
			return err
		},
		"blksum": func(ctx context.Context, d source.Disk) error {
			_, err := transfer.Sum(ctx, d, digest.Blksum, transfer.CompareOptions{})
			return err
		},
		"sha256": func(ctx context.Context, d source.Disk) error {
			_, err := transfer.Sum(ctx, d, digest.SHA256, transfer.CompareOptions{})
			return err
		},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		var count atomic.Int64
		d := &sourcetest.Memory{Context: ctx, Bytes: bytes.Repeat([]byte{1}, 16<<20), OnRead: func(int64, int) error {
			if count.Add(1) == 6 {
				cancel(cause)
			}
			return nil
		}}
		if err := f(ctx, d); !errors.Is(err, cause) {
			t.Errorf("%s: error %v, want the cause", name, err)
		}
	}
	// A disk without data ends with its context, too.
	for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
		ctx, cancel := context.WithCancelCause(t.Context())
		d := sourcetest.Pattern(1 << 60)
		// The context ends after the extents were queried, while zeros are added.
		d.OnExtent = func(source.Extent) error { time.AfterFunc(time.Millisecond, func() { cancel(cause) }); return nil }
		if _, err := transfer.Sum(ctx, d, a, transfer.CompareOptions{}); !errors.Is(err, cause) {
			t.Errorf("%s of zeros: error %v, want the cause", a, err)
		}
	}
}

func TestSum(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	for i := range 60 {
		size := r.IntN(1 << (4 + r.IntN(18)))
		d := allocated(r, randomDisk(r, int64(size), 1+int64(r.IntN(1<<(1+r.IntN(17))))).Bytes)
		for _, a := range []digest.Algorithm{digest.Blksum, digest.SHA256} {
			s := digest.New(a) // the tests of package digest check it against the definition
			s.Data(d.Bytes)
			want := s.Value()
			if h := sha256.Sum256(d.Bytes); a == digest.SHA256 && want != hex.EncodeToString(h[:]) {
				t.Fatal("package digest is wrong")
			}
			o := transfer.CompareOptions{RequestSize: 512 << r.IntN(9), Requests: 1 + r.IntN(5), Counters: new(progress.Counters)}
			got, err := transfer.Sum(t.Context(), d, a, o)
			if err != nil || got != want {
				t.Errorf("disk %d, %s of %d bytes: %s, %v, want %s", i, a, size, got, err, want)
			}
			if s := o.Counters.Snapshot(); s.Done != s.Planned || s.Done+s.Skipped != int64(size) {
				t.Errorf("disk %d, %s of %d bytes: %+v", i, a, size, s)
			}
		}
	}
}

// TestCompareAndSumReadIntoTheSourcesMemory checks that buffers of a source.Allocator
// are used and all freed.
func TestCompareAndSumReadIntoTheSourcesMemory(t *testing.T) {
	for _, boom := range []bool{false, true} {
		var disks [2]lender
		for i := range disks {
			disks[i] = lender{&sourcetest.Memory{Bytes: bytes.Repeat([]byte{3}, 9<<20)}, make(chan []byte, 3)}
			for range cap(disks[i].free) {
				disks[i].free <- make([]byte, 1<<20)
			}
			if boom {
				disks[i].OnRead = func(off int64, _ int) error { return boomAt(off > 5<<20) }
			}
		}
		if _, err := transfer.Compare(t.Context(), disks[0], disks[1], transfer.CompareOptions{}); boom != (err != nil) {
			t.Errorf("error %v", err)
		}
		if _, err := transfer.Sum(t.Context(), disks[0], digest.Blksum, transfer.CompareOptions{}); boom != (err != nil) {
			t.Errorf("error %v", err)
		}
		for _, d := range disks {
			if len(d.free) != cap(d.free) {
				t.Errorf("%d of %d buffers came back", len(d.free), cap(d.free))
			}
		}
	}
}

func TestCompareIsBounded(t *testing.T) {
	var now, most atomic.Int64
	disk := func() *sourcetest.Memory {
		return &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 32<<20), OnRead: func(int64, int) error {
			n := now.Add(1)
			defer now.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			return nil
		}}
	}
	if _, err := transfer.Compare(t.Context(), disk(), disk(), transfer.CompareOptions{Requests: 3}); err != nil {
		t.Fatal(err)
	}
	if most.Load() > 3 {
		t.Errorf("%d reads at once, want 3 at most", most.Load())
	}
}

func BenchmarkCompare(b *testing.B) {
	const size = 1 << 30
	for _, percent := range []int64{0, 50, 100} {
		b.Run(fmt.Sprintf("data=%d%%", percent), func(b *testing.B) {
			var data []source.Extent
			for off := int64(0); off < size && percent > 0; off += 4 << 20 {
				data = append(data, source.Extent{Off: off, Len: 4 << 20 * percent / 100})
			}
			x, y := sourcetest.Pattern(size, data...), sourcetest.Pattern(size, data...)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if diff, err := transfer.Compare(b.Context(), x, y, transfer.CompareOptions{}); diff != nil || err != nil {
					b.Fatal(diff, err)
				}
			}
		})
	}
}

// BenchmarkCompareDifferent measures disks that differ in nearly every byte.
func BenchmarkCompareDifferent(b *testing.B) {
	random := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{1}).Read(random)
	x := &sourcetest.Memory{Bytes: random}
	y := &sourcetest.Memory{Bytes: append(random[1:len(random):len(random)], 0)}
	b.SetBytes(x.Size())
	b.ReportAllocs()
	for b.Loop() {
		if diff, err := transfer.Compare(b.Context(), x, y, transfer.CompareOptions{}); diff == nil || err != nil {
			b.Fatal(diff, err)
		}
	}
}

func BenchmarkSum(b *testing.B) {
	const size = 256 << 20
	for _, percent := range []int64{0, 50, 100} {
		b.Run(fmt.Sprintf("data=%d%%", percent), func(b *testing.B) {
			var data []source.Extent
			for off := int64(0); off < size && percent > 0; off += 4 << 20 {
				data = append(data, source.Extent{Off: off, Len: 4 << 20 * percent / 100})
			}
			x := sourcetest.Pattern(size, data...)
			b.SetBytes(size)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := transfer.Sum(b.Context(), x, digest.Blksum, transfer.CompareOptions{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
