package ova_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/ova"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// folder is an Opener of files in memory.
func folder(files map[string]string) source.Opener {
	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		content, ok := files[name]
		if !ok {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
		}
		return &sourcetest.Memory{Context: ctx, Bytes: []byte(content), ID: name}, nil
	}
}

// openText opens a descriptor, with small as disk1.img beside it.
func openText(t testing.TB, descriptor string) (*ova.Appliance, error) {
	t.Helper()
	a, err := ova.OpenDescriptor("dir/x.ovf", memory([]byte(descriptor)), folder(map[string]string{"disk1.img": small}))
	if err == nil {
		t.Cleanup(func() { a.Close() })
	}
	return a, err
}

func TestDescriptors(t *testing.T) {
	disk := func(attributes string) string {
		return envelope(file1, `<Disk ovf:diskId="d" ovf:fileRef="file1" `+attributes+`/>`)
	}
	nested := func(n int) string {
		return "<Envelope>" + strings.Repeat("<a>", n) + strings.Repeat("</a>", n) + "</Envelope>"
	}
	for _, c := range []struct {
		name, text string
		want       string // of the disks
		fails      string // a part of the error
	}{
		{name: "ovftool", text: envelope(file1, disk1), want: "1 vmdisk1 disk1.img vm1 1536/512"},
		{name: "with a BOM and CRLF", text: "\ufeff" + strings.ReplaceAll(envelope(file1, disk1), "\n", "\r\n"), want: "1 vmdisk1 disk1.img vm1 1536/512"},
		{name: "ASCII", text: strings.Replace(envelope(file1, disk1), "UTF-8", "us-ascii", 1), want: "1 vmdisk1 disk1.img vm1 1536/512"},
		{
			name: "all prefixes, version 2", want: "1 d disk1.img  1/1",
			text: `<?xml version="1.0"?><o:Envelope xmlns:o="http://schemas.dmtf.org/ovf/envelope/2"><o:References><o:File o:id="f" o:href="disk1.img"/></o:References><o:DiskSection><o:Disk o:capacity="1" o:diskId="d" o:fileRef="f"/></o:DiskSection></o:Envelope>`,
		},
		{
			name: "version 0.9, as VMware wrote it", want: "1 d disk1.img s 2048/1",
			text: `<ovf:Envelope xmlns:ovf="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"><References><File ovf:id="f" ovf:href="disk1.img"/></References><Section xsi:type="ovf:DiskSection_Type"><Info/><Disk ovf:capacity="2048" ovf:diskId="d" ovf:fileRef="f"/></Section><Content ovf:id="s" xsi:type="ovf:VirtualSystem_Type"><Section xsi:type="ovf:VirtualHardwareSection_Type"><Item><rasd:HostResource>disk/x</rasd:HostResource><rasd:HostResource>/disk/d</rasd:HostResource></Item></Section></Content></ovf:Envelope>`,
		},
		{
			name: "no namespaces at all", want: "1 d disk1.img  1/1",
			text: `<Envelope><References><File id="f" href="disk1.img"/></References><DiskSection><Disk capacity="1" diskId="d" fileRef="f"/></DiskSection></Envelope>`,
		},
		{
			name: "attributes and elements of others", want: "1 d disk1.img  3/1",
			text: strings.Replace(envelope(file1+`<vmw:File vmw:id="file1"/>`, `<vmw:Disk vmw:diskId="v"/><Disk vmw:capacity="7" ovf:capacity="3" ovf:diskId="d" ovf:fileRef="file1" vmw:fileRef="x"/>`), "vmdisk1", "other", 1),
		},
		{name: "Disks elsewhere", text: strings.Replace(envelope(file1, disk1), "<VirtualSystem ", "<Disk/><DiskSection><Info><Disk/></Info></DiskSection><VirtualSystem ", 1), want: "1 vmdisk1 disk1.img vm1 1536/512"},
		{name: "an unnamed disk", text: envelope(file1, `<Disk ovf:fileRef="file1" ovf:capacity="4"/>`), want: "1 disk1.img disk1.img  4/1"},
		{name: "two disks", text: envelope(file1, disk1+`<Disk ovf:diskId="e" ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"/>`), want: "1 vmdisk1 disk1.img vm1 1536/512, 2 e   1073741824/1073741824"},
		{name: "entities of XML itself", text: envelope(`<File ovf:id="f" ovf:href="a&amp;b&#x26;c"/>`, `<Disk ovf:diskId="d" ovf:fileRef="f"/>`), want: "1 d a&b&c  0/1"},
		{name: "no capacity", text: disk(``), want: "1 d disk1.img  0/1"},
		{name: "a capacity of a property", text: disk(`ovf:capacity="${size}"`), want: "1 d disk1.img  0/1"},
		{name: "MegaBytes", text: disk(`ovf:capacity="3" ovf:capacityAllocationUnits="MegaBytes"`), want: "1 d disk1.img  3145728/1048576"},
		{name: "GB", text: disk(`ovf:capacity="3" ovf:capacityAllocationUnits="GB"`), want: "1 d disk1.img  3221225472/1073741824"},
		{name: "byte*1024", text: disk(`ovf:capacity="3" ovf:capacityAllocationUnits="byte*1024"`), want: "1 d disk1.img  3072/1024"},
		{name: "Byte * 10^3 * 2", text: disk(`ovf:capacity=" 3 " ovf:capacityAllocationUnits=" Byte * 10^3 * 2 "`), want: "1 d disk1.img  6000/2000"},
		{name: "the largest", text: disk(`ovf:capacity="9223372036854775807" ovf:capacityAllocationUnits="byte"`), want: "1 d disk1.img  9223372036854775807/1"},

		{name: "empty", fails: "no XML element"},
		{name: "text", text: "hello", fails: "no XML element"},
		{name: "another document", text: "<html></html>", fails: `line 1: the root element is "html", want an OVF Envelope`},
		{name: "two documents", text: "<Envelope></Envelope><Envelope></Envelope>", fails: "a second root element"},
		{name: "cut off", text: envelope(file1, disk1)[:500], fails: "unexpected EOF"},
		{name: "not well formed", text: "<Envelope><a></b></Envelope>", fails: "line 1: element <a> closed by </b>"},
		{name: "no disk", text: envelope(file1, ""), fails: "the descriptor has no disk"},
		{
			name:  "a billion laughs",
			text:  "<?xml version=\"1.0\"?>\n<!DOCTYPE lolz [<!ENTITY lol \"lol\"><!ENTITY lol2 \"&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;&lol;\">]>" + envelope(`<File ovf:id="f" ovf:href="&lol2;"/>`, disk1)[38:],
			fails: "line 2: a document type (<!DOCTYPE) is not allowed",
		},
		{name: "an external entity", text: `<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><Envelope>&e;</Envelope>`, fails: "a document type (<!DOCTYPE) is not allowed"},
		{name: "an external document type", text: `<!DOCTYPE x SYSTEM "http://localhost/x.dtd"><Envelope/>`, fails: "a document type (<!DOCTYPE) is not allowed"},
		{name: "an entity alone", text: "<Envelope><!ENTITY e 'x'></Envelope>", fails: "a document type (<!ENTITY) is not allowed"},
		{name: "an entity that nobody declared", text: "<Envelope>&e;</Envelope>", fails: "invalid character entity &e;"},
		{name: "UTF-16", text: "\xff\xfe<\x00", fails: "UTF-16"},
		{name: "another encoding", text: `<?xml version="1.0" encoding="EBCDIC"?><Envelope/>`, fails: `the encoding "EBCDIC" is not supported`},
		{name: "a control character", text: "<Envelope>\x01</Envelope>", fails: "illegal character code"},
		{name: "as deep as may be", text: nested(63), fails: "the descriptor has no disk"},
		{name: "too deep", text: nested(64), fails: "elements are nested more than 64 deep"},
		{name: "far too deep", text: strings.Repeat("<Envelope>", 1<<16), fails: "elements are nested more than 64 deep"},
		{name: "too many elements", text: "<Envelope>" + strings.Repeat("<a/>", 100_000), fails: "more than 100000 elements"},
		{name: "long texts", text: strings.Replace(envelope(file1, disk1), "<References>", "<!-- "+strings.Repeat("<a 'b ", 1<<18)+"--><License>"+strings.Repeat("it's > a text ", 1<<18)+"</License><![CDATA["+strings.Repeat("<p \"x ", 1<<18)+"]]><References>", 1), want: "1 vmdisk1 disk1.img vm1 1536/512"},
		{name: "a descriptor that is too long", text: "<Envelope>" + strings.Repeat("x", 16<<20), fails: "want at most 16777216"},
		{name: "a tag that is too long", text: "\n<Envelope" + strings.Repeat(" a=''", 300_000), fails: "line 2: a tag has more than 1048576 bytes"},
		{name: "a tag that is too long, with a > in a value", text: "<Envelope a='>'" + strings.Repeat(" a=''", 300_000), fails: "a tag has more than 1048576 bytes"},
		{name: "a comment without an end", text: "<!--" + strings.Repeat("x", 1<<20+10), fails: "XML syntax error"},
		{name: "ISO-8859-1", text: strings.NewReplacer("UTF-8", "ISO-8859-1", "vmdisk1", "vmdisk1\xe9").Replace(envelope(file1, disk1)), want: "1 vmdisk1é disk1.img vm1 1536/512"},
		{name: "windows-1252", text: strings.NewReplacer("UTF-8", "windows-1252", "vmdisk1", "vmdisk1\x80").Replace(envelope(file1, disk1)), want: "1 vmdisk1€ disk1.img vm1 1536/512"},
		{name: "too large", text: strings.Repeat(" ", 16<<20+1), fails: "the file has 16777217 bytes, want at most 16777216"},
		{name: "too many Files", text: envelope(numbered(4097, `<File ovf:id="%d"/>`), disk1), fails: "more than 4096 elements File"},
		{name: "too many Disks", text: envelope("", numbered(4097, `<Disk ovf:diskId="%d"/>`)), fails: "more than 4096 elements Disk"},
		{name: "two Files of one id", text: envelope(file1+"\n"+file1, disk1), fails: `line 4: there is a second element File with the id "file1"`},
		{name: "two Disks of one id", text: envelope(file1, disk1+"\n"+disk1), fails: `line 5: there is a second element Disk with the diskId "vmdisk1"; the first is in line 4`},
		{name: "a fileRef to nothing", text: envelope("", disk1), fails: `line 4: the disk "vmdisk1" has the fileRef "file1", but the descriptor has no element File with this id`},
		{name: "an attribute twice", text: envelope(`<File ovf:id="a" ovf:id="b"/>`, ""), fails: `File has the attribute "id" twice`},
		{name: "an attribute twice, with and without a prefix", text: envelope("", `<Disk ovf:capacity="1" capacity="2"/>`), fails: `Disk has the attribute "capacity" twice`},
		{name: "a chunkSize of 0", text: envelope(`<File ovf:id="f" ovf:href="a" ovf:chunkSize="0"/>`, disk1), fails: `File "f" has the chunkSize "0"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := openText(t, c.text)
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) || !strings.Contains(err.Error(), "dir/x.ovf") {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range a.Disks {
				got = append(got, fmt.Sprintf("%d %s %s %s %d/%d", d.Number, d.Name(), d.File, d.System, d.Capacity, d.Unit))
			}
			if all := strings.Join(got, ", "); all != c.want {
				t.Errorf("%s, want %s", all, c.want)
			}
		})
	}
}

// TestOddCapacities tests that an invalid capacity is a warning about its disk, and an
// error only if the disk has no file that shows its size.
func TestOddCapacities(t *testing.T) {
	for _, c := range []struct{ attributes, want string }{
		{`ovf:capacity="-1"`, `capacity is "-1", want a number`},
		{`ovf:capacity="ten"`, `capacity is "ten", want a number`},
		{`ovf:capacity="8589934592" ovf:capacityAllocationUnits="byte * 2^30"`, "is more than 8 EiB"},
		{`ovf:capacity="1" ovf:capacityAllocationUnits="furlong"`, `capacityAllocationUnits is "furlong"`},
		{`ovf:capacity="20" ovf:capacityAllocationUnits="GiB"`, `capacityAllocationUnits is "GiB"`},
		{`ovf:capacity="1" ovf:capacityAllocationUnits="byte * 0"`, `capacityAllocationUnits is "byte * 0"`},
		{`ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^62 * 2"`, "capacityAllocationUnits is"},
		{`ovf:capacity="1" ovf:capacityAllocationUnits="byte * 1^99999999999"`, "capacityAllocationUnits is"},
	} {
		a, err := openText(t, envelope(file1, `<Disk ovf:diskId="d" ovf:fileRef="file1" `+c.attributes+`/>`+disk1+`<Disk ovf:diskId="e" `+c.attributes+`/>`))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 2 {
			if got := content(t, a, i); got != small {
				t.Errorf("%s: disk %d: %.20q", c.attributes, i+1, got)
			}
		}
		if w := a.Warnings(0, 1536, 1536); len(w) != 1 || !strings.Contains(w[0], c.want) || !strings.Contains(w[0], `disk "d"`) || !strings.Contains(w[0], "1536 bytes") {
			t.Errorf("%s: warnings %q", c.attributes, w)
		}
		if w := a.Warnings(1, 1536, 1536); len(w) != 0 {
			t.Errorf("%s: the other disk: warnings %q", c.attributes, w)
		}
		if _, err := a.OpenDisk(t.Context(), 2); err == nil || !strings.Contains(err.Error(), "the disk has no file, and its capacity cannot be read") || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: an empty disk: %v", c.attributes, err)
		}
	}
}

