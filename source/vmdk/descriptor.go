package vmdk

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/charset"
)

const (
	maxDescriptor = 1 << 20  // bytes; real descriptors have 300 to 30000
	maxLine       = 16 << 10 // bytes in a line of a descriptor
	maxSectors    = (1<<63 - 1) / sectorSize
	bom           = "\xef\xbb\xbf" // the byte order mark in UTF-8, with which some texts begin
)

// noParent is the parentCID of an image without a parent ("Virtual Disk Format
// 5.0", The Header).
const noParent = 0xffffffff

// The type descriptor has the parsed lines of an image's descriptor. A descriptor is a text
// that lists the extents of the image and the properties of the disk ("Virtual Disk Format
// 5.0", The Descriptor File).
type descriptor struct {
	values  map[string]value // by key, in lower case
	extents []extentLine
}

type value struct {
	text string
	line int
}

// extentLine is a line of the section "Extent description" of a descriptor.
type extentLine struct {
	line    int    // line number
	access  string // RW, RDONLY or NOACCESS
	sectors int64  // size of the extent
	kind    string // type in upper case: FLAT, SPARSE, ZERO, VMFS, ...
	name    string // name of the file, converted to UTF-8; "" for ZERO
	offset  int64  // sector of the file where a flat extent begins
}

// parseDescriptor parses a descriptor. It ignores everything from the first zero byte
// on, because the space for an embedded descriptor is filled up with zeros. It also
// ignores a byte 0x1a at the end, which DOS editors write. Errors begin with the line
// number.
func parseDescriptor(text []byte) (*descriptor, error) {
	if end := bytes.IndexByte(text, 0); end >= 0 {
		text = text[:end]
	}
	if content := bytes.TrimRight(text, "\x1a\r\n\t "); bytes.IndexByte(text[len(content):], 0x1a) >= 0 {
		text = content
	}
	cut := len(text) > maxDescriptor
	text = text[:min(len(text), maxDescriptor)]
	text = bytes.TrimPrefix(text, []byte(bom))
	d := &descriptor{values: map[string]value{}}
	n := 0
	for line := range bytes.Lines(text) {
		n++
		if len(line) > maxLine {
			return nil, fmt.Errorf("line %d: the line is longer than %d bytes", n, maxLine)
		}
		if cut && line[len(line)-1] != '\n' {
			break // the line is cut
		}
		if err := d.parseLine(n, strings.TrimSpace(string(line))); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	if cut {
		return nil, fmt.Errorf("line %d: the descriptor is longer than %d bytes", n, maxDescriptor)
	}
	return d, d.decodeNames()
}

func (d *descriptor) parseLine(n int, line string) error {
	if line == "" || line[0] == '#' {
		return nil
	}
	word, rest, _ := strings.Cut(strings.ReplaceAll(line, "\t", " "), " ")
	switch access := strings.ToUpper(word); access {
	case "RW", "RDONLY", "NOACCESS":
		if strings.HasPrefix(strings.TrimSpace(rest), "=") {
			break // a key with the name RW, RDONLY or NOACCESS
		}
		e, err := parseExtent(rest)
		if err != nil {
			return err
		}
		e.line, e.access = n, access
		d.extents = append(d.extents, e)
		return nil
	}
	key, text, ok := strings.Cut(line, "=")
	if !ok {
		// The line may be the damaged line of an extent. If it were ignored, the disk
		// would be too short.
		return fmt.Errorf("found %s, want KEY=VALUE or a description of an extent (RW, RDONLY or NOACCESS, sectors, type, file)", quote(line))
	}
	key = strings.ToLower(strings.TrimSpace(key))
	if _, twice := d.values[key]; !twice {
		d.values[key] = value{unquote(strings.TrimSpace(text)), n}
	}
	return nil
}

// parseExtent parses the line of an extent, of which the first word was removed. The line
// has the number of sectors and the type of the extent. If the type is not ZERO, the name
// of a file follows, and perhaps an offset in sectors. parseExtent ignores the rest of the
// line, where the line of a device partition has identifiers.
func parseExtent(s string) (e extentLine, err error) {
	word, rest := nextWord(s)
	e.sectors, err = parseSectors("number of sectors", word)
	if err != nil {
		return e, err
	}
	word, rest = nextWord(rest)
	if word == "" {
		return e, fmt.Errorf("the extent has no type (FLAT, SPARSE, ZERO, VMFS, ...)")
	}
	e.kind = strings.ToUpper(word)
	if e.kind == "ZERO" {
		return e, nil
	}
	rest = strings.TrimSpace(rest)
	if name, ok := strings.CutPrefix(rest, `"`); ok {
		e.name, rest, ok = strings.Cut(name, `"`)
		if !ok {
			return e, fmt.Errorf("the file name %s has no closing quote", quote(rest))
		}
	} else {
		e.name, rest = nextWord(rest)
	}
	if e.name == "" {
		return e, fmt.Errorf("the %s extent has no file name", e.kind)
	}
	if word, _ := nextWord(rest); word != "" {
		if e.offset, err = parseSectors("offset", word); err != nil {
			return e, err
		}
	}
	return e, nil
}

func nextWord(s string) (word, rest string) {
	s = strings.TrimSpace(s)
	if i := strings.IndexAny(s, " \t"); i >= 0 {
		return s[:i], s[i:]
	}
	return s, ""
}

func parseSectors(what, s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%s %s is not a whole number", what, quote(s))
	}
	if n > maxSectors {
		return 0, fmt.Errorf("%s %d is more than 8 EiB", what, n)
	}
	return int64(n), nil
}

