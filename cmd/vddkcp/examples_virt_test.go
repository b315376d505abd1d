package main

import (
	"bytes"
	"crypto/md5"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/export"
	"github.com/vddkcp/vddkcp/internal/peer"
)

// guestInit is the first program of a small guest. It reads all files of its first
// disk, writes one, and powers off. Its output is on the serial console.
const guestInit = `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
echo 1 >/proc/sys/kernel/printk
for module in /modules/*; do insmod $module; done
echo "disks: $(echo /dev/vd*)"
mount -t ext4 /dev/vda /mnt
cd /mnt
find . -type f -exec md5sum {} +
dd if=/dev/urandom of=written bs=64k count=32 2>/dev/null
rm -r gone
sync
fstrim /mnt
echo "wrote $(md5sum <written)"
cd /
umount /mnt && echo "the guest is done"
poweroff -f
`

// guest is a small Linux to boot beside a disk.
type guest struct{ kernel, initrd string }

// newGuest makes one of a kernel of this machine (Debian: linux-image-cloud-amd64)
// and busybox.
func newGuest(t *testing.T) guest {
	t.Helper()
	return newGuestWith(t, guestInit)
}

// newGuestWith makes a guest whose first program is the given script.
func newGuestWith(t *testing.T, init string) guest {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("the guest is of this machine's kernel, and the machine it runs on an x86-64")
	}
	peer.Need(t, "qemu-system-x86_64", "busybox", "modprobe")
	kernels, err := filepath.Glob("/boot/vmlinuz-*")
	if err != nil {
		t.Fatal(err)
	}
	kernel := "/boot/vmlinuz" // which is missing
	if len(kernels) > 0 {
		kernel = slices.Max(kernels)
	}
	peer.NeedFile(t, kernel)
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "dev", "mnt", "proc", "modules"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	peer.Run(t, "cp", "-L", busybox, filepath.Join(root, "bin/busybox"))
	version := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	seen := map[string]bool{}
	for _, module := range []string{"virtio_pci", "virtio_blk", "ext4"} {
		for _, line := range strings.Split(peer.Run(t, "modprobe", "--show-depends", "--set-version", version, module), "\n") {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "insmod" && !seen[f[1]] { // others are built in
				seen[f[1]] = true
				peer.Run(t, "cp", f[1], filepath.Join(root, "modules", fmt.Sprintf("%02d.ko", len(seen))))
			}
		}
	}
	if err := os.WriteFile(filepath.Join(root, "init"), []byte(init), 0o755); err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(dir, "initrd")
	peer.Run(t, "sh", "-c", `cd "$1" && find . | busybox cpio -o -H newc >"$2"`, "sh", root, initrd)
	return guest{kernel, initrd}
}

// flags are those of qemu-system-x86_64.
func (g guest) flags() string {
	return "-kernel " + g.kernel + " -initrd " + g.initrd + " -append console=ttyS0,115200\\ panic=-1 -no-reboot"
}

