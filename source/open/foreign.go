package open

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/qcow2"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// ForeignError reports a file or a stream that vddkcp cannot read as a disk: an image
// of another program, an archive, a compressed file or a text. It also reports a stream
// that is an image in a format such as VMDK, because only a raw disk can be read from a
// stream. If such a file or stream were read as a raw disk, the result would not be the
// content of a disk.
type ForeignError struct {
	Path  string // path of the file, or name of the stream
	What  string // what the content is, such as "a VHD image"
	Where string // the bytes by which it was recognized, and their offset
	hint  string
}

func (e *ForeignError) Error() string {
	return fmt.Sprintf("%s is %s, not a disk that can be read: %s", e.Path, e.What, e.Where)
}

// Hint returns how to get a disk from the file.
func (e *ForeignError) Hint() string {
	return e.hint + "; if the content is a raw disk nevertheless, add --source-format raw"
}

// The type content has the parts of a file or stream by which its format is recognized.
type content struct {
	head  []byte // the first headSize bytes, or all bytes of a short text
	tail  []byte // the last tailSize bytes; nil: not known yet
	whole bool   // head has all bytes
}

const (
	headSize = 4 << 10  // bytes
	tailSize = 512      // bytes
	textSize = 64 << 10 // bytes; only shorter texts are read completely to recognize them
)

// contentOf reads the bytes that are needed to recognize the format of f.
func contentOf(f source.Disk) (content, error) {
	size := f.Size()
	c := content{head: make([]byte, min(size, headSize)), tail: make([]byte, min(size, tailSize))}
	if _, err := f.ReadAt(c.head, 0); err != nil && err != io.EOF {
		return c, err
	}
	if size <= textSize && c.mayBeJSON() {
		c.head = make([]byte, size)
		if _, err := f.ReadAt(c.head, 0); err != nil && err != io.EOF {
			return c, err
		}
	}
	c.whole = int64(len(c.head)) == size
	if _, err := f.ReadAt(c.tail, size-int64(len(c.tail))); err != nil && err != io.EOF {
		c.tail = nil // the error is reported when the disk is read
	}
	return c, nil
}

// isLUKS reports whether the content is a disk that is encrypted with LUKS 1 or 2.
func (c content) isLUKS() bool {
	return bytes.HasPrefix(c.head, []byte("LUKS\xba\xbe\x00\x01")) || bytes.HasPrefix(c.head, []byte("LUKS\xba\xbe\x00\x02"))
}

// The method foreign returns a *ForeignError for the given path if the content has a
// known format that this package cannot read. A file with a partition table counts as a
// raw disk, unless its last bytes are those of an image.
func (c content) foreign(path string) error {
	if !c.hasPartitions() {
		for _, s := range signatures {
			if s.matches(c.head) {
				return &ForeignError{path, s.what, fmt.Sprintf("found %+q at byte %d", s.magic, s.offset), s.hint}
			}
		}
		if isTar(c.head) {
			return &ForeignError{path, "a tar archive", "found the header of a member at byte 0", unpackHint("tar -xf FILE")}
		}
		if what := c.text(); what != "" {
			return &ForeignError{path, what, fmt.Sprintf("it begins with %+q", c.head[:min(len(c.head), 40)]), "use the disk itself (a VMDK, qcow2 or raw file) as the source"}
		}
	}
	return c.foreignTail(path)
}

// foreignTail returns a *ForeignError for the given path if the last bytes of the
// content show a format that this package cannot read.
func (c content) foreignTail(path string) error {
	if at, ok := fixedVHD(c.tail); ok {
		return &ForeignError{path, "a VHD image of fixed size", fmt.Sprintf("found a footer %q %d bytes before the end", "conectix", len(c.tail)-at), imageHint("vpc")}
	}
	if len(c.tail) == tailSize && bytes.HasPrefix(c.tail, []byte("koly\x00\x00\x00\x04\x00\x00\x02\x00")) {
		return &ForeignError{path, "an Apple disk image (DMG)", fmt.Sprintf("found a trailer %q %d bytes before the end", "koly", tailSize), imageHint("dmg")}
	}
	return nil
}

