package ova_test

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/ova"
)

var writeSeeds = flag.Bool("write-seeds", false, "write the seeds of the fuzz targets into testdata")

// seeds adds the seeds, and also writes them to files if the flag writeSeeds is set.
func seeds(f *testing.F, all map[string][]byte) {
	for name, seed := range all {
		f.Add(seed)
		if !*writeSeeds {
			continue
		}
		path := filepath.Join("testdata", "fuzz", f.Name(), name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			f.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("go test fuzz v1\n[]byte("+strconv.Quote(string(seed))+")\n"), 0o644); err != nil {
			f.Fatal(err)
		}
	}
}

// use opens and reads every disk. If all is not nil, it is the archive in which the
// bytes of the disks must lie.
func use(t *testing.T, a *ova.Appliance, all []byte) {
	defer a.Close()
	for i := range a.Disks {
		x := &a.Disks[i]
		if x.Number != i+1 || x.Capacity < 0 || x.Unit <= 0 || x.Capacity%x.Unit != 0 {
			t.Fatalf("%+v", x)
		}
		d, err := a.OpenDisk(t.Context(), i)
		if err != nil {
			if !strings.Contains(err.Error(), "fuzz") && !strings.Contains(err.Error(), "disk1.img") {
				t.Errorf("the error does not name the file: %v", err)
			}
			continue
		}
		if x.File == "" {
			if d.Size() != x.Capacity {
				t.Fatalf("size %d, want %d", d.Size(), x.Capacity)
			}
			d.Close()
			continue
		}
		a.Warnings(i, d.Size(), math.MaxInt64)
		if d.Size() > 1<<20 {
			d.Close()
			continue
		}
		b, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
		if err != nil {
			t.Fatal(err)
		}
		if all != nil && !bytes.Contains(all, b[:min(len(b), 512)]) {
			t.Fatalf("disk %d is not in the archive", i)
		}
		for _, err := range source.Covered(t.Context(), d, 0, d.Size()) {
			if err != nil {
				t.Fatal(err)
			}
		}
		d.Close()
		if i == 16 {
			break
		}
	}
	// Any result is correct, but the call must return.
	_ = a.Verify(t.Context())
}

func FuzzTar(f *testing.F) {
	x := entry{name: "x.ovf", content: envelope(`<File ovf:id="file1" ovf:href="d"/>`, `<Disk ovf:diskId="1" ovf:fileRef="file1"/>`)}
	d := entry{name: "d", content: "disk"}
	m := entry{name: "x.mf", content: "SHA1(x.ovf)= " + sum1(x.content) + "\nSHA1(d)= " + sum1("disk")}
	long := strings.Repeat("l/", 100)
	whole := archive(f, tar.FormatUSTAR, x, d, m)
	at := len(archive(f, tar.FormatUSTAR, x)) - 1024
	seeds(f, map[string][]byte{
		"ustar":        whole,
		"pax":          archive(f, tar.FormatPAX, x, d, m, entry{name: long + "x", header: tar.Header{PAXRecords: map[string]string{"A.b": "c"}}}),
		"gnu-long":     archive(f, tar.FormatGNU, entry{name: long + "x.ovf", content: x.content}, entry{name: long + "d", content: "disk"}),
		"no-end":       whole[:len(whole)-1024],
		"cut":          whole[:len(whole)-1024-500],
		"base-256":     patch(whole, at, func(h []byte) { copy(h[124:], binary(4)) }),
		"huge":         patch(whole, at, func(h []byte) { copy(h[124:], binary(math.MaxInt64)) }),
		"negative":     patch(whole, at, func(h []byte) { copy(h[124:], bytes.Repeat([]byte{0xff}, 12)) }),
		"dots":         archive(f, tar.FormatUSTAR, x, entry{name: "../d", content: "disk"}),
		"absolute":     archive(f, tar.FormatUSTAR, x, entry{name: "/d", content: "disk"}),
		"twice":        archive(f, tar.FormatUSTAR, x, d, d),
		"link":         archive(f, tar.FormatUSTAR, x, entry{name: "d", header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "d"}}),
		"global":       archive(f, tar.FormatPAX, entry{name: "g", header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"size": "1"}}}, x, d),
		"sparse":       patch(whole, at, func(h []byte) { h[156] = 'S' }),
		"chunks":       archive(f, tar.FormatUSTAR, entry{name: "x.ovf", content: strings.Replace(x.content, `ovf:href="d"`, `ovf:href="d" ovf:size="6" ovf:chunkSize="4"`, 1)}, entry{name: "d.000000000", content: "disk"}, entry{name: "d.000000001", content: "en"}),
		"two-ovf":      archive(f, tar.FormatUSTAR, x, entry{name: "y.ovf"}),
		"only-chunk":   archive(f, tar.FormatUSTAR, x, entry{name: "d.000000000", content: "disk"}),
		"short":        archive(f, tar.FormatUSTAR, entry{name: "x.ovf", content: strings.Replace(x.content, `ovf:href="d"`, `ovf:href="d" ovf:size="5"`, 1)}, d),
		"packed":       []byte("\x1f\x8b\x08\x00"),
		"text":         []byte("hello"),
		"zeros":        make([]byte, 1024),
		"member-holds": patch(whole, at, func(h []byte) { copy(h[124:], fmt.Sprintf("%011o", len(whole)-at-512)) }),
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ova.Open(t.Context(), "fuzz.ova", memory(b))
		if err != nil {
			if !strings.Contains(err.Error(), "fuzz.ova") {
				t.Errorf("the error does not name the file: %v", err)
			}
			return
		}
		if bytes.Contains(b, []byte("chunkSize")) { // chunks are not in one piece
			use(t, a, nil)
			return
		}
		use(t, a, b)
	})
}

