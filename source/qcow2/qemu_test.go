package qcow2_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/qcow2"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// opened opens an image as vddkcp does, so that a chain may have images of all formats.
func opened(t testing.TB, path string) (source.Disk, error) {
	t.Helper()
	d, err := new(open.Opener).Open(t.Context(), path, "qcow2")
	if err == nil {
		t.Cleanup(func() { d.Close() })
	}
	return d, err
}

func mustOpen(t testing.TB, path string) *qcow2.Disk {
	t.Helper()
	d, err := opened(t, path)
	if err != nil {
		t.Fatal(err)
	}
	return d.(*qcow2.Disk)
}

// content reads the whole disk.
func content(t testing.TB, d source.Disk) []byte {
	t.Helper()
	all, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// qemuMapping is an object that qemu-img map prints.
type qemuMapping struct {
	Start, Length       int64
	Depth               int
	Present, Zero, Data bool
	Offset              *int64
}

func qemuMap(t testing.TB, path string) []qemuMapping {
	t.Helper()
	var all, merged []qemuMapping
	if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "map", "-f", "qcow2", "--output=json", path)), &all); err != nil {
		t.Fatal(err)
	}
	for _, q := range all {
		if n := len(merged); n > 0 && merged[n-1].like(q) {
			merged[n-1].Length += q.Length
			continue
		}
		merged = append(merged, q)
	}
	return merged
}

// like reports whether n differs from q only in its range and its place in the file.
func (q qemuMapping) like(n qemuMapping) bool {
	return q.Depth == n.Depth && q.Present == n.Present && q.Zero == n.Zero
}

func (q qemuMapping) extent() source.Extent {
	e := source.Extent{Off: q.Start, Len: q.Length, Depth: q.Depth, Absent: !q.Present}
	if q.Zero {
		e.Kind = source.Zero
	}
	return e
}

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

// checkPlaces compares the places of the bytes that Map returns with those of
// qemu-img, and the extents that Map returns with those of Extents.
func checkPlaces(t *testing.T, path string, d source.Disk, want []source.Extent) {
	t.Helper()
	places := map[int64]int64{} // of the byte at the start of each piece of qemu's
	var all []qemuMapping
	if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "map", "-f", "qcow2", "--output=json", path)), &all); err != nil {
		t.Fatal(err)
	}
	for _, q := range all {
		places[q.Start] = -1
		if q.Offset != nil && (!q.Zero || q.Data) {
			places[q.Start] = *q.Offset
		}
	}
	var got []source.Extent
	for m, err := range source.Map(t.Context(), d, 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if n := len(got); n > 0 && got[n-1].Kind == m.Kind && got[n-1].Depth == m.Depth && got[n-1].Absent == m.Absent {
			got[n-1].Len += m.Len
		} else {
			got = append(got, m.Extent)
		}
		if want, ok := places[m.Off]; ok && m.Kind == source.Data && (m.File == nil) != (want < 0) || m.File != nil && want >= 0 && m.Pos != want {
			t.Fatalf("%s: %+v, qemu-img has it at %d", path, m, want)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s: Map has the extents %+v, Extents %+v", path, got, want)
	}
}

// agrees compares the content and the allocation of the image with those that
// qemu-img finds.
func agrees(t *testing.T, path string) (want []byte) {
	t.Helper()
	d := mustOpen(t, path)
	plain := filepath.Join(t.TempDir(), "qemu.raw")
	peer.Run(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, plain)
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
	if len(want) == 0 {
		return want // of which qemu-img map prints an empty extent
	}
	for i := range max(len(got), len(wantMap)) {
		if i >= len(got) || i >= len(wantMap) || got[i] != wantMap[i].extent() {
			t.Fatalf("%s: extent %d of %d and %d: got %+v\nqemu-img map: %+v", path, i, len(got), len(wantMap), got[min(i, len(got)):min(i+4, len(got))], wantMap[min(i, len(wantMap)):min(i+4, len(wantMap))])
		}
	}
	checkPlaces(t, path, d, got)
	return want
}

