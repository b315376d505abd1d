package vmdk_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// benchmarkImages calls do with a disk of 64 MiB of each kind, with nothing,
// half (every second run of four grains) and all of it allocated.
func benchmarkImages(b *testing.B, do func(b *testing.B, d source.Disk)) {
	const capacity, all = 64 << 20 / sector, 64 << 20 / 65536
	for _, kind := range []string{"flat", "sparse", "stream", "markers", "child", "cowd", "sesparse"} {
		for _, used := range []int{0, 50, 100} {
			b.Run(fmt.Sprintf("%s/%d%%", kind, used), func(b *testing.B) {
				im := image{capacity: capacity, descriptor: monolithic, grains: map[int64][]byte{}}
				for g := range int64(all) {
					if used == 100 || used == 50 && g/4%2 == 0 {
						im.grains[g] = random(uint64(g), 65536)
					}
				}
				dir := b.TempDir()
				switch kind {
				case "flat":
					flat := make([]byte, capacity*sector)
					for g, data := range im.grains {
						copy(flat[g*65536:], data)
					}
					write(b, dir, "flat", flat)
					write(b, dir, "x.vmdk", fmt.Appendf(nil, "# Disk DescriptorFile\nRW %d FLAT \"flat\"\n", capacity))
				case "child":
					write(b, dir, "base.vmdk", im.build().file)
					child := image{capacity: capacity, grains: grains(65536, 5, 500), descriptor: "# Disk DescriptorFile\nCID=9\nparentCID=1234abcd\nparentFileNameHint=\"base.vmdk\"\nRW %d SPARSE \"x.vmdk\"\n"}
					write(b, dir, "x.vmdk", child.build().file)
				case "cowd", "sesparse":
					x := delta{se: kind == "sesparse", capacity: capacity, grains: map[int64][]byte{}}.defaults()
					for g, data := range im.grains {
						for i := range 65536 / (x.grain * sector) {
							x.grains[g*65536/(x.grain*sector)+i] = data[i*x.grain*sector:][:x.grain*sector]
						}
					}
					x.order = nil
					x.described(b, dir, "x.vmdk", "")
				default:
					im.compressed = kind == "stream" || kind == "markers"
					im.bare = kind == "markers"
					write(b, dir, "x.vmdk", im.build().file)
				}
				d := mustOpen(b, filepath.Join(dir, "x.vmdk"))
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

// BenchmarkOpenMarkers opens streams without a grain directory, which reads all
// their markers.
func BenchmarkOpenMarkers(b *testing.B) {
	for _, size := range []int64{600, 32 << 10} { // bytes of a compressed grain
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			im := bare(image{capacity: 1 << 30 / sector, grains: map[int64][]byte{}})
			l := im.build()
			l.file = l.file[:len(l.file)-sector]
			grain := make([]byte, (12+size+sector-1)/sector*sector)
			for g := range int64(1 << 30 / 65536) {
				binary.LittleEndian.PutUint64(grain, uint64(g*128))
				binary.LittleEndian.PutUint32(grain[8:], uint32(size))
				l.file = append(l.file, grain...)
			}
			path := write(b, b.TempDir(), "x.vmdk", append(l.file, make([]byte, sector)...))
			b.SetBytes(int64(len(l.file)))
			b.ReportAllocs()
			for b.Loop() {
				d := mustOpen(b, path)
				d.Close()
			}
		})
	}
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
