package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/qcow2"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

var writeSeeds = flag.Bool("write-seeds", false, "write the seeds of the fuzz target into testdata")

// FuzzQcow2 opens images of the fuzzer, reads parts of them, and asks for their
// allocation. Reads in pieces must return the same bytes as one read, ranges of
// zeros must read as zeros, and no image may make the reader use more memory than
// a few clusters.
func FuzzQcow2(f *testing.F) {
	all := [][]byte{
		image{size: 3<<9 + 100, bits: 9, clusters: some(512, 0, 2)}.build().file,
		image{size: 3 << 9, bits: 9, version: 2, clusters: some(512, 0, 1)}.build().file,
		image{size: 5 << 12, bits: 12, packed: "zlib", clusters: some(4096, 0, 1, 3, 4)}.build().file,
		image{size: 5 << 12, bits: 12, packed: "zstd", clusters: some(4096, 0, 1, 3, 4)}.build().file,
		image{size: 70 << 9, bits: 9, clusters: map[int64][]byte{0: nil, 64: random(1, 512)}}.build().file,
		image{size: 3 << 9, bits: 9, backing: "base", format: "raw", clusters: some(512, 1)}.build().file,
		image{size: 3 << 9, bits: 9, backing: "base", clusters: map[int64][]byte{1: nil}}.build().file,
		image{size: 3 << 9, bits: 9, data: "data", clusters: some(512, 0, 2)}.build().file,
		image{size: 1 << 9, bits: 9, features: 1<<0 | 1<<9, names: "\x00\x09time travel" + strings.Repeat("\x00", 35)}.build().file,
		image{size: 1 << 34, bits: 21}.build().file[:2<<20+8],
	}
	sub := image{size: 3 << 14, bits: 14, extended: true, clusters: map[int64][]byte{0: nil, 1: random(1, 1<<14)}}.build()
	sub.put64(sub.l2(1)+8, 0xff00_0000<<32|0x0f00_00f1)
	all = append(all, sub.file)
	lies := image{size: 5 << 12, bits: 12, packed: "zlib", clusters: some(4096, 0, 1, 3, 4)}.build()
	lies.put64(lies.l2(1), lies.get64(lies.l2(3)))
	lies.put64(lies.l2(4), 1<<62|uint64(len(lies.file)-10))
	all = append(all, lies.file)
	if *writeSeeds {
		dir := filepath.Join("testdata", "fuzz", f.Name())
		if err := os.MkdirAll(dir, 0o777); err != nil {
			f.Fatal(err)
		}
		for i, seed := range all {
			if len(seed) > 128<<10 {
				seed = seed[:600] // of that the header is enough
			}
			text := "go test fuzz v1\n[]byte(" + strconv.Quote(string(seed)) + ")\n"
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%02d", i)), []byte(text), 0o666); err != nil {
				f.Fatal(err)
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) { use(t, &sourcetest.Memory{Bytes: b}) })
}

// named opens the files that an image of the fuzzer names.
func named(_ context.Context, _, _, format string) (source.Disk, error) {
	if format != "raw" {
		return nil, errors.New("no images here")
	}
	return sourcetest.Pattern(1<<20, source.Extent{Len: 1 << 20}), nil
}

func use(t *testing.T, f source.Disk) {
	d, err := qcow2.Open(t.Context(), "fuzz.qcow2", f, named, qcow2.Options{})
	if err != nil {
		if !strings.Contains(err.Error(), "fuzz.qcow2") {
			t.Errorf("the error does not name the file: %v", err)
		}
		return
	}
	defer d.Close()
	size := d.Size()
	next, n := int64(0), 0
	for e, err := range source.Covered(t.Context(), d, 0, size) {
		if err != nil {
			if !strings.Contains(err.Error(), "fuzz.qcow2") {
				t.Fatal(err)
			}
			break
		}
		next = e.End()
		if e.Kind == source.Zero && n < 16 {
			p := bytes.Repeat([]byte{1}, int(min(e.Len, 4096)))
			if _, err := d.ReadAt(p, e.Off); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
				t.Fatalf("%+v reads as %x, %v", e, p[:min(len(p), 32)], err)
			}
		}
		if n++; n > 1<<16 {
			break
		}
	}
	whole, pieces := make([]byte, 256<<10), make([]byte, 256<<10)
	for _, off := range []int64{0, next / 2 &^ 511, max(0, size-int64(len(whole)))} {
		want, err := d.ReadAt(whole, off)
		if err != nil && err != io.EOF {
			continue
		}
		if int64(want) != max(0, min(int64(len(whole)), size-off)) {
			t.Fatalf("ReadAt at %d of %d: %d bytes, %v", off, size, want, err)
		}
		for at := 0; at < want; at += 7000 {
			k := min(7000, want-at)
			if _, err := d.ReadAt(pieces[at:at+k], off+int64(at)); err != nil && err != io.EOF {
				t.Fatalf("a piece at %d of what could be read: %v", off+int64(at), err)
			}
		}
		if !bytes.Equal(whole[:want], pieces[:want]) {
			t.Fatalf("what is read at %d in pieces differs", off)
		}
	}
	n = 0
	for _, err := range source.Map(t.Context(), d, 0, size) {
		if err != nil {
			if !strings.Contains(err.Error(), "fuzz.qcow2") {
				t.Fatal(err)
			}
			break
		}
		if n++; n > 1<<16 {
			break
		}
	}
	_ = d.Info()
}
