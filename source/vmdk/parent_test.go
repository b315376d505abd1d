package vmdk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testFolder is a vmdk.Folder of a directory. It counts the files that are opened with
// Peek.
type testFolder struct {
	dir    string
	peeked *int
}

func (f testFolder) Names(context.Context) ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func (f testFolder) Peek(ctx context.Context, name string) (source.Disk, error) {
	*f.peeked++
	return raw.Open(ctx, filepath.Join(f.dir, name))
}

// openIn opens an image, whose parent may be searched in the folder of the image.
func openIn(t testing.TB, path string, single bool) (*vmdk.Disk, error) {
	return openCounting(t, path, single, new(int))
}

// openCounting does what openIn does, and counts the files that are opened with Peek.
func openCounting(t testing.TB, path string, single bool, peeked *int) (*vmdk.Disk, error) {
	t.Helper()
	var open func(ctx context.Context, from, name, format string) (source.Disk, error)
	open = func(ctx context.Context, from, name, format string) (source.Disk, error) {
		path := filepath.Join(filepath.Dir(from), name)
		f, err := raw.Open(ctx, path)
		if err != nil {
			return nil, err
		}
		if format == "raw" {
			return f, nil
		}
		d, err := vmdk.Open(ctx, path, f, open, vmdk.Options{SingleLink: single, Folder: testFolder{filepath.Dir(path), peeked}})
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	x, err := open(t.Context(), path, filepath.Base(path), "vmdk")
	if err != nil {
		return nil, err
	}
	d := x.(*vmdk.Disk)
	t.Cleanup(func() { d.Close() })
	return d, nil
}

const (
	noUUID = "00000000-0000-0000-0000-000000000000"
	uuidA  = "aa000000-0000-4000-8000-000000000001"
	uuidB  = "bb000000-0000-4000-8000-000000000002"
	uuidC  = "cc000000-0000-4000-8000-000000000003"
)

// virtualBox is the descriptor of an image as VirtualBox writes it.
func virtualBox(own, parent, more string) string {
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=1a2b3c4d\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\nRW %%d SPARSE \"x.vmdk\"\n\n#DDB\nddb.adapterType=\"ide\"\nddb.uuid.image=%q\nddb.uuid.parent=%q\n%s", own, parent, more)
}

// TestDifferencing reads images whose parents are named by their UUIDs alone.
func TestDifferencing(t *testing.T) {
	dir := t.TempDir()
	base := image{capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: virtualBox(uuidA, noUUID, "")}
	middle := image{capacity: 3000, grains: map[int64][]byte{1: random(101, 65536), 2: nil}, descriptor: virtualBox(uuidB, "{"+strings.ToUpper(uuidA)+"}", "")}
	top := image{capacity: 3000, grains: map[int64][]byte{9: random(109, 65536)}, descriptor: virtualBox(uuidC, uuidB, "")}
	for name, im := range map[string]image{"base.vmdk": base, "middle.vmdk": middle, "top.vmdk": top} {
		write(t, dir, name, im.build().file)
	}
	write(t, dir, "flat.bin", random(7, 5000))
	write(t, dir, "other.vmdk", []byte("# Disk DescriptorFile\nRW 1 ZERO\n"))
	want := base.content()
	d, err := openIn(t, filepath.Join(dir, "base.vmdk"), false)
	if err != nil || !bytes.Equal(content(t, d), want) || len(d.Info().Chain) != 1 {
		t.Errorf("the base: another content, or %v", err)
	}
	copy(want[65536:], middle.grains[1])
	clear(want[2*65536 : 3*65536])
	copy(want[9*65536:], top.grains[9])
	d, err = openIn(t, filepath.Join(dir, "top.vmdk"), false)
	if err != nil {
		t.Fatal(err)
	}
	if chain := d.Info().Chain; !bytes.Equal(content(t, d), want) || len(chain) != 3 || filepath.Base(chain[2]) != "base.vmdk" {
		t.Errorf("the top: another content, chain %q", chain)
	}
	if w := d.Warnings(); len(w) != 0 {
		t.Errorf("warnings %q", w)
	}
	alone, err := openIn(t, filepath.Join(dir, "top.vmdk"), true)
	if err != nil {
		t.Fatal(err)
	}
	for e, err := range alone.Extents(t.Context(), 0, alone.Size()) {
		if want := e.Off == 9*65536; err != nil || (e.Kind == source.Data) != want || !want && e.Kind != source.Inherited {
			t.Errorf("a single link: %+v, %v", e, err)
		}
	}
}