// conforms runs the suite of source.Disk on the image.
func conforms(t *testing.T, path string, want []byte) {
	t.Helper()
	sourcetest.Run(t, sourcetest.Config{
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			d, err := new(open.Opener).Open(ctx, path, "qcow2")
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
		Content: want,
	})
}

// ext4 makes a real disk of a real directory tree, and returns its path. Its
// size is no multiple of a cluster.
func ext4(t testing.TB, dir string) string {
	t.Helper()
	peer.Need(t, "mke2fs", "qemu-img", "qemu-io")
	path := filepath.Join(dir, "disk.raw")
	peer.Run(t, "mke2fs", "-q", "-t", "ext4", "-F", "-d", filepath.Join(peer.Tree(t), "net", "http"), path, "6M")
	if err := os.Truncate(path, 6<<20+5*512); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestImagesOfQemu reads images of an ext4 disk, with some writes of qemu-io, that
// qemu-img wrote with different options and cluster sizes.
func TestImagesOfQemu(t *testing.T) {
	disk := ext4(t, t.TempDir())
	for _, c := range []struct {
		options  string
		compress bool
		conforms bool
	}{
		{"cluster_size=512,compat=0.10", false, false},
		{"cluster_size=512", true, false},
		{"cluster_size=512,lazy_refcounts=on", false, false},
		{"cluster_size=4k,compat=0.10", true, false},
		{"cluster_size=4k,compression_type=zstd", true, true},
		{"cluster_size=64k", false, false},
		{"cluster_size=64k,compat=0.10", true, false},
		{"cluster_size=64k", true, false},
		{"cluster_size=64k,compression_type=zstd", true, false},
		{"cluster_size=64k,compression_type=zstd,lazy_refcounts=on", false, false},
		{"cluster_size=64k,preallocation=metadata", false, true},
		{"cluster_size=64k,preallocation=falloc", false, false},
		{"cluster_size=64k,preallocation=full,compat=0.10", false, false},
		{"cluster_size=16k,extended_l2=on", false, true},
		{"cluster_size=64k,extended_l2=on", true, false},
		{"cluster_size=2M,extended_l2=on,compression_type=zstd", true, false},
		{"cluster_size=64k,extended_l2=on,preallocation=metadata", false, false},
		{"cluster_size=64k,data_file=DATA", false, true},
		{"cluster_size=16k,data_file=DATA,extended_l2=on", false, false},
		{"cluster_size=64k,data_file=DATA,data_file_raw=on", false, false},
		{"cluster_size=2M", false, false},
		{"cluster_size=2M,refcount_bits=1", true, false},
		{"cluster_size=2M,compression_type=zstd", true, false},
		{"cluster_size=2M,preallocation=metadata", false, false},
	} {
		t.Run(fmt.Sprint(c.options, " ", c.compress), func(t *testing.T) {
			t.Parallel()
			dir, err := os.MkdirTemp("", "qcow2") // that of the test has commas in its name
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(dir) })
			path, data := filepath.Join(dir, "disk of qemu.qcow2"), filepath.Join(dir, "data.raw")
			args := []string{"convert", "-f", "raw", "-O", "qcow2", "-o", strings.ReplaceAll(c.options, "DATA", data)}
			if c.compress {
				args = append(args, "-c")
			}
			if strings.Contains(c.options, "DATA") {
				peer.Run(t, "qemu-img", "create", "-q", "-f", "raw", data, "0")
			}
			peer.Run(t, "qemu-img", append(args, disk, path)...)
			agrees(t, path)
			write := []string{"-f", "qcow2", "-d", "unmap",
				"-c", "write -P 1 0 512", "-c", "write -P 2 1000448 70k", "-c", "write -P 3 3M 2560", "-c", "discard 4M 256k",
				"-c", "write -P 9 4100k 3k", "-c", "write -P 4 6M 2560"}
			if !strings.Contains(c.options, "0.10") {
				write = append(write, "-c", "write -z 2M 300k", "-c", "write -z -u 2500k 64k", "-c", "write -P 7 2100k 4k")
			}
			peer.Run(t, "qemu-io", append(write, path)...)
			want := agrees(t, path)
			if c.conforms {
				conforms(t, path, want)
			}
		})
	}
}

