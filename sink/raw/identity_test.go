package raw

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

// fakeDevices makes a folder like /sys/dev/block. Devices are their folders, with
// their attributes.
func fakeDevices(t *testing.T, devices map[string]map[string]string) string {
	t.Helper()
	sys := t.TempDir()
	numbers := filepath.Join(sys, "dev")
	if err := os.Mkdir(numbers, 0o700); err != nil {
		t.Fatal(err)
	}
	for folder, attributes := range devices {
		dir := filepath.Join(sys, folder)
		for name, text := range attributes {
			path := filepath.Join(dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(dir, filepath.Join(numbers, attributes["dev"])); err != nil {
			t.Fatal(err)
		}
	}
	return numbers
}

func TestDescribeDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	devices := fakeDevices(t, map[string]map[string]string{
		"sda":       {"dev": "8:0", "device/wwid": "naa.5000c500"},
		"sda/sda3":  {"dev": "8:3", "partition": "3", "start": "2048"},
		"sdb":       {"dev": "8:16", "device/wwid": ""},
		"sdb/sdb1":  {"dev": "8:17", "partition": "1", "start": "64"},
		"vda":       {"dev": "254:0", "serial": "disk-1"},
		"nvme0n1":   {"dev": "259:0", "wwid": "eui.0025", "device/serial": "S1"},
		"dm-0":      {"dev": "253:0", "dm/uuid": "LVM-abc", "dm/name": "vg-lv"},
		"dm-1":      {"dev": "253:1", "dm/uuid": "", "dm/name": "plain"},
		"loop0":     {"dev": "7:0", "loop/backing_file": file},
		"loop2":     {"dev": "7:2", "loop/backing_file": file, "loop/offset": "0"},
		"loop3":     {"dev": "7:3", "loop/backing_file": file, "loop/offset": "1048576"},
		"loop1":     {"dev": "7:1", "loop/backing_file": "/gone (deleted)"},
		"partition": {"dev": "9:9", "partition": "1"},
	})
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	for number, want := range map[string]string{
		"8:0":   `the device with the wwid "naa.5000c500"`,
		"8:3":   `the partition at sector 2048 of the device with the wwid "naa.5000c500"`,
		"8:16":  "block device 8:16",
		"8:17":  "the partition at sector 64 of block device 8:16",
		"254:0": `the device with the serial "disk-1"`,
		"259:0": `the device with the wwid "eui.0025"`,
		"253:0": `the device with the uuid "LVM-abc"`,
		"253:1": "block device 253:1",
		"7:0":   fmt.Sprintf("the loop device of %q, inode %d", file, inode(info)),
		"7:2":   fmt.Sprintf("the loop device of %q, inode %d", file, inode(info)),
		"7:3":   fmt.Sprintf("the loop device of %q, inode %d, from byte 1048576", file, inode(info)),
		"7:1":   `block device 7:1, the loop device of "/gone (deleted)"`,
		"9:9":   "block device 9:9",
		"1:1":   "block device 1:1",
	} {
		if got := describeDevice(devices, number); got != want {
			t.Errorf("%s is %q, want %q", number, got, want)
		}
	}
}

func TestFileIdentity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d")
	create := func(o sink.Options) (sink.Disk, string) {
		t.Helper()
		d, err := CreateFile(t.Context(), path, 4096, Options{Options: o, Force: true})
		if err != nil {
			t.Fatal(err)
		}
		id, err := sink.IdentityOf(d)
		if err != nil || id == "" {
			t.Fatalf("identity %q, %v", id, err)
		}
		return d, id
	}
	d, first := create(sink.Options{})
	if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Suspend(); err != nil {
		t.Fatal(err)
	}
	// The identity of a file decides nothing here: it may have been moved.
	d, again := create(sink.Options{State: state(4096), Resume: 512, Identity: "another"})
	if again != first {
		t.Errorf("the same file is %q, and was %q", again, first)
	}
	if err := d.Suspend(); err != nil {
		t.Fatal(err)
	}
	d, other := create(sink.Options{})
	if other == first {
		t.Errorf("a new file has the identity %q of the one before", other)
	}
	if err := d.Abort(); err != nil {
		t.Fatal(err)
	}
}

func inode(info os.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

func TestRelatedFiles(t *testing.T) {
	devices := fakeDevices(t, map[string]map[string]string{
		"sda":        {"dev": "8:0"},
		"sda/sda1":   {"dev": "8:1", "partition": "1"},
		"sda/queue":  {"dev": "none"},
		"c0!d0":      {"dev": "104:0"},
		"dm-0":       {"dev": "253:0"},
		"loop0":      {"dev": "7:0", "loop/backing_file": "/img"},
		"loop0/l0p1": {"dev": "259:1", "partition": "1"},
	})
	slaves := filepath.Join(devices, "..", "dm-0", "slaves")
	if err := os.Mkdir(slaves, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, lower := range []string{"sda/sda1", "c0!d0"} {
		if err := os.Symlink(filepath.Join(devices, "..", lower), filepath.Join(slaves, filepath.Base(lower))); err != nil {
			t.Fatal(err)
		}
	}
	for number, want := range map[string]string{
		"8:0":   "[/dev/sda1]",
		"8:1":   "[/dev/sda]",
		"7:0":   "[/dev/l0p1 /img]",
		"259:1": "[/dev/loop0 /img]",
		"253:0": "[/dev/c0/d0 /dev/sda1 /dev/sda]",
		"1:1":   "[]",
	} {
		if got := fmt.Sprint(relatedFiles(devices, number)); got != want {
			t.Errorf("%s: %s, want %s", number, got, want)
		}
	}
}