// TestLongDifferencingChain tests that each file of a folder is inspected only once for
// a whole chain.
func TestLongDifferencingChain(t *testing.T) {
	dir := t.TempDir()
	const n = 200
	for i := range n {
		parent := ""
		if i > 0 {
			parent = fmt.Sprint("id", i-1)
		}
		write(t, dir, fmt.Sprintf("%d.vmdk", i), fmt.Appendf(nil, "# Disk DescriptorFile\nRW 1 ZERO\nddb.uuid.image=\"id%d\"\nddb.uuid.parent=%q\n", i, parent))
	}
	peeked := 0
	d, err := openCounting(t, filepath.Join(dir, fmt.Sprintf("%d.vmdk", n-1)), false, &peeked)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Info().Chain) != n || peeked != n {
		t.Errorf("a chain of %d, %d files looked at, want %d", len(d.Info().Chain), peeked, n)
	}
}

// TestDifferencingIsNeverAlone tests that differencing images are refused if their
// parents cannot be found or have changed.
func TestDifferencingIsNeverAlone(t *testing.T) {
	image := func(descriptor string) []byte {
		return image{capacity: 3000, grains: grains(65536, 3), descriptor: descriptor}.build().file
	}
	child := image(virtualBox(uuidB, uuidA, "ddb.uuid.modification=\"1\"\nddb.uuid.parentmodification=\""+uuidC+"\"\n"))
	for _, c := range []struct {
		name  string
		files map[string][]byte
		want  []string
	}{
		{"no parent", map[string][]byte{"other.vmdk": image(virtualBox(uuidC, noUUID, ""))}, []string{"cannot find the parent, the image with the UUID", uuidA, "none of 2 files named *.vmdk in the image's folder has this UUID"}},
		{"two of the UUID", map[string][]byte{"p.vmdk": image(virtualBox(uuidA, noUUID, "")), "q.vmdk": image(virtualBox(uuidA, noUUID, ""))}, []string{"two files have this UUID", `"p.vmdk"`, `"q.vmdk"`}},
		{"a sibling that can't be read", map[string][]byte{"p.vmdk": []byte("# Disk DescriptorFile\nnonsense\n")}, []string{"1 of them could not be read, the first: p.vmdk: descriptor line 2"}},
		{"a parent that is cut", map[string][]byte{"p.vmdk": image(virtualBox(uuidA, noUUID, ""))[:1000]}, []string{"1 of them could not be read", "truncated"}},
		{"a loop of two", map[string][]byte{"p.vmdk": image(virtualBox(uuidA, uuidB, ""))}, []string{"loops"}},
		{"its own parent", map[string][]byte{"child.vmdk": image(virtualBox(uuidA, uuidA, ""))}, []string{"loops"}},
		{"a parent that was changed", map[string][]byte{"p.vmdk": image(virtualBox(uuidA, noUUID, "ddb.uuid.modification=\""+uuidB+"\"\n"))}, []string{"the ddb.uuid.modification of the parent", "the parent was changed"}},
		{"a UUID that is none", map[string][]byte{"child.vmdk": image(virtualBox(uuidB, "0x", ""))}, []string{`the UUID "0x"`, "none of 1 files"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path := write(t, dir, "child.vmdk", child)
			for name, b := range c.files {
				write(t, dir, name, b)
			}
			var err error
			if strings.Contains(strings.Join(c.want, " "), "loops") {
				_, err = openChain(t, path) // it detects loops, the reader does not
			} else {
				_, err = openIn(t, path, false)
			}
			wantError(t, err, "child.vmdk", c.want...)
			if _, err := open(t, path); err == nil {
				t.Error("it is read without a folder")
			}
			if d, err := openIn(t, path, true); err != nil {
				t.Errorf("a single link: %v", err)
			} else if e := extents(t, d); e[0].Kind != source.Inherited {
				t.Errorf("a single link: %+v", e)
			}
		})
	}
	// A symbolic link to the parent is not a second parent.
	dir := t.TempDir()
	path := write(t, dir, "child.vmdk", child)
	write(t, dir, "p.vmdk", image(virtualBox(uuidA, noUUID, "ddb.uuid.modification=\""+uuidC+"\"\n")))
	if err := os.Symlink("p.vmdk", filepath.Join(dir, "q.vmdk")); err != nil {
		t.Fatal(err)
	}
	if _, err := openIn(t, path, false); err != nil {
		t.Error(err)
	}
}

