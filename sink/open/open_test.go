package open_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/sink/raw"
)

const size = 1<<20 + 5

// plan plans a target by its address.
func plan(ctx context.Context, text string, size int64, o open.Options) (*open.Target, error) {
	a, err := address.Parse(text, address.Target)
	if err != nil {
		return nil, err
	}
	return open.PlaceOf(a).Plan(ctx, size, o)
}

// targetOf parses the address of a target. A datastore path, which no target is,
// is taken for a path.
func targetOf(t *testing.T, text string) address.Address {
	if strings.HasPrefix(text, "[") {
		return address.Path(text)
	}
	a, err := address.Parse(text, address.Target)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// fill writes a disk to its end: a megabyte of zeros and "12345".
func fill(t *testing.T, d sink.Disk) {
	t.Helper()
	defer d.Abort()
	err := d.ZeroAt(t.Context(), 0, 1<<20)
	if err == nil {
		_, err = d.WriteAt([]byte("12345"), 1<<20)
	}
	if err == nil {
		err = d.Finish(t.Context())
	}
	if err == nil {
		err = d.Publish(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func content() []byte { return append(make([]byte, 1<<20), "12345"...) }

func TestFiles(t *testing.T) {
	for _, c := range []struct {
		name string
		o    open.Options
	}{
		{"disk", open.Options{}}, {"disk.raw", open.Options{}}, {"disk.IMG", open.Options{}}, {"disk.bin", open.Options{}},
		{"disk.qcow2", open.Options{Format: "raw"}}, {"disk.vmdk", open.Options{Format: "raw"}}, {"disk.vhdx", open.Options{Format: "raw"}},
		{"a:b", open.Options{}}, {"nbd:disk", open.Options{}}, {"disk.raw", open.Options{Preallocation: raw.PreallocateFull}},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, c.name)
		target, err := plan(t.Context(), path, size, c.o)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if target.String() != "raw file" || target.Address.String() != path || target.Zeroed != (c.o.Preallocation == "") {
			t.Errorf("%s: %+v", c.name, target)
		}
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: Plan made %v", c.name, entries)
		}
		d, err := target.Create(t.Context())
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		fill(t, d)
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content()) {
			t.Errorf("%s: %d bytes, %v", c.name, len(got), err)
		}
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "exists.raw"), []byte("old"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	anything := func(os.FileInfo) (string, bool) { return "/the/source", true }
	usage := new(open.UsageError)
	for _, c := range []struct {
		address string
		o       open.Options
		size    int64
		want    error // nil: any that is neither
		text    string
	}{
		{"", open.Options{}, size, usage, "empty"},
		{"[ds] vm/vm.vmdk", open.Options{}, 512, usage, "does not write them"},
		{"vddk:/vm.vmdk", open.Options{}, 512, usage, "does not write them"},
		{"disk.qcow2", open.Options{}, sink.UnknownSize, usage, "--size"},
		{"disk.qcow2", open.Options{Preallocation: raw.PreallocateFull}, 512, usage, "--preallocation full"},
		{"disk.qcow2", open.Options{Compress: "zstd:23"}, 512, usage, "1 to 22"},
		{"disk.qcow2", open.Options{ClusterSize: 3 << 10}, 512, usage, "cluster"},
		{"disk.raw", open.Options{ClusterSize: 64 << 10}, 512, usage, "--cluster-size is not valid for raw disks"},
		{"disk.vmdk", open.Options{ClusterSize: 64 << 10}, 512, usage, "--cluster-size is for qcow2 only"},
		{"disk.VMDK", open.Options{}, size, nil, "a multiple of 512 bytes"},
		{"disk.vmdk", open.Options{}, 0, nil, "0 bytes"},
		{"disk.vmdk", open.Options{}, 64<<40 + 512, nil, "64 TiB"},
		{"disk.vmdk", open.Options{}, sink.UnknownSize, usage, "--size"},
		{"disk.vmdk", open.Options{Preallocation: raw.PreallocateFull}, 512, usage, "--preallocation full"},
		{"disk.vmdk", open.Options{Options: sink.Options{State: []byte("x")}}, 512, usage, "cannot be resumed"},
		{"disk.vmdk", open.Options{Compress: "zstd"}, 512, usage, "want zlib"},
		{"disk.vmdk", open.Options{Compress: "none"}, 512, usage, "want zlib"},
		{"disk.vmdk", open.Options{Compress: "zlib:10"}, 512, usage, "1 to 9"},
		{"disk.vmdk", open.Options{Compress: "zlib:"}, 512, usage, "a LEVEL of at least 1"},
		{"disk.vmdk", open.Options{Compress: "lz4"}, 512, usage, "want none, zlib or zstd"},
		{"disk.raw", open.Options{Compress: "zlib"}, size, usage, "--compress zlib is not valid for raw disks"},
		{"nbd://host/export", open.Options{Format: "vmdk"}, 512, usage, "NBD export"},
		{"exists.raw", open.Options{Format: "vmdk"}, 512, fs.ErrExist, "--force"},
		{"exists.raw", open.Options{Format: "qcow2"}, 512, fs.ErrExist, "--force"},
		{"-", open.Options{Format: "vmdk"}, sink.UnknownSize, usage, "--size"},
		{"-", open.Options{Format: "qcow2"}, size, usage, "only to a file or a block device"},
		{"disk.raw", open.Options{Format: "vdi"}, size, usage, `"vdi"`},
		{"nbd://host/export", open.Options{}, sink.UnknownSize, usage, "--size"},
		{"NBDS+unix:///?socket=s&unknown=1", open.Options{}, size, usage, "unknown"},
		{"nbd://host", open.Options{Format: "qcow2"}, size, usage, "only to a file or a block device"},
		{"disk.qcow", open.Options{}, size, usage, "--format"},
		{"disk.qed", open.Options{}, size, usage, "--format"},
		{"disk.vdi", open.Options{}, size, usage, "--format"},
		{"disk.VHD", open.Options{}, size, usage, "--format"},
		{"disk.vhdx", open.Options{}, size, usage, "--format"},
		{"disk.ova", open.Options{}, size, usage, "--format"},
		{"disk.ovf", open.Options{}, size, usage, "--format"},
		{"exists.raw", open.Options{}, size, fs.ErrExist, "--force"},
		{"exists.raw", open.Options{Force: true, Source: anything}, size, nil, "a file of the source (the same as /the/source)"},
		{".", open.Options{}, size, nil, "folder"},
		{"fifo", open.Options{Source: anything}, size, nil, "a file of the source"},
		{"fifo", open.Options{Options: sink.Options{State: []byte("x")}}, size, usage, "stream"},
		{"-", open.Options{Options: sink.Options{State: []byte("x")}}, size, usage, "stream"},
		{"disk.raw", open.Options{}, -2, nil, "-2"},
		{"disk.raw", open.Options{Need: 1 << 60}, size, unix.ENOSPC, "free"},
	} {
		target, err := plan(t.Context(), c.address, c.size, c.o)
		var isUsage *open.UsageError
		switch {
		case err == nil:
			t.Errorf("%q %+v: %v, no error", c.address, c.o, target)
			continue
		case c.want == usage && !errors.As(err, &isUsage), c.want != usage && errors.As(err, &isUsage):
			t.Errorf("%q %+v: %T %v", c.address, c.o, err, err)
		case c.want != nil && c.want != usage && !errors.Is(err, c.want):
			t.Errorf("%q %+v: %v, want %v", c.address, c.o, err, c.want)
		}
		if !strings.Contains(err.Error(), c.text) {
			t.Errorf("%q: %v; want %q in it", c.address, err, c.text)
		}
		if d, err := open.Create(t.Context(), c.address, c.size, c.o); err == nil {
			t.Errorf("%q: Create: no error", c.address)
			d.Abort()
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 2 {
		t.Errorf("made %v", entries)
	}
}

// TestReserve gives planned targets the number of bytes that they will take.
func TestReserve(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for _, c := range []struct {
		address string
		o       open.Options
		full    bool // more bytes than any file system has are refused
	}{
		{"disk.raw", open.Options{}, true},
		{"disk.raw", open.Options{Preallocation: raw.PreallocateFull}, true},
		{"disk.qcow2", open.Options{}, true},
		{"disk.qcow2", open.Options{Compress: "zlib"}, false},
		{"disk.vmdk", open.Options{}, false},
		{"null:", open.Options{}, false},
		{"nbd://host", open.Options{}, false},
	} {
		target, err := plan(t.Context(), c.address, 1<<20, c.o)
		if err != nil {
			t.Fatal(err)
		}
		if err := target.Reserve(1 << 60); errors.Is(err, unix.ENOSPC) != c.full || !c.full && err != nil {
			t.Errorf("%s %+v: reserve 1 EiB: %v", c.address, c.o, err)
		}
		if c.address == "nbd://host" {
			continue
		}
		if d, err := target.Create(t.Context()); c.full != errors.Is(err, unix.ENOSPC) {
			t.Errorf("%s %+v: create after a reservation of 1 EiB: %v", c.address, c.o, err)
		} else if err == nil {
			d.Abort()
		}
		if err := target.Reserve(1 << 20); err != nil {
			t.Errorf("%s %+v: reserve 1 MiB: %v", c.address, c.o, err)
		}
		target.DropCache()
		d, err := target.Create(t.Context())
		if err != nil {
			t.Errorf("%s %+v: %v", c.address, c.o, err)
			continue
		}
		d.Abort()
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("made %v", entries)
	}
}

func TestFormatOf(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo.vmdk")
	if err := unix.Mkfifo(fifo, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ address, format, want string }{
		{"disk", "", "raw"}, {"disk.raw", "", "raw"}, {"disk.vmdk", "", "vmdk"}, {"disk.QCOW2", "", "qcow2"}, {"[ds] vm/DISK.VMDK", "", "vmdk"},
		{"disk.vmdk", "raw", "raw"}, {"disk", "vmdk", "vmdk"}, {"-", "", "raw"}, {"-", "vmdk", "vmdk"}, {"null:", "", "raw"},
		{"nbd://host/disk.vmdk", "", "raw"}, {fifo, "", "raw"}, {fifo, "vmdk", "vmdk"},
	} {
		if got := open.PlaceOf(targetOf(t, c.address)).Format(c.format); got != c.want {
			t.Errorf("FormatOf(%q, %q) = %q, want %q", c.address, c.format, got, c.want)
		}
	}
}

// A VMDK goes wherever a raw stream goes, with what is known of the source.
func TestVMDK(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := unix.Mkfifo("fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	stdout, err := os.Create("stdout")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte)
	go func() { b, _ := os.ReadFile("fifo"); got <- b }()
	var want []byte
	for _, c := range []struct{ address, kind, file string }{
		{"disk.vmdk", "file", "disk.vmdk"}, {"fifo", "stream", "fifo"}, {"-", "stream", "stdout"}, {"null:", "null", ""},
	} {
		o := open.Options{Format: "vmdk", Stdout: stdout, Compress: "zlib:1", Need: 1 << 60}
		o.Info.CID = "12345678"
		target, err := plan(t.Context(), c.address, 1<<20, o)
		if err != nil || target.String() != "vmdk "+c.kind || !target.Zeroed || target.CloneUnit != nil {
			t.Errorf("%s: %+v, %v", c.address, target, err)
			continue
		}
		d, err := target.Create(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(bytes.Repeat([]byte("data"), 16<<10), 1<<16); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		var image []byte
		switch c.file {
		case "":
			continue
		case "fifo":
			image = <-got
		default:
			if image, err = os.ReadFile(c.file); err != nil {
				t.Fatal(err)
			}
		}
		if want == nil {
			want = image
		}
		if !bytes.HasPrefix(image, []byte("KDMV")) || !bytes.Contains(image, []byte("CID=12345678\n")) || !bytes.Equal(image, want) {
			t.Errorf("%s: %d bytes, want %d", c.address, len(image), len(want))
		}
	}
}

func TestNull(t *testing.T) {
	target, err := plan(t.Context(), "null:", size, open.Options{})
	if err != nil || target.Kind != "null" || !target.Zeroed {
		t.Fatalf("%+v, %v", target, err)
	}
	d, err := target.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	fill(t, d)
}

func TestDevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	backing := filepath.Join(t.TempDir(), "device")
	if err := os.WriteFile(backing, bytes.Repeat([]byte{0xAA}, 2<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", backing))
	defer peer.Run(t, "losetup", "--detach", device)

	// A link to a device is one, whatever its name.
	link := filepath.Join(t.TempDir(), "disk.vhdx")
	if err := os.Symlink(device, link); err != nil {
		t.Fatal(err)
	}
	var warnings []string
	target, err := plan(t.Context(), link, size, open.Options{Warn: func(s string) { warnings = append(warnings, s) }})
	if err != nil || target.String() != "raw block device" || target.Zeroed {
		t.Fatalf("%+v, %v", target, err)
	}
	d, err := target.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(warnings) != 1 {
		t.Errorf("warnings %q", warnings)
	}
	fill(t, d)
	want := append(content(), bytes.Repeat([]byte{0xAA}, 1<<20-5)...)
	if got, err := os.ReadFile(device); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the device differs, %v", err)
	}
	if _, err := plan(t.Context(), device, 1<<20, open.Options{Format: "vmdk"}); err == nil || !strings.Contains(err.Error(), "block device") {
		t.Errorf("VMDK: %v", err)
	}
	if _, err := plan(t.Context(), device, 2<<20+1, open.Options{}); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("too small: %v", err)
	}
}

func TestStandardOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	target, err := plan(t.Context(), "-", size, open.Options{Stdout: w})
	if err != nil || target.String() != "raw stream" || target.Zeroed {
		t.Fatalf("%+v, %v", target, err)
	}
	d, err := target.Create(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte)
	go func() { b, _ := io.ReadAll(r); got <- b }()
	fill(t, d)
	// It is still ours.
	if _, err := w.WriteString("more"); err != nil {
		t.Error(err)
	}
	w.Close()
	if b := <-got; !bytes.Equal(b, append(content(), "more"...)) {
		t.Errorf("%d bytes came", len(b))
	}
}

// Standard output that leads into the source's file would destroy it.
func TestStandardOutputIsSource(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "source"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = plan(t.Context(), "-", size, open.Options{Stdout: f, Source: func(info os.FileInfo) (string, bool) {
		source, err := f.Stat()
		return "source", err == nil && os.SameFile(source, info)
	}})
	if err == nil || !strings.Contains(err.Error(), "file of the source") {
		t.Errorf("error %v", err)
	}
}

func TestFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o666); err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte)
	go func() { b, _ := os.ReadFile(path); got <- b }() // opened before or after the target
	d, err := open.Create(t.Context(), path, size, open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, d)
	if b := <-got; !bytes.Equal(b, content()) {
		t.Errorf("%d bytes came", len(b))
	}
}

func TestFIFOWithoutReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o666); err != nil {
		t.Fatal(err)
	}
	why := errors.New("stop")
	ctx, stop := context.WithCancelCause(t.Context())
	target, err := plan(ctx, path, size, open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { _, err := target.Create(ctx); done <- err }()
	stop(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("Create: %v", err)
	}
}

func TestCharacterDevice(t *testing.T) {
	d, err := open.Create(t.Context(), "/dev/null", size, open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fill(t, d)
}

func TestUnknownSize(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	d, err := open.Create(t.Context(), path, sink.UnknownSize, open.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt([]byte("12345"), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.(sink.Sizer).SetSize(5), d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); string(got) != "12345" {
		t.Errorf("%q, %v", got, err)
	}
}