// TestShortFiles tests that a file which is shorter than its File element says is
// refused as truncated, whatever its format is.
func TestShortFiles(t *testing.T) {
	for _, c := range []struct {
		size, capacity string
		file, raw      string // parts of the errors, "" without one
	}{
		{"1536", "1536", "", ""},
		{"1537", "1536", "disk1.img has 1536 bytes, want 1537 according to its File in the descriptor", ""},
		{"9223372036854775807", "1536", "want 9223372036854775807", ""},
		{"1535", "1536", "", ""},
		{"-1", "1537", "", "disk1.img has 1536 bytes, want 1537 according to its capacity in the descriptor"},
		{"0", "1535", "", ""},
		{"", `4" ovf:capacityAllocationUnits="byte * 2^9`, "", "want 2048 according to its capacity"},
		{"", `1" ovf:capacityAllocationUnits="byte * 2^30`, "", ""}, // rounded up
	} {
		a, err := openText(t, envelope(`<File ovf:id="f" ovf:href="disk1.img" ovf:size="`+c.size+`"/>`, `<Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="`+c.capacity+`"/>`))
		if err != nil {
			t.Fatal(err)
		}
		check := func(err error, want string) {
			t.Helper()
			var short *ova.ShortError
			switch {
			case want == "" && err != nil:
				t.Errorf("%+v: %v", c, err)
			case want != "" && (!errors.As(err, &short) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "x.ovf") || short.Hint() == ""):
				t.Errorf("%+v: %v, want %q", c, err, want)
			}
		}
		d, err := a.OpenDisk(t.Context(), 0)
		check(err, c.file)
		if err == nil {
			check(a.CheckRaw(0, d.Size()), c.raw)
			d.Close()
		}
		_, err = a.Size(t.Context(), 0)
		check(err, c.file)
	}
}

