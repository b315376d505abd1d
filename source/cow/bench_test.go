package cow

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
)

const benchSize = 256 << 20

func benchFile(b *testing.B) *raw.Disk {
	b.Helper()
	path := filepath.Join(b.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	for off := int64(0); off < benchSize; off += int64(len(p)) {
		rand.NewChaCha8([32]byte{byte(off >> 20)}).Read(p)
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	d, err := raw.Open(b.Context(), path)
	if err != nil {
		b.Fatal(err)
	}
	return d
}

func benchDisk(b *testing.B, o Options) *Disk {
	b.Helper()
	d, err := New(b.Context(), benchFile(b), o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { d.Close() })
	return d
}

func randomReads(b *testing.B, d source.Disk) {
	b.SetBytes(4096)
	b.ReportAllocs()
	var seed atomic.Uint64
	b.RunParallel(func(pb *testing.PB) {
		r := rand.New(rand.NewPCG(seed.Add(1), 1))
		p := make([]byte, 4096)
		for pb.Next() {
			if _, err := d.ReadAt(p, r.Int64N(benchSize/4096)*4096); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkRandomRead reads 4 KiB at random offsets, from a file, and through a layer that
// has some of the blocks.
func BenchmarkRandomRead(b *testing.B) {
	b.Run("without", func(b *testing.B) {
		d := benchFile(b)
		b.Cleanup(func() { d.Close() })
		b.ResetTimer()
		randomReads(b, d)
	})
	for _, present := range []int{0, 50, 100} {
		b.Run(fmt.Sprintf("here=%d%%", present), func(b *testing.B) {
			d := benchDisk(b, Options{})
			p := make([]byte, DefaultBlockSize)
			for i := range int64(benchSize / DefaultBlockSize) {
				if i%2 < int64(present/50) || present == 100 {
					if _, err := d.WriteAt(p, i*DefaultBlockSize); err != nil {
						b.Fatal(err)
					}
				}
			}
			b.ResetTimer()
			randomReads(b, d)
		})
	}
}

// BenchmarkSequentialWrite writes 1 MiB at a time in ascending order, and starts again
// at the end.
func BenchmarkSequentialWrite(b *testing.B) {
	write := func(b *testing.B, writeAt func([]byte, int64) (int, error)) {
		p := make([]byte, 1<<20)
		for i := range p {
			p[i] = byte(i * 7)
		}
		b.SetBytes(int64(len(p)))
		b.ReportAllocs()
		b.ResetTimer()
		for i := range b.N {
			if _, err := writeAt(p, int64(i)<<20%benchSize); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("file", func(b *testing.B) {
		f, err := os.Create(filepath.Join(b.TempDir(), "f"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		write(b, f.WriteAt)
	})
	b.Run("cow", func(b *testing.B) { write(b, benchDisk(b, Options{}).WriteAt) })
}

// BenchmarkRandomWrite writes 4 KiB at random offsets to a layer that is empty at
// first, as a guest that starts to write does. It reports the space that the layer
// uses, for each block size.
func BenchmarkRandomWrite(b *testing.B) {
	for _, block := range []int64{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("block=%dKiB", block>>10), func(b *testing.B) {
			d := benchDisk(b, Options{BlockSize: block})
			r := rand.New(rand.NewPCG(1, 1))
			p := make([]byte, 4096)
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if _, err := d.WriteAt(p, r.Int64N(benchSize/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
