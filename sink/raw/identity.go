package raw

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/eintr"
)

// deviceIdentity returns a string that identifies a block device with the given
// size in bytes. If another device gets the same name later, its identity is
// different.
func deviceIdentity(f *os.File, size int64) (string, error) {
	var st unix.Stat_t
	if err := eintr.Retry(func() error { return unix.Fstat(int(f.Fd()), &st) }); err != nil {
		return "", fmt.Errorf("cannot determine the identity of %s: %w", f.Name(), err)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	return fmt.Sprintf("%s of %d bytes", describeDevice("/sys/dev/block", number), size), nil
}

// describeDevice returns a description that identifies a device. The parameter
// devices is a folder like /sys/dev/block, and number consists of the device
// numbers in the form MAJOR:MINOR. Properties of the device itself, such as a
// serial number or the file behind a loop device, are preferred, since device
// numbers can change with a reboot. The numbers are used only if the device has no
// such property.
func describeDevice(devices, number string) string {
	dir, err := filepath.EvalSymlinks(filepath.Join(devices, number))
	if err != nil {
		return "block device " + number
	}
	attribute := func(name string) string { return readAttribute(dir, name) }
	if attribute("partition") != "" {
		disk := readAttribute(filepath.Dir(dir), "dev")
		if disk != "" && disk != number {
			return fmt.Sprintf("the partition at sector %s of %s", attribute("start"), describeDevice(devices, disk))
		}
	}
	for _, name := range []string{"dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "device/cid"} {
		if id := attribute(name); id != "" {
			return fmt.Sprintf("the device with the %s %q", filepath.Base(name), id)
		}
	}
	if path := attribute("loop/backing_file"); path != "" {
		var st unix.Stat_t
		if unix.Stat(path, &st) == nil {
			id := fmt.Sprintf("the loop device of %q, inode %d", path, st.Ino)
			if offset := attribute("loop/offset"); offset != "" && offset != "0" {
				id += ", from byte " + offset
			}
			return id
		}
		return fmt.Sprintf("block device %s, the loop device of %q", number, path)
	}
	return "block device " + number
}

func readAttribute(dir, name string) string {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
