package vmdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

const streamOptimized = "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\nRW %d SPARSE \"x.vmdk\"\n"

// marker returns a marker of the given kind, which does not belong to a grain, and the
// sectors of content that follow it.
func marker(kind uint32, sectors uint64, content ...byte) []byte {
	b := make([]byte, sector*(1+sectors))
	binary.LittleEndian.PutUint64(b, sectors)
	binary.LittleEndian.PutUint32(b[12:], kind)
	copy(b[16:], content)
	return b
}

// insert inserts b into the file before grain g.
func (l *layout) insert(g int64, b []byte) {
	at := l.grains[g]
	l.file = append(l.file[:at:at], append(b, l.file[at:]...)...)
	for n, off := range l.grains {
		if off >= at {
			l.grains[n] += int64(len(b))
		}
	}
}

// bare returns im as a stream without a grain directory.
func bare(im image) image {
	im.compressed, im.bare, im.descriptor = true, true, streamOptimized
	return im
}

// TestMarkers reads streams without a usable grain directory.
func TestMarkers(t *testing.T) {
	small := bare(image{capacity: 4096, entries: 8, grains: grains(65536, 0, 1, 2, 9, 31)})
	full := bare(image{capacity: 2000, grains: map[int64][]byte{}})
	for g := range int64(16) {
		full.grains[g] = random(uint64(g), min(65536, (2000-g*128)*sector))
	}
	tables := func(im image) image { im.bare = false; im.footer = true; return im }
	footer := func(im image) image { im.footer = true; return im }
	nothing := func(*layout) {}
	for _, c := range []struct {
		name   string
		im     image
		change func(*layout)
	}{
		{"gdOffset 0", small, nothing},
		{"footer without a directory", footer(small), nothing},
		{"footer that says at the end", footer(small), func(l *layout) { l.put64(l.header+56, 1<<64-1) }},
		{"footer and gdOffset 0", footer(small), func(l *layout) { l.put64(56, 0) }},
		{"footer and padding", footer(small), func(l *layout) { l.file = append(l.file, make([]byte, 60000)...) }},
		{"footer without a directory, but tables", tables(small), func(l *layout) { l.put64(l.header+56, 0) }},
		{"footer with a directory and gdOffset 0", tables(small), func(l *layout) { l.put64(56, 0) }},
		{"full", full, nothing},
		{"last grain", bare(image{capacity: 200, grains: grains(65536, 0, 1)}), nothing},
		{"no grains", bare(image{capacity: 4096}), nothing},
		{"only the last grain", bare(image{capacity: 4096, grains: grains(65536, 31)}), nothing},
		{"grain of 1 sector", bare(image{grain: 1, capacity: 9001, grains: grains(512, 0, 1, 2, 7, 511, 2047, 2048, 2049, 4096, 6143, 9000)}), nothing},
		{"large grains", bare(image{grain: 2048, capacity: 9000, grains: grains(1<<20, 0, 1, 3)}), nothing},
		{"version 3", bare(image{version: 3, capacity: 4096, grains: grains(65536, 3, 4)}), nothing},
		{"overHead 0", bare(image{tight: true, capacity: 4096, grains: grains(65536, 3, 4)}), func(l *layout) { l.put64(64, 0) }},
		{"zeros before the first marker", small, func(l *layout) {
			l.insert(0, make([]byte, 300*sector))
			l.put64(64, uint64(l.grains[0]/sector))
		}},
		{"tables, directories and progress between", small, func(l *layout) {
			l.insert(1, marker(1, 4, bytes.Repeat([]byte{7}, 4*sector)...))
			l.insert(9, marker(4, 0, 1, 2, 3))
			l.insert(9, marker(4, 0, 1, 2, 3))
			l.insert(9, marker(2, 1))
			l.insert(31, marker(3, 1, []byte("KDMV, not the last one")...))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := c.im.defaults()
			l := im.build()
			c.change(l)
			path := write(t, t.TempDir(), "x.vmdk", l.file)
			d := mustOpen(t, path)
			checkExtents(t, im, d)
			want := im.content()
			if !bytes.Equal(content(t, d), want) {
				t.Fatal("another content")
			}
			// The suite is slow, so it runs only in some cases. The others differ only
			// in how they are opened.
			switch c.name {
			case "gdOffset 0", "full", "grain of 1 sector":
				conforms(t, path, want)
			}
		})
	}
}

