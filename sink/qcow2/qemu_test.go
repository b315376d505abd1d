package qcow2

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source/open"
	sourceraw "github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/transfer"
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

// rawFile writes data at offsets of a sparse file.
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
	src := openRaw(t, from)
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
		for off := e.Start &^ (cluster - 1); e.Data && off < end; off += cluster {
			if n, _ := f.ReadAt(b, off); zero.Is(b[:n]) {
				t.Errorf("%s: the cluster at %d is stored and is all zeros", image, off)
			}
		}
	}
	if info, err := f.Stat(); err != nil || info.Size() != end {
		t.Errorf("%s: the map ends at %d, want %d, %v", image, end, info.Size(), err)
	}
}

// readsAlike reads pieces of an image, at random and at its ends, by our own
// reader and by qemu-io, and holds them against the raw file.
func readsAlike(t testing.TB, from, image string) {
	t.Helper()
	src := openRaw(t, from)
	d, err := new(open.Opener).Open(t.Context(), image, "qcow2")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	size := src.Size()
	if d.Size() != size {
		t.Fatalf("%s: we read %d bytes, want %d", image, d.Size(), size)
	}
	if size == 0 {
		return
	}
	r := rand.New(rand.NewPCG(uint64(size), 2))
	pieces := [][2]int64{{0, 512}, {size - 512, 512}}
	for range 20 {
		off := r.Int64N(size) &^ 511
		pieces = append(pieces, [2]int64{off, min(size-off, 512+r.Int64N(8<<10)&^511)})
	}
	args := []string{"-r", "-f", "qcow2"}
	var want []byte
	for _, p := range pieces {
		args = append(args, "-c", fmt.Sprintf("read -v %d %d", p[0], p[1]))
		b, got := make([]byte, p[1]), make([]byte, p[1])
		if _, err := src.ReadAt(b, p[0]); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if _, err := d.ReadAt(got, p[0]); err != nil && err != io.EOF || !bytes.Equal(got, b) {
			t.Errorf("%s: we read other bytes in [%d, %d), %v", image, p[0], p[0]+p[1], err)
		}
		want = append(want, b...)
	}
	var got []byte
	for line := range strings.Lines(peer.Run(t, "qemu-io", append(args, image)...)) {
		// 00000200:  61 62 63 ...  abc
		_, line, ok := strings.Cut(line, ":  ")
		if !ok {
			continue
		}
		b, err := hex.DecodeString(strings.ReplaceAll(line[:min(len(line), 16*3)], " ", ""))
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got = append(got, b...)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: qemu-io reads other bytes, %d of them, want %d", image, len(got), len(want))
	}
}

var clusterSizes = []int64{512, 4 << 10, 64 << 10, 2 << 20}

func TestQemu(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
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
				if size > 1<<40 && cluster == 4<<10 && compression != Zlib {
					continue // qemu-img takes 20 s each
				}
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
					readsAlike(t, from, image)
					onlyData(t, from, image, max(cluster, 4<<10)) // the engine looks for no smaller zeros
				})
			}
		}
	}
}

func openRaw(t testing.TB, path string) *sourceraw.Disk {
	t.Helper()
	d, err := sourceraw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// An overlay has the clusters that differ from its backing and no others,
// whatever that is and whether it ends before the disk or behind it.
func TestOverlay(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	const mib = 1 << 20
	const size = 24*mib + 512
	base := map[int64][]byte{0: fragments(20, 5*mib), 8 * mib: fragments(21, 4*mib)}
	for _, baseSize := range []int64{size, 10*mib + 1536, 30 * mib} {
		for _, format := range []string{"raw", "qcow2"} {
			for _, cluster := range []int64{4 << 10, 64 << 10, 2 * mib} {
				for _, compression := range []Compression{None, Zlib, Zstd} {
					if format == "qcow2" && (baseSize != size || compression == Zstd) || compression != None && (cluster == 2*mib || baseSize > size) {
						continue
					}
					t.Run(fmt.Sprintf("%d %s %d %s", baseSize, format, cluster, compression), func(t *testing.T) {
						dir := t.TempDir()
						backing := rawFile(t, baseSize, base)
						// The content is that of the backing, except some bytes,
						// zeros, and everything behind the end of the backing.
						content := make([]byte, size)
						f, err := os.Open(backing)
						if err != nil {
							t.Fatal(err)
						}
						f.ReadAt(content, 0)
						f.Close()
						old := bytes.Clone(content)
						content[70<<10]++
						content[9*mib-1]++
						clear(content[2*mib : 3*mib+5000])
						copy(content[20*mib:], fragments(22, mib))
						content[size-1] = 1
						from := rawFile(t, size, map[int64][]byte{0: content})
						name := filepath.Join(dir, "base."+format)
						peer.Run(t, "qemu-img", "convert", "-O", format, backing, name)
						image := filepath.Join(dir, "disk.qcow2")
						o := Options{ClusterSize: cluster, Compression: compression, BackingName: "base." + format, BackingFormat: format}
						o.Backing = openRaw(t, backing)
						write(t, from, image, o)
						verify(t, from, image)

						// The overlay must contain exactly the ranges that differ.
						var extents []struct {
							Start, Length int64
							Depth         int
							Present       bool
						}
						if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "map", "--output=json", image)), &extents); err != nil {
							t.Fatal(err)
						}
						here := make([]bool, (size+cluster-1)/cluster)
						for _, e := range extents {
							for c := e.Start / cluster; e.Depth == 0 && e.Present && c < (e.Start+e.Length+cluster-1)/cluster; c++ {
								here[c] = true
							}
						}
						for c := range here {
							start, end := int64(c)*cluster, min(int64(c+1)*cluster, size)
							if differs := !bytes.Equal(old[start:end], content[start:end]); here[c] != differs {
								t.Errorf("cluster %d: in the overlay %v, differs %v", c, here[c], differs)
							}
						}
					})
				}
			}
		}
	}
}

// A block device may have anything on it before, another image too.
func TestDevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup", "qemu-img")
	old := filepath.Join(t.TempDir(), "old")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=full", old, "20M")
	peer.Run(t, "sh", "-c", "tr '\\0' '\\252' </dev/zero | head -c 12000000 | dd of="+old+" bs=65536 seek=1 conv=notrunc status=none")
	peer.Run(t, "truncate", "-s", "40M", old)
	device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", old))
	t.Cleanup(func() { peer.Run(t, "losetup", "--detach", device) })
	from := rawFile(t, 1<<36, map[int64][]byte{0: fragments(30, 3<<20), 1 << 34: fragments(31, 3<<20)})
	for _, cluster := range clusterSizes[1:] {
		for _, compression := range []Compression{None, Zlib, Zstd} {
			write(t, from, device, Options{ClusterSize: cluster, Compression: compression})
			peer.Run(t, "qemu-img", "check", "-q", "-f", "qcow2", device)
			peer.Run(t, "qemu-img", "compare", "-q", "-F", "qcow2", from, device)
		}
	}
}