func unquote(s string) string {
	if s, ok := strings.CutPrefix(s, `"`); ok {
		s, _, _ = strings.Cut(s, `"`)
		return s
	}
	return s
}

// The function quote quotes text of an image for a message. Only the first 100 bytes of a
// longer text are quoted.
func quote(s string) string {
	if len(s) > 100 {
		return strconv.Quote(s[:100]) + "..."
	}
	return strconv.Quote(s)
}

// The method text returns the value of a key, or "" if the key is missing.
func (d *descriptor) text(key string) string { return d.values[strings.ToLower(key)].text }

// The method number returns the value of a key as a decimal number. It returns 0 if the key is
// missing or its value is not a decimal number.
func (d *descriptor) number(key string) int64 {
	n, err := strconv.ParseUint(d.text(key), 10, 63)
	if err != nil {
		return 0
	}
	return int64(n)
}

// The method cid returns the content identifier (CID) that is the value of the given key. The
// result ok is false if the key is missing. VMware writes 8 hexadecimal digits, and qemu writes
// no leading zeros. Some exporters write decimal digits. A number that is too long for 8
// hexadecimal digits is read as decimal. A shorter decimal number is misread as hexadecimal.
// This does no harm, because it is misread in the parent and in the child, so that the two
// still match.
func (d *descriptor) cid(key string) (cid uint32, ok bool, err error) {
	v, ok := d.values[strings.ToLower(key)]
	if !ok {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(v.text), "0x"), 16, 32)
	if err != nil {
		n, err = strconv.ParseUint(v.text, 10, 32)
	}
	if err != nil {
		return 0, false, fmt.Errorf("line %d: %s %s is not a hexadecimal number of up to 8 digits", v.line, key, quote(v.text))
	}
	return uint32(n), true, nil
}

// maxSectorSize is the largest sector size that a descriptor may record, in bytes.
// Disks of VMware have sectors of 512 or 4096 bytes.
const maxSectorSize = 64 << 10

// sectorSizes returns the logical and the physical sector size that the virtual machine
// sees, in bytes. A size is 0 if the descriptor does not record it. A recorded value that
// cannot be a sector size is ignored, and sectorSizes returns a warning about it.
func (d *descriptor) sectorSizes() (logical, physical int64, warnings []string) {
	size := func(key string) int64 {
		v, ok := d.values[strings.ToLower(key)]
		if !ok {
			return 0
		}
		n, err := strconv.ParseInt(v.text, 10, 64)
		if err != nil || n < sectorSize || n > maxSectorSize || n&(n-1) != 0 {
			warnings = append(warnings, fmt.Sprintf("line %d: %s is %s, want a power of two from %d to %d: the value is ignored", v.line, key, quote(v.text), sectorSize, maxSectorSize))
			return 0
		}
		return n
	}
	logical, physical = size("ddb.logicalSectorSize"), size("ddb.physicalSectorSize")
	if physical > 0 && physical < max(logical, sectorSize) {
		v := d.values["ddb.physicalsectorsize"]
		warnings = append(warnings, fmt.Sprintf("line %d: ddb.physicalSectorSize is %d, want at least the logical sector size of %d: the value is ignored", v.line, physical, max(logical, sectorSize)))
		physical = 0
	}
	return logical, physical, warnings
}

