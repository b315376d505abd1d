package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// free returns the number of free bytes of the file system at path.
func free(t *testing.T, path string) int64 {
	t.Helper()
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		t.Fatal(err)
	}
	return int64(s.Bavail) * s.Bsize
}

// counts returns the numbers of bytes in a report.
func counts(t *testing.T, report string) (c struct {
	Read    int64 `json:"bytes_read"`
	Written int64 `json:"bytes_written"`
	Cloned  int64 `json:"bytes_cloned"`
	Planned int64 `json:"bytes_planned"`
}) {
	t.Helper()
	text, err := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestReflink checks that all formats with uncompressed data are copied without moving
// data on a file system that can share blocks: a copy uses no space, and a second copy
// succeeds without space for its data.
func TestReflink(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "mke2fs", "mkfs.xfs", "mkfs.btrfs")
	for _, kind := range []string{"xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			device := filepath.Join(t.TempDir(), "device")
			sh(t, "truncate -s 1G %s && mkfs.%s -q %s", device, kind, device)
			dir := mount(t, "-o", "loop", device)
			in := func(name string) string { return filepath.Join(dir, name) }
			disk := in("disk.raw")
			ext4(t, disk)
			sh(t, `cd %s
				qemu-img convert -O vmdk disk.raw sparse.vmdk
				qemu-img convert -O vmdk -o subformat=monolithicFlat disk.raw flat.vmdk
				qemu-img convert -O vmdk -o subformat=twoGbMaxExtentSparse disk.raw parts.vmdk
				qemu-img convert -O vmdk -o subformat=streamOptimized disk.raw stream.vmdk
				qemu-img create -q -f vmdk -b sparse.vmdk -F vmdk child.vmdk
				qemu-io -f vmdk -c 'write -P 7 10M 1M' child.vmdk >/dev/null
				qemu-img convert -O qcow2 disk.raw plain.qcow2
				qemu-img create -q -f qcow2 -b plain.qcow2 -F qcow2 child.qcow2
				qemu-io -f qcow2 -c 'write -P 7 10M 1M' child.qcow2 >/dev/null
				qemu-img create -q -f qcow2 -b flat.vmdk -F vmdk mixed.qcow2
				qemu-img create -q -f qcow2 -o data_file=$PWD/outside.raw,data_file_raw=on outside.qcow2 60M
				qemu-img convert -n -O qcow2 disk.raw outside.qcow2
				qemu-img convert -c -O qcow2 disk.raw packed.qcow2
				printf 'some bytes in front of the disk, so that nothing is aligned' >odd.bin
				sync -f .`, dir)
			report := filepath.Join(t.TempDir(), "report")
			for _, name := range []string{"disk.raw", "sparse.vmdk", "flat.vmdk", "parts.vmdk", "child.vmdk", "stream.vmdk",
				"plain.qcow2", "child.qcow2", "mixed.qcow2", "outside.qcow2", "packed.qcow2"} {
				out := in("out.raw")
				before := free(t, dir)
				copies(t, "--report", report, "--progress", "none", in(name), out)
				sh(t, "sync -f %s", dir)
				used := before - free(t, dir)
				peer.Run(t, "qemu-img", "compare", in(name), out)
				c := counts(t, report)
				if name == "stream.vmdk" || name == "packed.qcow2" { // are compressed
					if c.Cloned != 0 || c.Read == 0 {
						t.Errorf("%s: %+v", name, c)
					}
				} else if c.Cloned < c.Planned*9/10 || c.Read != c.Planned-c.Cloned || used > c.Planned/10 {
					t.Errorf("%s: %+v, and %d bytes of the file system were used", name, c, used)
				}
				// --digest reads, and shares all the same: XFS takes reserved blocks
				// for data once they were read, so that there may be more to share.
				copied := c.Planned - c.Cloned
				r := copies(t, "--force", "--digest", "--verify", "--report", report, "--progress", "none", in(name), out)
				if c := counts(t, report); c.Planned-c.Cloned != copied || c.Read != c.Planned || !strings.Contains(r.stderr, "digest blksum=") {
					t.Errorf("%s with a digest: %+v, and %d not shared before\n%s", name, c, copied, r.stderr)
				}
				peer.Run(t, "qemu-img", "compare", in(name), out)
				// Never: not even a block.
				copies(t, "--force", "--reflink=never", "--report", report, "--progress", "none", in(name), out)
				if c := counts(t, report); c.Cloned != 0 {
					t.Errorf("%s: %d bytes are shared", name, c.Cloned)
				}
				sh(t, "rm %s", out)
			}

			// A file that does not belong here: always says so, auto copies it.
			other, out := filepath.Join(t.TempDir(), "disk.raw"), in("out.raw")
			sh(t, "cp --sparse=always %s %s", disk, other)
			refuses(t, other+" and the target are not on the same file system", out, "--reflink", "always", other, out)
			refuses(t, "compressed", out, "--reflink", "always", in("stream.vmdk"), out)
			copies(t, "--reflink", "always", in("parts.vmdk"), out)
			copies(t, "--force", other, out)
			peer.Run(t, "cmp", disk, out)
			sh(t, "rm %s", out)

			// There is no room for another disk, and none is needed.
			big := in("big.raw")
			random(t, big, 550<<20)
			sh(t, "sync -f %s", big)
			refuses(t, "but the file system has only", out, "--reflink=never", big, out)
			sh(t, "%s --dry-run %s %s | grep -q '^of these shared: 576716800 bytes'", must(binary()), big, out)
			copies(t, big, out)
			peer.Run(t, "cmp", big, out)
		})
	}
}

// TestReflinkOfOddPlaces checks copies of data at unaligned offsets and with unaligned
// ends.
func TestReflinkOfOddPlaces(t *testing.T) {
	peer.Need(t, "mkfs.xfs")
	device := filepath.Join(t.TempDir(), "device")
	sh(t, "truncate -s 400M %s && mkfs.xfs -q %s", device, device)
	dir := mount(t, "-o", "loop", device)
	data, out, report := filepath.Join(dir, "data"), filepath.Join(dir, "out.raw"), filepath.Join(dir, "report")
	random(t, data, 4<<20)
	for _, c := range []struct {
		name       string
		descriptor string
		want       string // what the disk is made of, for a shell
		cloned     int64
	}{
		{"at a sector", "RW 8191 FLAT \"data\" 1\n", "tail -c +513 data", 0},
		{"at a block, with a tail", "RW 8001 FLAT \"data\" 8\n", "tail -c +4097 data | head -c 4096512", 1000 * 4096},
		{"behind zeros that shift it", "RW 1 ZERO\nRW 8000 FLAT \"data\" 0\n", "head -c 512 /dev/zero; head -c 4096000 data", 0},
		{"behind zeros, at a block all the same", "RW 1 ZERO\nRW 8000 FLAT \"data\" 1\n", "head -c 512 /dev/zero; tail -c +513 data | head -c 4096000", 999 * 4096},
	} {
		vmdk := filepath.Join(dir, "disk.vmdk")
		if err := os.WriteFile(vmdk, []byte("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n"+c.descriptor), 0o600); err != nil {
			t.Fatal(err)
		}
		copies(t, "--force", "--report", report, vmdk, out)
		sh(t, "cd %s; { %s; } >want; cmp want out.raw", dir, c.want)
		if got := counts(t, report); got.Cloned != c.cloned {
			t.Errorf("%s: %d bytes are shared, want %d", c.name, got.Cloned, c.cloned)
		}
	}
}
