package main

import (
	"bufio"
	"bytes"
	"crypto/md5"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// bootFirst is a run of boot-first.sh: a QEMU whose disk is copied behind it, and the export that
// it is copied from.
type bootFirst struct {
	t          *testing.T
	src, image string
	device     string // the disk of the guest
	pid        string // file with the process ID of the export
	flags      string // of QEMU, in addition to those that every run has

	cmd      *exec.Cmd
	out      bytes.Buffer // valid after the end of cmd
	monitor  net.Conn
	messages *bufio.Scanner
}

// newBootFirst does not start the script yet.
func newBootFirst(t *testing.T, src, device, flags string) *bootFirst {
	t.Helper()
	peer.Need(t, "qemu-system-x86_64", "qemu-img", "qemu-io")
	dir := t.TempDir()
	return &bootFirst{t: t, src: src, device: device, image: filepath.Join(dir, "image.qcow2"), pid: filepath.Join(dir, "pid"), flags: flags}
}

// start starts the script, which copies slowly, and connects to QEMU.
func (b *bootFirst) start() {
	b.t.Helper()
	socket := filepath.Join(b.t.TempDir(), "qmp")
	b.cmd = example(b.t, "boot-first.sh", []string{
		"VDDKCP_FLAGS=--pid-file " + b.pid, "ACCEL=tcg", "MEMORY_MIB=256", "CPUS=1", "DEVICE=" + b.device, "SPEED=262144", "RESTARTS=9",
		"QEMU_FLAGS=-nic none -display none -qmp unix:" + socket + ",server=on,wait=off " + b.flags,
	}, []string{b.src, b.image})
	b.cmd.Cancel = func() error { return b.cmd.Process.Signal(syscall.SIGTERM) } // the script ends QEMU and the export
	b.cmd.WaitDelay = time.Minute
	b.out.Reset()
	b.cmd.Stdout, b.cmd.Stderr = &b.out, &b.out
	if err := b.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	cmd := b.cmd
	b.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Wait()
		}
	})
	soon(b.t, "QEMU has not started", func() bool {
		var err error
		b.monitor, err = net.Dial("unix", socket)
		return err == nil
	})
	b.t.Cleanup(func() { b.monitor.Close() })
	b.messages = bufio.NewScanner(b.monitor)
	b.do(`{"execute": "qmp_capabilities"}`)
	soon(b.t, "the copy has not begun", func() bool { _, running := b.copied(); return running })
}

// do lets QEMU execute a command, and returns its answer.
func (b *bootFirst) do(command string) json.RawMessage {
	b.t.Helper()
	if _, err := fmt.Fprintln(b.monitor, command); err != nil {
		b.t.Fatal(err)
	}
	for b.messages.Scan() {
		var answer struct{ Return, Error json.RawMessage }
		if err := json.Unmarshal(b.messages.Bytes(), &answer); err != nil {
			b.t.Fatal(err)
		}
		if bytes.Contains(answer.Error, []byte("DeviceNotActive")) {
			return nil // the copy is complete
		}
		if answer.Error != nil {
			b.t.Fatalf("%s: %s", command, answer.Error)
		}
		if answer.Return != nil { // otherwise it is an event
			return answer.Return
		}
	}
	b.t.Fatalf("%s: no answer from QEMU: %v", command, b.messages.Err())
	return nil
}

// io lets QEMU execute a command of qemu-io on the disk of the guest.
func (b *bootFirst) io(format string, args ...any) {
	b.t.Helper()
	command := fmt.Sprintf(format, args...)
	line, err := json.Marshal("qemu-io -d disk \"" + command + "\"")
	if err != nil {
		b.t.Fatal(err)
	}
	// QEMU prints errors of the command itself, such as "write failed", and sends errors before it.
	if answer := string(b.do(`{"execute": "human-monitor-command", "arguments": {"command-line": ` + string(line) + `}}`)); answer != `""` {
		b.t.Fatalf("%s: %s", command, answer)
	}
}

// copied returns how many bytes have been copied behind the guest, and whether the copy is
// still in progress.
func (b *bootFirst) copied() (offset int64, running bool) {
	b.t.Helper()
	var jobs []struct{ Offset int64 }
	if err := json.Unmarshal(b.do(`{"execute": "query-block-jobs"}`), &jobs); err != nil {
		b.t.Fatal(err)
	}
	if len(jobs) == 0 {
		return 0, false
	}
	return jobs[0].Offset, true
}

