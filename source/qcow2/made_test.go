package qcow2_test

import (
	"bytes"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
)

func TestMade(t *testing.T) {
	for name, im := range map[string]image{
		"plain":       {size: 5<<16 - 100, clusters: some(65536, 0, 2, 3, 4)},
		"version 2":   {size: 5 << 16, version: 2, clusters: some(65536, 0, 2, 3, 4)},
		"two tables":  {size: 200 * 512, bits: 9, clusters: some(512, 0, 63, 64, 65, 199)},
		"zeros":       {size: 1 << 20, clusters: map[int64][]byte{1: nil, 2: random(2, 65536), 3: nil}},
		"zlib":        {size: 5<<16 - 100, packed: "zlib", clusters: some(65536, 0, 1, 2, 4)},
		"zstd":        {size: 5<<16 - 100, packed: "zstd", clusters: some(65536, 0, 1, 2, 4)},
		"zlib 512":    {size: 300*512 + 100, bits: 9, packed: "zlib", clusters: some(512, 0, 1, 2, 64, 65, 199, 300)},
		"zlib 2M":     {size: 9 << 20, bits: 21, packed: "zlib", clusters: some(2<<20, 0, 1, 3, 4)},
		"subclusters": {size: 9 << 16, extended: true, clusters: map[int64][]byte{1: nil, 2: random(2, 65536), 3: nil, 8: random(8, 65536)}},
		"empty":       {size: 1 << 30},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := write(t, t.TempDir(), "x.qcow2", im.build().file)
			if im.size > 64<<20 {
				if got, want := extents(t, mustOpen(t, path)), (source.Extent{Len: im.size, Kind: source.Zero, Absent: true}); len(got) != 1 || got[0] != want {
					t.Errorf("%+v, want %+v", got, want)
				}
				return
			}
			if got := content(t, mustOpen(t, path)); !bytes.Equal(got, im.content()) {
				t.Error("another content")
			}
			switch name {
			case "plain", "zlib", "two tables":
				conforms(t, path, im.content())
			}
		})
	}
}

// TestPackedAnyhow reads compressed clusters in all forms that writers may choose.
func TestPackedAnyhow(t *testing.T) {
	one := random(1, 65536)
	half := one[:30000]
	for name, p := range map[string]struct {
		kind  string
		bytes []byte
	}{
		"stored":        {"zlib", append(append([]byte{0, 0x00, 0x80, 0xff, 0x7f}, one[:32768]...), append([]byte{1, 0x00, 0x80, 0xff, 0x7f}, one[32768:]...)...)},
		"two frames":    {"zstd", append(zstandard(half), zstandard(one[30000:])...)},
		"large window":  {"zstd", zstandard(one, zstd.WithWindowSize(128<<20), zstd.WithSingleSegment(false))},
		"no checksum":   {"zstd", zstandard(one, zstd.WithEncoderCRC(false))},
		"one segment":   {"zstd", zstandard(one, zstd.WithSingleSegment(true))},
		"best":          {"zstd", zstandard(one, zstd.WithEncoderLevel(zstd.SpeedBestCompression))},
		"cut at no end": {"zstd", append(zstandard(one), 0x28, 0xb5, 0x2f)},
	} {
		l := image{size: 3 << 16, packed: p.kind, clusters: some(65536, 0, 2)}.build()
		l.pack(1, p.bytes)
		l.file = append(l.file, zstandard(one)...) // follows in the last sector
		got := content(t, mustOpen(t, write(t, t.TempDir(), "x", l.file)))
		if !bytes.Equal(got, slices.Concat(random(0, 65536), one, random(2, 65536))) {
			t.Errorf("%s: another content", name)
		}
	}
	// The compressed clusters are in another order than in the disk and far from each
	// other, and some entries refer to the same bytes.
	l := image{size: 64 << 16, packed: "zlib", clusters: some(65536, 9)}.build()
	var want []byte
	at := map[int64][2]int64{}
	for i := range int64(64) {
		c := i * 37 % 64
		if i%16 == 15 {
			l.append(nil, 1<<20)
		}
		p := deflated(random(uint64(c), 65536))
		at[c] = [2]int64{l.append(p, 1), int64(len(p))}
		l.packedAt(c, at[c][0], at[c][1])
	}
	l.packedAt(7, at[8][0], at[8][1])
	for c := range uint64(64) {
		if c == 7 {
			c = 8
		}
		want = append(want, random(c, 65536)...)
	}
	if got := content(t, mustOpen(t, write(t, t.TempDir(), "x", l.file))); !bytes.Equal(got, want) {
		t.Error("in another order: another content")
	}
}

