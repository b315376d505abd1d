package open_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

const (
	vmdkURI = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"
	rawURI  = "http://en.wikipedia.org/wiki/Byte"
)

// ovf returns a descriptor with a disk for each of the files, called vmdisk1 and so on.
// more has further attributes of each disk.
func ovf(uri string, more string, files ...string) string {
	var references, disks strings.Builder
	for i, f := range files {
		fmt.Fprintf(&references, `<File ovf:href=%q ovf:id="file%d"/>`, f, i+1)
		fmt.Fprintf(&disks, `<Disk ovf:diskId="vmdisk%d" ovf:fileRef="file%[1]d" ovf:format=%q %s/>`, i+1, uri, more)
	}
	return `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References>` + references.String() + `</References><DiskSection><Info/>` + disks.String() + `</DiskSection></Envelope>
`
}

// tarUp makes an archive of files in dir with the tar program.
func tarUp(t testing.TB, dir, archive, format string, files ...string) {
	t.Helper()
	peer.Need(t, "tar")
	peer.Run(t, "tar", append([]string{"-C", dir, "--format", format, "-cf", filepath.Join(dir, archive)}, files...)...)
}

// guest makes disk.raw in dir, 8 MiB of data and holes, and returns it.
func guest(t testing.TB, dir string) []byte {
	t.Helper()
	b := make([]byte, 8<<20)
	r := rand.NewChaCha8([32]byte{1})
	for _, at := range []int{0, 2 << 20, 2<<20 + 65536, 5<<20 + 512, 8<<20 - 4096} {
		r.Read(b[at : at+4096])
	}
	copy(b[3<<20:4<<20], bytes.Repeat([]byte("text that compresses well\n"), 1<<20/26))
	if err := os.WriteFile(filepath.Join(dir, "disk.raw"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAppliances opens disks that qemu-img wrote, in archives that tar wrote and in a
// folder.
func TestAppliances(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	want := guest(t, dir)
	for _, subformat := range []string{"streamOptimized", "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse"} {
		name := subformat + ".vmdk"
		peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", "subformat="+subformat, filepath.Join(dir, "disk.raw"), filepath.Join(dir, name))
		peer.Run(t, "qemu-img", "convert", "-O", "raw", filepath.Join(dir, name), filepath.Join(dir, "want.raw"))
		if again, err := os.ReadFile(filepath.Join(dir, "want.raw")); err != nil || !bytes.Equal(again, want) {
			t.Fatalf("qemu-img reads its own %s otherwise: %v", name, err)
		}
		write(t, dir, map[string]string{"x.ovf": ovf(vmdkURI, `ovf:capacity="8" ovf:capacityAllocationUnits="byte * 2^20"`, name)})
		members, err := filepath.Glob(filepath.Join(dir, subformat+"*"))
		if err != nil || len(members) == 0 {
			t.Fatal(members, err)
		}
		for i, m := range members {
			members[i] = filepath.Base(m)
		}
		addresses := []string{"x.ovf"}
		for _, format := range []string{"ustar", "pax", "gnu"} {
			archive := subformat + "-" + format + ".ova"
			tarUp(t, dir, archive, format, append([]string{"x.ovf"}, members...)...)
			addresses = append(addresses, archive)
		}
		for _, address := range addresses {
			for _, choice := range []string{"", "#1", "#vmdisk1", "#" + name} {
				d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, address)+choice, "")
				if err != nil {
					t.Fatal(err)
				}
				if got := read(t, d); got != string(want) {
					t.Errorf("%s of %s%s: another content", subformat, address, choice)
				}
				described, _ := source.Ability[source.Described](d)
				if info := described.Info(); info.Format != "vmdk" || info.Subformat != subformat || !strings.Contains(info.Chain[0], strings.TrimSuffix(name, ".vmdk")) {
					t.Errorf("%s of %s: %+v", subformat, address, info)
				}
				warned, ok := source.Ability[open.Warned](d)
				if !ok || len(warned.Warnings()) != 0 {
					t.Errorf("%s of %s: warnings %v, %v", subformat, address, warned, ok)
				}
				d.Close()
			}
		}
		if subformat == "monolithicFlat" || subformat == "streamOptimized" {
			t.Run(subformat, func(t *testing.T) {
				sourcetest.Run(t, sourcetest.Config{Content: want, Open: func(ctx context.Context, t testing.TB) source.Disk {
					d, err := new(open.Opener).Open(ctx, filepath.Join(dir, subformat+"-gnu.ova"), "")
					if err != nil {
						t.Fatal(err)
					}
					return d
				}})
			})
		}
	}
}

// TestRawInArchive tests that a raw disk in an archive returns places in the archive,
// and that its holes are those of the archive.
func TestRawInArchive(t *testing.T) {
	peer.Need(t, "fallocate")
	dir := t.TempDir()
	want := guest(t, dir)
	for _, uri := range []string{rawURI, ""} {
		write(t, dir, map[string]string{"x.ovf": ovf(uri, "", "disk.raw")})
		tarUp(t, dir, "x.ova", "ustar", "x.ovf", "disk.raw")
		path := filepath.Join(dir, "x.ova")
		peer.Run(t, "fallocate", "--dig-holes", path)
		sourcetest.Run(t, sourcetest.Config{Content: want, Open: func(ctx context.Context, t testing.TB) source.Disk {
			d, err := new(open.Opener).Open(ctx, path, "")
			if err != nil {
				t.Fatal(err)
			}
			return d
		}})
		d, err := new(open.Opener).Open(t.Context(), path, "")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		in, ok := source.Ability[source.InFile](d)
		if !ok {
			t.Fatal("it is not InFile")
		}
		f, pos, n, ok := in.InFile(2 << 20)
		if !ok || f.Name() != path || pos <= 2<<20 || n != int64(len(want))-2<<20 {
			t.Errorf("InFile: %v, %d, %d, %v", f, pos, n, ok)
		}
		zeros := int64(0)
		for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind == source.Zero {
				zeros += e.Len
			}
		}
		if zeros < 6<<20 {
			t.Errorf("holes of %d bytes", zeros)
		}
	}
}