func TestOnlyChunk(t *testing.T) {
	for _, c := range []struct {
		name, file string
		files      map[string]string
		fails      string
	}{
		{name: "alone", file: `ovf:href="d"`, files: map[string]string{"d.000000000": small}},
		{name: "alone, with escapes", file: `ovf:href="a%20d" ovf:size="1536"`, files: map[string]string{"a d.000000000": small}},
		{name: "cut", file: `ovf:href="d" ovf:size="1537"`, files: map[string]string{"d.000000000": small}, fails: "has 1536 bytes, want 1537"},
		{name: "with another", file: `ovf:href="d"`, files: map[string]string{"d.000000000": small, "d.000000001": small}, fails: "has no ovf:chunkSize"},
		{name: "the second alone", file: `ovf:href="d"`, files: map[string]string{"d.000000001": small}, fails: "open d: file does not exist"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := envelope(`<File ovf:id="f" `+c.file+`/>`, `<Disk ovf:diskId="x" ovf:fileRef="f"/>`)
			c.files["x.ovf"], c.files["x.mf"] = text, "SHA256(x.ovf)= "+sum256(text)+"\nSHA256(d)= "+sum256(small)+"\nSHA256(a d)= "+sum256(small)+"\n"
			a, err := ova.OpenDescriptor("x.ovf", memory([]byte(text)), folder(c.files))
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			if c.fails != "" {
				if _, err := a.OpenDisk(t.Context(), 0); err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			for range 2 {
				if got := content(t, a, 0); got != small {
					t.Errorf("%.20q", got)
				}
			}
			if err := a.Verify(t.Context()); err != nil {
				t.Error(err)
			}
			if w := a.Warnings(0, 1536, 1536); len(w) != 1 || !strings.Contains(w[0], "000000000") || !strings.Contains(w[0], "is read instead") {
				t.Errorf("warnings %q", w)
			}
		})
	}
}

