package open

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf16"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
)

// found opens content as a file and reads it as a stream. It returns "" for a raw disk,
// the name of an image format, or the description in the *ForeignError.
func found(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	file := foundIn(t, path)
	r, _, err := RawStream(iotest.HalfReader(bytes.NewReader(content)), "stdin")
	var got []byte
	if err == nil {
		got, err = io.ReadAll(r)
	}
	stream := whatOf(t, err)
	if stream == "" && !bytes.Equal(got, content) {
		t.Errorf("the stream has other bytes than its reader")
	}
	if stream != file {
		t.Errorf("as a file %q, as a stream %q", file, stream)
	}
	return file
}

// foundIn is found for a file.
func foundIn(t *testing.T, path string) string {
	t.Helper()
	o := new(Opener)
	d, err := o.Open(t.Context(), path, "")
	if err == nil {
		defer d.Close()
		described, _ := source.Ability[source.Described](d)
		if format := described.Info().Format; format != "raw" {
			return format
		}
	}
	// With the format "raw", the bytes are returned whatever the content is.
	forced, forcedErr := o.Open(t.Context(), path, "raw")
	if forcedErr != nil {
		t.Fatalf("as raw: %v", forcedErr)
	}
	forced.Close()
	if foreign := (*ForeignError)(nil); errors.As(err, &foreign) && foreign.Path != path {
		t.Errorf("path %q, want %q", foreign.Path, path)
	}
	return whatOf(t, err)
}

func whatOf(t *testing.T, err error) string {
	t.Helper()
	if err == nil {
		return ""
	}
	var foreign *ForeignError
	if !errors.As(err, &foreign) {
		return err.Error()
	}
	if foreign.What == "" || foreign.Where == "" || !strings.Contains(foreign.Hint(), "--source-format raw") {
		t.Errorf("%+v", foreign)
	}
	return foreign.What
}

// padded is text at an offset of n bytes of zeros.
func padded(n, offset int, text string) []byte {
	b := make([]byte, n)
	copy(b[offset:], text)
	return b
}

func utf16Text(order binary.AppendByteOrder, text string) []byte {
	b := order.AppendUint16(nil, 0xfeff)
	for _, c := range utf16.Encode([]rune(text)) {
		b = order.AppendUint16(b, c)
	}
	return b
}

// vhdFooter returns the footer of a VHD with a correct checksum.
func vhdFooter(kind uint32) []byte {
	b := padded(512, 0, "conectix")
	binary.BigEndian.PutUint32(b[60:], kind)
	sum := uint32(0)
	for _, c := range b {
		sum += uint32(c)
	}
	binary.BigEndian.PutUint32(b[64:], ^sum)
	return b
}

// withMBR adds a partition table with one partition to a disk.
func withMBR(b []byte) []byte {
	b[446], b[450] = 0x80, 0x83
	binary.LittleEndian.PutUint32(b[454:], 2048)
	binary.LittleEndian.PutUint32(b[458:], 4096)
	b[510], b[511] = 0x55, 0xaa
	return b
}

