package qcow2

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

// BenchmarkEncode compresses clusters of what fragments makes, one after the
// other; ratio is of the compressed bytes.
func BenchmarkEncode(b *testing.B) {
	data := fragments(60, 16<<20)
	for _, compression := range []Compression{Zlib, Zstd} {
		levels := []int{1, 2, 3, 4, 5, 6, 7, 9}
		if compression == Zstd {
			levels = []int{1, 3, 6, 10}
		}
		for _, level := range levels {
			b.Run(fmt.Sprintf("%s:%d", compression, level), func(b *testing.B) {
				e, err := newEncoding(Options{ClusterSize: 64 << 10, Compression: compression, Level: level})
				if err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(len(data)))
				b.ReportAllocs()
				code, total := make([]byte, 0, 128<<10), 0
				for b.Loop() {
					total = 0
					for off := 0; off < len(data); off += e.cluster {
						enc, plain, err := e.Encode(code, data[off:off+e.cluster], int64(off))
						if err != nil {
							b.Fatal(err)
						}
						if total += len(enc); plain {
							total += e.cluster
						}
					}
				}
				b.ReportMetric(float64(total)/float64(len(data)), "ratio")
			})
		}
	}
}

// BenchmarkWrite writes a disk in calls of 1 MiB, of which so many percent are
// data. It includes fsync, in the folder for temporary files.
func BenchmarkWrite(b *testing.B) {
	const size = 256 << 20
	data := fragments(61, 1<<20)
	for _, compression := range []Compression{None, Zlib, Zstd} {
		for _, percent := range []int{0, 50, 100} {
			b.Run(fmt.Sprintf("%s/%d%%", compression, percent), func(b *testing.B) {
				path := filepath.Join(b.TempDir(), "disk.qcow2")
				o := Options{Compression: compression}
				o.Force = true
				b.SetBytes(size)
				b.ReportAllocs()
				for b.Loop() {
					d, err := Create(b.Context(), path, size, o)
					if err != nil {
						b.Fatal(err)
					}
					fill(b, d, data, percent, size)
				}
			})
		}
	}
}

func fill(b *testing.B, d sink.Disk, data []byte, percent int, size int64) {
	b.Helper()
	defer d.Abort()
	for i := range int(size >> 20) {
		var err error
		if off := int64(i) << 20; i*percent/100 < (i+1)*percent/100 {
			_, err = d.WriteAt(data, off)
		} else {
			err = d.ZeroAt(b.Context(), off, 1<<20)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	if err := errors.Join(d.Finish(b.Context()), d.Publish(b.Context())); err != nil {
		b.Fatal(err)
	}
}

// In the long run nothing is allocated for a cluster.
func TestEncodingReusesItsMemory(t *testing.T) {
	data := fragments(62, 64<<10)
	for _, o := range []Options{{Compression: Zlib, Level: 3}, {Compression: Zlib, Level: 9}, {Compression: Zstd, Level: 3}, {Compression: Zstd, Level: 10}} {
		o.ClusterSize = 64 << 10
		e, err := newEncoding(o)
		if err != nil {
			t.Fatal(err)
		}
		code := make([]byte, 0, 128<<10)
		for _, n := range []int{len(data), len(data) - 512} {
			if allocs := testing.AllocsPerRun(20, func() { e.Encode(code, data[:n], 0) }); allocs > 0 {
				t.Errorf("%s:%d: %v allocations for a cluster of %d bytes", o.Compression, o.Level, allocs, n)
			}
		}
	}
}
