package ova_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/ova"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

func memory(b []byte) *sourcetest.Memory { return &sourcetest.Memory{Bytes: b} }

// content opens disk i and reads it.
func content(t testing.TB, a *ova.Appliance, i int) string {
	t.Helper()
	d, err := a.OpenDisk(t.Context(), i)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	b, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestArchives(t *testing.T) {
	descriptor := entry{name: "x.ovf", content: envelope(file1, disk1)}
	disk := entry{name: "disk1.img", content: small}
	long := strings.Repeat("long/", 60)
	longDisk := entry{name: long + "disk1.img", content: small}
	longDescriptor := entry{name: long + "x.ovf", content: descriptor.content}
	whole := archive(t, tar.FormatUSTAR, descriptor, disk)
	at := len(archive(t, tar.FormatUSTAR, descriptor)) - 1024 // the header of the disk
	lied := func(size uint64) []byte {
		return patch(whole, at, func(h []byte) { copy(h[124:], binary(size)) })
	}
	pax := func(records map[string]string) entry {
		return entry{name: "disk1.img", content: small, header: tar.Header{PAXRecords: records}}
	}
	for _, c := range []struct {
		name  string
		b     []byte
		fails string // a part of the error
	}{
		{name: "ustar", b: whole},
		{name: "pax", b: archive(t, tar.FormatPAX, descriptor, pax(map[string]string{"COMMENT.x": "y"}))},
		{name: "gnu", b: archive(t, tar.FormatGNU, descriptor, disk)},
		{name: "long names, pax", b: archive(t, tar.FormatPAX, longDescriptor, longDisk)},
		{name: "long names, gnu", b: archive(t, tar.FormatGNU, longDescriptor, longDisk)},
		{name: "the size in base 256", b: lied(1536)},
		{name: "the descriptor is last", b: archive(t, tar.FormatUSTAR, disk, descriptor)},
		{name: "names with ./", b: archive(t, tar.FormatUSTAR, entry{name: "./", header: tar.Header{Typeflag: tar.TypeDir}}, entry{name: "./x.ovf", content: descriptor.content}, entry{name: "./disk1.img", content: small})},
		{name: "in a folder", b: archive(t, tar.FormatUSTAR, entry{name: "a/", header: tar.Header{Typeflag: tar.TypeDir}}, entry{name: "a/x.OVF", content: descriptor.content}, entry{name: "a/disk1.img", content: small}, entry{name: "disk1.img", content: "another"})},
		{name: "a companion of macOS", b: archive(t, tar.FormatUSTAR, entry{name: "._x.ovf", content: "?"}, descriptor, disk)},
		{name: "a global header", b: archive(t, tar.FormatPAX, entry{name: "g", header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c"}}}, descriptor, disk)},
		{name: "without the end", b: whole[:len(whole)-1024]},
		{name: "half of the end", b: whole[:len(whole)-512]},
		{name: "something after the end", b: append(bytes.Clone(whole), "rest"...)},
		{name: "without the padding of the last member", b: archive(t, tar.FormatUSTAR, disk, descriptor)[:512+1536+512+len(descriptor.content)]},

		{name: "empty", fails: "the file is empty"},
		{name: "zeros", b: make([]byte, 4096), fails: "none of its 0 files is an .ovf file"},
		{name: "no descriptor", b: archive(t, tar.FormatUSTAR, disk), fails: "none of its 1 files is an .ovf file"},
		{name: "two descriptors", b: archive(t, tar.FormatUSTAR, descriptor, disk, entry{name: "a/y.ovf"}), fails: `two .ovf files, "a/y.ovf" and "x.ovf"`},
		{name: "text", b: []byte(strings.Repeat("no archive ", 100)), fails: `offset 0: the file is no tar archive: it begins with "no archive no ar"`},
		{name: "gzip", b: append([]byte("\x1f\x8b\x08"), make([]byte, 1024)...), fails: `the whole file is compressed with gzip`},
		{name: "an image", b: append([]byte("QFI\xfb"), make([]byte, 1024)...), fails: `no tar archive: it begins with "QFI\xfb`},
		{name: "a damaged header", b: append(append(bytes.Clone(whole[:at]), bytes.Repeat([]byte{7}, 512)...), whole[at+512:]...), fails: fmt.Sprintf("offset %d: there is no valid header", at)},
		{name: "cut in a member", b: whole[:len(whole)-1024-1], fails: fmt.Sprintf("offset %d: \"disk1.img\" has 1536 bytes from offset %d on, but the archive ends at offset %d: the archive is truncated", at, at+512, len(whole)-1025)},
		{name: "cut before a member", b: whole[:at+512], fails: "the archive is truncated"},
		{name: "cut in a header", b: whole[:at+100], fails: fmt.Sprintf("offset %d: the archive ends in the middle of a header", at)},
		{name: "cut in an extended header", b: archive(t, tar.FormatGNU, longDisk)[:700], fails: "offset 0: the archive ends in the middle of a header"},
		{name: "a size past the end", b: lied(1<<62 + 5), fails: "has 4611686018427387909 bytes from"},
		{name: "the largest size", b: lied(1<<63 - 1), fails: "has 9223372036854775807 bytes from"},
		{name: "a size that goes back", b: patch(whole, at, func(h []byte) { copy(h[124:], bytes.Repeat([]byte{0xff}, 11)); h[135] = 0 }), fails: "there is no valid header"},
		{name: "a size that is none", b: patch(whole, at, func(h []byte) { copy(h[124:], "hello") }), fails: "there is no valid header"},
		{name: "a size that hides members", b: patch(whole, 0, func(h []byte) { copy(h[124:], fmt.Sprintf("%011o", len(whole)-512)) }), fails: "x.ovf"},
		{name: "an absolute name", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "/etc/shadow"}), fails: `offset ` + fmt.Sprint(at) + `: the name "/etc/shadow" is an absolute path`},
		{name: "..", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "a/../../x"}), fails: "leads out of the archive"},
		{name: ".. of a folder", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "../", header: tar.Header{Typeflag: tar.TypeDir}}), fails: "leads out of the archive"},
		{name: "two of a name", b: archive(t, tar.FormatUSTAR, descriptor, disk, disk), fails: `a second member with the name "disk1.img"`},
		{name: "two of a name, written otherwise", b: archive(t, tar.FormatUSTAR, descriptor, disk, entry{name: "./a/..b/../../disk1.img"}), fails: "leads out of the archive"},
		{name: "two of a name, with ./", b: archive(t, tar.FormatUSTAR, descriptor, disk, entry{name: "././disk1.img"}), fails: `a second member with the name "disk1.img"`},
		{name: "a file named as a folder", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "disk1.img/", header: tar.Header{Typeflag: tar.TypeDir}}, disk), fails: "a second member"},
		{name: "a symbolic link", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "disk1.img", header: tar.Header{Typeflag: tar.TypeSymlink, Linkname: "disk1.img"}}), fails: `"disk1.img" is a link to "disk1.img"`},
		{name: "a hard link", b: archive(t, tar.FormatUSTAR, descriptor, disk, entry{name: "l", header: tar.Header{Typeflag: tar.TypeLink, Linkname: "disk1.img"}}), fails: `"l" is a link to "disk1.img"`},
		{name: "a FIFO", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "p", header: tar.Header{Typeflag: tar.TypeFifo}}), fails: `"p" is of type '6'`},
		{name: "a device", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "p", header: tar.Header{Typeflag: tar.TypeBlock}}), fails: `"p" is of type '4'`},
		{name: "a global header with a name", b: archive(t, tar.FormatPAX, entry{name: "g", header: tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"path": "disk1.img"}}}, descriptor, disk), fails: "a global header sets the name"},
		{name: "more members than there may be", b: archive(t, tar.FormatUSTAR, many(4097)...), fails: "more than 4096 members"},
		{name: "headers without end", b: bytes.Repeat(archive(t, tar.FormatGNU, entry{name: strings.Repeat("x", 1<<19)})[:512+1<<19+512], 40), fails: "the headers have more than 16777216 bytes"},
		{name: "a name without end", b: archive(t, tar.FormatPAX, descriptor, entry{name: strings.Repeat("x", 5000)}), fails: "has 5000 bytes, want at most 4096"},
		{name: "no member of the disk's name", b: archive(t, tar.FormatUSTAR, descriptor, entry{name: "disk2.img"}), fails: `x.ova has no file "disk1.img"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := ova.Open(t.Context(), "x.ova", memory(c.b))
			if err == nil {
				defer a.Close()
				var d source.Disk
				if d, err = a.OpenDisk(t.Context(), 0); err == nil {
					d.Close()
				}
			}
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) || !strings.Contains(err.Error(), "x.ova") {
					t.Errorf("%v, want %q", err, c.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := content(t, a, 0); got != small {
				t.Errorf("%d bytes %.20q", len(got), got)
			}
		})
	}
}

func many(n int) (all []entry) {
	for i := range n {
		all = append(all, entry{name: fmt.Sprint(i)})
	}
	return all
}

// TestOwned tests that the archive is closed if Open refuses it, and otherwise together
// with the appliance.
func TestOwned(t *testing.T) {
	good := memory(archive(t, tar.FormatUSTAR, entry{name: "x.ovf", content: envelope(file1, disk1)}, entry{name: "disk1.img", content: small}))
	bad := memory([]byte("text"))
	a, err := ova.Open(t.Context(), "x.ova", good)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	if _, err := ova.Open(t.Context(), "x.ova", bad); err == nil {
		t.Fatal("no error")
	}
	for _, f := range []*sourcetest.Memory{good, bad} {
		if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%v, want it closed", err)
		}
	}
}

// TestOnlyHeadersAreRead opens an archive with 1 GiB of content, of which Open may read
// only the headers.
func TestOnlyHeadersAreRead(t *testing.T) {
	const size = 1 << 30
	var head bytes.Buffer
	w := tar.NewWriter(&head)
	x := envelope(file1, disk1)
	w.WriteHeader(&tar.Header{Name: "x.ovf", Size: int64(len(x)), Mode: 0o644})
	io.WriteString(w, x)
	w.WriteHeader(&tar.Header{Name: "disk1.img", Size: size, Mode: 0o644})
	w.Flush()
	h := head.Bytes()
	read := 0
	f := &sourcetest.Memory{
		Content: zerosAfter(h), Length: int64(len(h)) + size + 1024,
		OnRead: func(off int64, n int) error { read += n; return nil },
	}
	a, err := ova.Open(t.Context(), "x.ova", f)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if n, err := a.Size(t.Context(), 0); n != size || err != nil {
		t.Errorf("size %d, %v", n, err)
	}
	if most := len(h) + len(x) + 4096; read > most {
		t.Errorf("%d bytes were read, want at most %d", read, most)
	}
}

type zerosAfter []byte

func (z zerosAfter) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if off < int64(len(z)) {
		copy(p, z[off:])
	}
	return len(p), nil
}

// TestOpenStops ends the context while an archive is opened. The error must be the
// cause of the context.
func TestOpenStops(t *testing.T) {
	why := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	_, err := ova.Open(ctx, "x.ova", memory(archive(t, tar.FormatUSTAR, entry{name: "x.ovf", content: envelope(file1, disk1)})))
	if !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
}

// TestTarProgram reads archives of the tar program in all its formats, with and without
// names that are too long for ustar. Sparse files are refused.
func TestTarProgram(t *testing.T) {
	peer.Need(t, "tar")
	for _, format := range []string{"ustar", "pax", "gnu", "v7", "oldgnu"} {
		for _, folder := range []string{".", strings.Repeat("f", 80) + "/" + strings.Repeat("g", 80)} {
			if format == "v7" && folder != "." {
				continue
			}
			dir := t.TempDir()
			write := func(name, content string) {
				path := filepath.Join(dir, folder, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write("x.ovf", envelope(file1, disk1))
			write("disk1.img", small)
			archive := filepath.Join(dir, "x.ova")
			peer.Run(t, "tar", "-C", dir, "--format", format, "-cf", archive, folder+"/x.ovf", folder+"/disk1.img")
			b, err := os.ReadFile(archive)
			if err != nil {
				t.Fatal(err)
			}
			a, err := ova.Open(t.Context(), "x.ova", memory(b))
			if err != nil {
				t.Fatalf("%s, %s: %v", format, folder, err)
			}
			if got := content(t, a, 0); got != small {
				t.Errorf("%s, %s: %d bytes %.20q", format, folder, len(got), got)
			}
			a.Close()
		}
	}
	for _, args := range [][]string{{"--format=gnu"}, {"--format=oldgnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"}} {
		dir := t.TempDir()
		path, archive := filepath.Join(dir, "disk1.img"), filepath.Join(dir, "x.ova")
		if err := os.WriteFile(path, []byte(small), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 8<<20); err != nil {
			t.Fatal(err)
		}
		peer.Run(t, "tar", append(args, "-C", dir, "--sparse", "--hole-detection=raw", "-cf", archive, "disk1.img")...)
		b, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ova.Open(t.Context(), "x.ova", memory(b)); err == nil || !strings.Contains(err.Error(), "sparse file of GNU tar") {
			t.Errorf("%v: %v", args, err)
		}
	}
}
