package raw

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/sink"
)

const benchSize = 256 << 20

// writeDisk makes a whole disk in calls of 1 MiB, of which so many percent are
// data, and the others ZeroAt.
func writeDisk(b *testing.B, d sink.Disk, data []byte, percent int) {
	b.Helper()
	defer d.Abort()
	for i := range benchSize >> 20 {
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

func randomMiB() []byte {
	data := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	return data
}

// BenchmarkFile includes fsync and rename, in the folder for temporary files.
func BenchmarkFile(b *testing.B) {
	data := randomMiB()
	cached := kernel()
	cached.pwriteUncache = func(int, []byte, int64) (int, error) { return 0, unix.EOPNOTSUPP }
	plain := cached
	plain.syncRange = func(int, int64, int64, int) error { return nil }
	for _, c := range []struct {
		name string
		o    Options
		sys  system
	}{
		{"uncached", Options{}, kernel()},
		{"write-back", Options{}, cached},
		{"write-back and drop", Options{DropCache: true}, cached},
		{"nothing early", Options{}, plain},
		{"full", Options{Preallocation: PreallocateFull}, kernel()},
	} {
		for _, percent := range []int{0, 50, 100} {
			b.Run(fmt.Sprintf("%s/%d%%", c.name, percent), func(b *testing.B) {
				path := filepath.Join(b.TempDir(), "disk.raw")
				o := c.o
				o.Force = true
				b.SetBytes(benchSize)
				b.ReportAllocs()
				for b.Loop() {
					d, err := createFile(b.Context(), path, benchSize, o, c.sys)
					if err != nil {
						b.Fatal(err)
					}
					writeDisk(b, d, data, percent)
				}
			})
		}
	}
}

// BenchmarkDevice includes fsync. The device is a loop device on a file in the
// folder for temporary files.
func BenchmarkDevice(b *testing.B) {
	data := randomMiB()
	device := loop(b, benchSize)
	for _, percent := range []int{0, 50, 100} {
		b.Run(fmt.Sprintf("%d%%", percent), func(b *testing.B) {
			b.SetBytes(benchSize)
			b.ReportAllocs()
			for b.Loop() {
				d, err := OpenDevice(b.Context(), device, benchSize, Options{})
				if err != nil {
					b.Fatal(err)
				}
				writeDisk(b, d, data, percent)
			}
		})
	}
}

func BenchmarkNull(b *testing.B) {
	data := randomMiB()
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	d := Null(b.Context(), 1<<20)
	for b.Loop() {
		if _, err := d.WriteAt(data, 0); err != nil {
			b.Fatal(err)
		}
	}
}