func TestChoices(t *testing.T) {
	dir := t.TempDir()
	a, b := strings.Repeat("a", 512), strings.Repeat("b", 1024)
	two := ovf(rawURI, `ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"`, "a.img", "b.img")
	write(t, dir, map[string]string{
		"x.ovf": two, "a.img": a, "b.img": b,
		"same.ovf": strings.ReplaceAll(two, "a.img", "b.img"),
		"odd.ovf":  strings.ReplaceAll(strings.ReplaceAll(two, "vmdisk1", "2"), "vmdisk2", "a&#10;b#1 "),
		"none.ovf": strings.ReplaceAll(two, "b.img", "none.img"),
		"many.ovf": ovf(rawURI, "", strings.Fields(strings.Repeat("a.img ", 40))...),
	})
	tarUp(t, dir, "x.ova", "ustar", "x.ovf", "a.img", "b.img")
	tarUp(t, dir, "none.ova", "ustar", "none.ovf", "a.img")
	if err := os.Rename(filepath.Join(dir, "x.ova"), filepath.Join(dir, "#1.ova")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		address string
		want    string   // the content
		choice  bool     // it is a ChoiceError
		fails   []string // parts of the error
	}{
		{address: "x.ovf#1", want: a},
		{address: "x.ovf#2", want: b},
		{address: "x.ovf#vmdisk2", want: b},
		{address: "x.ovf#a.img", want: a},
		{address: "x.ovf", choice: true, fails: []string{"x.ovf has 2 disks: #1 vmdisk1 (1.0 GiB), #2 vmdisk2 (1.0 GiB)"}},
		{address: "x.ovf#", choice: true, fails: []string{"x.ovf has 2 disks"}},
		{address: "x.ovf#0", choice: true, fails: []string{`x.ovf has no disk 0; it has #1 vmdisk1`, "#2 vmdisk2"}},
		{address: "x.ovf#3", choice: true, fails: []string{`x.ovf has no disk 3; it has #1`}},
		{address: "x.ovf#vmdisk", choice: true, fails: []string{`x.ovf has no disk vmdisk; it has #1`}},
		{address: "x.ovf#-1", choice: true, fails: []string{`has no disk -1`}},
		{address: "#1.ova#2", want: b},
		{address: "#1.ova", choice: true, fails: []string{"#1.ova has 2 disks"}},
		{address: "same.ovf#b.img", choice: true, fails: []string{"same.ovf has 2 disks with the name b.img: #1 vmdisk1"}},
		{address: "same.ovf#vmdisk1", want: b},
		{address: "odd.ovf#2", want: b}, // a number first
		{address: "odd.ovf#a\nb#1 ", want: b},
		{address: "odd.ovf", choice: true, fails: []string{`#1 2 (1.0 GiB), #2 "a\nb#1 " (`}},
		{address: "many.ovf", choice: true, fails: []string{"#32 vmdisk32 (capacity unknown), and 8 more"}},
		{address: "none.ovf#1", want: a},
		{address: "none.ova#1", want: a},
		{address: "none.ovf#2", fails: []string{`disk "vmdisk2": open ` + dir + "/none.img: no such file"}},
		{address: "none.ova#2", fails: []string{`disk "vmdisk2": ` + dir + `/none.ova has no file "none.img"`}},
	} {
		d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, c.address), "")
		if c.fails != nil {
			if err == nil {
				d.Close()
			}
			for _, part := range c.fails {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("%s: %v, want %q", c.address, err, part)
				}
			}
			var choice *open.ChoiceError
			if errors.As(err, &choice) != c.choice {
				t.Errorf("%s: %T", c.address, err)
			} else if choice != nil && !strings.HasSuffix(choice.Hint(), "#1'") {
				t.Errorf("%s: hint %s", c.address, choice.Hint())
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.address, err)
			continue
		}
		if got := read(t, d); got != c.want {
			t.Errorf("%s: %.10q", c.address, got)
		}
		d.Close()
	}
}