// TestStrippedStreams reads streams that qemu and VMware wrote, with and without
// their grain directories.
func TestStrippedStreams(t *testing.T) {
	for name, made := range map[string]func(t *testing.T) (stream, want []byte){
		"qemu-img": func(t *testing.T) (stream, want []byte) {
			dir := t.TempDir()
			disk, path := ext4(t, dir), filepath.Join(dir, "x.vmdk")
			peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", disk, path)
			// The file ends with the last grain and the unused part of the space for
			// it. The end-of-stream marker is missing.
			b := bytes.TrimRight(read(t, path), "\x00")
			return append(b, make([]byte, 2*sector-len(b)%sector)...), read(t, disk)
		},
		"VMware": func(t *testing.T) (stream, want []byte) {
			path := filepath.Join(samples, "streamOptimizedWithMarkers.vmdk")
			peer.NeedFile(t, path)
			return read(t, path), content(t, mustOpen(t, path))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b, want := made(t)
			l := layout{file: b}
			le := binary.LittleEndian
			if le.Uint64(b[56:]) == 0 {
				t.Fatal("no grain directory to strip")
			}
			clear(b[48:64]) // both directories
			l.put32(8, le.Uint32(b[8:])&^2)
			clear(b[sector*(le.Uint64(b[28:])+le.Uint64(b[36:])) : sector*le.Uint64(b[64:])])
			if footer := b[len(b)-2*sector:]; string(footer[:4]) == "KDMV" {
				clear(footer[56:64])
			}
			path := write(t, t.TempDir(), "stripped.vmdk", b)
			d := mustOpen(t, path)
			if !bytes.Equal(content(t, d), want) {
				t.Fatal("another content")
			}
			if size := d.Info().ClusterSize; size != 65536 {
				t.Errorf("ClusterSize %d", size)
			}
		})
	}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCutStream cuts a whole stream at each half sector, and fills it up with
// zeros again in some ways. It must not be read as another content, with the
// zeros for grains that were lost.
func TestCutStream(t *testing.T) {
	im := bare(image{grain: 8, capacity: 200, grains: grains(4096, 0, 1, 5, 20)})
	bareStream := im.build()
	bareFooter := im
	bareFooter.footer = true
	tables := bareFooter
	tables.bare = false
	for _, c := range []struct {
		name string
		l    *layout
		gd   uint64
	}{{"bare", bareStream, 0}, {"bare with a footer", bareFooter.build(), 0}, {"bare with a footer, at the end", bareFooter.build(), 1<<64 - 1}, {"tables", tables.build(), 1<<64 - 1}} {
		c.l.put64(56, c.gd)
		for n := c.l.grains[0]; n < int64(len(c.l.file)); n += 256 {
			for _, fill := range []int64{0, 8, -n & (sector - 1), 4096 - n%4096, int64(len(c.l.file)) - n, 100000} {
				if c.gd == 0 && (n+fill)/sector == (n+sector-1)/sector+1 {
					continue // one sector of zeros: just what a whole stream ends with
				}
				f := &sourcetest.Memory{Bytes: append(c.l.file[:n:n], make([]byte, fill)...)}
				d, err := vmdk.Open(t.Context(), "x.vmdk", f, nowhere, vmdk.Options{})
				if err != nil {
					for _, want := range []string{"truncated", "x.vmdk"} {
						if !strings.Contains(err.Error(), want) {
							t.Errorf("%s: cut at %d: error %q, want %q in it", c.name, n, err, want)
						}
					}
					continue
				}
				// If only zeros were lost, reading may succeed.
				got := make([]byte, d.Size())
				if _, err := d.ReadAt(got, 0); err == nil && !bytes.Equal(got, im.content()) {
					t.Errorf("%s: cut at %d of %d and filled up with %d zeros it reads as another content", c.name, n, len(c.l.file), fill)
				}
				d.Close()
			}
		}
	}
}