// The method sectors returns the number of sectors of all extents together.
func (d *descriptor) sectors() (int64, error) {
	var sum int64
	for _, e := range d.extents {
		if sum += e.sectors; sum > maxSectors || sum < 0 {
			return 0, fmt.Errorf("line %d: the extents up to this line have more than 8 EiB together", e.line)
		}
	}
	return sum, nil
}

// Some disks are refused because this package cannot read them. The errors about such disks end
// with one of these texts.
const (
	physical  = "a physical device; copy from the device itself"
	rawDevice = "a raw device mapping of an ESXi host; copy from the device to which it is mapped, or from the host by VDDK"
	encrypted = "the disk is encrypted (%s), which is not supported: decrypt it in vSphere or Workstation first"
)

// The map unread lists the types of images that this package refuses regardless of their
// extents ("Virtual Disk Format 5.0", The Header). The keys are values of createType in lower
// case, and the values describe the type in errors.
var unread = map[string]string{
	"fulldevice":                  physical,
	"partitioneddevice":           physical,
	"vmfsraw":                     rawDevice,
	"vmfsrdm":                     rawDevice,
	"vmfsrdmp":                    rawDevice,
	"vmfsrawdevicemap":            rawDevice,
	"vmfspassthroughrawdevicemap": rawDevice,
}

// The method readable returns an error if the descriptor describes an encrypted disk or a disk
// of a type that this package does not read.
func (d *descriptor) readable() error {
	for _, key := range []string{"encryption.keySafe", "encryption.data"} {
		if v, ok := d.values[strings.ToLower(key)]; ok {
			return fmt.Errorf("line %d: "+encrypted, v.line, key)
		}
	}
	if v := d.values["ddb.iofilters"]; strings.Contains(strings.ToLower(v.text), "vmcrypt") {
		return fmt.Errorf("line %d: "+encrypted, v.line, "ddb.iofilters "+quote(v.text))
	}
	v := d.values["createtype"]
	if what, ok := unread[strings.ToLower(v.text)]; ok {
		return fmt.Errorf("line %d: createType %s is not supported, because it stands for %s", v.line, quote(v.text), what)
	}
	return nil
}

// The method device reports whether the name of the extent is the path of a device on a Windows
// or Unix host.
func (e *extentLine) device() bool {
	name := strings.ReplaceAll(strings.ToLower(e.name), `\`, "/")
	for _, prefix := range []string{"//./", "//?/", "/dev/"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// decodeNames converts the names of files in the descriptor to UTF-8. The line
// "encoding" of the descriptor names their encoding. If the line is missing, the names
// are in UTF-8. Bytes that are not valid UTF-8 are then kept, because the name of the
// file may have exactly these bytes.
func (d *descriptor) decodeNames() error {
	encoding := d.values["encoding"]
	switch strings.ToLower(encoding.text) {
	case "", "utf-8", "utf8":
		return nil
	}
	known, ok := charset.Get(encoding.text)
	decode := func(name string, line int) (string, error) {
		if isASCII(name) {
			return name, nil
		}
		if ok {
			if decoded, err := known.NewDecoder().String(name); err == nil {
				return decoded, nil
			}
		}
		return "", fmt.Errorf("line %d: the name %s is in the encoding %s, which line %d declares and which is not supported: want UTF-8, or an encoding of one byte per character, such as windows-1252", line, quote(name), quote(encoding.text), encoding.line)
	}
	for i := range d.extents {
		e := &d.extents[i]
		var err error
		if e.name, err = decode(e.name, e.line); err != nil {
			return err
		}
	}
	hint, hasHint := d.values["parentfilenamehint"]
	if !hasHint {
		return nil
	}
	text, err := decode(hint.text, hint.line)
	if err != nil {
		return err
	}
	d.values["parentfilenamehint"] = value{text, hint.line}
	return nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}