// TestSizes reads disks whose sizes are not multiples of a cluster, and an empty disk.
func TestSizes(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	t.Parallel()
	for _, size := range []int64{0, 512, 65536 + 512, 3<<20 + 1536} {
		for _, options := range []string{"cluster_size=64k", "cluster_size=512,compression_type=zstd"} {
			path := filepath.Join(t.TempDir(), "x.qcow2")
			peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, fmt.Sprint(size))
			if size > 0 {
				peer.Run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -c -P 5 0 %d", min(size, 2<<20)), "-c", fmt.Sprintf("write -P 6 %d 512", size-512), path)
			}
			if got := agrees(t, path); int64(len(got)) != size {
				t.Errorf("%d bytes, want %d", len(got), size)
			}
		}
	}
}

// TestLargeDisk reads a disk of 2 TiB that has a few bytes of data in distant places.
func TestLargeDisk(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "x.qcow2")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "2T")
	peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 1T 1M", "-c", "write -P 2 2147483583k 65k", "-c", "write -z 700G 100M", path)
	d := mustOpen(t, path)
	got, want := extents(t, d), qemuMap(t, path)
	for i := range want {
		if i >= len(got) || got[i] != want[i].extent() {
			t.Fatalf("got %+v, want %+v", got, want)
		}
	}
	p := make([]byte, 66<<10)
	if _, err := d.ReadAt(p, 2<<40-66<<10); err != nil && err != io.EOF || p[1023] != 0 || !bytes.Equal(p[1024:], bytes.Repeat([]byte{2}, 65<<10)) {
		t.Errorf("the end of the disk is another, %v", err)
	}
}

// TestChains reads chains of two overlays over a base of each format.
func TestChains(t *testing.T) {
	dir := t.TempDir()
	disk := ext4(t, dir)
	for _, base := range []string{"raw", "qcow2", "qcow2 -c", "qcow2 -o extended_l2=on", "vmdk", "vmdk -o subformat=streamOptimized"} {
		for _, overlay := range []string{"cluster_size=4k", "cluster_size=64k,extended_l2=on", "compat=0.10"} {
			t.Run(base+" "+overlay, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				path := func(name string) string { return filepath.Join(dir, name) }
				format := strings.Fields(base)[0]
				args := append([]string{"convert", "-f", "raw", "-O"}, strings.Fields(base)...)
				peer.Run(t, "qemu-img", append(args, disk, path("base"))...)
				for i, names := range [][2]string{{"base", "middle"}, {"middle", "top"}} {
					peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", names[0], "-o", overlay, path(names[1]))
					format = "qcow2"
					args := []string{"-f", "qcow2"}
					for k := range 8 {
						off := (i*77777 + k*666666) / 512 * 512
						args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 16*i+k+1, off, 512*(1+k*37)))
					}
					if overlay != "compat=0.10" {
						args = append(args, "-c", "write -z 4M 1M", "-c", fmt.Sprintf("write -z %dk 68k", 5000+100*i), "-c", fmt.Sprintf("discard %dM 64k", i+1))
					}
					args = append(args, "-c", "write -c -P 99 3M 64k")
					peer.Run(t, "qemu-io", append(args, path(names[1]))...)
				}
				want := agrees(t, path("top"))
				if base == "vmdk" && overlay == "cluster_size=4k" || base == "raw" && strings.Contains(overlay, "extended") {
					conforms(t, path("top"), want)
				}
				d := mustOpen(t, path("top"))
				if want := []string{path("top"), path("middle"), path("base")}; fmt.Sprint(d.Info().Chain) != fmt.Sprint(want) {
					t.Errorf("chain %v, want %v", d.Info().Chain, want)
				}
				single, err := (&open.Opener{SingleLink: true}).Open(t.Context(), path("top"), "")
				if err != nil {
					t.Fatal(err)
				}
				defer single.Close()
				for _, e := range extents(t, single) {
					if deeper := e.Kind == source.Inherited; e.Depth != 0 || e.Absent || deeper != (slices.ContainsFunc(extents(t, d), func(x source.Extent) bool { return x.Off <= e.Off && e.Off < x.End() && x.Depth > 0 })) {
						t.Errorf("alone: %+v", e)
					}
				}
			})
		}
	}
}