// TestBadMarkers opens streams without a grain directory whose markers or headers are
// wrong.
func TestBadMarkers(t *testing.T) {
	im := bare(image{capacity: 3000, grains: grains(65536, 0, 1, 9, 20)})
	footer := im
	footer.footer = true
	for _, c := range []struct {
		name   string
		im     image
		damage func(*layout)
		want   []string
	}{
		{"absurd size", im, func(l *layout) { l.put32(l.grains[9]+8, 1<<31) }, []string{"marker at offset %9", "2147483648 compressed bytes, want 1 to 132096"}},
		{"past the end", im, func(l *layout) { l.put32(l.grains[20]+8, 100000) }, []string{"marker at offset %20", "is followed by 100000 compressed bytes, which would end at", "but the stream ends at offset"}},
		{"over the end", im, func(l *layout) { l.put32(l.grains[20]+8, uint32(int64(len(l.file))-l.grains[20]-12)) }, []string{"marker at offset %20", "but the stream ends at offset"}},
		{"past the capacity", im, func(l *layout) { l.put64(l.grains[20], 3072) }, []string{"marker at offset %20", "at sector 3072, but the extent has 3000"}},
		{"far past the capacity", im, func(l *layout) { l.put64(l.grains[20], 1<<63) }, []string{"marker at offset %20", "at sector 9223372036854775808"}},
		{"no multiple", im, func(l *layout) { l.put64(l.grains[9], 1153) }, []string{"marker at offset %9", "at sector 1153, want a multiple of the grain size of 128"}},
		{"out of order", im, func(l *layout) { l.put64(l.grains[20], 128*8) }, []string{"marker at offset %20", "at sector 1024, but the previous marker, at offset %9, belongs to a grain at sector 1152", "ascend"}},
		{"duplicate", im, func(l *layout) { l.put64(l.grains[9], 128) }, []string{"marker at offset %9", "at sector 128, but the previous marker, at offset %1, belongs to a grain at sector 128"}},
		{"size 0 and no type", im, func(l *layout) { l.put32(l.grains[9]+8, 0); l.put32(l.grains[9]+12, 0x9c78) }, []string{"marker at offset %9", "type 40056, want 0 to 4"}},
		{"size 0 and end of the stream", im, func(l *layout) { l.put64(l.grains[9]+8, 0) }, []string{"marker at offset %9", "first 8 bytes are 0x480, want 0"}},
		{"garbage between", im, func(l *layout) { l.insert(9, bytes.Repeat([]byte("garbage!"), sector/8)) }, []string{"marker at offset", "damaged"}},
		{"zeros between", im, func(l *layout) { l.insert(9, make([]byte, sector)) }, []string{"marker at offset", "the stream ends too early: found the end-of-stream marker (zeros), want this marker at offset"}},
		{"overlapping", im, func(l *layout) { l.put32(l.grains[1]+8, 60000) }, []string{"marker at offset"}},
		{"size too small", im, func(l *layout) { l.put32(l.grains[1]+8, 600) }, []string{"marker at offset"}},
		{"metadata past the end", im, func(l *layout) { l.insert(20, marker(1, 3)); l.put64(l.grains[20]-4*sector, 1<<62) }, []string{"4611686018427387904 sectors of metadata (type 1) follow"}},
		{"metadata over the end", im, func(l *layout) {
			l.insert(20, marker(1, 3))
			l.put64(l.grains[20]-4*sector, uint64((int64(len(l.file))-l.grains[20])/sector+3))
		}, []string{"sectors of metadata (type 1) follow the marker, but "}},
		{"no end", im, func(l *layout) { l.file = l.file[:len(l.file)-sector] }, []string{"no end-of-stream marker", "want zeros"}},
		{"no end and no sector", im, func(l *layout) { l.file = l.file[:len(l.file)-100] }, []string{"no end-of-stream marker", "should end with a sector of zeros at offset", "truncated"}},
		{"two ends", im, func(l *layout) { l.file = append(l.file, make([]byte, sector)...) }, []string{"the stream ends too early: found the end-of-stream marker (zeros), want this marker at offset", "truncated and filled up"}},
		{"no footer", im, func(l *layout) { l.put64(56, 1<<64-1) }, []string{"there is no footer with the offset of the grain directory: found", "in the last sector before the end-of-stream marker, want", "is truncated, or its writer did not close it"}},
		{"no footer and no end", im, func(l *layout) { l.put64(56, 1<<64-1); l.file = l.file[:l.grains[20]] }, []string{"there is no footer with the offset of the grain directory: found", "in the last sector before the end-of-stream marker, want", "is truncated, or its writer did not close it"}},
		{"footer and no end", footer, func(l *layout) { l.file = l.file[:l.header+sector] }, []string{"no end-of-stream marker", "should end with a sector of zeros at offset"}},
		{"footer without a marker", footer, func(l *layout) { copy(l.file[l.header-sector:], l.file[l.header:]) }, []string{"marker at offset"}},
		{"grains before overHead", im, func(l *layout) { l.put64(64, uint64(l.grains[1]/sector)) }, []string{"between the descriptor and the first marker at offset %1 (overHead), want zeros"}},
		{"overHead past the end of the stream", footer, func(l *layout) { l.put64(l.header+64, uint64(len(l.file)/sector)) }, []string{"overHead"}},
		{"descriptor past the end", footer, func(l *layout) { l.put64(l.header+36, 1<<63) }, []string{"descriptor at sector 1 has 9223372036854775808 sectors"}},
		{"zero grains", im, func(l *layout) { l.put32(8, 0x30005) }, []string{"flags 0x30005", "mark grains as zeros"}},
		{"directory past the end", im, func(l *layout) { l.put64(56, 1<<40) }, []string{"grain directory at sector 1099511627776", "truncated"}},
		{"damaged grain", im, func(l *layout) { l.file[l.grains[9]+200] ^= 1 }, []string{"grain at disk offset 589824, stored at offset %9"}},
		{"no markers", im, func(l *layout) { l.put32(8, 0x10001) }, []string{"no grain directory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.im.build()
			at := map[int64]int64{}
			for g, off := range l.grains {
				at[g] = off
			}
			c.damage(l)
			for i := range c.want { // %9 is where grain 9 was
				for _, g := range []int64{20, 9, 1} {
					c.want[i] = strings.ReplaceAll(c.want[i], fmt.Sprintf("%%%d", g), fmt.Sprint(at[g]))
				}
			}
			path := write(t, t.TempDir(), "bad.vmdk", l.file)
			wantError(t, readError(t, path), path, c.want...)
		})
	}
}

