package vmdk

import (
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	reader "github.com/vddkcp/vddkcp/source/vmdk"
)

// written is what a reader finds in the descriptor of an image.
func written(t *testing.T, name string, size int64, info source.Info) source.Info {
	t.Helper()
	var m sinktest.Memory
	out, err := m.Create(t.Context(), sink.UnknownSize, sink.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Create(t.Context(), out, name, size, Options{Options: sink.Options{Info: info}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := d.(sink.Verifiable).Reopen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if r.Size() != size {
		t.Errorf("size %d, want %d", r.Size(), size)
	}
	return r.(*reader.Disk).Info()
}

func TestDescriptorKeepsWhatIsKnown(t *testing.T) {
	const gib = 1 << 30
	known := source.Info{
		AdapterType: "buslogic", HWVersion: "14", ToolsVersion: "10346", UUID: "60 00 C2 9f", CID: "0000abcd",
		Geometry: [3]int64{1000, 16, 63},
	}
	got := written(t, "x.vmdk", gib, known)
	if got.Subformat != "streamOptimized" || got.AdapterType != known.AdapterType || got.HWVersion != known.HWVersion ||
		got.ToolsVersion != known.ToolsVersion || got.UUID != known.UUID || got.CID != known.CID || got.Geometry != known.Geometry {
		t.Errorf("%+v, want what %+v has", got, known)
	}
	for given, want := range map[string]string{
		"IDE": "ide", "LegacyESX": "legacyESX", "lsilogic": "lsilogic", "nvme": "lsilogic", "": "lsilogic", "ide\"\nevil=\"1": "lsilogic",
	} {
		if got := written(t, "x.vmdk", gib, source.Info{AdapterType: given}).AdapterType; got != want {
			t.Errorf("adapter %q became %q, want %q", given, got, want)
		}
	}
	// Foreign text can't leave its quotes, nor can much of it be carried over.
	hostile := source.Info{
		HWVersion: "4\"\nRW 1 ZERO\n", ToolsVersion: "many", UUID: "a\nCID=00000001", CID: "wrong", Geometry: [3]int64{1 << 40, 255, 63},
	}
	got = written(t, "x.vmdk", gib, hostile)
	if got.HWVersion != "4" || got.ToolsVersion != "2147483647" || got.UUID != "" || got.Geometry != [3]int64{512, 128, 32} {
		t.Errorf("%+v", got)
	}
	if got := written(t, "x.vmdk", gib, source.Info{UUID: strings.Repeat("x", 65), HWVersion: strings.Repeat("1", 65)}); got.UUID != "" || got.HWVersion != "4" {
		t.Errorf("%+v", got)
	}
}

// An unknown CID is another one each time, and never that of no parent.
func TestCID(t *testing.T) {
	seen := map[string]bool{}
	for _, cid := range []string{"", "ffffffff", "123456789", "-1", "", ""} {
		got := written(t, "x.vmdk", 512, source.Info{CID: cid}).CID
		if got == "ffffffff" || seen[got] {
			t.Errorf("CID %q became %s, seen before: %v", cid, got, seen[got])
		}
		seen[got] = true
	}
}

// Sector sizes are recorded where one of them is not 512.
func TestSectorSizes(t *testing.T) {
	for _, c := range []struct{ logical, physical, wantLogical, wantPhysical int64 }{
		{0, 0, 0, 0}, {512, 512, 0, 0}, {512, 0, 0, 0}, {4096, 4096, 4096, 4096}, {4096, 0, 4096, 0}, {512, 4096, 512, 4096}, {0, 4096, 0, 4096},
		{4096, 512, 4096, 0}, {513, 1, 0, 0}, {-4096, 1 << 40, 0, 0},
	} {
		got := written(t, "x.vmdk", 1<<20, source.Info{GuestSector: c.logical, GuestPhysical: c.physical})
		if got.GuestSector != c.wantLogical || got.GuestPhysical != c.wantPhysical {
			t.Errorf("%d, %d became %d, %d", c.logical, c.physical, got.GuestSector, got.GuestPhysical)
		}
	}
}

func TestGeometry(t *testing.T) {
	const gib = 1 << 30 / sectorSize
	for _, c := range []struct {
		sectors int64
		adapter string
		known   [3]int64
		want    [3]int64
	}{
		{1, "lsilogic", [3]int64{}, [3]int64{1, 64, 32}},
		{gib - 1, "lsilogic", [3]int64{}, [3]int64{1023, 64, 32}},
		{gib, "lsilogic", [3]int64{}, [3]int64{512, 128, 32}},
		{2 * gib, "lsilogic", [3]int64{}, [3]int64{261, 255, 63}},
		{40 * gib, "buslogic", [3]int64{}, [3]int64{5221, 255, 63}},
		{4 * gib, "ide", [3]int64{}, [3]int64{8322, 16, 63}},
		{100 * gib, "ide", [3]int64{}, [3]int64{16383, 16, 63}},
		{MaxSize / sectorSize, "lsilogic", [3]int64{}, [3]int64{8555179, 255, 63}},
		{2048, "lsilogic", [3]int64{1, 255, 63}, [3]int64{1, 255, 63}}, // rounded up
		{16065, "lsilogic", [3]int64{2, 255, 63}, [3]int64{7, 64, 32}}, // more than there is
		{gib, "lsilogic", [3]int64{10, 256, 63}, [3]int64{512, 128, 32}},
		{gib, "lsilogic", [3]int64{10, 255, 64}, [3]int64{512, 128, 32}},
		{gib, "lsilogic", [3]int64{-1, 16, 63}, [3]int64{512, 128, 32}},
	} {
		cylinders, heads, perTrack := geometry(c.sectors, c.adapter, c.known)
		if got := [3]int64{cylinders, heads, perTrack}; got != c.want {
			t.Errorf("%d sectors, %s, %v: %v, want %v", c.sectors, c.adapter, c.known, got, c.want)
		}
	}
}

func TestExtentName(t *testing.T) {
	for name, want := range map[string]string{
		"/a/b/web 01.vmdk": "web 01.vmdk", "Ünï.VMDK": "Ünï.VMDK", "-": "disk.vmdk", "standard output": "disk.vmdk", "null:": "disk.vmdk",
		"a\".vmdk": "disk.vmdk", "a\nb.vmdk": "disk.vmdk", "\xff.vmdk": "disk.vmdk", strings.Repeat("x", 300) + ".vmdk": "disk.vmdk",
	} {
		if got := extentName(name); got != want {
			t.Errorf("%q became %q, want %q", name, got, want)
		}
	}
}
