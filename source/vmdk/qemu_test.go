package vmdk_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// ext4 makes a real disk of a real directory tree, and returns its path. Its
// size is no multiple of a grain.
func ext4(t testing.TB, dir string) string {
	t.Helper()
	peer.Need(t, "go", "mke2fs", "qemu-img", "qemu-io")
	path := filepath.Join(dir, "disk.raw")
	peer.Run(t, "mke2fs", "-q", "-t", "ext4", "-F", "-d", filepath.Join(goroot(t), "src", "net", "http"), path, "8M")
	if err := os.Truncate(path, 8<<20+5*512); err != nil {
		t.Fatal(err)
	}
	return path
}

// goroot returns the directory of Go's own sources, which every machine has that runs
// the tests.
func goroot(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(peer.Run(t, "go", "env", "GOROOT"))
}

// qemuMap returns the extents that qemu-img map prints, with equal neighbours merged.
func qemuMap(t testing.TB, path string) []source.Extent {
	t.Helper()
	var entries []struct {
		Start, Length       int64
		Depth               int
		Present, Zero, Data bool
	}
	if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "map", "-f", "vmdk", "--output=json", path)), &entries); err != nil {
		t.Fatal(err)
	}
	var all []source.Extent
	for _, q := range entries {
		e := source.Extent{Off: q.Start, Len: q.Length, Depth: q.Depth, Absent: !q.Present}
		if q.Zero {
			e.Kind = source.Zero
		}
		if !q.Zero && !q.Data { // both: a hole in a flat extent's file
			t.Fatalf("qemu-img map: %+v", q)
		}
		if n := len(all); n > 0 && all[n-1].Kind == e.Kind && all[n-1].Depth == e.Depth && all[n-1].Absent == e.Absent {
			all[n-1].Len += e.Len
			continue
		}
		all = append(all, e)
	}
	return all
}

// extents returns the extents of the whole disk.
func extents(t testing.TB, d source.Disk) []source.Extent {
	t.Helper()
	var all []source.Extent
	for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// mappedExtents returns the extents of the whole disk according to Map, without the
// places.
func mappedExtents(t testing.TB, d source.Disk) []source.Extent {
	t.Helper()
	var all []source.Extent
	for m, err := range source.Map(t.Context(), d, 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if n := len(all); n > 0 && all[n-1].Kind == m.Kind && all[n-1].Depth == m.Depth && all[n-1].Absent == m.Absent {
			all[n-1].Len += m.Len
			continue
		}
		all = append(all, m.Extent)
	}
	return all
}

// agrees compares the content and the extents of the image with those that qemu-img
// finds, and returns the content.
func agrees(t *testing.T, path string) (want []byte) {
	t.Helper()
	d := mustOpen(t, path)
	plain := filepath.Join(t.TempDir(), "qemu.raw")
	peer.Run(t, "qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, plain)
	want, err := os.ReadFile(plain)
	if err != nil {
		t.Fatal(err)
	}
	if d.Size() != int64(len(want)) {
		t.Fatalf("size %d, qemu-img has %d", d.Size(), len(want))
	}
	if !bytes.Equal(content(t, d), want) {
		t.Errorf("%s: qemu-img reads another content", path)
	}
	got, wantMap := extents(t, d), qemuMap(t, path)
	if mapped := mappedExtents(t, d); !slices.Equal(mapped, got) {
		t.Errorf("%s: Map has the extents %+v, Extents %+v", path, mapped, got)
	}
	for i := range max(len(got), len(wantMap)) {
		if i >= len(got) || i >= len(wantMap) || got[i] != wantMap[i] {
			t.Fatalf("%s: extent %d of %d and %d: got %+v\nqemu-img map: %+v", path, i, len(got), len(wantMap), tail(got, i), tail(wantMap, i))
		}
	}
	return want
}

func tail(e []source.Extent, i int) []source.Extent { return e[min(i, len(e)):min(i+4, len(e))] }

// conforms runs the suite of source.Disk on the image.
func conforms(t *testing.T, path string, want []byte) {
	t.Helper()
	sourcetest.Run(t, sourcetest.Config{
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			d, err := opener(ctx, "", path, "vmdk")
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Content: want,
	})
}

func TestSubformatsOfQemu(t *testing.T) {
	disk := ext4(t, t.TempDir())
	for _, options := range []string{
		"subformat=monolithicSparse",
		"subformat=monolithicSparse,hwversion=7,adapter_type=lsilogic",
		"subformat=monolithicSparse,compat6,adapter_type=legacyESX",
		"subformat=monolithicSparse,zeroed_grain=on",
		"subformat=monolithicFlat",
		"subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat",
		"subformat=streamOptimized",
	} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk of qemu.vmdk")
			peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", options, disk, path)
			conforms(t, path, agrees(t, path))
		})
	}
}