// TestSubclusters reads a cluster with subclusters of each kind, over a backing file.
func TestSubclusters(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "base", random(9, 2<<16))
	im := image{size: 2 << 16, extended: true, backing: "base", format: "raw", clusters: some(65536, 0)}
	l := im.build()
	l.put64(l.l2(0)+8, 0x0000_ff00<<32|0x0f00_00f1) // 0, 4-7 and 24-27 are data, 8-15 zeros
	l.put64(l.l2(1)+8, 0x8000_0000<<32)             // 31 is zeros, without a cluster
	want := random(9, 2<<16)
	for _, r := range [][2]int{{0, 1}, {4, 8}, {24, 28}} {
		copy(want[r[0]*2048:r[1]*2048], im.clusters[0][r[0]*2048:])
	}
	clear(want[8*2048 : 16*2048])
	clear(want[63*2048:])
	path := write(t, dir, "x.qcow2", l.file)
	conforms(t, path, want)
	got := extents(t, mustOpen(t, path))
	if w := (source.Extent{Off: 63 * 2048, Len: 2048, Kind: source.Zero}); got[len(got)-1] != w {
		t.Errorf("%+v, want %+v at the end", got, w)
	}
}

// TestNames opens images that name their backing files and data files in every way.
func TestNames(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "base.img", random(1, 65536))
	write(t, dir, "b:c", random(1, 65536))
	write(t, dir, "looks.img", image{size: 65536, clusters: some(65536, 0)}.build().file)
	for _, c := range []struct {
		backing, format, want string // want "": it is read
	}{
		{"base.img", "raw", ""},
		{"file:base.img", "raw", ""},
		{"./b:c", "raw", ""},
		{filepath.Join(dir, "base.img"), "host_device", ""},
		{"base.img", "", ""},
		{"b:c", "raw", `backing file "b:c" uses the protocol "b:"`},
		{"json:{\"driver\":\"raw\"}", "raw", "is a list of options (json:)"},
		{"nbd://host/x", "raw", `"nbd://host/x" uses the protocol "nbd:"`},
		{"https://host/x", "raw", `uses the protocol "https:"`},
		{"file:///etc/passwd", "raw", `uses the protocol "file:"`},
		{"rbd:pool/x", "qcow2", `uses the protocol "rbd:"`},
		{"none", "raw", `backing file "none": open `},
		{"base.img", "qcow2", "no qcow2 image"},
		{"base.img", "vdi", "a vdi image: not supported by this version"},
		{"x.qcow2", "qcow2", "loops"},
		{"/etc/passwd", "raw", "outside of the image's folder"},
		{"base.img\x00", "raw", "has a zero byte"},
	} {
		path := write(t, dir, "x.qcow2", image{size: 65536, backing: c.backing, format: c.format}.build().file)
		d, err := opened(t, path)
		switch {
		case c.want != "":
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s as %s: %v, want %q", c.backing, c.format, err, c.want)
			}
		case err != nil:
			t.Error(err)
		case !bytes.Equal(content(t, d), random(1, 65536)):
			t.Errorf("%s as %s: another content", c.backing, c.format)
		}
	}
	for name, want := range map[string]string{"base.img": "", "nbd:x": `data file "nbd:x" uses the protocol "nbd:"`, "none": `data file "none"`} {
		path := write(t, dir, "x.qcow2", image{size: 65536, data: name, clusters: some(65536, 0)}.build().file)
		d, err := opened(t, path)
		if want != "" {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("data file %s: %v", name, err)
			}
		} else if err != nil || !bytes.Equal(content(t, d), random(1, 65536)) {
			t.Errorf("data file %s: another content, %v", name, err)
		}
	}
	// A backing file whose format is not recorded is read as raw, whatever its content
	// is.
	d := mustOpen(t, write(t, dir, "x.qcow2", image{size: 65536, backing: "looks.img"}.build().file))
	if got := content(t, d); !bytes.HasPrefix(got, []byte("QFI\xfb")) {
		t.Errorf("the backing file was probed: %q", got[:8])
	}
	if w := d.Warnings(); len(w) != 1 || !strings.Contains(w[0], "the file is read as raw") {
		t.Errorf("warnings %q", w)
	}
	// With SingleLink the image opens without its backing file.
	path := write(t, dir, "x.qcow2", image{size: 65536, backing: "none", format: "raw"}.build().file)
	single, err := (&open.Opener{SingleLink: true}).Open(t.Context(), path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer single.Close()
	if got := extents(t, single); len(got) != 1 || got[0].Kind != source.Inherited {
		t.Errorf("%+v", got)
	}
}

func TestDirty(t *testing.T) {
	im := image{size: 1 << 20, features: 1, clusters: some(65536, 3)}
	d := mustOpen(t, write(t, t.TempDir(), "x", im.build().file))
	if !bytes.Equal(content(t, d), im.content()) {
		t.Error("another content")
	}
	if w := d.Warnings(); len(w) != 1 || !strings.Contains(w[0], "dirty bit") {
		t.Errorf("warnings %q", w)
	}
}