// kill kills the export in the middle of the copy. The function meanwhile is called while there may
// be no export. The method kill returns when another export serves the copy.
func (b *bootFirst) kill(meanwhile func()) {
	b.t.Helper()
	before, running := b.copied()
	pid := b.exporter()
	if !running || pid == 0 {
		b.t.Fatalf("the copy is over, or there is no export: process %d", pid)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		b.t.Fatal(err)
	}
	meanwhile()
	soon(b.t, "the export was not started again", func() bool { now := b.exporter(); return now != 0 && now != pid })
	soon(b.t, "the copy does not go on", func() bool { now, running := b.copied(); return !running || now > before })
}

// exporter returns the process ID of the export, or 0.
func (b *bootFirst) exporter() int {
	text, err := os.ReadFile(b.pid)
	if err != nil {
		return 0
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return pid
}

// unlimited lets the copy run as fast as it can.
func (b *bootFirst) unlimited() {
	b.t.Helper()
	b.do(`{"execute": "block-job-set-speed", "arguments": {"device": "copy", "speed": 0}}`)
}

// complete checks the image of a copy that is complete, and returns its content.
func (b *bootFirst) complete() []byte {
	b.t.Helper()
	if info := peer.Run(b.t, "qemu-img", "info", "-U", b.image); strings.Contains(info, "backing") {
		b.t.Errorf("the image has a backing file:\n%s", info)
	}
	peer.Run(b.t, "qemu-img", "check", b.image)
	for _, end := range []string{".sock", ".pin", ".pin.lock"} {
		if _, err := os.Lstat(b.image + end); err == nil {
			b.t.Errorf("image.qcow2%s is left", end)
		}
	}
	if pid := b.exporter(); pid != 0 {
		b.t.Errorf("the export still runs: process %d", pid)
	}
	flat := filepath.Join(b.t.TempDir(), "flat.raw")
	peer.Run(b.t, "qemu-img", "convert", "-O", "raw", b.image, flat)
	content, err := os.ReadFile(flat)
	if err != nil {
		b.t.Fatal(err)
	}
	return content
}

// ends waits for the end of the script.
func (b *bootFirst) ends(status int) {
	b.t.Helper()
	b.cmd.Wait()
	if got := b.cmd.ProcessState.ExitCode(); got != status {
		b.t.Fatalf("boot-first.sh: status %d, want %d\n%s", got, status, &b.out)
	}
}

// firstDifference returns the offset of the first byte in which a and b differ.
func firstDifference(a, b []byte) (at int, differ bool) {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i, true
		}
	}
	return min(len(a), len(b)), len(a) != len(b)
}