func FuzzOVF(f *testing.F) {
	seeds(f, map[string][]byte{
		"ovftool":     []byte(envelope(file1, disk1)),
		"version-2":   []byte(`<?xml version="1.0"?><o:Envelope xmlns:o="http://schemas.dmtf.org/ovf/envelope/2"><o:References><o:File o:id="f" o:href="disk1.img"/></o:References><o:DiskSection><o:Disk o:capacity="1" o:diskId="d" o:fileRef="f"/></o:DiskSection></o:Envelope>`),
		"version-0.9": []byte(`<ovf:Envelope xmlns:ovf="http://www.vmware.com/schema/ovf/1/envelope" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><References><File ovf:id="f" ovf:href="disk1.img"/></References><Section xsi:type="ovf:DiskSection_Type"><Disk ovf:capacity="2048" ovf:diskId="d" ovf:fileRef="f"/></Section><Content ovf:id="s" xsi:type="ovf:VirtualSystem_Type"><HostResource>/disk/d</HostResource></Content></ovf:Envelope>`),
		"bare":        []byte(`<Envelope><References><File id="f" href="disk1.img"/></References><DiskSection><Disk capacity="1" diskId="d" fileRef="f"/></DiskSection></Envelope>`),
		"empty-disk":  []byte(envelope("", `<Disk ovf:diskId="e" ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^30"/>`)),
		"units":       []byte(envelope("", `<Disk ovf:capacity="9" ovf:capacityAllocationUnits="byte * 10^3 * 2^62"/>`)),
		"gzip":        []byte(envelope(`<File ovf:id="f" ovf:href="disk1.img" ovf:compression="gzip"/>`, `<Disk ovf:fileRef="f"/>`)),
		"chunks":      []byte(envelope(`<File ovf:id="f" ovf:href="disk1.img" ovf:size="9223372036854775807" ovf:chunkSize="1"/>`, `<Disk ovf:fileRef="f"/>`)),
		"parent":      []byte(envelope(file1, `<Disk ovf:fileRef="file1" ovf:parentRef="p"/>`)),
		"laughs":      []byte(`<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]><Envelope>&b;</Envelope>`),
		"external":    []byte(`<!DOCTYPE l [<!ENTITY a SYSTEM "file:///etc/passwd">]><Envelope>&a;</Envelope>`),
		"deep":        []byte(strings.Repeat("<Envelope>", 70)),
		"twice":       []byte(envelope(file1+file1, disk1)),
		"url":         []byte(envelope(`<File ovf:id="f" ovf:href="http://localhost/"/>`, `<Disk ovf:fileRef="f"/>`)),
		"latin-1":     []byte(strings.Replace(envelope(file1, "<!-- \xe9 -->"+disk1), "UTF-8", "ISO-8859-1", 1)),
		"odd-unit":    []byte(envelope(file1, strings.Replace(disk1, "byte * 2^9", "GiB", 1))),
		"quotes":      []byte(`<Envelope a=">" b='"'><a>it's <![CDATA[<"]]></a></Envelope>`),
		"cdata":       []byte(`<Envelope><a><![CDATA[<Disk>]]></a><!-- <Disk> --></Envelope>`),
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ova.OpenDescriptor("fuzz.ovf", memory(b), folder(map[string]string{"disk1.img": small, "fuzz.mf": "SHA1(fuzz.ovf)= " + sum1(string(b))}))
		if err != nil {
			if !strings.Contains(err.Error(), "fuzz.ovf") {
				t.Errorf("the error does not name the file: %v", err)
			}
			return
		}
		for i := range a.Disks {
			if d := &a.Disks[i]; d.File != "" && d.File != "disk1.img" {
				return // the errors of files that are missing are the folder's
			}
		}
		use(t, a, nil)
	})
}

func FuzzManifest(f *testing.F) {
	seeds(f, map[string][]byte{
		"sha1":      []byte("SHA1(x.ovf)= " + sum1("") + "\n"),
		"sha256":    []byte("SHA256 (x.ovf) = " + sum256("") + "\r\n"),
		"sha512":    []byte("SHA512(x.ovf)=" + sum512("") + "\nSHA512(d)=" + sum512("x")),
		"two":       []byte("SHA1(d)= " + sum1("") + "\nSHA256(d)= " + sum256("")),
		"md5":       []byte("MD5(d)= 00"),
		"bom":       []byte("\ufeff\n\n SHA-1(d) = " + sum1("") + " \n"),
		"brackets":  []byte("SHA1(a (1).vmdk)= " + sum1("")),
		"short":     []byte("SHA1(d)= 12"),
		"none":      []byte("SHA1(d)="),
		"text":      []byte("hello"),
		"binary":    {0, 1, 2, '\n', 0xff, 0xfe},
		"path":      []byte("SHA1(../../d)= " + sum1("")),
		"sum-first": []byte(sum1("") + "  d\n"),
	})
	x := envelope(file1, disk1)
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := ova.OpenDescriptor("fuzz.ovf", memory([]byte(x)), folder(map[string]string{"fuzz.ovf": x, "fuzz.mf": string(b), "disk1.img": small}))
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		content(t, a, 0)
		err = a.Verify(t.Context())
		if err == nil {
			// An accepted manifest has the right digests of both files.
			text := strings.ToLower(string(b))
			for _, of := range []string{x, small} {
				if !strings.Contains(text, sum1(of)) && !strings.Contains(text, sum256(of)) && !strings.Contains(text, sum512(of)) {
					t.Errorf("accepted: %q", b)
				}
			}
		} else if !strings.Contains(err.Error(), "fuzz.") && !strings.Contains(err.Error(), "disk1.img") {
			t.Errorf("the error does not name the file: %v", err)
		}
	})
}
