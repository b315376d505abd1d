package cow

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestWrongFile tests that a file which is not the layer of this disk is refused and
// not changed, and that the error says what was found and what was expected.
func TestWrongFile(t *testing.T) {
	const size = 1<<20 + 512
	for _, c := range []struct {
		name   string
		change func(t *testing.T, path string, base *sourcetest.Memory, o *Options)
		want   string
	}{
		{"nothing", func(*testing.T, string, *sourcetest.Memory, *Options) {}, ""},
		{"another disk", func(_ *testing.T, _ string, u *sourcetest.Memory, _ *Options) { u.ID = "disk 2" }, "the layer belongs to disk \"disk 1\", but the base disk is disk \"disk 2\""},
		{"another proof", func(_ *testing.T, _ string, u *sourcetest.Memory, _ *Options) { u.Proof = "none" }, `the proof of unchanged content (snapshot, mtime or none) was "mtime" then, and is "none" now`},
		{"another size", func(_ *testing.T, _ string, u *sourcetest.Memory, _ *Options) { u.Bytes = u.Bytes[:512] }, "a disk of 1049088 bytes, but the base disk has 512"},
		{"other blocks", func(_ *testing.T, _ string, _ *sourcetest.Memory, o *Options) { o.BlockSize = 4096 }, "the layer has blocks of 65536 bytes, not of 4096 bytes"},
		{"odd blocks", func(_ *testing.T, _ string, _ *sourcetest.Memory, o *Options) { o.BlockSize = 5000 }, "block size of 5000 bytes: want a power of two"},
		{"text", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, []byte("root:x:0:0:root:/root:/bin/bash\n"), 0, 32)
		}, `not a layer of vddkcp: the file begins with "root:x:0:0:root:"`},
		{"zeros", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, nil, 0, 1<<20)
		}, `not a layer of vddkcp`},
		{"cut", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, nil, -1, 2<<20)
		}, "the layer file has 2097152 bytes, want 2097664 bytes for a disk of 1049088 bytes: the layer file is truncated or damaged"},
		{"one torn header", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, []byte{0}, 40, -1)
		}, ""},
		{"the first header lost", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, make([]byte, 512), 0, -1)
		}, ""},
		{"torn headers", func(t *testing.T, path string, _ *sourcetest.Memory, _ *Options) {
			overwrite(t, path, []byte{0}, 40, -1)
			overwrite(t, path, []byte{0}, slotSize+40, -1)
		}, "both headers are damaged or incomplete"},
		{"another version", func(t *testing.T, path string, u *sourcetest.Memory, _ *Options) {
			h := encodeAs(t, header{Size: size, BlockSize: 65536, Source: u.ID, Proof: u.Proof}, 9)
			overwrite(t, path, h, 0, -1)
			overwrite(t, path, h, slotSize, -1)
		}, "the layer has the format version 9, but this vddkcp reads only version 1"},
		{"a folder", func(_ *testing.T, path string, _ *sourcetest.Memory, o *Options) { o.File = filepath.Dir(path) }, "is a directory"},
		{"a FIFO", func(t *testing.T, path string, _ *sourcetest.Memory, o *Options) {
			o.File = path + ".fifo"
			if err := unix.Mkfifo(o.File, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "must be a regular file"},
		{"no folder", func(_ *testing.T, path string, _ *sourcetest.Memory, o *Options) { o.File = path + "/x" }, "not a directory"},
		{"in use", func(t *testing.T, path string, u *sourcetest.Memory, _ *Options) {
			make1(t, memory(size), Options{File: path})
		}, "in use by another process"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.cow")
			d := make1(t, memory(size), Options{File: path})
			if _, err := d.WriteAt([]byte("written"), 100); err != nil {
				t.Fatal(err)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			base, o := memory(size), Options{File: path}
			c.change(t, path, base, &o)
			before, _ := os.ReadFile(path)
			d, err := New(t.Context(), base, o)
			if c.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				if got := read(t, d, 100, 7); string(got) != "written" {
					t.Errorf("it holds %q", got)
				}
				d.Close()
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("the file was changed")
			}
			if base.Closed() {
				t.Error("the disk below was closed")
			}
		})
	}
}