// TestBootFirstWithoutGuest writes a disk while it is copied behind QEMU, without a guest. The
// image must have every byte of the source and of the writes, whatever happened to the export and
// the script meanwhile.
func TestBootFirstWithoutGuest(t *testing.T) {
	t.Parallel()
	const size, unit = 96 << 20, 4 << 10
	seed := rand.NewChaCha8([32]byte{1})
	random := rand.New(seed)
	want := make([]byte, size)
	seed.Read(want)
	clear(want[size/2:][:size/8]) // a hole
	src := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(src, want, 0o600); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "fallocate", "-d", src)
	before := sha256sum(t, src)

	b := newBootFirst(t, src, "ide-hd", "-S")
	writes := func() {
		t.Helper()
		// Each command of qemu-io also lets QEMU copy up to 1 MiB, whatever the limit of the copy.
		for i := range 8 {
			offset, n := random.Int64N(size-64*unit)/512*512, (1+random.Int64N(60*unit))/512*512
			if i == 0 {
				offset, n = size-unit, unit
			}
			pattern := byte(1 + random.IntN(255))
			copy(want[offset:], bytes.Repeat([]byte{pattern}, int(n)))
			b.io("write -P %d %d %d", pattern, offset, n)
		}
		b.io("flush")
	}
	b.start()
	writes()
	b.kill(writes)
	b.kill(writes)

	// The script is stopped, and continues, if the disk is still the same.
	b.cmd.Process.Signal(syscall.SIGTERM)
	b.ends(143)
	soon(t, "the export runs without the script", func() bool { return b.exporter() == 0 })
	stat, err := os.Stat(src)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(src, time.Time{}, stat.ModTime().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	cmd := example(t, "boot-first.sh", nil, []string{src, b.image})
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "or the disk has changed") {
		t.Errorf("with a disk that has changed: %v\n%s", err, out)
	}
	if err := os.Chtimes(src, time.Time{}, stat.ModTime()); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.kill(writes)
	b.unlimited()
	writes()
	soon(t, "the copy does not end", func() bool { _, running := b.copied(); return !running })
	soon(t, "the export still runs", func() bool { return b.exporter() == 0 })
	writes() // the guest needs no export any more
	b.do(`{"execute": "quit"}`)
	b.ends(0)
	if out := b.out.String(); strings.Contains(out, "failed") || strings.Count(out, "wrote ") != 24 {
		t.Errorf("want 24 writes and no failure since the script was started again:\n%s", out)
	}
	if at, differ := firstDifference(b.complete(), want); differ {
		t.Errorf("the image is not the disk with the writes: the first difference is at byte %d", at)
	}
	if sha256sum(t, src) != before {
		t.Error("the source has changed")
	}

	// A complete image is not taken for the image of a copy.
	cmd = example(t, "boot-first.sh", nil, []string{src, b.image})
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "is complete") {
		t.Errorf("with a complete image: %v\n%s", err, out)
	}
	// Neither is one whose pin is gone.
	lost := filepath.Join(t.TempDir(), "lost.qcow2")
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", src, lost)
	cmd = example(t, "boot-first.sh", nil, []string{src, lost})
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "lost.qcow2.pin is missing") {
		t.Errorf("without the pin: %v\n%s", err, out)
	}
	// A disk that cannot be served starts nothing, and leaves nothing.
	cmd = example(t, "boot-first.sh", nil, []string{"none.raw", "new.qcow2"})
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "none.raw") {
		t.Errorf("without a disk: %v\n%s", err, out)
	}
	if left, err := os.ReadDir(cmd.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// bootFirstInit is the first program of the guest of TestExampleBootFirst. It is guestInit with two
// more writes, one of them beyond the end of the file system, and the checksum of the whole disk as
// the guest sees it at its end.
var bootFirstInit = strings.Replace(guestInit, `cd /
umount /mnt && echo "the guest is done"
`, `dd if=written of=/dev/vda bs=64k seek=800 count=32 conv=notrunc 2>/dev/null
cd /
umount /mnt
sync
echo 3 >/proc/sys/vm/drop_caches
echo "disk $(md5sum </dev/vda)"
echo "the guest is done"
`, 1)

// TestExampleBootFirst boots a guest from a disk that is copied behind it, and kills the export
// while the guest reads, and again while the guest writes.
func TestExampleBootFirst(t *testing.T) {
	t.Parallel()
	g := newGuestWith(t, bootFirstInit)
	disk, sums := guestDisk(t)
	f, err := os.OpenFile(disk, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	tail := bytes.Repeat([]byte("no zeros "), 1<<20)[:4<<20]
	if _, err := f.Write(tail); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	before := sha256sum(t, disk)
	serial := filepath.Join(t.TempDir(), "console")
	b := newBootFirst(t, disk, "virtio-blk-pci", "-serial file:"+serial+" "+strings.ReplaceAll(g.flags(), `115200\ panic=-1`, "115200"))
	began := time.Now()
	b.start()
	prints := func(text string) {
		t.Helper()
		for deadline := time.Now().Add(4 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
			console, err := os.ReadFile(serial)
			if err == nil && bytes.Contains(console, []byte(text)) {
				t.Logf("the guest printed %q after %.1f s", text, time.Since(began).Seconds())
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the guest does not print %q: %v\n%s", text, err, console)
			}
		}
	}
	prints("disks: ")
	b.kill(func() {})
	prints("wrote ")
	b.kill(func() {})
	prints("the guest is done")
	b.unlimited() // the guest may be off already; the copy goes on nevertheless
	b.ends(0)
	console, err := os.ReadFile(serial)
	if err != nil {
		t.Fatal(err)
	}
	wrote := g.said(t, string(console), "/dev/vda", sums)
	content := b.complete()
	m := regexp.MustCompile(`(?m)^disk ([0-9a-f]{32})`).FindSubmatch(console)
	if sum := fmt.Sprintf("%x", md5.Sum(content)); m == nil || string(m[1]) != sum {
		t.Errorf("the image has the checksum %s, which is not that of the guest's disk:\n%s", sum, console)
	}
	copied := filepath.Join(t.TempDir(), "copied.raw")
	if err := os.WriteFile(copied, content, 0o600); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "e2fsck", "-fn", copied)
	if sum := fmt.Sprintf("%x", md5.Sum(content[800<<16:][:2<<20])); sum != wrote {
		t.Errorf("beyond the file system is %s, and the guest wrote %s", sum, wrote)
	}
	if !bytes.HasSuffix(content, tail[len(tail)-1<<20:]) {
		t.Error("the end of the disk is not that of the source")
	}
	if sha256sum(t, disk) != before {
		t.Error("the source has changed")
	}
}