// streamed is a file with n markers, one for each step-th grain. Each compressed grain
// takes one sector.
type streamed struct {
	n, step int64
	head    []byte     // the header, the descriptor
	packed  [64][]byte // the grains in turn
}

func newStreamed(n, step int64) *streamed {
	s := &streamed{n: n, step: step}
	capacity := n * step * 128
	for i := range s.packed {
		one := image{capacity: 128, compressed: true, bare: true, grains: map[int64][]byte{0: bytes.Repeat([]byte{byte(i + 1)}, 65536)}}
		l := one.build()
		s.packed[i] = l.file[l.grains[0] : l.grains[0]+sector]
	}
	l := bare(image{capacity: 1}).build()
	copy(l.file[sector:], fmt.Sprintf(streamOptimized, capacity))
	l.put64(12, uint64(capacity))
	s.head = l.file[:len(l.file)-sector]
	return s
}

func (s *streamed) size() int64 { return int64(len(s.head)) + (s.n+1)*sector }

func (s *streamed) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		at := off + int64(n)
		if at < int64(len(s.head)) {
			n += copy(p[n:], s.head[at:])
			continue
		}
		i := (at - int64(len(s.head))) / sector
		var b [sector]byte
		if i < s.n {
			copy(b[:], s.packed[i%int64(len(s.packed))])
			binary.LittleEndian.PutUint64(b[:], uint64(i*s.step*128))
		}
		n += copy(p[n:], b[(at-int64(len(s.head)))%sector:])
	}
	return len(p), nil
}

// TestManyMarkers has more stretches of grains than the index of an extent may
// have, in disks of up to 64 TiB, and more such extents than those of an image.
func TestManyMarkers(t *testing.T) {
	for _, c := range []struct{ n, step, extents int64 }{
		{300_000, 1, 1}, {100_000, 2, 1}, {100_000, 2048, 1}, {70_000, 15_000, 1}, {40_000, 2048, 2},
	} {
		t.Run(fmt.Sprintf("%d of %d, %d times", c.n, c.n*c.step, c.extents), func(t *testing.T) {
			s := newStreamed(c.n, c.step)
			file := &sourcetest.Memory{Content: s, Length: s.size()}
			text := "# Disk DescriptorFile\n"
			for i := range c.extents {
				text += fmt.Sprintf("RW %d SPARSE \"%d\"\n", c.n*c.step*128, i)
			}
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			d, err := vmdk.Open(t.Context(), "x.vmdk", &sourcetest.Memory{Bytes: []byte(text)}, func(context.Context, string, string, string) (source.Disk, error) {
				return file, nil
			}, vmdk.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			runtime.ReadMemStats(&after)
			if n := after.TotalAlloc - before.TotalAlloc; n > 6<<20 && c.extents == 1 {
				t.Errorf("%d bytes allocated to open it", n)
			}
			r := rand.New(rand.NewPCG(1, 1))
			p := make([]byte, 3*65536)
			check := func(off int64) {
				n, err := d.ReadAt(p, off)
				if err != nil && err != io.EOF {
					t.Fatal(err)
				}
				for got := p[:n]; len(got) > 0; {
					g := off / 65536 % (c.n * c.step)
					want := byte(0)
					if g%c.step == 0 {
						want = byte(g/c.step%64 + 1)
					}
					here := min(int64(len(got)), 65536-off%65536)
					if !bytes.Equal(got[:here], bytes.Repeat([]byte{want}, int(here))) {
						t.Fatalf("bytes %d to %d are not all %d", off, off+here, want)
					}
					got, off = got[here:], off+here
				}
			}
			for range 30 {
				grain := r.Int64N(c.n*c.extents) * c.step
				check(max(0, grain*65536-r.Int64N(70000)))
			}
			check(d.Size() - 65536*min(3, c.step))
			var data, last int64
			for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Kind == source.Data {
					data += e.Len
				} else if !e.Absent {
					t.Fatalf("%+v", e)
				}
				last = e.Off
			}
			if data != c.n*c.extents*65536 {
				t.Errorf("%d bytes of data (last extent at %d), want %d", data, last, c.n*c.extents*65536)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if n := int64(after.HeapAlloc) - int64(before.HeapAlloc); n > 4<<20 {
				t.Errorf("%d bytes are held", n)
			}
			runtime.KeepAlive(d)
		})
	}
}