func TestListing(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"a.vmdk": flat("a.bin"), "a.bin": sector, "c.vhd": sector,
		"x.ovf": `<Envelope><References><File id="a" href="a.vmdk"/><File id="b" href="b.vmdk"/><File id="c" href="c.vhd"/></References>
<DiskSection><Disk diskId="one" capacity="1" capacityAllocationUnits="byte * 2^9" fileRef="a" format="` + vmdkURI + `"/><Disk diskId="two" fileRef="b"/><Disk diskId="three" capacity="8192"/>
<Disk diskId="four" fileRef="c" format="http://go.microsoft.com/fwlink/?LinkId=137171"/></DiskSection></Envelope>`,
	})
	tarUp(t, dir, "x.ova", "pax", "x.ovf", "a.vmdk", "a.bin", "c.vhd")
	for _, name := range []string{"x.ovf", "x.ova", "x.ova#two", "x.ova#9"} {
		o := new(open.Opener)
		disks, err := o.Appliance(t.Context(), parse(t, filepath.Join(dir, name)))
		if err != nil {
			t.Fatal(err)
		}
		if len(disks) != 4 {
			t.Fatalf("%s: %+v", name, disks)
		}
		for i := range disks {
			if err := disks[i].Err; (err != nil) != (i == 1 || i == 3) || i == 1 && !errors.Is(err, fs.ErrNotExist) || i == 3 && !errors.Is(err, open.ErrNotRead) {
				t.Errorf("%s, disk %d: %v", name, i+1, err)
			}
			disks[i].Err = nil
		}
		want := []open.DiskEntry{
			{Number: 1, Name: "one", File: "a.vmdk", Format: "vmdk", Capacity: 512, Size: int64(len(flat("a.bin")))},
			{Number: 2, Name: "two", File: "b.vmdk"},
			{Number: 3, Name: "three", Capacity: 8192},
			{Number: 4, Name: "four", File: "c.vhd", Format: "vhd", Size: 512},
		}
		for i := range want {
			if disks[i] != want[i] {
				t.Errorf("%s: %+v, want %+v", name, disks[i], want[i])
			}
		}
		if files := o.Files(); len(files) != 0 {
			t.Errorf("%s: %v is listed as opened", name, files)
		}
	}
	o := new(open.Opener)
	if disks, err := o.Appliance(t.Context(), parse(t, filepath.Join(dir, "a.vmdk"))); disks != nil || err != nil {
		t.Errorf("no appliance: %v, %v", disks, err)
	}
	if _, err := o.Appliance(t.Context(), parse(t, filepath.Join(dir, "none.ova"))); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := o.Open(t.Context(), filepath.Join(dir, "x.ova#4"), ""); !errors.Is(err, open.ErrNotRead) || !strings.Contains(err.Error(), "VHD") {
		t.Error(err)
	}
	d, err := o.Open(t.Context(), filepath.Join(dir, "x.ova#three"), "")
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, d); got != strings.Repeat("\x00", 8192) {
		t.Errorf("an empty disk: %d bytes", len(got))
	}
	d.Close()
}

