package ova_test

import (
	"archive/tar"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source/ova"
)

func sum1(s string) string   { return fmt.Sprintf("%x", sha1.Sum([]byte(s))) }
func sum256(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }
func sum512(s string) string { return fmt.Sprintf("%x", sha512.Sum512([]byte(s))) }

func TestManifests(t *testing.T) {
	x := envelope(file1, disk1)
	good := "SHA256(x.ovf)= " + sum256(x) + "\nSHA256(disk1.img)= " + sum256(small) + "\n"
	for _, c := range []struct {
		name, manifest string // "": none
		mf             string // its name, x.mf where ""
		none           bool   // an ErrNoManifest
		differs        string // the file of a ManifestError
		fails          string // a part of any error
	}{
		{name: "SHA256", manifest: good},
		{name: "SHA1, as VirtualBox writes it", manifest: "SHA1 (x.ovf) = " + sum1(x) + "\nSHA1 (disk1.img) = " + sum1(small) + "\n"},
		{name: "SHA512", manifest: "SHA512(x.ovf)= " + sum512(x) + "\nSHA512(disk1.img)= " + sum512(small)},
		{name: "CRLF, a BOM and empty lines", manifest: "\ufeff" + strings.ReplaceAll(good, "\n", "\r\n\r\n")},
		{name: "capitals", manifest: strings.ToUpper("sha256(") + "x.ovf)=" + strings.ToUpper(sum256(x)) + "\nsha-256(./disk1.img)=" + sum256(small)},
		{name: "several of a file", manifest: good + "SHA1(disk1.img)= " + sum1(small) + "\n"},
		{name: "files that are not asked for", manifest: good + "SHA256(other.iso)= " + sum256("") + "\nMD5(third)= 00\n"},
		{name: "another name", manifest: good, mf: "y.MF"},

		{name: "none", none: true, fails: "x.ova has no manifest (.mf)"},
		{name: "empty", manifest: "\n", none: true, fails: `x.ova(x.mf): the manifest has no line with a digest of "x.ovf"`},
		{name: "in another folder", manifest: good, mf: "a/x.mf", none: true, fails: "has no manifest"},
		{name: "not of the disk", manifest: "SHA256(x.ovf)= " + sum256(x), none: true, fails: `the manifest has no line with a digest of "disk1.img"`},
		{name: "not of the descriptor", manifest: "SHA256(disk1.img)= " + sum256(small), none: true, fails: `the manifest has no line with a digest of "x.ovf"`},
		{name: "of an unknown kind", manifest: "MD5(x.ovf)= 0123\n", none: true, fails: `the digest of "x.ovf" is of the type MD5, want SHA1`},
		{name: "the disk differs", manifest: "SHA256(x.ovf)= " + sum256(x) + "\nSHA256(disk1.img)= " + sum256("?"), differs: "x.ova(disk1.img)", fails: "the manifest has " + sum256("?")},
		{name: "the descriptor differs", manifest: "SHA1(x.ovf)= " + sum1("?") + "\nSHA1(disk1.img)= " + sum1(small), differs: "x.ova(x.ovf)", fails: "the SHA1 of the file is " + sum1(x)},
		{name: "one of two differs", manifest: good + "SHA1(disk1.img)= " + sum1("?"), differs: "x.ova(disk1.img)"},
		{name: "a line that is none", manifest: good + "hello\n", fails: `x.ova(x.mf): line 3: found "hello", want a line such as`},
		{name: "a digest that is short", manifest: "SHA256(x.ovf)= 1234\n", fails: "line 1: the SHA256 digest has 4 hexadecimal digits, want 64"},
		{name: "a digest in other digits", manifest: "SHA1(x.ovf)= " + strings.Repeat("g", 40), fails: "line 1: found"},
		{name: "no digest", manifest: "SHA1(x.ovf)=", fails: "line 1: the SHA1 digest has 0 hexadecimal digits"},
		{name: "too large", manifest: strings.Repeat("\n", 16<<20+1), fails: "want at most 16777216"},
	} {
		t.Run(c.name, func(t *testing.T) {
			entries := []entry{{name: "x.ovf", content: x}, {name: "disk1.img", content: small}}
			if c.mf == "" {
				c.mf = "x.mf"
			}
			if c.manifest != "" {
				entries = append(entries, entry{name: c.mf, content: c.manifest})
			}
			a, err := ova.Open(t.Context(), "x.ova", memory(archive(t, tar.FormatUSTAR, entries...)))
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			content(t, a, 0)
			err = a.Verify(t.Context())
			var differs *ova.ManifestError
			switch {
			case errors.Is(err, ova.ErrNoManifest) != c.none:
				t.Errorf("%v, want an ErrNoManifest: %v", err, c.none)
			case errors.As(err, &differs) != (c.differs != ""):
				t.Errorf("%v, want a ManifestError: %q", err, c.differs)
			case differs != nil && differs.File != c.differs:
				t.Errorf("%s differs, want %s", differs.File, c.differs)
			case (err == nil) != (c.fails == "" && c.differs == ""):
				t.Errorf("%v, want %q", err, c.fails)
			}
			if c.fails != "" && err != nil && (!strings.Contains(err.Error(), c.fails) || !strings.Contains(err.Error(), "x.ova")) {
				t.Errorf("%v, want %q", err, c.fails)
			}
		})
	}
}

