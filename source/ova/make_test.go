package ova_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// envelope returns a descriptor with the given elements, as ovftool writes it.
func envelope(references, disks string) string {
	return `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData" xmlns:vmw="http://www.vmware.com/schema/ovf">
  <References>` + references + `</References>
  <DiskSection><Info>Virtual disk information</Info>` + disks + `</DiskSection>
  <VirtualSystem ovf:id="vm1"><Info>A virtual machine</Info><VirtualHardwareSection>
    <Item><rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>
`
}

const (
	file1 = `<File ovf:href="disk1.img" ovf:id="file1" ovf:size="1536"/>`
	disk1 = `<Disk ovf:capacity="3" ovf:capacityAllocationUnits="byte * 2^9" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>`
)

// entry is a member of an archive.
type entry struct {
	name, content string
	header        tar.Header // the rest of it
}

// archive is a tar of the entries.
func archive(t testing.TB, format tar.Format, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.header
		h.Name, h.Size, h.Format = e.name, int64(len(e.content)), format
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			h = tar.Header{Typeflag: h.Typeflag, PAXRecords: h.PAXRecords}
		} else if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// patch changes the header of the archive at off, and its checksum.
func patch(b []byte, off int, change func(header []byte)) []byte {
	b = bytes.Clone(b)
	h := b[off : off+512]
	change(h)
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// binary returns n in base 256, the form in which GNU tar writes large sizes.
func binary(n uint64) []byte {
	b := make([]byte, 12)
	for i := 11; i > 3; i-- {
		b[i] = byte(n)
		n >>= 8
	}
	b[0] = 0x80
	return b
}

// small is the content of disk1.img.
var small = strings.Repeat("a", 512) + strings.Repeat("b", 512) + strings.Repeat("c", 512)
