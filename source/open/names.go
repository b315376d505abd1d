package open

import (
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
)

// flatExtent matches the names of VMware's files that hold nothing but the bytes of
// a disk: vm-flat.vmdk, vm-f001.vmdk.
var flatExtent = regexp.MustCompile(`(?i)-(flat|f[0-9]{3,})\.vmdk$`)

// FormatByName returns the format that the name of a local source suggests, such as "a
// VMDK", or "" if the name fits a raw disk. If a file is read as a raw disk although
// its name suggests another format, the user should be warned. For example, a VHD of
// fixed size is recognized by its last bytes. If these are missing, only its name shows
// that it is not a raw disk.
func FormatByName(a address.Address) string {
	path := a.String()
	if address.IsRemote(a) || flatExtent.MatchString(path) {
		return ""
	}
	switch strings.ToLower(filepath.Ext(path)) {
	case ".vmdk":
		return "a VMDK"
	case ".qcow2", ".qcow":
		return "a qcow2 image"
	case ".vhd":
		return "a VHD"
	case ".vhdx":
		return "a VHDX"
	case ".vdi":
		return "a VirtualBox image"
	case ".gz", ".xz", ".zst", ".bz2", ".lz4":
		return "a compressed file"
	case ".zip", ".7z", ".tar", ".tgz":
		return "an archive"
	}
	return ""
}