func TestPackedAppliances(t *testing.T) {
	for magic, want := range map[string]string{"\x1f\x8b\x08": "gunzip", "PK\x03\x04": "unzip", "\xfd7zXZ\x00": "xz", "\x28\xb5\x2f\xfd": "zstd", "BZh91AY&SY": "bunzip2", "7z\xbc\xaf\x27\x1c": "7z x"} {
		b := append([]byte(magic), make([]byte, 1024)...)
		_, err := ova.Open(t.Context(), "x.ova", memory(b))
		var packed *ova.PackedError
		if !errors.As(err, &packed) || !strings.Contains(err.Error(), "x.ova: the whole file is compressed with") || !strings.Contains(packed.Hint(), want) {
			t.Errorf("%q: %v", magic, err)
		}
		if _, err = ova.OpenDescriptor("x.ovf", memory(b[:len(magic)]), folder(nil)); !errors.As(err, &packed) {
			t.Errorf("%q: %v", magic, err)
		}
	}
	// The name of a member may begin with the magic of a compressed file.
	b := archive(t, tar.FormatUSTAR, entry{name: "BZh.ovf", content: envelope(file1, disk1)}, entry{name: "disk1.img", content: small})
	a, err := ova.Open(t.Context(), "x.ova", memory(b))
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
}