// TestReferencesOfAppliances opens images that name other files. An image in an
// archive may name files of the archive only. An image in the folder of a descriptor
// may name the same files as any image.
func TestReferencesOfAppliances(t *testing.T) {
	dir := t.TempDir()
	p := strings.Repeat("p", 512)
	files := map[string]string{
		"secret": sector, "in/x.bin": sector, "in/sub/y.bin": p,
		"in/a.vmdk": flat("x.bin"), "in/abs.vmdk": flat("/etc/passwd"), "in/up.vmdk": flat("../secret"), "in/none.vmdk": flat("none.bin"), "in/link.vmdk": flat("l"),
		"in/sub/b.vmdk": flat("y.bin"), "in/sub/c.vmdk": flat("../x.bin"),
		"in/child.vmdk": child(2, "sub/parent.vmdk", 1), "in/sub/parent.vmdk": base(1), "in/loop.vmdk": child(1, "loop.vmdk", 1),
		"in/q.qcow2": overlay("x.bin", "raw"), "in/over.qcow2": overlay("a.vmdk", "vmdk"), "in/round.qcow2": overlay("sub/back", "qcow2"), "in/sub/back": overlay("../round.qcow2", "qcow2"), "in/self.qcow2": overlay("self.qcow2", "qcow2"),
		"in/l": "-> ../secret",
	}
	disks := []string{"q.qcow2", "over.qcow2", "round.qcow2", "self.qcow2", "a.vmdk", "sub/b.vmdk", "sub/c.vmdk", "child.vmdk", "abs.vmdk", "up.vmdk", "none.vmdk", "loop.vmdk", "link.vmdk", "../secret", "/etc/passwd"}
	files["in/x.ovf"] = ovf("", "", disks...)
	write(t, dir, files)
	in := filepath.Join(dir, "in")
	tarUp(t, in, "x.ova", "gnu", "x.ovf", "x.bin", "sub", "a.vmdk", "abs.vmdk", "up.vmdk", "none.vmdk", "link.vmdk", "child.vmdk", "loop.vmdk", "q.qcow2", "over.qcow2", "round.qcow2", "self.qcow2")
	zeros := strings.Repeat("\x00", 512)
	for _, c := range []struct {
		disk, archive, folder string // the content, or after "!" a part of the error
	}{
		{"a.vmdk", sector, sector},
		{"q.qcow2", sector, sector},
		{"over.qcow2", sector, sector},
		{"round.qcow2", "!the chain of images loops", "!outside of the image's folder"},
		{"self.qcow2", "!the chain of images loops", "!the chain of images loops"},
		{"sub/b.vmdk", p, p},
		{"sub/c.vmdk", sector, "!outside of the image's folder"},
		{"child.vmdk", zeros, zeros},
		{"abs.vmdk", `!x.ova(abs.vmdk) refers to the file "/etc/passwd", but an image in an archive may refer only to files in this archive`, "!outside of the image's folder"},
		{"up.vmdk", `!refers to the file "../secret", but an image in an archive`, "!outside of the image's folder"},
		{"none.vmdk", `!has no file "none.bin"`, "!none.bin: no such file"},
		{"link.vmdk", `!has no file "l"`, "!outside of the image's folder"},
		{"loop.vmdk", "!the chain of images loops", "!the chain of images loops"},
		{"../secret", `!x.ova has no file "../secret"`, "!outside of the image's folder"},
		{"/etc/passwd", `!x.ova has no file "/etc/passwd"`, "!outside of the image's folder"},
	} {
		for address, want := range map[string]string{"x.ova": c.archive, "x.ovf": c.folder} {
			o := new(open.Opener)
			d, err := o.Open(t.Context(), filepath.Join(in, address)+"#"+c.disk, "")
			fails, isError := strings.CutPrefix(want, "!")
			switch {
			case !isError && err != nil:
				t.Errorf("%s of %s: %v", c.disk, address, err)
			case isError && (err == nil || !strings.Contains(err.Error(), fails)):
				t.Errorf("%s of %s: %v, want %q", c.disk, address, err, fails)
			case !isError && read(t, d) != want:
				t.Errorf("%s of %s: another content", c.disk, address)
			}
			if d != nil {
				d.Close()
			}
			for _, f := range o.Files() {
				if f.Path == "/etc/passwd" || filepath.Base(f.Path) == "secret" {
					t.Errorf("%s of %s: %s is listed as opened", c.disk, address, f.Path)
				}
			}
			if address == "x.ova" && len(o.Files()) != 1 {
				t.Errorf("%s of an archive: opened %v", c.disk, o.Files())
			}
		}
	}
	o := &open.Opener{AllowPath: []string{dir}}
	d, err := o.Open(t.Context(), filepath.Join(in, "x.ovf#up.vmdk"), "")
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
	o = &open.Opener{SingleLink: true}
	d, err = o.Open(t.Context(), filepath.Join(in, "x.ova#loop.vmdk"), "")
	if err != nil {
		t.Fatalf("a single link: %v", err)
	}
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil || e.Kind != source.Zero { // an extent ZERO
			t.Errorf("%+v, %v", e, err)
		}
	}
	d.Close()
}

