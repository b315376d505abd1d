package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

func TestQemuWritesWeReadAndQemuCompares(t *testing.T) {
	peer.Need(t, "qemu-img", "mke2fs")
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.raw")
	ext4(t, disk)
	for _, options := range []string{
		"subformat=monolithicSparse",
		"subformat=monolithicFlat",
		"subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat",
		"subformat=streamOptimized",
		"subformat=monolithicSparse,adapter_type=lsilogic,hwversion=13",
		"subformat=monolithicSparse,compat6=on",
	} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			image, out := filepath.Join(dir, "disk.vmdk"), filepath.Join(dir, "out.raw")
			peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", options, disk, image)
			copies(t, image, out)
			peer.Run(t, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", image, out)
			peer.Run(t, "cmp", disk, out)
		})
	}
}

func TestDeltaChain(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "mke2fs")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ext4(t, in("disk.raw"))
	peer.Run(t, "qemu-img", "convert", "-O", "vmdk", in("disk.raw"), in("base.vmdk"))
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", in("one.vmdk"))
	peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 0x11 1M 200k", "-c", "write -P 0 8M 64k", in("one.vmdk"))
	peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-b", "one.vmdk", "-F", "vmdk", in("two.vmdk"))
	peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 0x22 1100k 65k", "-c", "write -P 0x33 59M 1M", in("two.vmdk"))
	copies(t, in("two.vmdk"), in("out.raw"))
	peer.Run(t, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", in("two.vmdk"), in("out.raw"))

	// Any file of the chain is the source too.
	if r := vddkcp(t, "--force", "--format", "raw", in("two.vmdk"), in("base.vmdk")); r.exit != 1 || !strings.Contains(r.stderr, "base.vmdk is the source") {
		t.Errorf("onto its own base: exit status %d\n%s", r.exit, r.stderr)
	}
	peer.Run(t, "qemu-img", "compare", "-f", "vmdk", "-F", "raw", in("two.vmdk"), in("out.raw"))
}