// overwrite writes p to the file at off, and truncates the file to size bytes. A
// negative off or size skips that step.
func overwrite(t *testing.T, path string, p []byte, off, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if off >= 0 && p == nil {
		p = make([]byte, size)
	}
	if off >= 0 {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if size >= 0 {
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDamagedTable tests that damage in the table is an error for the blocks that it
// describes, and never other content.
func TestDamagedTable(t *testing.T) {
	const size = 3 * sectorBlocks * minBlockSize
	path := filepath.Join(t.TempDir(), "x.cow")
	d := make1(t, memory(size), Options{File: path, BlockSize: minBlockSize})
	for s := range int64(3) {
		if _, err := d.WriteAt(make([]byte, 4096), s*sectorBlocks*minBlockSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func(table []byte){
		"a bit":      func(b []byte) { b[sectorSize+3] ^= 4 },
		"checksum":   func(b []byte) { b[2*sectorSize-1] ^= 1 },
		"lost half":  func(b []byte) { clear(b[sectorSize : sectorSize+256]) },
		"misplaced":  func(b []byte) { copy(b[sectorSize:], b[:sectorSize]) },
		"foreign":    func(b []byte) { copy(b[sectorSize:], bytes.Repeat([]byte{0xff}, sectorSize)) },
		"bad state":  func(b []byte) { reseal(b, 1, 5, 3) },
		"beyond end": func(b []byte) { reseal(b, 3, 0, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(whole)
			damage(b[tableStart:])
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			d := make1(t, memory(size), Options{File: path})
			for name, err := range map[string]error{
				"read":  func() error { _, err := d.ReadAt(make([]byte, 512), sectorBlocks*minBlockSize); return err }(),
				"write": func() error { _, err := d.WriteAt(make([]byte, 512), sectorBlocks*minBlockSize); return err }(),
				"map": func() error {
					for _, err := range d.Extents(t.Context(), 0, size) {
						if err != nil {
							return err
						}
					}
					return nil
				}(),
			} {
				if err == nil || !strings.Contains(err.Error(), "table of the layer "+path) || !strings.Contains(err.Error(), "damaged") {
					t.Errorf("%s: %v", name, err)
				}
			}
			if _, _, _, ok := d.InFile(0); ok {
				t.Error("InFile knows more")
			}
		})
	}
}

// reseal sets the state of a block in a sector of the table, and corrects the checksum
// of the sector.
func reseal(table []byte, s int64, block int, state byte) {
	sector := table[s*sectorSize : (s+1)*sectorSize]
	sector[block/4] |= state << (block % 4 * 2)
	seal(sector, s)
}

// TestSameFile tests that the device number of a raw file, which the headers of layers
// from before November 2026 have, is ignored.
func TestSameFile(t *testing.T) {
	const old = "file:1792:12:62914560:1796048694695282666"
	for id, want := range map[string]bool{
		"file:inode 12 born 1796048690.000000001:62914560:1796048694695282666": true,
		"file:inode 12:62914560:1796048694695282666":                           true,
		"file:inode 13:62914560:1796048694695282666":                           false,
		"file:inode 12:62914561:1796048694695282666":                           false,
		"file:inode 12:62914560:1796048694695282667":                           false,
		"block:7:12:62914560":                                                  false,
	} {
		have, want := header{Source: old, Proof: "mtime"}.differs(header{Source: id, Proof: "mtime"}), want
		if (have == nil) != want {
			t.Errorf("%s: %v, want it to be the same %v", id, have, want)
		}
	}
}

// TestAnotherProcessMakesTheLayer tests that New does not remove a file which another
// process turned into a layer between the creation of the file and its lock.
func TestAnotherProcessMakesTheLayer(t *testing.T) {
	for _, ended := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "x.cow")
		sys := kernel()
		var other *Disk
		sys.lock = func(f *os.File) error {
			var err error
			if other, err = New(t.Context(), memory(2<<20), Options{File: path}); err != nil {
				t.Fatal(err)
			}
			if ended {
				other.Close()
			}
			return kernel().lock(f)
		}
		if d, err := newDisk(t.Context(), memory(1<<20), Options{File: path}, sys); err == nil {
			d.Close()
			t.Fatal("no error")
		}
		if !ended {
			other.Close()
		}
		if info, err := os.Stat(path); err != nil || info.Size() < 2<<20 {
			t.Errorf("the layer of the other process (ended: %v): %v", ended, err)
		}
	}
}