// TestManyExtents reads disks with extents of 2 GiB and a shorter last one.
func TestManyExtents(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			peer.Run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat="+subformat, path, "5000000000")
			peer.Run(t, "qemu-io", "-f", "vmdk",
				"-c", "write -P 1 0 1M", "-c", "write -P 2 2147400000 200000", "-c", "write -P 3 4294966000 3000", "-c", "write -P 4 4999990000 9728", path)
			d := mustOpen(t, path)
			for i, e := range extents(t, d) {
				if want := qemuMap(t, path); e != want[i] {
					t.Fatalf("extent %d: %+v, qemu-img map: %+v", i, e, want[i])
				}
			}
			for _, w := range []struct {
				pattern byte
				off     int64
				n       int
			}{{1, 0, 1 << 20}, {2, 2147400000, 200000}, {3, 4294966000, 3000}, {4, 4999990000, 9728}} {
				p := make([]byte, w.n+1024)
				if _, err := d.ReadAt(p, max(w.off-512, 0)); err != nil && w.pattern != 4 {
					t.Fatal(err)
				}
				if w.off > 0 {
					if p[511] != 0 {
						t.Errorf("byte %d is %d", w.off-1, p[511])
					}
					p = p[512:]
				}
				if !bytes.Equal(p[:w.n], bytes.Repeat([]byte{w.pattern}, w.n)) || p[w.n] != 0 {
					t.Errorf("%d bytes at %d are not all %d", w.n, w.off, w.pattern)
				}
			}
		})
	}
}

// TestChainOfQemu reads chains of two children over a base of each kind.
func TestChainOfQemu(t *testing.T) {
	dir := t.TempDir()
	disk := ext4(t, dir)
	for _, base := range []string{"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "streamOptimized"} {
		for _, child := range []string{"monolithicSparse", "twoGbMaxExtentSparse", "monolithicSparse,zeroed_grain=on"} {
			t.Run(base+" "+child, func(t *testing.T) {
				dir := t.TempDir()
				path := func(name string) string { return filepath.Join(dir, name+".vmdk") }
				peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+base, disk, path("base"))
				for i, names := range [][2]string{{"base", "middle"}, {"middle", "top"}} {
					peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", names[0]+".vmdk", "-o", "subformat="+child, path(names[1]))
					args := []string{"-f", "vmdk"}
					for k := range 12 {
						off := (i*77777 + k*666666) / 512 * 512
						args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 16*i+k+1, off, 512*(1+k*37)))
					}
					args = append(args, "-c", "write -z 4M 1M", "-c", fmt.Sprintf("write -z %dM 64k", 6+i))
					peer.Run(t, "qemu-io", append(args, path(names[1]))...)
				}
				want := agrees(t, path("top"))
				if base == "monolithicSparse" && child == "twoGbMaxExtentSparse" {
					conforms(t, path("top"), want)
				}
				d := mustOpen(t, path("top"))
				if want := []string{path("top"), path("middle"), path("base")}; fmt.Sprint(d.Info().Chain) != fmt.Sprint(want) {
					t.Errorf("chain %v, want %v", d.Info().Chain, want)
				}
			})
		}
	}
}

// TestShorterParent reads a chain in which each parent is shorter than its child.
func TestShorterParent(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name+".vmdk") }
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", path("a"), "5M")
	peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 1 0 5M", path("a"))
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "a.vmdk", path("b"), "3M")
	peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 2 1M 70000", path("b"))
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "b.vmdk", path("c"), "8M")
	peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 3 6M 100k", path("c"))
	agrees(t, path("c"))
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", "c.vmdk", path("d"), "9M")
	agrees(t, path("d"))
}

func TestInfoOfQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "disk.vmdk")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "hwversion=9,adapter_type=lsilogic", path, "100M")
	info := mustOpen(t, path).Info()
	if len(info.CID) != 8 {
		t.Errorf("CID %q", info.CID)
	}
	info.CID, info.Allocated = "", 0
	want := source.Info{Format: "vmdk", Subformat: "monolithicSparse", AdapterType: "lsilogic", HWVersion: "9", ToolsVersion: "2147483647", LogicalSector: 512, ClusterSize: 65536, Geometry: [3]int64{12, 255, 63}, Chain: []string{path}}
	if fmt.Sprintf("%+v", info) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v\nwant %+v", info, want)
	}
}

var _ source.Opener = opener
var _ interface {
	source.Disk
	source.Identified
	source.Described
	source.InFile
	source.Uncached
} = (*vmdk.Disk)(nil)