func TestBlockDevices(t *testing.T) {
	peer.Need(t, "qemu-img", "mke2fs")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ext4(t, in("disk.raw"))
	peer.Run(t, "qemu-img", "convert", "-O", "vmdk", in("disk.raw"), in("disk.vmdk"))
	const size = 60 << 20

	// The device has exactly the size of the disk, and none of its old content may
	// remain.
	device, backing := loop(t, size, 0xAA)
	copies(t, in("disk.vmdk"), device)
	peer.Run(t, "cmp", in("disk.raw"), backing)
	// And back, from the device.
	copies(t, device, in("back.raw"))
	peer.Run(t, "cmp", in("disk.raw"), in("back.raw"))

	// Larger: a warning, and what lies behind stays.
	device, backing = loop(t, size+1<<20, 0xAA)
	if r := copies(t, in("disk.vmdk"), device); !strings.Contains(r.stderr, "warning: "+device+" is larger than the disk") {
		t.Errorf("no warning of the larger device: %s", r.stderr)
	}
	peer.Run(t, "cmp", "-n", fmt.Sprint(size), in("disk.raw"), backing)
	got, err := os.ReadFile(backing)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[size:], bytes.Repeat([]byte{0xAA}, 1<<20)) {
		t.Error("something was written behind the disk's end")
	}
	// As a stream too, whose end nobody knows before; too long a one fails.
	sh(t, "cat %s | %s - %s", in("disk.raw"), must(binary()), device)
	peer.Run(t, "cmp", "-n", fmt.Sprint(size), in("disk.raw"), backing)

	// Too small: refused before anything is written.
	device, backing = loop(t, size-512, 0xAA)
	r := vddkcp(t, in("disk.vmdk"), device)
	if r.exit != 1 || !strings.Contains(r.stderr, "is too small: it has 62914048 bytes") || !strings.Contains(r.stderr, "62914560") {
		t.Errorf("too small: exit status %d\n%s", r.exit, r.stderr)
	}
	if got, err := os.ReadFile(backing); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{0xAA}, size-512)) {
		t.Errorf("something was written to a device that is too small: %v", err)
	}

	// Mounted: in use.
	device, _ = loop(t, 20<<20, 0)
	peer.Run(t, "mke2fs", "-q", device)
	mount(t, device)
	if err := os.WriteFile(in("small.raw"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := vddkcp(t, in("small.raw"), device); r.exit != 1 || !strings.Contains(r.stderr, "mounted") {
		t.Errorf("mounted: exit status %d\n%s", r.exit, r.stderr)
	}
}

// Each writes in its own way: uncached, or with early write-back.
func TestFileSystems(t *testing.T) {
	peer.Need(t, "qemu-img", "mke2fs", "mkfs.xfs", "mkfs.btrfs")
	dir := t.TempDir()
	disk, image := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "disk.vmdk")
	ext4(t, disk)
	peer.Run(t, "qemu-img", "convert", "-O", "vmdk", disk, image)
	for kind, mkfs := range map[string][]string{
		"ext4":  {"mke2fs", "-q", "-t", "ext4"},
		"xfs":   {"mkfs.xfs", "-q"},
		"btrfs": {"mkfs.btrfs", "-q"},
	} {
		t.Run(kind, func(t *testing.T) {
			device := filepath.Join(t.TempDir(), "device")
			if err := os.WriteFile(device, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(device, 400<<20); err != nil {
				t.Fatal(err)
			}
			peer.Run(t, mkfs[0], append(mkfs[1:], device)...)
			folder := mount(t, "-o", "loop", device)
			out, back := filepath.Join(folder, "out.raw"), filepath.Join(folder, "back.raw")
			for _, cache := range []string{"keep", "drop"} {
				copies(t, "--force", "--cache", cache, image, out)
				peer.Run(t, "cmp", disk, out)
				copies(t, "--force", "--cache", cache, out, back)
				peer.Run(t, "cmp", disk, back)
			}
			copies(t, "--force", "--preallocation", "falloc", image, out)
			peer.Run(t, "cmp", disk, out)
		})
	}
}

func TestNoSpace(t *testing.T) {
	small := mount(t, "-t", "tmpfs", "-o", "size=8M", "tmpfs")
	big := filepath.Join(t.TempDir(), "big.raw")
	random(t, big, 16<<20)
	out := filepath.Join(small, "out.raw")

	// Known before: nothing is begun.
	refuses(t, "needs 16.0 MiB (16777216 bytes), but the file system has only 8.0 MiB free", out, big, out)
	// Found out on the way, since a stream tells nobody its size.
	cmd := command(t, "-", out)
	stdin, err := os.Open(big)
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = stdin, &stderr
	if r := ended(t, cmd, cmd.Run(), &stderr); r.exit != 1 || !strings.Contains(r.stderr, "no space left on device") || !strings.Contains(r.stderr, "free some space") {
		t.Errorf("exit status %d\n%s", r.exit, r.stderr)
	}
	leavesNothing(t, out)

	// A file that may not grow: ulimit -f, in blocks of 1024 bytes.
	limited := filepath.Join(t.TempDir(), "out.raw")
	sh(t, "ulimit -f 8192; ! %s %s %s 2>%s.err && grep -q 'ulimit -f' %s.err", must(binary()), big, limited, limited, limited)
	leavesNothing(t, limited)
}

func TestReadOnlyFileSystem(t *testing.T) {
	folder := mount(t, "-t", "tmpfs", "-o", "ro", "tmpfs")
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 1<<20)
	out := filepath.Join(folder, "out.raw")
	refuses(t, "read-only file system", out, disk, out)
}

func TestSignals(t *testing.T) {
	for signal, exit := range map[syscall.Signal]int{syscall.SIGHUP: 129, syscall.SIGINT: 130, syscall.SIGTERM: 143} {
		dir := t.TempDir()
		disk, out, report := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "out.raw"), filepath.Join(dir, "report.json")
		random(t, disk, 64<<20)
		cmd, wait := started(t, "--report", report, disk, out)
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
		r := wait()
		if r.exit != exit || !strings.Contains(r.stderr, "stopped by SIG") {
			t.Errorf("%s: exit status %d, want %d\n%s", signal, r.exit, exit, r.stderr)
		}
		text, err := os.ReadFile(report)
		if err != nil || !strings.Contains(string(text), `"status": "interrupted"`) || !strings.Contains(string(text), fmt.Sprintf(`"exit": %d`, exit)) {
			t.Errorf("%s: report %v\n%s", signal, err, text)
		}
		if _, err := os.Lstat(out); err == nil {
			t.Errorf("%s: %s is there", signal, out)
		}
		// The resumed run must not repeat work that was done.
		if r := vddkcp(t, "--resume", "--verify", "--report", report, disk, out); r.exit != 0 {
			t.Errorf("%s: --resume: exit status %d, want 0\n%s", signal, r.exit, r.stderr)
		}
		text, err = os.ReadFile(report)
		if err != nil || strings.Contains(string(text), `"resumed_from": 0`) || !strings.Contains(string(text), `"resume_proof": "mtime"`) {
			t.Errorf("%s: report %v\n%s", signal, err, text)
		}
		peer.Run(t, "cmp", disk, out)
		if left, _ := filepath.Glob(out + ".*"); len(left) > 0 {
			t.Errorf("%s: %v were left", signal, left)
		}
	}
}