func TestForeignContent(t *testing.T) {
	const n = 8 << 10
	for _, s := range signatures {
		if s.check == nil {
			if got := found(t, padded(n, s.offset, s.magic)); got != s.what {
				t.Errorf("%q: %q, want %q", s.magic, got, s.what)
			}
		}
	}
	odd := func(n int) []byte { return bytes.Repeat([]byte{0xe9, 1, 0}, n/3) }
	tail := func(disk, footer []byte) []byte { return append(bytes.Clone(disk), footer...) }
	badSum := vhdFooter(2)
	badSum[100]++
	for name, c := range map[string]struct {
		content []byte
		want    string
	}{
		"VDI":                         {padded(n, 64, "\x7f\x10\xda\xbe\x01\x00\x01\x00"), "a VirtualBox image (VDI)"},
		"VDI of no version":           {padded(n, 64, "\x7f\x10\xda\xbe\x01\x00\x90\x77"), ""},
		"VMA":                         {padded(n, 0, "VMA\x00\x00\x00\x00\x01"), "a backup of Proxmox VE (VMA)"},
		"VMA of no version":           {padded(n, 0, "VMA\x00\x00\x00\x00\x00"), ""},
		"gzip":                        {padded(n, 0, "\x1f\x8b\x08\x08"), "compressed by gzip"},
		"gzip with unknown flags":     {padded(n, 0, "\x1f\x8b\x08\xff"), ""},
		"gzip of 20 bytes":            {padded(20, 0, "\x1f\x8b\x08\x00"), "compressed by gzip"},
		"bzip2":                       {padded(n, 0, "BZh91AY&SY"), "compressed by bzip2"},
		"bzip2 of nothing":            {[]byte("BZh9\x17\x72\x45\x38\x50\x90\x00\x00\x00\x00"), "compressed by bzip2"},
		"text like bzip2":             {padded(n, 0, "BZh9 is no block"), ""},
		"zstd after a skippable":      {padded(n, 0, "\x50\x2a\x4d\x18"), "compressed by zstd or lz4"},
		"cpio newc":                   {padded(n, 0, "070701"+strings.Repeat("0", 104)), "a cpio archive"},
		"cpio odc":                    {padded(n, 0, "070707"+strings.Repeat("7", 70)), "a cpio archive"},
		"text like cpio":              {padded(n, 0, "070701, my number"), ""},
		"VMX":                         {[]byte("#!/usr/bin/vmware\n.encoding = \"UTF-8\"\r\nconfig.version = \"8\"\nscsi0:0.fileName = \"a.vmdk\"\n"), "the configuration of a VMware machine (.vmx)"},
		"VMX that is long":            {[]byte("config.version = \"8\"\n" + strings.Repeat("a.b = \"c\"\n", 1000)), "the configuration of a VMware machine (.vmx)"},
		"VMSD":                        {[]byte(".encoding = \"UTF-8\"\nsnapshot.lastUID = \"1\"\n"), "the list of a VMware machine's snapshots (.vmsd)"},
		"settings of others":          {[]byte("a.b = \"c\"\n"), ""},
		"HTML":                        {[]byte("\n<!DOCTYPE HTML><html>404</html>"), "a web page (an error that a download ended with?)"},
		"HTML, plain":                 {[]byte("\xef\xbb\xbf<html>"), "a web page (an error that a download ended with?)"},
		"XML":                         {[]byte("<?xml version='1.0'?><Error/>"), "an XML document (an OVF descriptor, or an error that a download ended with?)"},
		"JSON":                        {[]byte("{\"error\": \"not found\"}\n"), "a JSON document (an error that a download ended with?)"},
		"JSON of 20 KiB":              {[]byte("[" + strings.Repeat("1,", 10<<10) + "1]"), "a JSON document (an error that a download ended with?)"},
		"no JSON":                     {[]byte("{\"error\": \"not found\""), ""},
		"JSON and a disk":             {padded(n, 0, "{}"), ""},
		"other text":                  {[]byte("some words\n"), ""},
		"UTF-16":                      {utf16Text(binary.LittleEndian, "# Disk DescriptorFile\r\nversion=1\r\n"), "a VMDK descriptor in UTF-16 (save it in UTF-8)"},
		"UTF-16, big-endian":          {utf16Text(binary.BigEndian, "<?xml version=\"1.0\"?>"), "an XML document (an OVF descriptor, or an error that a download ended with?)"},
		"fixed VHD":                   {tail(odd(n), vhdFooter(2)), "a VHD image of fixed size"},
		"fixed VHD, 511 bytes":        {tail(odd(n), vhdFooter(2)[:511]), "a VHD image of fixed size"},
		"fixed VHD of a disk":         {tail(withMBR(make([]byte, n)), vhdFooter(2)), "a VHD image of fixed size"},
		"a footer's type is another":  {tail(odd(n), vhdFooter(3)), ""},
		"a footer's checksum differs": {tail(odd(n), badSum), ""},
		"DMG":                         {tail(odd(n), padded(512, 0, "koly\x00\x00\x00\x04\x00\x00\x02\x00")), "an Apple disk image (DMG)"},

		"zeros":             {make([]byte, n), ""},
		"one byte":          {[]byte{7}, ""},
		"511 bytes":         {make([]byte, 511), ""},
		"partitions":        {withMBR(make([]byte, n)), ""},
		"gzip, partitioned": {withMBR(padded(n, 0, "\x1f\x8b\x08\x00")), ""},
		"tar, partitioned":  {withMBR(padded(n, 0, "PK\x03\x04")), ""},
		"zip, GPT":          {padded(n, 0, "PK\x03\x04"+strings.Repeat("\x00", 508)+"EFI PART"), ""},
		"LVM":               {padded(n, 512, "LABELONE\x01\x00\x00\x00\x00\x00\x00\x00"), ""},
		"ISO 9660":          {padded(64<<10, 32769, "CD001\x01"), ""},
		"SquashFS":          {padded(n, 0, "hsqs"), ""},
		"FAT":               {withMBR(padded(n, 0, "\xeb\x3c\x90mkfs.fat")), ""},
		"NTFS":              {padded(n, 0, "\xeb\x52\x90NTFS    "), ""},
		"BitLocker":         {padded(n, 0, "\xeb\x58\x90-FVE-FS-"), ""},
		"ZFS, RAID, boot":   {odd(n), ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := found(t, c.content); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestForeignTar tests that tar archives of all formats are recognized, including
// formats that are no longer written.
func TestForeignTar(t *testing.T) {
	for _, format := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		h := &tar.Header{Name: "disk.vmdk", Size: 700, Mode: 0o644, Format: format}
		if format == tar.FormatPAX {
			h.PAXRecords = map[string]string{"VENDOR.key": "value"}
		}
		if err := errors.Join(w.WriteHeader(h), second(w.Write(make([]byte, 700))), w.Close()); err != nil {
			t.Fatal(err)
		}
		if got := found(t, b.Bytes()); got != "a tar archive" {
			t.Errorf("%v: %q", format, got)
		}
	}
	// The format of Unix version 7 has no magic, only the checksum.
	v7 := func(sum string) []byte {
		h := make([]byte, 1024)
		copy(h, "disk.vmdk")
		copy(h[100:], "000644 \x00000000 \x00000000 \x0000000000700 00000000000 ")
		copy(h[148:], sum)
		return h
	}
	sum := 8 * int(' ')
	for _, b := range v7("") {
		sum += int(b)
	}
	for text, want := range map[string]string{fmt.Sprintf("%06o\x00 ", sum): "a tar archive", fmt.Sprintf("%06o\x00 ", sum+1): "", "": ""} {
		if got := found(t, v7(text)); got != want {
			t.Errorf("version 7, checksum %q: %q, want %q", text, got, want)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestForeignByOtherPrograms tests images that qemu-img wrote, and archives and
// compressed files that other programs made of them.
func TestForeignByOtherPrograms(t *testing.T) {
	peer.Need(t, "qemu-img", "gzip", "tar")
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("truth"), bytes.Repeat([]byte("disk"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for format, want := range map[string]string{
		"vpc": "a VHD image", "vpc,subformat=fixed": "a VHD image of fixed size", "vhdx": "a VHDX image", "vdi": "a VirtualBox image (VDI)",
		"qed": "a QED image", "parallels": "a Parallels image", "qcow2": "qcow2", "vmdk": "vmdk", "raw": "",
	} {
		name, options, _ := strings.Cut(format, ",")
		args := []string{"convert", "-f", "raw", "-O", name}
		if options != "" {
			args = append(args, "-o", options)
		}
		peer.Run(t, "qemu-img", append(args, path("truth"), path(format))...)
		if got := foundIn(t, path(format)); got != want {
			t.Errorf("%s: %q, want %q", format, got, want)
		}
	}
	peer.Run(t, "qemu-img", "create", "-f", "vpc", path("difference"), "4M")
	if got := foundIn(t, path("difference")); got != "a VHD image" {
		t.Errorf("an empty VHD: %q", got)
	}
	peer.Run(t, "gzip", "-k", path("qcow2"))
	peer.Run(t, "tar", "-C", dir, "-cf", path("t"), "qcow2")
	for name, want := range map[string]string{"qcow2.gz": "compressed by gzip", "t": "a tar archive"} {
		if got := foundIn(t, path(name)); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// TestFileSystemsAreRaw tests that disks with a file system or a volume manager are raw
// and not foreign.
func TestFileSystemsAreRaw(t *testing.T) {
	peer.Need(t, "mke2fs", "mkfs.xfs", "mkfs.btrfs", "mkswap")
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	for _, command := range []string{
		"mke2fs -q -t ext2", "mke2fs -q -t ext4", "mke2fs -q -t ext4 -b 4096", "mkfs.xfs -q -f", "mkfs.btrfs -q -f", "mkswap -q",
	} {
		if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, nil, 0o600), os.Truncate(path, 320<<20)); err != nil {
			t.Fatal(err)
		}
		peer.Run(t, "sh", "-c", command+" "+path)
		if got := foundIn(t, path); got != "" {
			t.Errorf("%s: %q", command, got)
		}
	}
}

func TestLUKSIsToldOf(t *testing.T) {
	for version, want := range map[string]int{"\x00\x01": 1, "\x00\x02": 1, "\x00\x03": 0} {
		content := padded(64<<10, 0, "LUKS\xba\xbe"+version)
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, writable := range []bool{false, true} {
			d, err := (&Opener{Writable: writable}).Open(t.Context(), path, "")
			if err != nil {
				t.Fatal(err)
			}
			got := 0
			if w, ok := source.Ability[Warned](d); ok {
				got = len(w.Warnings())
			}
			if got != want {
				t.Errorf("version %q, writable %t: %d warnings, want %d", version, writable, got, want)
			}
			if _, ok := source.Ability[source.Writable](d); ok != writable {
				t.Errorf("writable: %t", ok)
			}
			d.Close()
		}
		if _, luks, err := RawStream(bytes.NewReader(content), "stdin"); luks != (want > 0) || err != nil {
			t.Errorf("stream: %t, %v", luks, err)
		}
	}
}

// TestForeignByReference tests that a file to which an appliance or an image refers is
// refused too if its content is foreign, unless the reference records its format.
func TestForeignByReference(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, content []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	gz := padded(1<<20, 0, "\x1f\x8b\x08\x00")
	write("disk.img", gz)
	write("flat.vmdk", gz)
	open := func(path, format string) error {
		d, err := new(Opener).Open(t.Context(), path, format)
		if err == nil {
			d.Close()
		}
		return err
	}
	extent := write("e.vmdk", []byte("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2048 FLAT \"flat.vmdk\" 0\n"))
	if err := open(extent, ""); err != nil {
		t.Errorf("a flat extent: %v", err)
	}
	for uri, want := range map[string]string{"": "compressed by gzip", "http://www.vmware.com/interfaces/specifications/vmdk.html": "compressed by gzip", "http://en.wikipedia.org/wiki/Byte": ""} {
		ovf := write("a.ovf", fmt.Appendf(nil, `<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References><File ovf:href="disk.img" ovf:id="f"/></References><DiskSection><Info/><Disk ovf:diskId="d" ovf:fileRef="f" ovf:format="%s" ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^20"/></DiskSection></Envelope>`, uri))
		if got := whatOf(t, open(ovf, "")); got != want {
			t.Errorf("appliance, format %q: %q, want %q", uri, got, want)
		}
		ova := filepath.Join(dir, "a.ova")
		peer.Run(t, "tar", "-C", dir, "-cf", ova, "a.ovf", "disk.img")
		if got := whatOf(t, open(ova, "")); got != want {
			t.Errorf("archive, format %q: %q, want %q", uri, got, want)
		}
	}
	if got := whatOf(t, open(filepath.Join(dir, "disk.img"), "qcow2")); got != "compressed by gzip" {
		t.Errorf("as qcow2: %q", got)
	}
	if _, err := (&Opener{Writable: true}).Open(t.Context(), filepath.Join(dir, "disk.img"), ""); whatOf(t, err) != "compressed by gzip" {
		t.Errorf("for writing: %v", err)
	}
}

// TestImagesInStreams tests that a stream of an image is refused, because images need
// reads at any offset.
func TestImagesInStreams(t *testing.T) {
	for content, want := range map[string]string{
		"QFI\xfb\x00\x00\x00\x03": "a qcow2 image", "QFI\xfb\x00\x00\x00\x01": "a qcow2 image",
		"# Disk DescriptorFile\n": "a vmdk image", "KDMV\x01": "a vmdk image", "COWD\x01": "a vmdk image",
	} {
		_, _, err := RawStream(bytes.NewReader(padded(64<<10, 0, content)), "stdin")
		if got := whatOf(t, err); got != want {
			t.Errorf("%q: %q, want %q", content, got, want)
		}
	}
}

func TestEmptyStream(t *testing.T) {
	if _, _, err := RawStream(strings.NewReader(""), "stdin"); !errors.Is(err, ErrEmptyStream) || !strings.Contains(err.Error(), "stdin") {
		t.Errorf("%v", err)
	}
	broken := errors.New("broken")
	if _, _, err := RawStream(iotest.ErrReader(broken), "stdin"); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
}