// TestParentsOfOtherHosts opens children that name their parent by a path of the host
// where they were made.
func TestParentsOfOtherHosts(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	want := random(1, 3<<20)
	peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", write(t, dir, "x.raw", want), dir+"/base.vmdk")
	peer.Run(t, "qemu-img", "create", "-f", "vmdk", "-b", dir+"/base.vmdk", "-F", "vmdk", dir+"/child.vmdk")
	whole := readFile(t, dir+"/child.vmdk")
	old := []byte(`parentFileNameHint="` + dir + `/base.vmdk"`)
	if !bytes.Contains(whole, old) {
		t.Fatal("no hint")
	}
	named := func(hint string) string {
		b := []byte(`parentFileNameHint="` + hint + `"`)
		text := bytes.Replace(whole[sector:21*sector], old, b, 1)
		text = bytes.TrimRight(text, "\x00")
		return write(t, dir, "c.vmdk", slices.Concat(whole[:sector], text, make([]byte, 20*sector-len(text)), whole[21*sector:]))
	}
	for _, hint := range []string{`C:\Users\u\VMs\base.vmdk`, `c:/VMs/base.vmdk`, `\\nas\vms\base.vmdk`, `..\base.vmdk`, "/vmfs/volumes/5f3c/base/base.vmdk", "[ds 1] web/base.vmdk", "[ds] base.vmdk"} {
		path := named(hint)
		d, err := openIn(t, path, false)
		if err != nil {
			t.Errorf("%s: %v", hint, err)
			continue
		}
		if !bytes.Equal(content(t, d), want) {
			t.Errorf("%s: another content", hint)
		}
		checkWarnings(t, d.Warnings(), path, []string{"belongs to another host", `"base.vmdk"`})
	}
	// A parent that exists by its full name is used without a warning.
	path := named("base.vmdk")
	if d, err := openIn(t, path, false); err != nil || len(d.Warnings()) != 0 {
		t.Errorf("%v, %v", d.Warnings(), err)
	}
	for hint, want := range map[string]string{
		`C:\VMs\none.vmdk`: `the image's folder has no file "none.vmdk"`,
		"/srv/base.vmdk":   "no such file",
		`C:\VMs\..`:        "no such file",
		"vsan://5f3c":      `parent "vsan://5f3c" is an object of a vSAN datastore`,
	} {
		path := named(hint)
		_, err := openIn(t, path, false)
		wantError(t, err, path, want)
	}
	b := readFile(t, dir+"/base.vmdk")
	write(t, dir, "base.vmdk", bytes.Replace(b, []byte("CID="), []byte("CID=1"), 1)[:len(b)])
	path = named(`C:\VMs\base.vmdk`)
	_, err := openIn(t, path, false)
	wantError(t, err, path, "the parentCID is")
}

// TestExtentsOfOtherHosts opens descriptors that name extents by paths of other hosts
// or by objects of storage systems.
func TestExtentsOfOtherHosts(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "d-flat.vmdk", random(1, 10*sector))
	for _, c := range []struct{ extent, err, hint string }{
		{`FLAT "C:\VMs\web\d-flat.vmdk" 0`, "no such file", `if the file "d-flat.vmdk" in the folder of`},
		{`VMFS "/vmfs/volumes/5f/web/d-flat.vmdk"`, "no such file", `replace the path in line 2 of the descriptor by the name of the file`},
		{`FLAT "\\nas\vms\e-flat.vmdk" 0`, "no such file", `put the file "e-flat.vmdk" into the folder of`},
		{`VMFS "vsan://5f3c1e5e-0000"`, `extent "vsan://5f3c1e5e-0000" is an object of a vSAN datastore, not a file`, "through its server"},
		{`VMFS "VVOL://naa.600c-rfc4122.0"`, `is a virtual volume (vVol) of a storage array, not a file`, "OVF appliance"},
	} {
		path := write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nRW 10 "+c.extent+"\n"))
		_, err := openIn(t, path, false)
		wantError(t, err, path, "descriptor line 2", c.err)
		var hinted interface{ Hint() string }
		if !errors.As(err, &hinted) || !strings.Contains(hinted.Hint(), c.hint) {
			t.Errorf("%s: %v: no hint %q", c.extent, err, c.hint)
		}
	}
}