// TestShorterBacking reads a chain in which each backing file is shorter than its
// overlay.
func TestShorterBacking(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	create := func(name string, args ...string) {
		peer.Run(t, "qemu-img", append([]string{"create", "-q", "-f", "qcow2"}, append(args[:len(args)-1:len(args)-1], path(name), args[len(args)-1])...)...)
	}
	create("a", "5M")
	peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 5M", path("a"))
	create("b", "-F", "qcow2", "-b", "a", "3000k")
	peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 70000", path("b"))
	create("c", "-F", "qcow2", "-b", "b", "8M")
	peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 3 6M 100k", path("c"))
	agrees(t, path("c"))
	create("d", "-F", "qcow2", "-b", "c", "9M")
	agrees(t, path("d"))
}

// TestWarnings opens an image with internal snapshots, whose current state is read, and
// an image that is in use.
func TestWarnings(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "x.qcow2")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	if w := mustOpen(t, path).Warnings(); len(w) != 0 {
		t.Errorf("warnings %q", w)
	}
	for i := range 2 {
		peer.Run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P %d 0 300k", i+1), path)
		peer.Run(t, "qemu-img", "snapshot", "-c", fmt.Sprint("s", i), path)
	}
	peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 100k 100k", path)
	agrees(t, path)
	if w := mustOpen(t, path).Warnings(); len(w) != 1 || !strings.Contains(w[0], "2 internal snapshots") {
		t.Errorf("warnings %q", w)
	}
	top := filepath.Join(filepath.Dir(path), "top")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "x.qcow2", top)
	if w := mustOpen(t, top).Warnings(); len(w) != 1 || !strings.Contains(w[0], "x.qcow2") {
		t.Errorf("warnings of the backing file: %q", w)
	}
}

func TestInfo(t *testing.T) {
	peer.Need(t, "qemu-img")
	path := filepath.Join(t.TempDir(), "x.qcow2")
	data := filepath.Join(filepath.Dir(path), "data.raw")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=128k,compression_type=zstd,extended_l2=on,data_file="+data, path, "100M")
	info := mustOpen(t, path).Info()
	info.Allocated = 0
	want := source.Info{
		Format: "qcow2", Subformat: "version 3, extended L2 entries, zstd, data file", LogicalSector: 512, ClusterSize: 128 << 10,
		Chain: []string{path}, Parts: []source.Part{{Kind: "DATA", Size: 100 << 20, Path: data}},
	}
	if fmt.Sprintf("%+v", info) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v\nwant %+v", info, want)
	}
}

var _ interface {
	source.Disk
	source.Identified
	source.Described
	source.InFile
	source.Mapped
	source.Uncached
	open.Warned
} = (*qcow2.Disk)(nil)

// createEncrypted makes an encrypted image with qemu-img. QEMU measures how fast it
// derives a LUKS key, and gives up when its processor time does not advance as it
// expects, which happens now and then on a virtual machine.
func createEncrypted(t *testing.T, format, path string) {
	t.Helper()
	options := "encrypt.format=" + format + ",encrypt.key-secret=s"
	if format == "luks" {
		options += ",encrypt.iter-time=10"
	}
	for attempt := 1; ; attempt++ {
		out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=geheim",
			"-o", options, path, "1M").CombinedOutput()
		if err == nil {
			return
		}
		if attempt == 20 || !bytes.Contains(out, []byte("Unable to get accurate CPU usage")) {
			t.Fatalf("qemu-img create, attempt %d: %v\n%s", attempt, err, out)
		}
	}
}

// TestEncryption opens images that qemu-img encrypted, which are refused.
func TestEncryption(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, format := range []string{"luks", "aes"} {
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		createEncrypted(t, format, path)
		if _, err := opened(t, path); err == nil || !strings.Contains(err.Error(), "encrypted with "+strings.ToUpper(format)) {
			t.Errorf("%s: %v", format, err)
		}
	}
}