func imageHint(format string) string {
	return fmt.Sprintf("convert it first: qemu-img convert -f %s -O raw FILE DISK.raw", format)
}

func unpackHint(command string) string { return "unpack it first: " + command }

// A signature describes a format that this package cannot read. A file in this format is
// recognized by fixed bytes at a fixed offset.
type signature struct {
	what   string                 // the What of the ForeignError
	offset int                    // bytes
	magic  string                 // the bytes at the offset
	hint   string                 // how to get a disk
	check  func(head []byte) bool // a further condition; nil: there is none
}

func (s *signature) matches(head []byte) bool {
	return len(head) > s.offset && bytes.HasPrefix(head[s.offset:], []byte(s.magic)) && (s.check == nil || s.check(head))
}

// signatures lists formats that this package cannot read, in any order. It must not
// list file systems, partition tables, volume managers or boot loaders: a file that
// begins with one of these is a raw disk.
var signatures = []signature{
	{what: "a VHD image", magic: "conectix", hint: imageHint("vpc")},
	{what: "a VHDX image", magic: "vhdxfile", hint: imageHint("vhdx")},
	{what: "a VirtualBox image (VDI)", offset: 64, magic: "\x7f\x10\xda\xbe", hint: imageHint("vdi"), check: vdiVersion},
	{what: "a QED image", magic: "QED\x00", hint: imageHint("qed")},
	{what: "a Parallels image", magic: "WithoutFreeSpace", hint: imageHint("parallels")},
	{what: "a Parallels image", magic: "WithouFreSpacExt", hint: imageHint("parallels")},
	{what: "a Bochs image", magic: "Bochs Virtual HD Image", hint: imageHint("bochs")},
	{what: "a compressed loop image (cloop)", magic: "#!/bin/sh\n#V2.0 Format\nmodprobe cloop", hint: imageHint("cloop")},
	{what: "a COW image of an old qemu", magic: "OOOM\x00\x00\x00\x02", hint: "convert it first with a qemu-img older than version 2.2: qemu-img convert -f cow -O raw FILE DISK.raw"},
	{what: "a backup of Proxmox VE (VMA)", magic: "VMA\x00\x00\x00\x00\x01", hint: "extract its disks first: vma extract FILE FOLDER"},
	{what: "an Apple sparse disk image", magic: "sprs\x00\x00\x00\x03", hint: "convert it first, on macOS: hdiutil convert FILE -format UDTO -o DISK"},
	{what: "an encrypted Apple disk image (DMG)", magic: "encrcdsa", hint: "convert it to an image without encryption first, on macOS: hdiutil convert FILE -format UDTO -o DISK"},
	{what: "an Android sparse image", magic: "\x3a\xff\x26\xed\x01\x00", hint: "convert it first: simg2img FILE DISK.raw"},
	{what: "a Windows image (WIM)", magic: "MSWIM\x00\x00\x00", hint: "extract it to an NTFS volume first: wimapply FILE IMAGE DEVICE; then use, as the source, the disk on which this volume lies"},
	{what: "a partclone image", magic: "partclone-image", hint: "restore it to a device first: partclone.restore -s FILE -o DEVICE; then use this device as the source"},
	{what: "an ntfsclone image", magic: "\x00ntfsclone-image", hint: "restore it first: ntfsclone --restore-image --overwrite DISK.raw FILE"},
	{what: "a partimage image", magic: "PaRtImAgE-VoLuMe", hint: "restore it to a device first: partimage restore DEVICE FILE; then use this device as the source"},

	{what: "an EnCase image (E01)", magic: "EVF\x09\x0d\x0a\xff\x00", hint: "export it first: ewfexport -f raw FILE"},
	{what: "an EnCase image (L01)", magic: "LVF\x09\x0d\x0a\xff\x00", hint: "export it first: ewfexport FILE"},
	{what: "an EnCase image (Ex01)", magic: "EVF2\x0d\x0a\x81\x00", hint: "export it first: ewfexport -f raw FILE"},
	{what: "an AFF image", magic: "AFF10\x0d\x0a\x00", hint: "export it first: affconvert -r FILE"},

	{what: "compressed by gzip", magic: "\x1f\x8b\x08", hint: unpackHint("gunzip FILE"), check: func(head []byte) bool { return len(head) > 3 && head[3]&0xe0 == 0 }},
	{what: "compressed by xz", magic: "\xfd7zXZ\x00", hint: unpackHint("xz -d FILE")},
	{what: "compressed by zstd", magic: "\x28\xb5\x2f\xfd", hint: unpackHint("zstd -d FILE")},
	{what: "compressed by zstd or lz4", offset: 1, magic: "\x2a\x4d\x18", hint: unpackHint("zstd -d FILE, or lz4 -d FILE"), check: func(head []byte) bool { return head[0]&0xf0 == 0x50 }},
	{what: "compressed by bzip2", magic: "BZh", hint: unpackHint("bunzip2 FILE"), check: bzip2Block},
	{what: "compressed by lz4", magic: "\x04\x22\x4d\x18", hint: unpackHint("lz4 -d FILE")},
	{what: "compressed by lz4", magic: "\x02\x21\x4c\x18", hint: unpackHint("lz4 -d FILE")},
	{what: "compressed by lzip", magic: "LZIP\x01", hint: unpackHint("lzip -d FILE")},
	{what: "compressed by lzop", magic: "\x89LZO\x00\x0d\x0a\x1a\x0a", hint: unpackHint("lzop -d FILE")},
	{what: "compressed by compress", magic: "\x1f\x9d\x90", hint: unpackHint("uncompress FILE")},
	{what: "a 7z archive", magic: "7z\xbc\xaf\x27\x1c", hint: unpackHint("7z x FILE")},
	{what: "a zip archive", magic: "PK\x03\x04", hint: unpackHint("unzip FILE")},
	{what: "an empty zip archive", magic: "PK\x05\x06", hint: unpackHint("unzip FILE")},
	{what: "a part of a zip archive", magic: "PK\x07\x08", hint: unpackHint("unzip FILE")},
	{what: "a rar archive", magic: "Rar!\x1a\x07", hint: unpackHint("unrar x FILE")},
	{what: "a cabinet archive", magic: "MSCF\x00\x00\x00\x00", hint: unpackHint("cabextract FILE")},
	{what: "a cpio archive", magic: "0707", hint: unpackHint("cpio -id <FILE"), check: cpioHeader},
	{what: "an RPM package", magic: "\xed\xab\xee\xdb", hint: unpackHint("rpm2cpio FILE | cpio -id")},
	{what: "an archive of ar (a Debian package?)", magic: "!<arch>\n", hint: unpackHint("ar x FILE")},

	{what: "the NVRAM of a VMware machine (.nvram)", magic: "MRVN", hint: "use a disk of the virtual machine, a .vmdk file, as the source"},
	{what: "a snapshot or suspended state of a VMware machine (.vmsn, .vmss)", magic: "\xd0\xbe\xd2\xbe", hint: "use a disk of the virtual machine, a .vmdk file, as the source"},
	{what: "a snapshot or suspended state of a VMware machine (.vmsn, .vmss)", magic: "\xd1\xba\xd1\xba", hint: "use a disk of the virtual machine, a .vmdk file, as the source"},
	{what: "a snapshot or suspended state of a VMware machine (.vmsn, .vmss)", magic: "\xd2\xbe\xd2\xbe", hint: "use a disk of the virtual machine, a .vmdk file, as the source"},
	{what: "a snapshot or suspended state of a VMware machine (.vmsn, .vmss)", magic: "\xd3\xbe\xd2\xbe", hint: "use a disk of the virtual machine, a .vmdk file, as the source"},
	{what: "a journal of vddkcp", magic: "vddkcp journal\n\x00", hint: "the journal belongs to a disk image in the same folder, and has no data of a disk itself: use that disk image as the source"},
	{what: "a layer of vddkcp export --cow", magic: "vddkcp cow layer", hint: "a layer has only the changed blocks of a disk; to read all blocks, serve the disk SRC that it was created for, with this layer as FILE: vddkcp export SRC --cow=FILE"},
}