// guestDisk is a disk with a file system, and the checksums of its files.
func guestDisk(t *testing.T) (disk string, sums map[string]string) {
	t.Helper()
	peer.Need(t, "mke2fs", "e2fsck", "debugfs")
	tree, sums := t.TempDir(), map[string]string{}
	if err := os.Mkdir(filepath.Join(tree, "gone"), 0o755); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "cp", "-r", filepath.Join(peer.Tree(t), "net"), filepath.Join(peer.Tree(t), "strings"), tree)
	peer.Run(t, "cp", filepath.Join(peer.Tree(t), "fmt/print.go"), filepath.Join(tree, "gone"))
	err := filepath.WalkDir(tree, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		sums["."+strings.TrimPrefix(path, tree)] = fmt.Sprintf("%x", md5.Sum(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	disk = filepath.Join(t.TempDir(), "disk.raw")
	peer.Run(t, "mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "64M")
	return disk, sums
}

var (
	consoleSum   = regexp.MustCompile(`(?m)^([0-9a-f]{32})  (\./.*?)\r?$`)
	consoleWrote = regexp.MustCompile(`(?m)^wrote ([0-9a-f]{32})`)
)

// said checks what a guest said of its disk, and returns the checksum of what
// it wrote.
func (g guest) said(t *testing.T, console string, disks string, sums map[string]string) (wrote string) {
	t.Helper()
	got := map[string]string{}
	for _, line := range consoleSum.FindAllStringSubmatch(console, -1) {
		got[line[2]] = line[1]
	}
	m := consoleWrote.FindStringSubmatch(console)
	switch {
	case m == nil || !strings.Contains(console, "the guest is done") || !strings.Contains(console, "disks: "+disks):
		t.Fatalf("the guest did not come to its end, or to other disks than %s:\n%s", disks, console)
	case !maps.Equal(got, sums):
		t.Fatalf("of %d files the guest read %d, or others:\n%s", len(sums), len(got), console)
	}
	return m[1]
}

func sha256sum(t *testing.T, path string) string {
	t.Helper()
	return strings.Fields(peer.Run(t, "sha256sum", path))[0]
}

// example is a script of examples/, which finds vddkcp, and other programs first
// in the folders of path.
func example(t *testing.T, script string, env []string, args []string, path ...string) *exec.Cmd {
	t.Helper()
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	absolute, err := filepath.Abs(filepath.Join(examples, script))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), absolute, args...)
	cmd.Dir = t.TempDir()
	path = append(path, filepath.Dir(program), os.Getenv("PATH"))
	cmd.Env = append(append(os.Environ(), "PATH="+strings.Join(path, ":")), env...)
	return cmd
}

// standInFlags is VDDKCP_FLAGS for a standInServer.
func standInFlags(t *testing.T, lib string) string {
	t.Helper()
	password := filepath.Join(t.TempDir(), "pw")
	put(t, password, "geheim\n")
	return "VDDKCP_FLAGS=--server localhost --port 1 --user backup@vsphere.local --password=+" + password + " --vm moref=12 --thumbprint " +
		pairs(strings.Repeat("AB", 20)) + " --libdir " + lib
}

// A guest boots from disks that are exported with --cow: a real kernel in qemu.
func TestExampleBootCheck(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	filled, sums := guestDisk(t)
	lib := standInServer(t, "ds1/web01/web01.vmdk", "ds2/web01/web01_1.vmdk")
	disk, second := filepath.Join(lib, "disks/ds1/web01/web01.vmdk"), filepath.Join(lib, "disks/ds2/web01/web01_1.vmdk")
	if err := os.Rename(filled, disk); err != nil {
		t.Fatal(err)
	}
	before := sha256sum(t, disk) + sha256sum(t, second)

	// Without KVM, which is not everywhere; the time is for slow machines.
	flags := strings.ReplaceAll(g.flags(), `115200\ panic=-1`, "115200")
	cmd := example(t, "boot-check.sh", []string{standInFlags(t, lib), "ACCEL=tcg", "DISK_IF=virtio", "MEMORY_MIB=256", "CPUS=1", "WAIT=240", "QEMU_FLAGS=" + flags}, []string{"a guest", "[ds1] web01/web01.vmdk", "[ds2] web01/web01_1.vmdk"})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	console, err := os.ReadFile(filepath.Join(cmd.Dir, "a guest.log"))
	if err != nil {
		t.Fatal(err)
	}
	g.said(t, string(console), "/dev/vda /dev/vdb", sums)

	// One that never ends, as its disks start nothing, leaves a picture.
	cmd = example(t, "boot-check.sh", []string{"ACCEL=tcg", "MEMORY_MIB=64", "CPUS=1", "WAIT=1"}, []string{"stuck", disk})
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if picture, err := os.ReadFile(filepath.Join(cmd.Dir, "stuck.ppm")); err != nil || !bytes.HasPrefix(picture, []byte("P6")) {
		t.Errorf("picture of %d bytes, %v", len(picture), err)
	}
	if after := sha256sum(t, disk) + sha256sum(t, second); after != before {
		t.Error("the disks have changed")
	}

	// A signal ends qemu too.
	cmd = example(t, "boot-check.sh", []string{"ACCEL=tcg", "MEMORY_MIB=64", "CPUS=1", "WAIT=600", "QEMU_FLAGS=-pidfile pid"}, []string{"stopped", disk})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	soon(t, "qemu has not started", func() bool {
		text, err := os.ReadFile(filepath.Join(cmd.Dir, "pid"))
		pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		return err == nil && pid > 0
	})
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if status := cmd.ProcessState.ExitCode(); status != 143 {
		t.Errorf("status %d after SIGTERM, want 143", status)
	}
	soon(t, "qemu goes on after the signal", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
}

// soon waits until a condition holds, or fails the test with what is wrong.
func soon(t *testing.T, wrong string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(wrong)
		}
	}
}