func TestManifestOfAppliance(t *testing.T) {
	dir := t.TempDir()
	sum := func(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }
	x := ovf(vmdkURI, "", "a.vmdk", "b.vmdk", "child.vmdk")
	a := flat("a.bin")
	manifest := "SHA256(x.ovf)= " + sum(x) + "\r\nSHA256(a.vmdk)= " + sum(a) + "\r\nSHA256(a.bin)= " + sum(sector) + "\r\nSHA256(b.vmdk)= " + sum("?") + "\r\nSHA256(child.vmdk)= " + sum(child(2, "parent.vmdk", 1)) + "\n"
	files := map[string]string{"x.ovf": x, "x.mf": manifest, "a.vmdk": a, "a.bin": sector, "b.vmdk": base(1), "child.vmdk": child(2, "parent.vmdk", 1), "parent.vmdk": base(1)}
	write(t, dir, files)
	archive := func() {
		tarUp(t, dir, "x.ova", "ustar", "x.ovf", "x.mf", "a.vmdk", "a.bin", "b.vmdk", "child.vmdk", "parent.vmdk")
	}
	verify := func(address string) error {
		d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, address), "")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		m, ok := source.Ability[open.Manifest](d)
		if !ok {
			t.Fatalf("%s has no manifest to ask", address)
		}
		return m.VerifyManifest(t.Context())
	}
	archive()
	var differs *open.ManifestError
	for _, address := range []string{"x.ova", "x.ovf"} {
		if err := verify(address + "#1"); err != nil {
			t.Errorf("%s: %v", address, err)
		}
		if err := verify(address + "#2"); !errors.As(err, &differs) || !strings.Contains(differs.File, "b.vmdk") {
			t.Errorf("%s: %v", address, err)
		}
		if err := verify(address + "#3"); !errors.Is(err, open.ErrNoManifest) || !strings.Contains(err.Error(), "parent.vmdk") {
			t.Errorf("%s, a parent that is not in the manifest: %v", address, err)
		}
	}
	write(t, dir, map[string]string{"a.bin": strings.Repeat("S", 512)})
	archive()
	for _, address := range []string{"x.ova", "x.ovf"} {
		if err := verify(address + "#1"); !errors.As(err, &differs) || !strings.Contains(differs.File, "a.bin") {
			t.Errorf("%s, an extent that was changed: %v", address, err)
		}
	}
	d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, "a.vmdk"), "")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, ok := source.Ability[open.Manifest](d); ok {
		t.Error("a disk of no appliance has a manifest")
	}
}

// TestApplianceDisagrees opens disks whose format or size differs from the descriptor.
func TestApplianceDisagrees(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"raw.ovf": ovf(vmdkURI, "", "x.img"), "x.img": sector, "v.ovf": ovf(rawURI, "", "v.vmdk"), "v.vmdk": flat("x.img"),
		"qcow2.ovf": ovf("http://www.gnome.org/~markmc/qcow-image-format.html", "", "q"), "q": "QFI\xfb\x00\x00\x00\x03",
		"odd.ovf":   ovf("http://localhost/unknown", `ovf:capacity="1024"`, "v.vmdk"),
		"empty.ovf": ovf("", "", "e"), "e": "", "zero.ova": "", "text.ovf": "hello", "tar.ovf": strings.Repeat("\x00", 1024),
		"gz.ovf": strings.Replace(ovf("", "", "x.img"), "<File ", `<File ovf:compression="gzip" `, 1),
	})
	for address, want := range map[string]string{
		"raw.ovf": "x.img is no VMDK image", "qcow2.ovf": "q: the file has 8 bytes, but a qcow2 header has 72", "empty.ovf": "e: the file is empty", "zero.ova": "the file is empty", "text.ovf": "no XML element", "tar.ovf": "illegal character",
		"gz.ovf": `is compressed (ovf:compression="gzip")`, "raw.ova": "no such file",
	} {
		d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, address), "")
		if err == nil {
			d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", address, err, want)
		}
	}
	for address, want := range map[string]string{"v.ovf": flat("x.img"), "odd.ovf": sector} {
		d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, address), "")
		if err != nil {
			t.Fatal(err)
		}
		if got := read(t, d); got != want {
			t.Errorf("%s: %.20q", address, got)
		}
		warned, _ := source.Ability[open.Warned](d)
		if got := warned.Warnings(); (len(got) == 1) != (address == "odd.ovf") {
			t.Errorf("%s: %q", address, got)
		}
		d.Close()
	}
	// If the format is given, the descriptor is opened as a plain file.
	d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, "raw.ovf"), "raw")
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, d); !strings.HasPrefix(got, "<?xml") {
		t.Errorf("%.20q", got)
	}
	d.Close()
}

