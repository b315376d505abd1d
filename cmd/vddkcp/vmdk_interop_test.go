package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// A real disk becomes a streamOptimized VMDK from each kind of source, and one
// file or a pipe makes no difference.
func TestVMDKTarget(t *testing.T) {
	peer.Need(t, "qemu-img", "mke2fs")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ext4(t, in("disk.raw"))
	sh(t, `cd %s
		qemu-img convert -O vmdk disk.raw sparse.vmdk
		qemu-img convert -O qcow2 -c disk.raw disk.qcow2
		qemu-img create -q -f vmdk -b sparse.vmdk -F vmdk child.vmdk
		qemu-img convert -O vmdk -o subformat=streamOptimized disk.raw stream.vmdk`, dir)
	for _, source := range []string{"disk.raw", "sparse.vmdk", "child.vmdk", "stream.vmdk", "disk.qcow2"} {
		out := in("out.vmdk")
		copies(t, "--force", "--verify", "--progress", "none", in(source), out)
		peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", in("disk.raw"), out)
		peer.Run(t, "qemu-img", "check", "-f", "vmdk", out)
		piped := in("piped.vmdk")
		sh(t, "%s --progress none --format vmdk %s - | cat >%s", must(binary()), in(source), piped)
		peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", in("disk.raw"), piped)
	}
	// The copy keeps the CID of the image that qemu wrote, so that it can replace
	// the image in a chain.
	sh(t, `cd %s && %s --progress none sparse.vmdk parent.vmdk && mv parent.vmdk sparse.vmdk
		qemu-img compare -f vmdk -F raw child.vmdk disk.raw`, dir, must(binary()))
	// The file is about as large as qemu's.
	ours, qemus := fileSize(t, in("piped.vmdk")), fileSize(t, in("stream.vmdk"))
	if ours > qemus*105/100 {
		t.Errorf("%d bytes, qemu's has %d", ours, qemus)
	}
}

func fileSize(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// A VMDK that is not whole has no name.
func TestVMDKTargetFaults(t *testing.T) {
	small := mount(t, "-t", "tmpfs", "-o", "size=8M", "tmpfs")
	big := filepath.Join(t.TempDir(), "big.raw")
	random(t, big, 16<<20)
	refuses(t, "no space left on device", filepath.Join(small, "out.vmdk"), big, filepath.Join(small, "out.vmdk"))

	out := filepath.Join(t.TempDir(), "out.vmdk")
	cmd, wait := started(t, big, out)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	wait()
	if _, err := os.Lstat(out); err == nil {
		t.Error("a killed copy has the final name")
	}
	if r := vddkcp(t, big, out); r.exit != 1 || !strings.Contains(r.stderr, "--force drops it") {
		t.Errorf("over what was left: exit status %d\n%s", r.exit, r.stderr)
	}
	copies(t, "--force", "--verify", big, out)
	copies(t, big, out+".raw")
	peer.Run(t, "cmp", big, out+".raw")

	// To a device that is always full.
	cmd = command(t, "--format", "vmdk", big, "/dev/full")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if r := ended(t, cmd, cmd.Run(), &stderr); r.exit != 1 || !strings.Contains(r.stderr, "no space left on device") {
		t.Errorf("/dev/full: exit status %d\n%s", r.exit, r.stderr)
	}
}