// TestManifestOfFiles tests that Verify checks all files of the opened disk and no
// others.
func TestManifestOfFiles(t *testing.T) {
	x := envelope(`<File ovf:id="f" ovf:href="d" ovf:chunkSize="4"/><File ovf:id="g" ovf:href="other"/>`, `<Disk ovf:diskId="1" ovf:fileRef="f"/><Disk ovf:diskId="2" ovf:fileRef="g"/>`)
	files := map[string]string{"d.000000000": "aaaa", "d.000000001": "bb", "other": "changed", "flat": "extent"}
	files["x.mf"] = "SHA1(x.ovf)= " + sum1(x) + "\nSHA1(d.000000000)= " + sum1("aaaa") + "\nSHA1(d.000000001)= " + sum1("bb") + "\nSHA1(other)= " + sum1("other") + "\nSHA1(flat)= " + sum1("extent")
	files["x.ovf"] = x
	verify := func(more ...string) error {
		a, err := ova.OpenDescriptor("x.ovf", memory([]byte(x)), folder(files))
		if err != nil {
			t.Fatal(err)
		}
		defer a.Close()
		content(t, a, 0)
		return a.Verify(t.Context(), more...)
	}
	if err := verify("flat"); err != nil {
		t.Error(err)
	}
	var differs *ova.ManifestError
	if err := verify("other"); !errors.As(err, &differs) || differs.File != "other" {
		t.Errorf("of another file: %v", err)
	}
	files["d.000000001"] = "bc"
	if err := verify(); !errors.As(err, &differs) || differs.File != "d.000000001" {
		t.Errorf("a chunk that was changed: %v", err)
	}
	files["d.000000001"] = "bb"
	delete(files, "x.mf")
	if err := verify(); !errors.Is(err, ova.ErrNoManifest) {
		t.Errorf("no manifest: %v", err)
	}
}

// TestManifestOfNamedFiles tests that Verify also checks the files to which a member of
// the archive refers.
func TestManifestOfNamedFiles(t *testing.T) {
	x := envelope(`<File ovf:id="f" ovf:href="sub/d"/>`, `<Disk ovf:fileRef="f"/>`)
	b := archive(t, tar.FormatUSTAR, entry{name: "a/x.ovf", content: x}, entry{name: "a/sub/d", content: "d"}, entry{name: "a/sub/e", content: "e"}, entry{name: "e", content: "not this one"},
		entry{name: "y.mf", content: "not this one"}, entry{name: "a/x.mf", content: "SHA1(x.ovf)= " + sum1(x) + "\nSHA1(sub/d)= " + sum1("d") + "\nSHA1(sub/e)= " + sum1("E") + "\n"})
	a, err := ova.Open(t.Context(), "x.ova", memory(b))
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := a.Verify(t.Context()); err != nil {
		t.Errorf("before anything is opened: %v", err)
	}
	content(t, a, 0)
	f, named, err := a.OpenFile(t.Context(), "sub/d", "e")
	if err != nil || named != "sub/e" || f.Size() != 1 {
		t.Fatalf("%q, %v", named, err)
	}
	f.Close()
	var differs *ova.ManifestError
	if err := a.Verify(t.Context()); !errors.As(err, &differs) || differs.File != "x.ova(a/sub/e)" {
		t.Errorf("%v", err)
	}
	for _, name := range []string{"none", "/a/sub/e", "../../../e", "/etc/passwd"} {
		if _, _, err := a.OpenFile(t.Context(), "sub/d", name); err == nil || !strings.Contains(err.Error(), "x.ova has no file") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestVerifyStops(t *testing.T) {
	why := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	x := envelope(file1, disk1)
	f := memory(archive(t, tar.FormatUSTAR, entry{name: "x.ovf", content: x}, entry{name: "disk1.img", content: strings.Repeat("x", 8<<20)},
		entry{name: "x.mf", content: "SHA1(x.ovf)= " + sum1(x) + "\nSHA1(disk1.img)= " + sum1("")}))
	reads := 0
	f.OnRead = func(_ int64, n int) error {
		if n == 1<<20 {
			if reads++; reads == 2 {
				cancel(why)
			}
		}
		return nil
	}
	a, err := ova.Open(t.Context(), "x.ova", f)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	d, err := a.OpenDisk(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := a.Verify(ctx); !errors.Is(err, why) || reads != 2 {
		t.Errorf("%v after %d reads", err, reads)
	}
	broken := errors.New("broken")
	f.OnRead = func(_ int64, n int) error {
		if n == 1<<20 {
			return broken
		}
		return nil
	}
	if err := a.Verify(t.Context()); !errors.Is(err, broken) {
		t.Errorf("a read that fails: %v", err)
	}
}

// TestSectionPlace tests that sections return their places in the archive and have
// different identities.
func TestSectionPlace(t *testing.T) {
	f := memory(archive(t, tar.FormatUSTAR, entry{name: "x.ovf", content: envelope(file1+`<File ovf:id="g" ovf:href="e"/>`, disk1+`<Disk ovf:fileRef="g"/>`)}, entry{name: "disk1.img", content: small}, entry{name: "e", content: small}))
	f.ID, f.Proof = "id", "mtime"
	a, err := ova.Open(t.Context(), "x.ova", f)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	ids := map[string]bool{}
	for i := range 2 {
		d, err := a.OpenDisk(t.Context(), i)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		s := d.(*ova.Section)
		id, proof, err := s.Identity(t.Context())
		if err != nil || proof != "mtime" || !strings.Contains(id, "id") {
			t.Errorf("%q, %q, %v", id, proof, err)
		}
		ids[id] = true
		want := []string{"x.ova(disk1.img)", "x.ova(e)"}[i]
		if info := s.Info(); info.Chain[0] != want || info.Allocated != int64(len(small)) {
			t.Errorf("%+v", info)
		}
		if _, err := d.ReadAt(make([]byte, 1), -1); err == nil || !strings.Contains(err.Error(), want) {
			t.Error(err)
		}
	}
	if len(ids) != 2 {
		t.Errorf("two disks have one identity: %v", ids)
	}
}
