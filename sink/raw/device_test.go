package raw

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/sink"
)

func TestDeviceRefused(t *testing.T) {
	const size = 1 << 20
	peer.NeedRoot(t)
	for _, c := range []struct {
		name  string
		setup func(t *testing.T, device string, o *Options) (path string)
		size  int64
		want  error
		text  string
	}{
		{"too small", func(t *testing.T, device string, o *Options) string { return device }, size + 1, nil,
			"too small: it has 1048576 bytes (1.0 MiB), and the disk has 1048577"},
		{"in use", func(t *testing.T, device string, o *Options) string {
			f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
			return device
		}, size, unix.EBUSY, "the device is mounted, or in use"},
		{"read-only", func(t *testing.T, device string, o *Options) string {
			return loop(t, size, "--read-only")
		}, size, nil, "is read-only"},
		{"source", func(t *testing.T, device string, o *Options) string {
			o.Source = func(info os.FileInfo) (string, bool) {
				source, err := os.Stat(device)
				return device, err == nil && os.SameFile(source, info)
			}
			return device
		}, size, nil, "is the source"},
		{"over the source's file", func(t *testing.T, device string, o *Options) string {
			backing, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file")
			if err != nil {
				t.Fatal(err)
			}
			o.Source = func(info os.FileInfo) (string, bool) {
				source, err := os.Stat(strings.TrimSpace(string(backing)))
				return "image.qcow2", err == nil && os.SameFile(source, info)
			}
			return device
		}, size, nil, "shares blocks with the source image.qcow2"},
		{"not a device", func(t *testing.T, device string, o *Options) string {
			path := filepath.Join(t.TempDir(), "file")
			put(t, path, "")
			return path
		}, size, nil, "not a block device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var o Options
			device := loop(t, size)
			path := c.setup(t, device, &o)
			d, openErr := OpenDevice(t.Context(), path, c.size, o)
			if openErr == nil {
				d.Abort()
			}
			for call, err := range map[string]error{"CheckDevice": CheckDevice(path, c.size, o), "OpenDevice": openErr} {
				if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
					t.Errorf("%s: %v; want %v with %q", call, err, c.want, c.text)
				}
			}
			hasContent(t, device, bytes.Repeat([]byte{0xAA}, size))
		})
	}
}

func TestMountedDeviceRefused(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "mke2fs")
	device := loop(t, 4<<20)
	peer.Run(t, "mke2fs", "-q", device)
	dir := t.TempDir()
	peer.Run(t, "mount", device, dir)
	defer peer.Run(t, "umount", dir)
	if _, err := OpenDevice(t.Context(), device, 1<<20, Options{}); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "mounted") {
		t.Errorf("error %v", err)
	}
}

func TestLargerDeviceWarns(t *testing.T) {
	const size = 1 << 20
	device := loop(t, size)
	for _, diskSize := range []int64{size, size - 777, sink.UnknownSize} {
		var warnings []string
		o := Options{Warn: func(s string) { warnings = append(warnings, s) }}
		d, err := OpenDevice(t.Context(), device, diskSize, o)
		if err != nil {
			t.Fatal(err)
		}
		if diskSize == sink.UnknownSize {
			if err := d.(sink.Sizer).SetSize(size - 777); err != nil {
				t.Fatal(err)
			}
		}
		d.Abort()
		if diskSize == size && len(warnings) > 0 {
			t.Errorf("a disk of the same size: %q", warnings)
		} else if diskSize != size && (len(warnings) != 1 || !strings.Contains(warnings[0], "last 777 bytes, from offset 1047799 on")) {
			t.Errorf("a disk of %d bytes: %q", diskSize, warnings)
		}
	}
}

// A stream may turn out to be longer than the device.
func TestDeviceTooSmallForStream(t *testing.T) {
	const size = 1 << 20
	d, err := OpenDevice(t.Context(), loop(t, size), sink.UnknownSize, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if _, err := d.WriteAt(make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte{1}, size); err == nil || !strings.Contains(err.Error(), "too small: it has 1048576 bytes") {
		t.Errorf("error %v", err)
	}
}

func TestTargetIsZero(t *testing.T) {
	const size = 1 << 20
	device := loop(t, size)
	for _, resume := range []int64{0, 512} {
		o := Options{TargetIsZero: true}
		if resume > 0 {
			o.State, o.Resume = state(size), resume
		}
		d, err := OpenDevice(t.Context(), device, size, o)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if got := d.(sink.Zeroed).ZeroedFrom(resume); got != (resume == 0) {
			t.Errorf("ZeroedFrom after a resume at %d: %v", resume, got)
		}
		if err := errors.Join(d.ZeroAt(t.Context(), resume, size-resume), d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{0xAA}, size)
		if resume > 0 { // the earlier run left something there
			clear(want[resume:])
		}
		hasContent(t, device, want)
	}
}

func TestDeviceFaults(t *testing.T) {
	const size = 1 << 20
	device := loop(t, size)
	for _, c := range []struct {
		name  string
		fault func(*system)
		text  string
	}{
		{"write", func(s *system) { failWrites(s, unix.EIO) }, "at offset 0: input/output error"},
		{"fsync", func(s *system) { s.fsync = func(int) error { return unix.EIO } }, "fsync"},
		{"written zeros", func(s *system) {
			s.zeroOut = func(int, int64, int64) error { return unix.EREMOTEIO }
			s.fallocate = func(int, uint32, int64, int64) error { return unix.EOPNOTSUPP }
			s.pwriteUncache = func(int, []byte, int64) (int, error) { return 0, unix.EOPNOTSUPP }
			s.pwrite = func(fd int, p []byte, off int64) (int, error) {
				if off == 4096 {
					return 0, unix.EIO
				}
				return unix.Pwrite(fd, p, off)
			}
		}, "at offset 4096"},
	} {
		sys := kernel()
		c.fault(&sys)
		d, err := createDevice(t.Context(), device, size, Options{}, sys)
		if err != nil {
			t.Fatal(err)
		}
		_, err = d.WriteAt(make([]byte, 4096), 0)
		if err == nil {
			err = d.ZeroAt(t.Context(), 4096, size-4096)
		}
		if err == nil {
			err = d.Finish(t.Context())
		}
		if !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), c.text) || !strings.Contains(err.Error(), device) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err := d.Abort(); err != nil {
			t.Errorf("%s: Abort: %v", c.name, err)
		}
	}
}

// The context's end stops a long ZeroAt between two pieces.
func TestZeroAtStops(t *testing.T) {
	why := errors.New("stop")
	ctx, stop := context.WithCancelCause(t.Context())
	defer stop(nil)
	calls := 0
	sys := kernel()
	sys.zeroOut = func(int, int64, int64) error {
		if calls++; calls == 2 {
			stop(why)
		}
		return nil
	}
	d := &device{life: newLife(ctx, "", 1<<40), w: writer{f: os.Stdin, sys: sys}, sector: 512}
	if err := d.ZeroAt(t.Context(), 0, 1<<40); !errors.Is(err, why) || calls != 2 {
		t.Errorf("ZeroAt: %v after %d calls", err, calls)
	}
}

// The free space of the file system that the device file lies on says nothing about
// the device.
func TestFullDevice(t *testing.T) {
	f, err := os.OpenFile(loop(t, 1<<20), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := explain(int(f.Fd()), unix.ENOSPC); !errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), "free") {
		t.Error(err)
	}
}
