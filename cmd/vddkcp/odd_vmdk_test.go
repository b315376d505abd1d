package main

import (
	"bytes"
	le "encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// describeVMDK replaces the descriptor that is embedded in a sparse VMDK.
func describeVMDK(t *testing.T, path string, change func(text string) string) {
	t.Helper()
	b := readAll(t, path)
	off := le.LittleEndian.Uint64(b[28:]) * 512
	n := le.LittleEndian.Uint64(b[36:]) * 512
	room := b[off : off+n]
	text, _, _ := bytes.Cut(room, []byte{0})
	changed := change(string(text))
	if len(changed) > len(room) {
		t.Fatalf("a descriptor of %d bytes in room for %d", len(changed), len(room))
	}
	clear(room)
	copy(room, changed)
	writeAll(t, path, b)
}

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func writeAll(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// everyCommand runs each command that reads a disk on src. Each must read want,
// with exactly one warning that has message, none where it is empty. Where fails
// is set, each must end with exit status 1 and the message instead; those that
// look at no table may succeed.
func everyCommand(t *testing.T, src string, want []byte, fails bool, message string) {
	t.Helper()
	dir := t.TempDir()
	out, served, truth := filepath.Join(dir, "out.raw"), filepath.Join(dir, "served.raw"), filepath.Join(dir, "truth.raw")
	writeAll(t, truth, want)
	for _, args := range [][]string{
		{"copy", "--progress", "none", src, out},
		{"copy", "--progress", "none", "--format", "qcow2", "--verify", src, out + ".qcow2"},
		{"copy", "--progress", "none", src, out + ".vmdk"},
		{"verify", "--progress", "none", src, truth},
		{"map", "--json", src},
		{"info", "--json", src},
		{"export", "--run", "qemu-img convert -f raw -O raw \"$uri\" " + served, src},
	} {
		switch r := vddkcp(t, args...); {
		case fails && r.exit == 0 && args[0] == "info":
		case fails && (r.exit != 1 || !strings.Contains(r.stderr, message)):
			t.Errorf("%v: exit status %d, want 1 and %q\n%s", args, r.exit, message, r.stderr)
		case !fails && (r.exit != 0 || message == "" && strings.Contains(r.stderr, "warning") || message != "" && strings.Count(r.stderr, message) != 1):
			t.Errorf("%v: exit status %d, want 0 and %q once\n%s", args, r.exit, message, r.stderr)
		}
	}
	for _, path := range []string{out, out + ".qcow2", out + ".vmdk"} {
		if fails {
			leavesNothing(t, path)
		} else {
			peer.Run(t, "qemu-img", "compare", truth, path)
		}
	}
	if !fails {
		peer.Run(t, "cmp", truth, served)
	}
}

// TestOddVMDKs runs every command on unusual images of other programs, and on damaged
// images.
func TestOddVMDKs(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	random(t, in("base.raw"), 3<<20)
	base := readAll(t, in("base.raw"))
	clear(base[1<<20 : 2<<20])
	writeAll(t, in("base.raw"), base)
	child := bytes.Clone(base)
	for i := range 65536 {
		child[1<<20+i] = 0x77
	}
	sh(t, `cd %s
		qemu-img convert -f raw -O vmdk base.raw base.vmdk
		qemu-img create -q -f vmdk -b base.vmdk -F vmdk child.vmdk
		qemu-img create -q -f vmdk alone.vmdk 3M
		for i in child alone; do qemu-io -c 'write -q -P 0x77 1M 64k' $i.vmdk; done
		qemu-img compare -f raw -F vmdk base.raw base.vmdk >/dev/null`, dir)

	t.Run("parent of Windows", func(t *testing.T) {
		describeVMDK(t, in("child.vmdk"), func(text string) string {
			return strings.Replace(text, `"base.vmdk"`, `"C:\VMs\base.vmdk"`, 1)
		})
		everyCommand(t, in("child.vmdk"), child, false, `the path of the parent, "C:\\VMs\\base.vmdk", belongs to another host`)
	})
	t.Run("differencing image", func(t *testing.T) {
		folder := t.TempDir()
		name := func(own, parent string) func(string) string {
			return func(string) string {
				return "# Disk DescriptorFile\nversion=1\nCID=1a2b3c4d\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 6144 SPARSE \"x.vmdk\"\n" +
					"ddb.uuid.image=\"" + own + "\"\nddb.uuid.parent=\"" + parent + "\"\n"
			}
		}
		writeAll(t, filepath.Join(folder, "{p}.vmdk"), readAll(t, in("base.vmdk")))
		writeAll(t, filepath.Join(folder, "{c}.vmdk"), readAll(t, in("alone.vmdk")))
		describeVMDK(t, filepath.Join(folder, "{p}.vmdk"), name("aa000000-0000-4000-8000-000000000001", "00000000-0000-0000-0000-000000000000"))
		describeVMDK(t, filepath.Join(folder, "{c}.vmdk"), name("bb000000-0000-4000-8000-000000000002", "aa000000-0000-4000-8000-000000000001"))
		everyCommand(t, filepath.Join(folder, "{c}.vmdk"), child, false, "")
		everyCommand(t, filepath.Join(folder, "{p}.vmdk"), base, false, "")
		if err := os.Remove(filepath.Join(folder, "{p}.vmdk")); err != nil {
			t.Fatal(err)
		}
		everyCommand(t, filepath.Join(folder, "{c}.vmdk"), child, true, "cannot find the parent, the image with the UUID")
		if r := vddkcp(t, "info", filepath.Join(folder, "{c}.vmdk")); r.exit != 1 {
			t.Errorf("info of an image without its parent: exit status %d", r.exit)
		}
		if r := vddkcp(t, "info", "--single-link", filepath.Join(folder, "{c}.vmdk")); r.exit != 0 {
			t.Errorf("info --single-link: exit status %d\n%s", r.exit, r.stderr)
		}
	})
	t.Run("table in the descriptor", func(t *testing.T) {
		b := readAll(t, in("base.vmdk"))
		gd, rgd := le.LittleEndian.Uint64(b[56:])*512, le.LittleEndian.Uint64(b[48:])*512
		le.LittleEndian.PutUint32(b[gd:], 2)
		writeAll(t, in("one.vmdk"), b)
		everyCommand(t, in("one.vmdk"), base, false, "the grain directory is damaged: 1 of 1 grain tables are read through the redundant grain directory")
		le.LittleEndian.PutUint32(b[rgd:], 2)
		writeAll(t, in("both.vmdk"), b)
		everyCommand(t, in("both.vmdk"), base, true, "grain table 0 at offset 1024")
	})
}

// TestSectorSizeOfVMDK checks that the sector size of a disk is recorded in targets
// that can store it, and causes a warning for the others.
func TestSectorSizeOfVMDK(t *testing.T) {
	peer.Need(t, "qemu-img", "nbdinfo")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	random(t, in("x.raw"), 1<<20)
	sh(t, "cd %s && qemu-img convert -f raw -O vmdk x.raw k.vmdk", dir)
	describeVMDK(t, in("k.vmdk"), func(text string) string {
		return strings.TrimSpace(text) + "\nddb.logicalSectorSize = \"4096\"\nddb.physicalSectorSize = \"4096\"\n"
	})
	const warning = "has sectors of 4096 bytes, which a "
	report := func(dst string, args ...string) (warnings int) {
		t.Helper()
		r := copies(t, append(args, "--force", "--progress", "none", "--report", in("report.json"), in("k.vmdk"), dst)...)
		var x struct{ Warnings []string }
		if err := json.Unmarshal(readAll(t, in("report.json")), &x); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(r.stderr, warning); n != len(x.Warnings) {
			t.Errorf("%s: %d warnings on standard error, %q in the report", dst, n, x.Warnings)
		}
		return len(x.Warnings)
	}
	for dst, want := range map[string]int{in("out.raw"): 1, in("out.qcow2"): 1, in("out.vmdk"): 0, "null:": 0} {
		if n := report(dst); n != want {
			t.Errorf("%s: %d warnings, want %d", dst, n, want)
		}
	}
	sh(t, "cd %s && truncate -s 1M nbd.raw && nbdkit -U - file nbd.raw --run '%s --progress none k.vmdk \"$uri\" 2>nbd.err' && grep -q 'has sectors of 4096 bytes, which a raw NBD export cannot record' nbd.err && cmp x.raw nbd.raw", dir, must(binary()))
	for _, name := range []string{"k.vmdk", "out.vmdk"} {
		out, err := command(t, "info", "--json", in(name)).Output()
		if err != nil || !bytes.Contains(out, []byte(`"sector_size": 4096,`)) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		out, err = command(t, "info", in(name)).Output()
		if err != nil || !bytes.Contains(out, []byte("sector size:      4.0 KiB (4096 bytes)")) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		sh(t, "%s export %s --run 'nbdinfo \"$uri\"' >%s", must(binary()), in(name), in("nbdinfo"))
		if out := readAll(t, in("nbdinfo")); !bytes.Contains(out, []byte("block_size_preferred: 4096")) {
			t.Errorf("%s: nbdinfo: %s", name, out)
		}
	}
}
