package vmdk

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/source"
)

// noParent is the parentCID of an image without a parent ("Virtual Disk Format
// 5.0", The Header).
const noParent = 0xffffffff

// These values are written to a descriptor for properties that the source does
// not report.
const (
	defaultAdapter   = "lsilogic"
	defaultHWVersion = "4" // the lowest version in use, which every host supports
	// unmanagedTools is a value of the descriptor's entry for the version of
	// VMware Tools. It means that the guest manages its tools itself
	// (open-vm-tools). vSphere then does not offer to install other tools.
	unmanagedTools = "2147483647"
	openVMTools    = "4" // the toolsInstallType of open-vm-tools
	defaultName    = "disk.vmdk"
)

// maxValue is the maximum length, in bytes, of a value that is copied from the
// source to the descriptor.
const maxValue = 64

// adapters are the valid values of ddb.adapterType ("Virtual Disk Format 5.0", The
// Disk Database).
var adapters = []string{"ide", "buslogic", "lsilogic", "legacyESX"}

// descriptor holds the variable parts of a VMDK descriptor, the text that
// describes an image.
type descriptor struct {
	name                       string
	sectors                    int64
	cid                        uint32
	adapter, hwVersion, uuid   string
	toolsVersion               string
	toolsInstallType           string
	cylinders, heads, perTrack int64
	logical, physical          int64 // sector sizes that the guest sees, bytes; 0: not recorded
}

// newDescriptor returns a descriptor with those properties of the source that are
// valid. The image keeps the CID (content ID) of the source, because the children
// of an image record the CID of the content on which they depend. If the source
// has no CID, the image gets a random CID, so that it differs from those of other
// images.
func newDescriptor(name string, size int64, info source.Info) descriptor {
	d := descriptor{
		name: extentName(name), sectors: size / sectorSize,
		adapter:      defaultAdapter,
		hwVersion:    defaultHWVersion,
		toolsVersion: unmanagedTools,
		uuid:         info.UUID,
	}
	for _, known := range adapters {
		if strings.EqualFold(info.AdapterType, known) {
			d.adapter = known
		}
	}
	if isNumber(info.HWVersion) {
		d.hwVersion = info.HWVersion
	}
	if isNumber(info.ToolsVersion) {
		d.toolsVersion = info.ToolsVersion
	}
	if d.toolsVersion == unmanagedTools {
		d.toolsInstallType = openVMTools
	}
	if !isPlain(d.uuid) {
		d.uuid = ""
	}
	if isSectorSize(info.GuestSector) {
		d.logical = info.GuestSector
	}
	if isSectorSize(info.GuestPhysical) && info.GuestPhysical >= d.logical {
		d.physical = info.GuestPhysical
	}
	if d.logical <= sectorSize && d.physical <= sectorSize {
		d.logical, d.physical = 0, 0 // 512 bytes is the default without these entries
	}
	d.cid = newCID(info.CID)
	d.cylinders, d.heads, d.perTrack = geometry(d.sectors, d.adapter, info.Geometry)
	return d
}

// isSectorSize reports whether n is a sector size, in bytes, that the reader in
// source/vmdk accepts. VMware's disks have sectors of 512 or 4096 bytes.
func isSectorSize(n int64) bool { return n >= sectorSize && n <= 64<<10 && n&(n-1) == 0 }

func newCID(known string) uint32 {
	if n, err := strconv.ParseUint(known, 16, 32); err == nil && n != noParent {
		return uint32(n)
	}
	var b [4]byte
	rand.Read(b[:])
	return binary.LittleEndian.Uint32(b[:]) % noParent
}

// The function geometry returns the geometry of the source if it matches the
// size of the disk. Otherwise it returns the geometry that VMware gives to a new
// disk. The numbers of heads and of sectors per track then depend on the size
// and the adapter. There are as many whole cylinders as fit in the disk.
func geometry(sectors int64, adapter string, known [3]int64) (cylinders, heads, perTrack int64) {
	c, h, s := known[0], known[1], known[2]
	// The number of cylinders in the source's geometry may be one higher than
	// the number of whole cylinders in the disk, because some programs round it
	// up.
	if c > 0 && h > 0 && h <= 255 && s > 0 && s <= 63 && c <= (sectors-1)/(h*s)+1 {
		return c, h, s
	}
	const gib = 1 << 30 / sectorSize
	switch {
	case adapter == "ide":
		return min(max(sectors/(16*63), 1), 16383), 16, 63
	case sectors < gib:
		heads, perTrack = 64, 32
	case sectors < 2*gib:
		heads, perTrack = 128, 32
	default:
		heads, perTrack = 255, 63
	}
	return max(sectors/(heads*perTrack), 1), heads, perTrack
}

// extentName returns the name by which the descriptor refers to the file of the
// image. Readers ignore this name. If the name of the target is not suitable, for
// example because the target is a pipe, the result is a fixed name.
func extentName(name string) string {
	name = filepath.Base(name)
	if !strings.EqualFold(filepath.Ext(name), ".vmdk") || len(name) > 255 || !isText(name) {
		return defaultName
	}
	return name
}

// isText reports whether s can be written between quotes in a descriptor.
func isText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '"' })
}

func isPlain(s string) bool { return s != "" && len(s) <= maxValue && isText(s) }

func isNumber(s string) bool {
	return isPlain(s) && !strings.ContainsFunc(s, func(r rune) bool { return r < '0' || r > '9' })
}

// The function decimal returns n in decimal digits, or "" if n is 0.
func decimal(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func (d descriptor) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=%08x
parentCID=%08x
createType="streamOptimized"

# Extent description
RW %d SPARSE "%s"

# The Disk Data Base
#DDB

`, d.cid, uint32(noParent), d.sectors, d.name)
	for _, entry := range []struct{ key, value string }{
		{"adapterType", d.adapter},
		{"geometry.cylinders", strconv.FormatInt(d.cylinders, 10)},
		{"geometry.heads", strconv.FormatInt(d.heads, 10)},
		{"geometry.sectors", strconv.FormatInt(d.perTrack, 10)},
		{"logicalSectorSize", decimal(d.logical)},
		{"physicalSectorSize", decimal(d.physical)},
		{"toolsInstallType", d.toolsInstallType},
		{"toolsVersion", d.toolsVersion},
		{"uuid", d.uuid},
		{"virtualHWVersion", d.hwVersion},
	} {
		if entry.value != "" {
			fmt.Fprintf(&b, "ddb.%s = \"%s\"\n", entry.key, entry.value)
		}
	}
	return b.String()
}