// vdiVersion reports whether head, the first bytes of a VirtualBox image, has the
// version 0 or 1. Other versions are not known.
func vdiVersion(head []byte) bool {
	return len(head) >= 72 && binary.LittleEndian.Uint32(head[68:])>>16 <= 1
}

// bzip2Block reports whether head, which begins with the magic of bzip2, continues like
// a bzip2 file: with a compression level, and then with the magic of a block or of the
// end of the stream.
func bzip2Block(head []byte) bool {
	return len(head) >= 10 && head[3] >= '1' && head[3] <= '9' &&
		(string(head[4:10]) == "\x31\x41\x59\x26\x53\x59" || string(head[4:10]) == "\x17\x72\x45\x38\x50\x90")
}

// cpioHeader reports whether head begins with a header of the cpio formats newc, crc or
// odc. The headers of these formats consist of digits.
func cpioHeader(head []byte) bool {
	if len(head) < 76 {
		return false
	}
	switch string(head[:6]) {
	case "070701", "070702":
		return len(bytes.Trim(head[6:76], "0123456789abcdefABCDEF")) == 0
	case "070707":
		return len(bytes.Trim(head[6:76], "01234567")) == 0
	}
	return false
}

// hasPartitions reports whether the content has a partition table: a GUID partition
// table, or a master boot record with at least one partition.
func (c content) hasPartitions() bool {
	for _, sector := range []int{512, 4096} {
		if len(c.head) >= sector+8 && string(c.head[sector:sector+8]) == "EFI PART" {
			return true
		}
	}
	if len(c.head) < 512 || c.head[510] != 0x55 || c.head[511] != 0xaa {
		return false
	}
	used := false
	for i := range 4 {
		entry := c.head[446+16*i:]
		if entry[0]&0x7f != 0 { // the status must be 0, or 0x80 for an active partition
			return false
		}
		used = used || entry[4] != 0 && binary.LittleEndian.Uint32(entry[12:]) != 0
	}
	return used
}