// TestOddDescriptors reads unusual descriptors of other writers.
func TestOddDescriptors(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "flat", random(1, 10*sector))
	write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=3735928559\nRW 10 FLAT \"flat\"\n"))
	for _, c := range []struct {
		name, text string
		cid        string
		want       []string // of the warning
	}{
		{"decimal CID", "CID=3735928559\nRW 10 FLAT \"flat\"\n", "deadbeef", nil},
		{"decimal CID of 9 digits", "CID=123456789\nRW 10 FLAT \"flat\"\n", "075bcd15", nil},
		{"8 digits are hexadecimal", "CID=12345678\nRW 10 FLAT \"flat\"\n", "12345678", nil},
		{"0x", "CID=0xDEADBEEF\nRW 10 FLAT \"flat\"\n", "deadbeef", nil},
		{"no CID", "RW 10 FLAT \"flat\"\n", "", nil},
		{"bad CID", "CID=xyz\nRW 10 FLAT \"flat\"\n", "", []string{"descriptor line 2", `CID "xyz"`, "ignored"}},
		{"CID too long", "CID=4294967296\nRW 10 FLAT \"flat\"\n", "", []string{"descriptor line 2", `CID "4294967296"`}},
		{"decimal parentCID without a parent", "CID=1\nparentCID=4294967295\nRW 10 FLAT \"flat\"\n", "00000001", nil},
		{"decimal parentCID", "CID=1\nparentCID=3735928559\nparentFileNameHint=\"base.vmdk\"\nRW 10 FLAT \"flat\"\n", "00000001", nil},
		{"hexadecimal parentCID of a decimal CID", "CID=1\nparentCID=deadbeef\nparentFileNameHint=\"base.vmdk\"\nRW 10 FLAT \"flat\"\n", "00000001", nil},
		{"the end of DOS", "CID=1\r\nRW 10 FLAT \"flat\"\r\n\x1a", "00000001", nil},
		{"two ends of DOS", "CID=1\nRW 10 FLAT \"flat\"\n\x1a\x1a\n", "00000001", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\n"+c.text))
			d := mustOpen(t, path)
			if d.Info().CID != c.cid || d.Size() != 10*sector {
				t.Errorf("CID %q, want %q; size %d", d.Info().CID, c.cid, d.Size())
			}
			checkWarnings(t, d.Warnings(), path, c.want)
			if !strings.Contains(c.text, "Hint") {
				text := strings.Replace(c.text, `10 FLAT "flat"`, `10 SPARSE "x.vmdk"`, 1)
				d := mustOpen(t, write(t, dir, "e.vmdk", image{capacity: 10, descriptor: "# Disk DescriptorFile\n" + text}.build().file))
				if d.Info().CID != c.cid || len(d.Warnings()) != min(len(c.want), 1) {
					t.Errorf("embedded: CID %q, warnings %q", d.Info().CID, d.Warnings())
				}
			}
		})
	}
	// A byte 0x1a in the middle of the text is an error, because the text after it may
	// be an extent.
	path := write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nRW 5 FLAT \"flat\"\n\x1a\nRW 5 FLAT \"flat\"\n"))
	_, err := open(t, path)
	wantError(t, err, path, "line 3", `found "\x1a"`)
}

// TestSectorSizes opens descriptors that record sector sizes for the guest.
func TestSectorSizes(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		text              string
		logical, physical int64
		warnings          int
	}{
		{"", 0, 0, 0},
		{"ddb.logicalSectorSize = \"512\"\nddb.physicalSectorSize = \"512\"\n", 512, 512, 0},
		{"ddb.logicalSectorSize = \"512\"\nddb.physicalSectorSize = \"4096\"\n", 512, 4096, 0},
		{"ddb.logicalSectorSize = \"4096\"\nddb.physicalSectorSize = \"4096\"\n", 4096, 4096, 0},
		{"DDB.LOGICALSECTORSIZE=4096\n", 4096, 0, 0},
		{"ddb.physicalSectorSize = \"4096\"\n", 0, 4096, 0},
		{"ddb.logicalSectorSize = \"0\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"513\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"256\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"131072\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"99999999999999999999\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"-4096\"\n", 0, 0, 1},
		{"ddb.logicalSectorSize = \"large\"\nddb.physicalSectorSize = \"\"\n", 0, 0, 2},
		{"ddb.logicalSectorSize = \"4096\"\nddb.physicalSectorSize = \"512\"\n", 4096, 0, 1},
	} {
		d := mustOpen(t, write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nCID=5\nRW 16 ZERO\n"+c.text)))
		if i := d.Info(); i.GuestSector != c.logical || i.GuestPhysical != c.physical || i.LogicalSector != max(c.logical, 512) {
			t.Errorf("%q: %d, %d, %d", c.text, i.GuestSector, i.GuestPhysical, i.LogicalSector)
		}
		if w := d.Warnings(); len(w) != c.warnings || c.warnings > 0 && !strings.Contains(w[0], "SectorSize is ") {
			t.Errorf("%q: warnings %q", c.text, w)
		}
	}
	// A child whose descriptor records no sector sizes has those of its parent.
	write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=5\nRW 16 ZERO\nddb.logicalSectorSize = \"4096\"\nddb.physicalSectorSize = \"4096\"\n"))
	d := mustOpen(t, write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nparentCID=5\nparentFileNameHint=\"base.vmdk\"\nRW 16 ZERO\n")))
	if i := d.Info(); i.GuestSector != 4096 || i.GuestPhysical != 4096 || i.LogicalSector != 4096 {
		t.Errorf("a child: %+v", i)
	}
}