// TestApplianceIsClosed tests that no file of an appliance stays open after the
// appliance was closed or could not be opened.
func TestApplianceIsClosed(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"x.ovf": ovf("", "", "a.vmdk", "bad.vmdk", "none", "empty", "up.vmdk"), "a.vmdk": flat("a.bin"), "a.bin": sector,
		"bad.vmdk": flat("none.bin"), "empty": "", "up.vmdk": flat("../x"), "text.ova": "text", "text.ovf": "text",
		"chunks.ovf":  strings.Replace(ovf(rawURI, "", "c", "d"), "<File ", `<File ovf:size="1024" ovf:chunkSize="512" `, -1),
		"c.000000000": sector, "c.000000001": sector, "d.000000000": sector,
	})
	tarUp(t, dir, "x.ova", "ustar", "x.ovf", "a.vmdk", "a.bin", "bad.vmdk", "empty", "up.vmdk")
	for _, address := range []string{"x.ova", "x.ovf", "text.ova", "text.ovf", "chunks.ovf"} {
		for _, choice := range []string{"", "#1", "#2", "#3", "#4", "#5", "#6"} {
			o := new(open.Opener)
			d, err := o.Open(t.Context(), filepath.Join(dir, address)+choice, "")
			if (err == nil) != (choice == "#1" && !strings.HasPrefix(address, "text")) {
				t.Errorf("%s%s: %v", address, choice, err)
			}
			if err == nil {
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			o.Appliance(t.Context(), parse(t, filepath.Join(dir, address)))
		}
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(target, dir) {
			t.Errorf("%s is open", target)
		}
	}
}

// TestShortDisksOfAppliances tests that a raw disk that is shorter than its descriptor
// says is refused as truncated. A VMDK records its own capacity, so a difference is
// only a warning.
func TestShortDisksOfAppliances(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"a.img": sector, "a.bin": sector, "a.vmdk": flat("a.bin"),
		"raw.ovf":    ovf(rawURI, `ovf:capacity="1024"`, "a.img"),
		"probed.ovf": ovf("", `ovf:capacity="1024"`, "a.img"),
		"luks.ovf":   ovf(rawURI, `ovf:capacity="1024"`, "luks.img"), "luks.img": "LUKS\xba\xbe\x00\x02" + strings.Repeat("\x00", 504),
		"vmdk.ovf": ovf(vmdkURI, `ovf:capacity="1024"`, "a.vmdk"),
		"size.ovf": strings.Replace(ovf(vmdkURI, "", "a.vmdk"), `ovf:id=`, `ovf:size="100000" ovf:id=`, 1),
	}
	write(t, dir, files)
	for name, want := range map[string]string{
		"raw": " has 512 bytes, want 1024 according to its capacity", "probed": " has 512 bytes, want 1024 according to its capacity",
		"luks": " has 512 bytes, want 1024 according to its capacity", "vmdk": "", "size": "want 100000 according to its File",
	} {
		tarUp(t, dir, name+".ova", "ustar", name+".ovf", "a.img", "a.bin", "a.vmdk", "luks.img")
		for _, address := range []string{name + ".ovf", name + ".ova"} {
			d, err := new(open.Opener).Open(t.Context(), filepath.Join(dir, address), "")
			if want != "" {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v, want %q", address, err, want)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", address, err)
				continue
			}
			if w, _ := source.Ability[open.Warned](d); len(w.Warnings()) != 1 || !strings.Contains(w.Warnings()[0], "has 1024 bytes") {
				t.Errorf("%s: warnings %q", address, w.Warnings())
			}
			d.Close()
		}
	}
}

func parse(t *testing.T, text string) address.Address {
	t.Helper()
	a, err := address.Parse(text, address.Disk)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
