package server_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// sparseFile creates a file with a hole, and returns its path and content.
func sparseFile(t testing.TB, size int) (path string, want []byte) {
	t.Helper()
	want = content(size)
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err == nil {
		defer f.Close()
		err = f.Truncate(int64(size))
	}
	for off := 0; err == nil && off < size; off += 4096 {
		p := want[off:min(off+4096, size)]
		if !bytes.Equal(p, make([]byte, len(p))) {
			_, err = f.WriteAt(p, int64(off))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return path, want
}

func openRaw(t testing.TB, path string) *raw.Disk {
	t.Helper()
	d, err := raw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// TestFile reads a file with lengths for which the server uses different ways to read, before
// and after its extents are cached.
func TestFile(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		path, want := sparseFile(t, 8<<20+777)
		c := ready(t, newServer(t, one("", openRaw(t, path)), server.Options{}), "", structured)
		for range 2 {
			for _, n := range []uint32{1, 512, 4095, 4096, 32<<10 - 1, 32 << 10, 32<<10 + 1, 1 << 20, 1<<20 + 1, 8 << 20} {
				for _, off := range []uint64{0, 1, 511, 2<<20 - 100, 4<<20 - 3, uint64(len(want)) - uint64(n)} {
					if off+uint64(n) <= uint64(len(want)) {
						c.reads(want, off, n)
					}
				}
			}
			if structured {
				c.do(nbd.CmdBlockStatus, 0, 0, uint32(len(want)), nil)
			}
		}
	})
}

// TestFileCut shortens the file while it is exported.
func TestFileCut(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		path, want := sparseFile(t, 8<<20)
		s := newServer(t, one("", openRaw(t, path)), server.Options{})
		c := ready(t, s, "", structured)
		if err := os.Truncate(path, 1<<20); err != nil {
			t.Fatal(err)
		}
		c.reads(want, 0, 1<<20)
		for _, n := range []uint32{4096, 64 << 10, 2 << 20} {
			if !structured && n > 1<<20 {
				end := ready(t, s, "", structured)
				end.send(nbd.CmdRead, 0, 1<<20-1000, n, nil)
				if b, err := io.ReadAll(end); len(b) >= int(n) {
					t.Errorf("%d bytes, %v, want the end of the connection", len(b), err)
				}
			}
			if a := c.do(nbd.CmdRead, 0, 1<<20-1000, n, nil); a.errno != nbd.EIO {
				t.Errorf("%d bytes: %v, want EIO", n, a.errno)
			}
			c.reads(want, 4096, 512)
		}
	})
}

// TestHoles checks that zeros are sent as holes.
func TestHoles(t *testing.T) {
	d := sourcetest.Pattern(8<<20, source.Extent{Off: 0, Len: 1 << 20}, source.Extent{Off: 3 << 20, Len: 1 << 20})
	var reads atomic.Int64
	d.OnRead = func(int64, int) error { reads.Add(1); return nil }
	want := make([]byte, 8<<20)
	if _, err := d.ReadAt(want, 0); err != nil {
		t.Fatal(err)
	}
	c := ready(t, newServer(t, one("", d), server.Options{}), "", true)
	chunks := func(off uint64, n uint32, flags nbd.CommandFlags) (data, holes int) {
		t.Helper()
		a := c.do(nbd.CmdRead, flags, off, n, nil)
		if !bytes.Equal(a.data, want[off:off+uint64(n)]) {
			t.Errorf("read of %d bytes at %d: other bytes, %v", n, off, a.errno)
		}
		for _, k := range a.kinds {
			switch k {
			case nbd.ChunkData:
				data++
			case nbd.ChunkHole:
				holes++
			}
		}
		return data, holes
	}
	if data, holes := chunks(1<<20, 4096, 0); data != 0 || holes != 1 {
		t.Errorf("zeros: %d chunks of data, %d holes", data, holes)
	}
	if data, holes := chunks(1<<20, 4096, nbd.FlagDF); data != 1 || holes != 0 {
		t.Errorf("zeros in one piece: %d chunks of data, %d holes", data, holes)
	}
	c.do(nbd.CmdBlockStatus, 0, 0, 1, nil) // now the server has cached all extents
	reads.Store(0)
	if data, holes := chunks(1<<20, 2<<20, 0); data != 0 || holes != 1 || reads.Load() != 0 {
		t.Errorf("a hole that is known: %d chunks of data, %d holes, %d reads", data, holes, reads.Load())
	}
	if data, holes := chunks(512<<10, 3<<20+1, 0); data != 2 || holes != 1 {
		t.Errorf("data, hole, data: %d chunks of data, %d holes", data, holes)
	}
	if data, holes := chunks(1<<20-512, 1024, 0); data != 1 || holes != 0 {
		t.Errorf("a hole too short to tell: %d chunks of data, %d holes", data, holes)
	}
}
