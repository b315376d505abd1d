package vmdk_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/vmdk"
	"github.com/vddkcp/vddkcp/source"
	rawreader "github.com/vddkcp/vddkcp/source/raw"
	reader "github.com/vddkcp/vddkcp/source/vmdk"
)

const grain = 64 << 10

// layer is a piece of a sparse disk.
type layer struct {
	off     int64
	content []byte
}

// noise is n bytes that do not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// text is n bytes that compress well.
func text(n int) []byte {
	return bytes.Repeat([]byte("The quick brown fox jumps over the lazy dog. "), n/45+1)[:n]
}

// sparse makes a raw disk, at the path it returns.
func sparse(t testing.TB, dir string, size int64, layers ...layer) string {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if _, err := f.WriteAt(l.content, l.off); err != nil {
			t.Fatal(err)
		}
	}
	return f.Name()
}

// fill writes the raw disk src to d, whole grains at a time and one after
// another, through NewEncoding and Place where encoder is set.
func fill(ctx context.Context, src source.Disk, d sink.Disk, encoder bool) error {
	e, _ := sink.Ability[sink.Encoder](d)
	encoding := e.NewEncoding()
	b, enc := make([]byte, grain), []byte(nil)
	for x, err := range source.Covered(ctx, src, 0, src.Size()) {
		if err != nil {
			return err
		}
		// A grain that a data extent and a hole share is read once, for the data.
		for off := x.Off &^ (grain - 1); x.Kind == source.Data && off < x.End(); off += grain {
			b := b[:min(grain, src.Size()-off)]
			if _, err := src.ReadAt(b, off); err != nil && len(b) == grain {
				return err
			}
			switch {
			case zero.Is(b):
				err = d.ZeroAt(ctx, off, int64(len(b)))
			case encoder:
				var plain bool
				if enc, plain, err = encoding.Encode(enc[:0], b, off); err == nil {
					err = e.Place(off, enc, plain)
				}
			default:
				_, err = d.WriteAt(b, off)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// write makes an image of the raw disk at path, beside it.
func write(t testing.TB, path string, encoder bool, o vmdk.Options) string {
	t.Helper()
	src, err := rawreader.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	target := strings.TrimSuffix(path, ".raw") + ".vmdk"
	out, err := raw.CreateFile(t.Context(), target, sink.UnknownSize, raw.Options{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	d, err := vmdk.Create(t.Context(), out, target, src.Size(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	err = fill(t.Context(), src, d, encoder)
	if err == nil {
		err = d.Finish(t.Context())
	}
	if err == nil {
		err = d.Publish(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func openImage(t testing.TB, path string) source.Disk {
	t.Helper()
	f, err := rawreader.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	d, err := reader.Open(t.Context(), path, f, nil, reader.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// shapes are disks of all kinds.
var shapes = []struct {
	name   string
	size   int64
	layers []layer
}{
	{"one sector", 512, []layer{{0, text(512)}}},
	{"one empty sector", 512, nil},
	{"one grain", grain, []layer{{0, noise(grain)}}},
	{"a sector more than a grain", grain + 512, []layer{{0, noise(grain + 512)}}},
	{"a sector less than a grain", grain - 512, []layer{{0, text(grain - 512)}}},
	{"empty", 100 << 20, nil},
	{"full of what compresses", 40 << 20, []layer{{0, text(40 << 20)}}},
	{"full of what does not", 33<<20 + 5*512, []layer{{0, noise(33<<20 + 5*512)}}},
	{"a table exactly", 32 << 20, []layer{{0, text(1)}, {32<<20 - 1, text(1)}}},
	{"a sector more than a table", 32<<20 + 512, []layer{{32 << 20, text(512)}}},
	{"sparse", 130<<20 + 512, []layer{{1 << 20, noise(300 << 10)}, {64<<20 - 100, text(200)}, {100 << 20, noise(1)}, {130 << 20, text(512)}}},
	{"5 TiB mostly empty", 5<<40 + 7*512, []layer{{0, text(4096)}, {1<<40 + 12345, noise(100000)}, {5 << 40, noise(7 * 512)}}},
}

func TestQemuReads(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, shape := range shapes {
		for _, encoder := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s encoder %v", shape.name, encoder), func(t *testing.T) {
				src := sparse(t, t.TempDir(), shape.size, shape.layers...)
				image := write(t, src, encoder, vmdk.Options{})
				compare(t, src, image, shape.size, shape.layers)
				peer.Run(t, "qemu-img", "check", "-f", "vmdk", image)
				var info struct {
					Size     int64 `json:"virtual-size"`
					Specific struct {
						Data struct {
							Type      string `json:"create-type"`
							ParentCID uint32 `json:"parent-cid"`
							Extents   []struct {
								Size        int64 `json:"virtual-size"`
								ClusterSize int64 `json:"cluster-size"`
								Compressed  bool
							}
						}
					} `json:"format-specific"`
				}
				if err := json.Unmarshal([]byte(peer.Run(t, "qemu-img", "info", "-f", "vmdk", "--output=json", image)), &info); err != nil {
					t.Fatal(err)
				}
				got := info.Specific.Data
				if info.Size != shape.size || got.Type != "streamOptimized" || got.ParentCID != 0xffffffff ||
					len(got.Extents) != 1 || got.Extents[0].ClusterSize != grain || !got.Extents[0].Compressed || got.Extents[0].Size != shape.size {
					t.Errorf("qemu-img info: %+v", info)
				}
			})
		}
	}
}

// compare lets qemu-img compare the disks: of a huge one, which it would take
// minutes for, the surroundings of the layers.
func compare(t *testing.T, src, image string, size int64, layers []layer) {
	t.Helper()
	if size < 1<<30 {
		peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", src, image)
		return
	}
	for _, l := range layers {
		start := max(l.off&^(grain-1)-40<<20, 0)
		window := fmt.Sprintf("driver=raw,offset=%d,size=%d,file.", start, min((l.off+80<<20)&^511, size)-start)
		peer.Run(t, "qemu-img", "compare", "--image-opts", window+"driver=file,file.filename="+src,
			window+"driver=vmdk,file.file.driver=file,file.file.filename="+image)
	}
}

// TestReads checks that source/vmdk reads what was written, both through the grain
// directory and by the markers alone, as a reader of a stream does.
func TestReads(t *testing.T) {
	for _, shape := range shapes {
		if shape.size > 1<<30 {
			continue
		}
		t.Run(shape.name, func(t *testing.T) {
			src := sparse(t, t.TempDir(), shape.size, shape.layers...)
			want, err := os.ReadFile(src)
			if err != nil {
				t.Fatal(err)
			}
			image := write(t, src, true, vmdk.Options{})
			bare := withoutDirectory(t, image)
			for _, path := range []string{image, bare} {
				d := openImage(t, path)
				got := make([]byte, d.Size())
				if _, err := d.ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s has another content", filepath.Base(path))
				}
				data := int64(0)
				for x, err := range source.Covered(t.Context(), d, 0, d.Size()) {
					if err != nil {
						t.Fatal(err)
					}
					if x.Kind == source.Data {
						data += x.Len
					}
				}
				if wantData := dataBytes(want); data != wantData {
					t.Errorf("%s has %d bytes of data, want %d: grains of zeros are not stored", filepath.Base(path), data, wantData)
				}
			}
		})
	}
}

// dataBytes are those of the grains that are not zeros.
func dataBytes(b []byte) (n int64) {
	for off := 0; off < len(b); off += grain {
		if g := b[off:min(off+grain, len(b))]; !zero.Is(g) {
			n += int64(len(g))
		}
	}
	return n
}

// withoutDirectory makes a copy of an image whose header and footer do not tell
// where its grain directory is.
func withoutDirectory(t testing.TB, image string) string {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	footer := b[len(b)-1024:]
	if string(footer[:4]) != "KDMV" {
		t.Fatalf("no footer: %q", footer[:4])
	}
	for i := range 8 {
		b[56+i], footer[56+i] = 0xff, 0xff
	}
	path := strings.TrimSuffix(image, ".vmdk") + "-bare.vmdk"
	if err := os.WriteFile(path, b, 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}

// libvmdk is the second referee, and reads what the descriptor has.
func TestLibvmdkReads(t *testing.T) {
	peer.Need(t, "vmdkinfo")
	for _, shape := range shapes {
		t.Run(shape.name, func(t *testing.T) {
			image := write(t, sparse(t, t.TempDir(), shape.size, shape.layers...), false, vmdk.Options{})
			out := peer.Run(t, "vmdkinfo", image)
			for _, want := range []string{"Stream optimized", fmt.Sprintf("(%d bytes)", shape.size)} {
				if !strings.Contains(out, want) {
					t.Errorf("vmdkinfo does not say %q:\n%s", want, out)
				}
			}
		})
	}
}