// isTar reports whether head begins with the header of a member of a tar archive. It
// checks only the checksum of the header, which all tar formats have in the same place.
func isTar(head []byte) bool {
	const size, sumAt, sumSize = 512, 148, 8
	if len(head) < size || head[0] == 0 {
		return false
	}
	want, digits := 0, 0
	for _, b := range bytes.Trim(head[sumAt:sumAt+sumSize], " \x00") {
		if b < '0' || b > '7' {
			return false
		}
		want, digits = want<<3|int(b-'0'), digits+1
	}
	if digits == 0 {
		return false
	}
	unsigned, signed := 0, 0 // old programs summed signed characters
	for i, b := range head[:size] {
		if i >= sumAt && i < sumAt+sumSize {
			b = ' '
		}
		unsigned += int(b)
		signed += int(int8(b))
	}
	return want == unsigned || want == signed
}

// fixedVHD looks for the footer of a VHD of fixed size in tail, the last bytes of a
// file. It returns the offset of the footer in tail. The footer has 512 bytes, but old
// programs wrote only 511 of them.
func fixedVHD(tail []byte) (at int, ok bool) {
	for _, size := range []int{512, 511} {
		if len(tail) < size {
			continue
		}
		at := len(tail) - size
		footer := make([]byte, 512)
		copy(footer, tail[at:])
		if string(footer[:8]) != "conectix" || binary.BigEndian.Uint32(footer[60:]) != 2 { // the type: fixed
			continue
		}
		sum := uint32(0)
		for i, b := range footer {
			if i < 64 || i >= 68 { // the checksum itself
				sum += uint32(b)
			}
		}
		if binary.BigEndian.Uint32(footer[64:]) == ^sum {
			return at, true
		}
	}
	return 0, false
}

// utf8BOM is the byte order mark in UTF-8, with which texts of Windows may begin.
const utf8BOM = "\xef\xbb\xbf"