// TestGuestWritesToCowFile checks that the writes of a guest are in the file of
// --cow as a whole file system, and that the disk is unchanged.
func TestGuestWritesToCowFile(t *testing.T) {
	t.Parallel()
	g := newGuest(t)
	disk, sums := guestDisk(t)
	before := sha256sum(t, disk)
	dir := t.TempDir()
	layer, stats, copied := filepath.Join(dir, "layer"), filepath.Join(dir, "stats.json"), filepath.Join(dir, "copied.raw")
	console, err := command(t, "export", disk, "--cow="+layer, "--stats", stats, "--run",
		`qemu-system-x86_64 -machine accel=tcg -m 256 -nic none -nographic -drive "file=$uri,format=raw,if=virtio,cache=none,discard=unmap" `+g.flags()).Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, console)
	}
	wrote := g.said(t, string(console), "/dev/vda", sums)
	peer.Need(t, "qemu-img")
	if out, err := command(t, "export", disk, "--cow="+layer, "--run", `qemu-img convert -O raw "$uri" `+copied).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	peer.Run(t, "e2fsck", "-fn", copied)
	peer.Run(t, "debugfs", "-R", "dump written "+filepath.Join(dir, "written"), copied)
	text, err := os.ReadFile(filepath.Join(dir, "written"))
	if sum := fmt.Sprintf("%x", md5.Sum(text)); err != nil || sum != wrote || len(text) != 2<<20 {
		t.Errorf("%d bytes with checksum %s: the guest wrote %s, %v", len(text), sum, wrote, err)
	}
	if list := peer.Run(t, "debugfs", "-R", "ls -p", copied); strings.Contains(list, "/gone/") || !strings.Contains(list, "/written/") {
		t.Errorf("root folder:\n%s", list)
	}
	if sha256sum(t, disk) != before {
		t.Error("the disk has changed")
	}
	text, err = os.ReadFile(stats)
	if err != nil {
		t.Fatal(err)
	}
	var served export.Stats
	if err := json.Unmarshal(text, &served); err != nil {
		t.Fatal(err)
	}
	done := map[string]bool{}
	for _, o := range served.Operations {
		done[o.Name] = o.Count > 0 && o.Failed == 0
	}
	for _, name := range []string{"read", "write", "flush", "trim"} {
		if !done[name] {
			t.Errorf("no %s, or one that failed: %s", name, text)
		}
	}
}

// standInV2V does with its disks what virt-v2v does first and last: it reads them
// through nbdkit's nbd plugin and cow filter, and copies them whole with nbdcopy.
// It converts nothing: virt-v2v itself takes minutes without KVM, and was run by
// hand (examples/README.md).
const standInV2V = `#!/bin/sh
set -eu
[ "$1" != --version ] || { echo "virt-v2v $V2V_VERSION"; exit; }
echo "$*" >"$OUT/arguments"
[ "$1" = -i ]
mode=$2
shift 2
copy() { n=$((n + 1)); nbdkit -U - --filter=cow nbd "$@" --run 'nbdcopy "$uri" "$OUT/disk'$n'"'; }
n=0
case $mode in
disk)
	while [ "${1#-}" = "$1" ]; do copy uri="$1"; shift; done ;;
libvirtxml)
	cp "$1" "$OUT/guest.xml"
	for port in $(sed -n "s/.*<host name='localhost' port='\([0-9]*\)'.*/\1/p" "$1"); do
		copy hostname=localhost port=$port shared=true
	done ;;
esac
exit "${V2V_EXIT-0}"
`

