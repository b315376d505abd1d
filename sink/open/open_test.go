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

	"vddkcp/internal/peer"
	"vddkcp/sink"
	"vddkcp/sink/open"
	"vddkcp/sink/raw"
)

const size = 1<<20 + 5

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
		target, err := open.Plan(t.Context(), path, size, c.o)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if target.String() != "raw file" || target.Address != path || target.Zeroed != (c.o.Preallocation == "") {
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
		{"disk.qcow2", open.Options{}, size, usage, "a multiple of 512"},
		{"disk.qcow2", open.Options{}, sink.UnknownSize, usage, "--size"},
		{"disk.QCOW2", open.Options{ClusterSize: 1000}, 1 << 20, usage, "power of two"},
		{"disk.qcow2", open.Options{Preallocation: raw.PreallocateFull}, 1 << 20, usage, "--preallocation full"},
		{"-", open.Options{Format: "qcow2"}, 1 << 20, usage, "files and block devices only"},
		{"null:", open.Options{Format: "qcow2"}, 1 << 20, usage, "files and block devices only"},
		{"fifo", open.Options{Format: "qcow2"}, 1 << 20, usage, "a stream"},
		{"exists.raw", open.Options{Format: "qcow2"}, 1 << 20, fs.ErrExist, "--force"},
		{"disk.raw", open.Options{Compression: "zlib"}, size, usage, "--compress zlib is for qcow2"},
		{"disk.raw", open.Options{ClusterSize: 65536}, size, usage, "--cluster-size is for qcow2"},
		{"null:", open.Options{BackingName: "base"}, size, usage, "--backing is for qcow2"},
		{"disk.VMDK", open.Options{}, size, open.ErrNotWritten, "format vmdk"},
		{"[ds] vm/disk.vmdk", open.Options{}, size, open.ErrNotWritten, "format vmdk"},
		{"disk.raw", open.Options{Format: "qcow2"}, size, usage, "a multiple of 512"},
		{"-", open.Options{Format: "vmdk"}, size, open.ErrNotWritten, "format vmdk"},
		{"disk.raw", open.Options{Format: "vdi"}, size, usage, `"vdi"`},
		{"nbd://host/export", open.Options{}, sink.UnknownSize, usage, "--size"},
		{"NBDS+unix:///?socket=s&unknown=1", open.Options{}, size, usage, "unknown"},
		{"nbd://host", open.Options{Format: "qcow2"}, size, usage, "files and block devices only"},
		{"disk.qcow", open.Options{}, size, usage, "--format"},
		{"disk.qed", open.Options{}, size, usage, "--format"},
		{"disk.vdi", open.Options{}, size, usage, "--format"},
		{"disk.VHD", open.Options{}, size, usage, "--format"},
		{"disk.vhdx", open.Options{}, size, usage, "--format"},
		{"disk.ova", open.Options{}, size, usage, "--format"},
		{"disk.ovf", open.Options{}, size, usage, "--format"},
		{"exists.raw", open.Options{}, size, fs.ErrExist, "--force"},
		{"exists.raw", open.Options{Force: true, Source: anything}, size, nil, "a file of the source: the same as /the/source"},
		{".", open.Options{}, size, nil, "folder"},
		{"fifo", open.Options{Source: anything}, size, nil, "a file of the source"},
		{"fifo", open.Options{Options: sink.Options{State: []byte("x")}}, size, usage, "stream"},
		{"-", open.Options{Options: sink.Options{State: []byte("x")}}, size, usage, "stream"},
		{"disk.raw", open.Options{}, -2, nil, "-2"},
		{"disk.raw", open.Options{Need: 1 << 60}, size, unix.ENOSPC, "free"},
	} {
		target, err := open.Plan(t.Context(), c.address, c.size, c.o)
		var isUsage *open.UsageError
		switch {
		case err == nil:
			t.Errorf("%q %+v: %v, no error", c.address, c.o, target)
			continue
		case c.want == usage && !errors.As(err, &isUsage), c.want != usage && errors.As(err, &isUsage):
			t.Errorf("%q %+v: %T %v", c.address, c.o, err, err)
		case c.want != nil && c.want != usage && !errors.Is(err, c.want), c.want != open.ErrNotWritten && errors.Is(err, open.ErrNotWritten):
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

func TestNull(t *testing.T) {
	target, err := open.Plan(t.Context(), "null:", size, open.Options{})
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
	target, err := open.Plan(t.Context(), link, size, open.Options{Warn: func(s string) { warnings = append(warnings, s) }})
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
	if _, err := open.Plan(t.Context(), device, 2<<20+1, open.Options{}); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("too small: %v", err)
	}
}

func TestStandardOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	target, err := open.Plan(t.Context(), "-", size, open.Options{Stdout: w})
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
	_, err = open.Plan(t.Context(), "-", size, open.Options{Stdout: f, Source: func(info os.FileInfo) (string, bool) {
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
	target, err := open.Plan(ctx, path, size, open.Options{})
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

func TestQcow2(t *testing.T) {
	dir := t.TempDir()
	for name, o := range map[string]open.Options{
		"disk.qcow2": {}, "disk.QCOW2": {Compression: "zlib", Level: 1}, "disk": {Format: "qcow2", Compression: "none", ClusterSize: 512},
	} {
		path := filepath.Join(dir, name)
		target, err := open.Plan(t.Context(), path, 1<<20, o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if target.String() != "qcow2 file" || !target.Zeroed {
			t.Errorf("%s: %+v", name, target)
		}
		d, err := target.Create(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if head, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(head, []byte("QFI\xfb\x00\x00\x00\x03")) {
			t.Errorf("%s is no qcow2 image: %v", name, err)
		}
	}
}