// setting matches a line of a VMware text file: a key, and a value in quotes.
var setting = regexp.MustCompile(`^[.A-Za-z][A-Za-z0-9_.:-]* *= *".*"$`)

// The method text says which kind of text the content is, such as "a web page". It
// returns "" if the content is no text that it knows. The content may then be a raw
// disk.
func (c content) text() string {
	head := c.head
	if narrow, ok := fromUTF16(head); ok {
		if vmdk.Probe(narrow) {
			return "a VMDK descriptor in UTF-16 (save it in UTF-8)"
		}
		head = narrow
	}
	head = bytes.TrimLeft(bytes.TrimPrefix(head, []byte(utf8BOM)), " \t\r\n")
	begin := strings.ToLower(string(head[:min(len(head), 16)]))
	for _, t := range []struct{ prefix, what string }{
		{"<!doctype html", "a web page (an error that a download ended with?)"},
		{"<html", "a web page (an error that a download ended with?)"},
		{"<?xml", "an XML document (an OVF descriptor, or an error that a download ended with?)"},
		{"http/1.", "a response of a web server"},
		{"%pdf-", "a PDF document"},
	} {
		if strings.HasPrefix(begin, t.prefix) {
			return t.what
		}
	}
	if c.whole && c.mayBeJSON() && json.Valid(head) {
		return "a JSON document (an error that a download ended with?)"
	}
	return c.settings(head)
}

// mayBeJSON reports whether the content begins as a JSON object or array.
func (c content) mayBeJSON() bool {
	text := bytes.TrimLeft(bytes.TrimPrefix(c.head, []byte(utf8BOM)), " \t\r\n")
	return len(text) > 0 && (text[0] == '{' || text[0] == '[')
}

// The method settings says which kind of VMware text file begins with the bytes in
// head, such as the configuration of a machine (.vmx). If these bytes are the beginning
// of anything else, it returns "".
func (c content) settings(head []byte) string {
	if bytes.IndexByte(head, 0) >= 0 {
		return ""
	}
	lines := strings.Split(string(head), "\n")
	if !c.whole {
		lines = lines[:len(lines)-1] // the last one may be cut
	}
	machine, snapshots := false, false
	for _, line := range lines {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if !setting.MatchString(line) {
			return ""
		}
		key := strings.ToLower(line)
		machine = machine || strings.HasPrefix(key, "config.version") || strings.HasPrefix(key, "virtualhw.version")
		snapshots = snapshots || strings.HasPrefix(key, "snapshot.")
	}
	switch {
	case machine:
		return "the configuration of a VMware machine (.vmx)"
	case snapshots:
		return "the list of a VMware machine's snapshots (.vmsd)"
	}
	return ""
}

// fromUTF16 converts head from UTF-16 to ASCII. The result ok is false if head does not
// begin with a byte order mark of UTF-16, or if it has a character that is not ASCII.
func fromUTF16(head []byte) (narrow []byte, ok bool) {
	var order binary.ByteOrder = binary.LittleEndian
	switch {
	case bytes.HasPrefix(head, []byte("\xff\xfe")):
	case bytes.HasPrefix(head, []byte("\xfe\xff")):
		order = binary.BigEndian
	default:
		return nil, false
	}
	for head = head[2:]; len(head) >= 2; head = head[2:] {
		c := order.Uint16(head)
		if c == 0 || c > 0x7f {
			return nil, false
		}
		narrow = append(narrow, byte(c))
	}
	return narrow, true
}

// The method probe recognizes the format of the content: "raw", "vmdk" or "qcow2". It
// returns a *ForeignError if the content has a known format that this package cannot
// read.
func (c content) probe(path string) (format string, err error) {
	switch {
	case vmdk.Probe(c.head):
		return "vmdk", nil
	case qcow2.Probe(c.head):
		return "qcow2", nil
	}
	return "raw", c.foreign(path)
}

// IsImage reports whether head, the first bytes of a file, belongs to an image of a format
// that this package reads.
func IsImage(head []byte) bool { return vmdk.Probe(head) || qcow2.Probe(head) }