// A reader that never reads does not keep vddkcp from ending.
func TestSignalWhileBlocked(t *testing.T) {
	dir := t.TempDir()
	disk, fifo := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "fifo")
	random(t, disk, 8<<20)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	cmd := command(t, disk, fifo)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The first bytes are there: it writes, and the pipe will be full.
	if _, err := io.ReadFull(reader, make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if r := ended(t, cmd, cmd.Wait(), &stderr); r.exit != 143 {
		t.Errorf("exit status %d, want 143\n%s", r.exit, r.stderr)
	}
}

// A second signal ends what the first can't: here a system call that waits for
// a reader of the log.
func TestSecondSignal(t *testing.T) {
	peer.NeedRoot(t) // to look at what the process waits in
	dir := t.TempDir()
	disk, fifo := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "fifo")
	random(t, disk, 1<<20)
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "--log-file", fifo, disk, "null:")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	for !opens(t, cmd.Process.Pid, fifo) {
		select {
		case err := <-exited:
			t.Fatalf("it ended: %v\n%s", err, stderr.String())
		default:
		}
	}
	// Signals of one kind that wait together are one: the second is another.
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	if r := ended(t, cmd, <-exited, &stderr); r.exit != 130 && r.exit != 143 {
		t.Errorf("exit status %d, want that of the second signal\n%s", r.exit, r.stderr)
	}
}

func TestSourceChangesWhileItIsCopied(t *testing.T) {
	for name, c := range map[string]struct {
		change func(path string) error
		want   string
	}{
		"shrinks": {func(path string) error { return os.Truncate(path, 1<<20) }, "and has 1048576 now"},
		"grows":   {func(path string) error { return os.Truncate(path, 9<<20) }, "the source changed while it was copied"},
		"is written to": {func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("x"), 7<<20)
			return err
		}, "the source changed while it was copied"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			disk, out := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "out.raw")
			random(t, disk, 8<<20)
			_, wait := started(t, disk, out)
			if err := c.change(disk); err != nil {
				t.Fatal(err)
			}
			if r := wait(); r.exit != 1 || !strings.Contains(r.stderr, c.want) {
				t.Errorf("exit status %d, want 1 and %q\n%s", r.exit, c.want, r.stderr)
			}
			leavesNothing(t, out)
		})
	}
}

func TestTargetVanishes(t *testing.T) {
	dir := t.TempDir()
	disk, folder := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "folder")
	random(t, disk, 8<<20)
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	_, wait := started(t, disk, filepath.Join(folder, "out.raw"))
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	if r := wait(); r.exit != 1 || !strings.Contains(r.stderr, "removed or replaced") {
		t.Errorf("exit status %d\n%s", r.exit, r.stderr)
	}
}