func TestExampleV2V(t *testing.T) {
	peer.Need(t, "nbdkit", "nbdcopy")
	lib := standInServer(t, "ds1/web01/web01.vmdk", "ds1/web01/web01_1.vmdk")
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "virt-v2v"), []byte(standInV2V), 0o755); err != nil {
		t.Fatal(err)
	}
	flags := standInFlags(t, lib)
	disks := []string{"[ds1] web01/web01.vmdk", "[ds1] web01/web01_1.vmdk"}
	for version, wants := range map[string]string{
		"2.2.0":                     `^-i libvirtxml \S+/guest.xml -on web01 -o local -os /images -of qcow2\n$`,
		"2.5.6rhel=9,release=4.el9": `^-i libvirtxml `,
		"2.12.0":                    `^-i disk (nbd\+unix:///\?socket=\S+ ){2}-on web01 -o local`,
		"2.13.3fedora=44":           `^-i disk nbd`,
	} {
		t.Run(version, func(t *testing.T) {
			out := t.TempDir()
			env := []string{flags, "OUT=" + out, "TMPDIR=" + t.TempDir(), "V2V_VERSION=" + version, "V2V_FLAGS=-o local -os /images -of qcow2"}
			cmd := example(t, "v2v.sh", env, append([]string{"web01"}, disks...), bin)
			if text, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
			arguments, err := os.ReadFile(filepath.Join(out, "arguments"))
			if err != nil || !regexp.MustCompile(wants).Match(arguments) {
				t.Errorf("virt-v2v %s, %v", arguments, err)
			}
			for i, name := range []string{"web01.vmdk", "web01_1.vmdk"} {
				peer.Run(t, "cmp", filepath.Join(out, fmt.Sprintf("disk%d", i+1)), filepath.Join(lib, "disks/ds1/web01", name))
			}
			if strings.HasPrefix(wants, "^-i libvirtxml") {
				checkDomain(t, filepath.Join(out, "guest.xml"))
			}
			// Its status is the script's.
			cmd = example(t, "v2v.sh", append(env, "V2V_EXIT=7"), append([]string{"web01"}, disks...), bin)
			if text, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 7 {
				t.Errorf("%v, want status 7\n%s", err, text)
			}
			if left, err := filepath.Glob(strings.TrimPrefix(env[2], "TMPDIR=") + "/*"); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
	// Without one of the disks nothing is converted.
	out := t.TempDir()
	cmd := example(t, "v2v.sh", []string{flags, "OUT=" + out, "V2V_VERSION=2.2.0"}, []string{"web01", disks[0], "[ds1] web01/none.vmdk"}, bin)
	text, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(text), "none.vmdk") {
		t.Errorf("a disk that is not there: %v\n%s", err, text)
	}
	if left, _ := filepath.Glob(out + "/*"); len(left) > 0 {
		t.Errorf("virt-v2v was run without a disk: %v", left)
	}
}

// checkDomain reads what the script tells an older virt-v2v of a VM.
func checkDomain(t *testing.T, path string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var domain struct {
		Type  string `xml:"type,attr"`
		Name  string `xml:"name"`
		Disks []struct {
			Type   string `xml:"type,attr"`
			Source struct {
				Protocol string `xml:"protocol,attr"`
			} `xml:"source"`
			Target struct {
				Dev string `xml:"dev,attr"`
			} `xml:"target"`
		} `xml:"devices>disk"`
	}
	if err := xml.Unmarshal(text, &domain); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if len(domain.Disks) != 2 || domain.Type != "vmware" || domain.Name == "" || domain.Disks[0].Target.Dev != "sda" ||
		domain.Disks[1].Target.Dev != "sdb" || domain.Disks[1].Type != "network" || domain.Disks[1].Source.Protocol != "nbd" {
		t.Errorf("domain\n%s", text)
	}
}