func numbered(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// TestDisksThatAreNotRead opens appliances with one disk that cannot be read. The other
// disk can be read.
func TestDisksThatAreNotRead(t *testing.T) {
	for _, c := range []struct{ name, file, disk, want string }{
		{"gzip", `ovf:href="disk1.img" ovf:compression="gzip"`, "", `the file "disk1.img" is compressed (ovf:compression="gzip")`},
		{"an unknown compression", `ovf:href="disk1.img" ovf:compression="zstd"`, "", `is compressed (ovf:compression="zstd")`},
		{"http", `ovf:href="http://localhost/disk1.img"`, "", `the file of the disk is at "http://localhost/disk1.img": only files of the appliance are read`},
		{"file", `ovf:href="file:///etc/passwd"`, "", `the file of the disk is at "file:///etc/passwd"`},
		{"no href", ``, "", `has no href`},
		{"missing", `ovf:href="none.img"`, "", `disk "d": open none.img: file does not exist`},
		{"a parent", `ovf:href="disk1.img"`, `ovf:parentRef="base"`, `the disk has only the differences from the disk "base"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := openText(t, envelope(`<File ovf:id="f" `+c.file+`/>`+file1, `<Disk ovf:diskId="d" ovf:fileRef="f" `+c.disk+`/>`+disk1))
			if err != nil {
				t.Fatal(err)
			}
			_, err = a.OpenDisk(t.Context(), 0)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			var compressed *ova.CompressionError
			if errors.As(err, &compressed) != strings.Contains(c.file, "compression") {
				t.Errorf("%T", err)
			} else if compressed != nil && (!strings.Contains(err.Error(), "x.ovf") || !strings.Contains(compressed.Hint(), "unpack")) {
				t.Errorf("%v; hint: %s", err, compressed.Hint())
			}
			if _, err := a.Size(t.Context(), 0); err == nil {
				t.Error("Size: no error")
			}
			if got := content(t, a, 1); got != small {
				t.Errorf("the other disk: %.20q", got)
			}
		})
	}
	a, err := openText(t, envelope("", `<Disk ovf:diskId="d" ovf:capacity="${x}"/>`))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.OpenDisk(t.Context(), 0); err == nil || !strings.Contains(err.Error(), "its capacity is missing, 0, or a property such as ${size}") {
		t.Error(err)
	}
}

func TestEmptyDisk(t *testing.T) {
	const size = 3 << 20
	sourcetest.Run(t, sourcetest.Config{
		Content: make([]byte, size),
		Open: func(ctx context.Context, t testing.TB) source.Disk {
			a, err := openText(t, envelope("", `<Disk ovf:diskId="d" ovf:capacity="3" ovf:capacityAllocationUnits="byte * 2^20"/>`))
			if err != nil {
				t.Fatal(err)
			}
			d, err := a.OpenDisk(ctx, 0)
			if err != nil {
				t.Fatal(err)
			}
			return d
		},
	})
}

func TestChunks(t *testing.T) {
	const whole = "aaaabbbbcc"
	sized := `ovf:href="d" ovf:size="10" ovf:chunkSize="4"`
	for _, c := range []struct {
		name, file string
		files      map[string]string
		fails      string
	}{
		{name: "of a size", file: sized, files: map[string]string{"d.000000000": "aaaa", "d.000000001": "bbbb", "d.000000002": "cc", "d.000000003": "not of it"}},
		{name: "of a size not told", file: `ovf:href="d" ovf:chunkSize="4"`, files: map[string]string{"d.000000000": "aaaa", "d.000000001": "bbbb", "d.000000002": "cc", "d.000000003": "not of it"}},
		{name: "the last is whole", file: `ovf:href="d" ovf:chunkSize="5"`, files: map[string]string{"d.000000000": "aaaab", "d.000000001": "bbbcc"}},
		{name: "one", file: `ovf:href="d" ovf:size="10" ovf:chunkSize="100"`, files: map[string]string{"d.000000000": whole}},
		{name: "none, and the file is there", file: `ovf:href="d" ovf:chunkSize="100"`, files: map[string]string{"d": whole}},
		{name: "with escapes", file: `ovf:href="a%20d" ovf:size="10" ovf:chunkSize="5"`, files: map[string]string{"a d.000000000": "aaaab", "a d.000000001": "bbbcc"}},
		{name: "missing", file: sized, fails: "d.000000000: file does not exist"},
		{name: "one missing", file: sized, files: map[string]string{"d.000000000": "aaaa", "d.000000002": "cc"}, fails: "d.000000001: file does not exist"},
		{name: "the last missing", file: sized, files: map[string]string{"d.000000000": "aaaa", "d.000000001": "bbbb"}, fails: "d.000000002: file does not exist"},
		{name: "one short", file: sized, files: map[string]string{"d.000000000": "aaa", "d.000000001": "bbbb", "d.000000002": "cc"}, fails: "the chunk d.000000000 has 3 bytes, want 4"},
		{name: "one long", file: sized, files: map[string]string{"d.000000000": "aaaaa", "d.000000001": "bbbb", "d.000000002": "cc"}, fails: "the chunk d.000000000 has 5 bytes, want 4"},
		{name: "the last long", file: sized, files: map[string]string{"d.000000000": "aaaa", "d.000000001": "bbbb", "d.000000002": "ccc"}, fails: "the chunk d.000000002 has 3 bytes, want 2"},
		{name: "one long of a size not told", file: `ovf:href="d" ovf:chunkSize="4"`, files: map[string]string{"d.000000000": "aaaaa"}, fails: "has 5 bytes, want 4"},
		{name: "too many", file: `ovf:href="d" ovf:size="9223372036854775807" ovf:chunkSize="1"`, fails: "has 9223372036854775807 chunks, want at most 4096"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := ova.OpenDescriptor("x.ovf", memory([]byte(envelope(`<File ovf:id="f" `+c.file+`/>`, `<Disk ovf:fileRef="f"/>`))), folder(c.files))
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			if c.fails != "" {
				if _, err := a.OpenDisk(t.Context(), 0); err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			if got := content(t, a, 0); got != whole {
				t.Errorf("%q, want %q", got, whole)
			}
		})
	}
}

func TestNames(t *testing.T) {
	for _, c := range []struct{ href, member string }{
		{"my disk.img", "my disk.img"},
		{"my%20disk.img", "my disk.img"},
		{"my%20disk.img", "my%20disk.img"}, // a name is first what it is
		{"./a.img", "a.img"},
		{"sub/a.img", "sub/a.img"},
		{"100%.img", "100%.img"},
		{"größe.img", "größe.img"},
	} {
		b := archive(t, tar.FormatPAX, entry{name: "x.ovf", content: envelope(`<File ovf:id="f" ovf:href="`+c.href+`"/>`, `<Disk ovf:fileRef="f"/>`)}, entry{name: c.member, content: small})
		a, err := ova.Open(t.Context(), "x.ova", memory(b))
		if err != nil {
			t.Fatal(err)
		}
		if got := content(t, a, 0); got != small {
			t.Errorf("%s: %.20q", c.href, got)
		}
		a.Close()
	}
	for _, member := range []string{"gr\xf6\xdfe.img", "größe.img"} {
		text := strings.Replace(envelope("<File ovf:id=\"f\" ovf:href=\"gr\xf6\xdfe.img\"/>", `<Disk ovf:fileRef="f"/>`), "UTF-8", "ISO-8859-1", 1)
		b := archive(t, tar.FormatGNU, entry{name: "x.ovf", content: text}, entry{name: member, content: small})
		a, err := ova.Open(t.Context(), "x.ova", memory(b))
		if err != nil {
			t.Fatal(err)
		}
		if got := content(t, a, 0); got != small {
			t.Errorf("%q: %.20q", member, got)
		}
		a.Close()
	}
	for _, href := range []string{"/disk1.img", "../disk1.img", "%2e%2e/disk1.img", "%2fdisk1.img", "a/../../disk1.img", "", "."} {
		b := archive(t, tar.FormatPAX, entry{name: "x.ovf", content: envelope(`<File ovf:id="f" ovf:href="`+href+`"/>`, `<Disk ovf:fileRef="f"/>`)}, entry{name: "disk1.img", content: small})
		a, err := ova.Open(t.Context(), "x.ova", memory(b))
		if err != nil {
			t.Fatal(err)
		}
		if d, err := a.OpenDisk(t.Context(), 0); err == nil {
			d.Close()
			t.Errorf("%s is opened", href)
		}
		a.Close()
	}
}

func TestWarnings(t *testing.T) {
	for _, c := range []struct {
		file, disk string
		size       int64 // of the disk
		want       []string
	}{
		{`ovf:size="1536"`, `ovf:capacity="1536"`, 1536, nil},
		{``, ``, 1536, nil},
		{`ovf:size="-1"`, `ovf:capacity="0"`, 1536, nil},
		{`ovf:size="1535"`, ``, 1536, []string{`"disk1.img" has 1535 bytes, but the file has 1536 bytes`}},
		{``, `ovf:capacity="1537"`, 1536, []string{`disk "d" has 1537 bytes (1.5 KiB), but the disk has 1536 bytes`}},
		{``, `ovf:capacity="1535"`, 1536, []string{`disk "d" has 1535 bytes`}},
		{``, `ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"`, 1 << 30, nil},
		{``, `ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"`, 1, nil}, // rounded up
		{``, `ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"`, 1<<30 + 1, []string{`has 1073741824 bytes (1.0 GiB), but the disk has 1073741825 bytes`}},
		{``, `ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^30"`, 1 << 30, []string{`has 2147483648 bytes`}},
		{`ovf:size="1"`, `ovf:capacity="2"`, 1, []string{"disk1.img", "has 2 bytes"}},
	} {
		a, err := openText(t, envelope(`<File ovf:id="f" ovf:href="disk1.img" `+c.file+`/>`, `<Disk ovf:diskId="d" ovf:fileRef="f" `+c.disk+`/>`))
		if err != nil {
			t.Fatal(err)
		}
		got := a.Warnings(0, int64(len(small)), c.size)
		if len(got) != len(c.want) {
			t.Errorf("%s %s: %q, want %q", c.file, c.disk, got, c.want)
			continue
		}
		for i := range got {
			if !strings.Contains(got[i], c.want[i]) || !strings.Contains(got[i], "x.ovf") {
				t.Errorf("%s %s: %q, want %q", c.file, c.disk, got[i], c.want[i])
			}
		}
	}
}

// TestSection runs the suite of source.Disk on a section in an archive and on a section
// of chunks.
func TestSection(t *testing.T) {
	pattern := make([]byte, 3<<20)
	for i := range pattern {
		pattern[i] = byte(i>>9) | byte(i)
	}
	copy(pattern[1<<20:2<<20], make([]byte, 1<<20))
	t.Run("archive", func(t *testing.T) {
		b := archive(t, tar.FormatGNU, entry{name: "x.ovf", content: envelope(file1, disk1)}, entry{name: "disk1.img", content: string(pattern)}, entry{name: "x.mf", content: "?"})
		path := filepath.Join(t.TempDir(), "x.ova")
		write(t, path, b)
		dig(t, path)
		sourcetest.Run(t, sourcetest.Config{Content: pattern, Open: func(ctx context.Context, t testing.TB) source.Disk {
			f, err := raw.Open(ctx, path)
			if err != nil {
				t.Fatal(err)
			}
			a, err := ova.Open(ctx, path, f)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { a.Close() })
			d, err := a.OpenDisk(ctx, 0)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}})
	})
	t.Run("chunks", func(t *testing.T) {
		const size = 1<<20 + 513
		dir := t.TempDir()
		for i := 0; i*size < len(pattern); i++ {
			path := filepath.Join(dir, fmt.Sprintf("disk1.img.%09d", i))
			write(t, path, pattern[i*size:min(len(pattern), (i+1)*size)])
			dig(t, path)
		}
		sourcetest.Run(t, sourcetest.Config{Content: pattern, Open: func(ctx context.Context, t testing.TB) source.Disk {
			text := envelope(strings.Replace(file1, "1536", fmt.Sprint(len(pattern), `" ovf:chunkSize="`, size), 1), disk1)
			a, err := ova.OpenDescriptor("x.ovf", memory([]byte(text)), func(ctx context.Context, _, name, _ string) (source.Disk, error) {
				return raw.Open(ctx, filepath.Join(dir, name))
			})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { a.Close() })
			d, err := a.OpenDisk(ctx, 0)
			if err != nil {
				t.Fatal(err)
			}
			return d
		}})
	})
}

func write(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// dig replaces the zeros in a file by holes.
func dig(t testing.TB, path string) {
	t.Helper()
	peer.Need(t, "fallocate")
	peer.Run(t, "fallocate", "--dig-holes", path)
}