// Memory is bounded whatever the disk's size.
func TestMemory(t *testing.T) {
	// Not by the test's own wait: a child's peak begins with what its parent
	// had when it was started.
	peer.Need(t, "time")
	const most = 64 << 10 // KiB
	huge := mount(t, "-t", "tmpfs", "-o", "size=1G", "tmpfs")
	in := func(name string) string { return filepath.Join(huge, name) }
	disk, err := os.Create(in("disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if err := disk.Truncate(64 << 40); err != nil {
		t.Fatal(err)
	}
	piece := bytes.Repeat([]byte{0x5A}, 64<<20)
	for _, off := range []int64{0, 17<<40 + 512, 64<<40 - 64<<20} {
		if _, err := disk.WriteAt(piece, off); err != nil {
			t.Fatal(err)
		}
	}
	descriptor := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW %d VMFS \"disk.raw\"\n", int64(64)<<31)
	if err := os.WriteFile(in("disk.vmdk"), []byte(descriptor), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, src := range []string{"disk.raw", "disk.vmdk"} {
		peer.Run(t, "time", "-f", "%M", "-o", in("peak"), must(binary()), in(src), in("out.raw"))
		var kib int
		text, err := os.ReadFile(in("peak"))
		if _, scanned := fmt.Sscan(string(text), &kib); err != nil || scanned != nil {
			t.Fatalf("%s: peak %q: %v, %v", src, text, err, scanned)
		}
		if kib > most {
			t.Errorf("%s: %d KiB were resident, want %d at most", src, kib, most)
		}
		var st syscall.Stat_t
		if err := syscall.Stat(in("out.raw"), &st); err != nil {
			t.Fatal(err)
		}
		if st.Size != 64<<40 || st.Blocks*512 < 3*int64(len(piece)) || st.Blocks*512 > 4*int64(len(piece)) {
			t.Errorf("%s: %d bytes, %d allocated", src, st.Size, st.Blocks*512)
		}
		out, err := os.Open(in("out.raw"))
		if err != nil {
			t.Fatal(err)
		}
		for _, off := range []int64{0, 17<<40 + 512, 64<<40 - 64<<20} {
			got := make([]byte, len(piece))
			if _, err := out.ReadAt(got, off); err != nil || !bytes.Equal(got, piece) {
				t.Errorf("%s: content at %d differs: %v", src, off, err)
			}
		}
		out.Close()
		os.Remove(in("out.raw"))
	}
}

func TestSamples(t *testing.T) {
	for name, want := range map[string]string{
		"streamOptimizedWithMarkers.vmdk": "92c0f8b4280377437056f57c51ef51a5f8aeb1462ac630ef0633febcbfc3db4e",
		"twoGbMaxExtentSparse.vmdk":       "a3bcf05f07a1c06a3380eeca8571f0efb2b85afafa1e21662b8cad436d1f7727",
		"vmfs_thick.vmdk":                 "8d43c795d24bce01b49f92744f934c1072210dcac170bb1c83a5aa56df46ab7d",
		"plaso_image.vmdk":                "854c3db1c4a07a241e2ed9fbd8892adf2adc662c7862a75deed26f3483f414c9",
		"dfvfs_ext2.vmdk":                 "a6c2f0e39afe6c6ab432ca5465349fcefe8dc944398e97b2d957d3f89dbb5d80",
	} {
		sample := filepath.Join("../../../shared/samples", name)
		peer.NeedFile(t, sample)
		out := filepath.Join(t.TempDir(), "out.raw")
		copies(t, sample, out)
		if got, _, _ := strings.Cut(peer.Run(t, "sha256sum", out), " "); got != want {
			t.Errorf("%s: sha256 %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{
		"vmfs_thick-000001.vmdk":   "vmfs_thick-000001-delta.vmdk: no such file",
		"win-missing-extents.vmdk": "disk-s001.vmdk: no such file",
		"invalid.vmdk":             "invalid.vmdk: ",
	} {
		sample := filepath.Join("../../../shared/samples", name)
		peer.NeedFile(t, sample)
		out := filepath.Join(t.TempDir(), "out.raw")
		refuses(t, want, out, sample, out)
	}
}

// A device that can't keep what it took fails the copy: here its backing file
// has no room, or is cut off under it.
func TestFailingDevice(t *testing.T) {
	peer.NeedRoot(t)
	peer.Need(t, "losetup")
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 24<<20)
	small := mount(t, "-t", "tmpfs", "-o", "size=8M", "tmpfs")
	for _, cut := range []bool{false, true} {
		backing := filepath.Join(small, "backing")
		if err := os.WriteFile(backing, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(backing, 24<<20); err != nil {
			t.Fatal(err)
		}
		device := strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", backing))
		if cut {
			if err := os.Truncate(backing, 4<<20); err != nil {
				t.Fatal(err)
			}
		}
		r := vddkcp(t, "--journal", filepath.Join(t.TempDir(), "journal"), "--request-size", "1MiB", disk, device)
		peer.Run(t, "losetup", "--detach", device)
		if r.exit != 1 && r.exit != 75 || !strings.Contains(r.stderr, device) {
			t.Errorf("cut %v: exit status %d, want 1 or 75\n%s", cut, r.exit, r.stderr)
		}
	}
}
