package qcow2_test

import (
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// benchmarkImages calls do with a disk of 64 MiB of each kind, with nothing,
// half (every second run of four clusters) and all of it allocated.
func benchmarkImages(b *testing.B, do func(b *testing.B, d source.Disk)) {
	const size = 64 << 20
	for _, kind := range []string{"plain", "zlib", "zstd", "subclusters", "overlay"} {
		for _, used := range []int{0, 50, 100} {
			b.Run(fmt.Sprintf("%s/%d%%", kind, used), func(b *testing.B) {
				im := image{size: size, clusters: map[int64][]byte{}, extended: kind == "subclusters"}
				for c := range int64(size >> 16) {
					if used == 100 || used == 50 && c/4%2 == 0 {
						im.clusters[c] = random(uint64(c), 65536)
					}
				}
				dir := b.TempDir()
				switch kind {
				case "zlib", "zstd":
					im.packed = kind
				case "overlay":
					write(b, dir, "base", im.build().file)
					im = image{size: size, backing: "base", format: "qcow2", clusters: some(65536, 5, 500)}
				}
				write(b, dir, "x.qcow2", im.build().file)
				d := mustOpen(b, filepath.Join(dir, "x.qcow2"))
				b.ReportAllocs()
				b.ResetTimer()
				do(b, d)
			})
		}
	}
}

// BenchmarkReadAt reads pieces of 1 MiB one after another.
func BenchmarkReadAt(b *testing.B) {
	benchmarkImages(b, func(b *testing.B, d source.Disk) { readSequentially(b, d, 1<<20) })
}

// BenchmarkReadAt4K reads pieces of 4 KiB one after another.
func BenchmarkReadAt4K(b *testing.B) {
	benchmarkImages(b, func(b *testing.B, d source.Disk) { readSequentially(b, d, 4<<10) })
}

func readSequentially(b *testing.B, d source.Disk, n int64) {
	p := make([]byte, n)
	b.SetBytes(n)
	off := int64(0)
	for b.Loop() {
		if _, err := d.ReadAt(p, off); err != nil && err != io.EOF {
			b.Fatal(err)
		}
		if off += n; off >= d.Size() {
			off = 0
		}
	}
}

// BenchmarkExtents asks for the allocation of the whole disk.
func BenchmarkExtents(b *testing.B) {
	benchmarkImages(b, func(b *testing.B, d source.Disk) {
		b.SetBytes(d.Size())
		for b.Loop() {
			var failed bool // an err that is passed on would be allocated each time
			for _, err := range d.Extents(b.Context(), 0, d.Size()) {
				failed = failed || err != nil
			}
			if failed {
				b.Fatal("no extents")
			}
		}
	})
}

// BenchmarkMap asks for the allocation with the places of the bytes.
func BenchmarkMap(b *testing.B) {
	benchmarkImages(b, func(b *testing.B, d source.Disk) {
		b.SetBytes(d.Size())
		for b.Loop() {
			var failed bool
			for _, err := range source.Map(b.Context(), d, 0, d.Size()) {
				failed = failed || err != nil
			}
			if failed {
				b.Fatal("no map")
			}
		}
	})
}
