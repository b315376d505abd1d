package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"vddkcp/internal/peer"
	"vddkcp/internal/zero"
	"vddkcp/sink"
	"vddkcp/source"
	sourceraw "vddkcp/source/raw"
	"vddkcp/transfer"
)

// fragments makes n bytes that compress like files do: words, runs, and pieces
// of noise that do not compress.
func fragments(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	random := rand.NewChaCha8([32]byte{byte(seed)})
	var b []byte
	for len(b) < n {
		size := 100 + r.IntN(40<<10)
		switch r.IntN(6) {
		case 0:
			noise := make([]byte, size*4)
			random.Read(noise)
			b = append(b, noise...)
		case 1:
			b = append(b, bytes.Repeat([]byte{byte(r.IntN(255) + 1)}, size)...)
		case 2: // far back, as far as deflate reaches and farther
			if len(b) > 40<<10 {
				from := len(b) - 20<<10 - r.IntN(16<<10)
				b = append(b, b[from:from+8<<10]...)
				continue
			}
			fallthrough
		default:
			for end := len(b) + size; len(b) < end; {
				b = fmt.Appendf(b, "%s=%d\n", []string{"name", "offset", "size", "kind of extent", "mode"}[r.IntN(5)], r.IntN(300))
			}
		}
	}
	return b[:n]
}

// put writes data at offsets of a sparse file.
func rawFile(t testing.TB, size int64, data map[int64][]byte) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "source.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, b := range data {
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// write copies a raw file into an image, with the engine.
func write(t testing.TB, from, to string, o Options) {
	t.Helper()
	src, err := sourceraw.Open(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	plan, err := transfer.NewPlan(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Create(t.Context(), to, src.Size(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := transfer.Copy(t.Context(), src, d, plan, transfer.Options{Backing: o.Backing, Reflink: transfer.ReflinkNever}); err != nil {
		t.Fatal(err)
	}
}

// verify holds an image against qemu-img: that its tables are right, that no
// cluster leaks, and that it has the content of the raw file.
func verify(t testing.TB, from, image string) {
	t.Helper()
	peer.Run(t, "qemu-img", "check", "-q", image)
	peer.Run(t, "qemu-img", "compare", "-q", from, image)
}

// onlyData checks that all clusters that an image has are no zeros.
func onlyData(t testing.TB, from, image string, cluster int64) {
	t.Helper()
	var extents []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "map", "--output=json", image)), &extents); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, cluster)
	end := int64(0)
	for _, e := range extents {
		end = e.Start + e.Length
		for off := e.Start; e.Data && off < end; off += cluster {
			if n, _ := f.ReadAt(b, off); zero.Is(b[:n]) {
				t.Errorf("%s: the cluster at %d is stored and is all zeros", image, off)
			}
		}
	}
	if info, err := f.Stat(); err != nil || info.Size() != end {
		t.Errorf("%s: the map ends at %d, want %d, %v", image, end, info.Size(), err)
	}
}

var clusterSizes = []int64{512, 4 << 10, 64 << 10, 2 << 20}

func TestQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	const mib = 1 << 20
	for name, disk := range map[string]struct {
		size int64
		data map[int64][]byte
		huge int64 // of clusters of 512 bytes
	}{
		"empty":                    {size: 64 * mib},
		"nothing":                  {size: 0},
		"full":                     {size: 12 * mib, data: map[int64][]byte{0: fragments(1, 12*mib)}},
		"sparse":                   {size: 40 * mib, data: map[int64][]byte{0: fragments(2, 100<<10), 3*mib + 512: fragments(3, 3*mib), 20*mib - 512: fragments(4, 1024), 40*mib - 512: fragments(5, 512)}},
		"odd":                      {size: 3*mib + 5*512, data: map[int64][]byte{0: fragments(6, 512), 3*mib + 4*512: fragments(7, 512)}},
		"odd, in the last cluster": {size: 5*mib + 3*512, data: map[int64][]byte{4 * mib: fragments(8, mib+3*512)}},
		"5 TiB":                    {size: 5 << 40, huge: 8 << 30, data: map[int64][]byte{0: fragments(9, 512), 1 << 32: fragments(10, mib), 1<<32 + 3<<30: fragments(11, 70<<10)}},
	} {
		for _, cluster := range clusterSizes {
			size := disk.size
			if cluster == 512 && disk.huge > 0 {
				size = disk.huge
			}
			for _, compression := range []Compression{None, Zlib, Zstd} {
				t.Run(fmt.Sprintf("%s %d %s", name, cluster, compression), func(t *testing.T) {
					data := disk.data
					if size > 1<<40 {
						data = map[int64][]byte{size - 512: fragments(12, 512)}
						for off, b := range disk.data {
							data[off] = b
						}
					}
					from := rawFile(t, size, data)
					image := filepath.Join(t.TempDir(), "disk.qcow2")
					write(t, from, image, Options{ClusterSize: cluster, Compression: compression})
					verify(t, from, image)
					onlyData(t, from, image, max(cluster, 4<<10)) // the engine looks for no smaller zeros
				})
			}
		}
	}
}

func openRaw(t testing.TB, path string) source.Disk {
	t.Helper()
	d, err := sourceraw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

var _ = errors.Join
var _ context.Context
var _ sink.Disk
