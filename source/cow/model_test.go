package cow

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// world is a disk with several pages of the table, and the parts of it ("windows") that
// a test uses: the borders of pages and of sectors of the table, and both ends.
type world struct {
	size    int64
	base    *sourcetest.Memory
	windows []window
}

// window is a range of the disk and its expected content.
type window struct {
	off  int64
	want []byte
}

const testBlock = minBlockSize

func newWorld(t *testing.T, size, length int64) *world {
	t.Helper()
	w := &world{size: size}
	var data []source.Extent
	at := []int64{0, sectorBlocks * testBlock, pageBlocks * testBlock, 2 * pageBlocks * testBlock, size}
	for _, a := range at {
		off := max(0, min(a-length/2, size-length))
		w.windows = append(w.windows, window{off, make([]byte, length)})
		data = append(data, source.Extent{Off: off, Len: length / 2})
	}
	w.base = sourcetest.Pattern(size, data...)
	w.base.ID = "pattern"
	for _, v := range w.windows {
		if _, err := w.base.ReadAt(v.want, v.off); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func (w *world) open(t *testing.T, file string, onRead bool, limit int, sys system) *Disk {
	t.Helper()
	// Each call returns a new disk, because the layer closes it.
	m := &sourcetest.Memory{Content: w.base.Content, Length: w.size, ExtentList: w.base.ExtentList, ID: w.base.ID}
	d, err := newDisk(t.Context(), m, Options{File: file, BlockSize: testBlock, OnRead: onRead}, sys)
	if err != nil {
		t.Fatal(err)
	}
	d.table.limit = limit
	return d
}

// quick returns system calls that do not wait for the disk. Power cuts have tests of
// their own.
func quick() system {
	sys := kernel()
	sys.fdatasync = func(*os.File) error { return nil }
	return sys
}

// check compares a range of a window with its expected content.
func (w *world) check(d *Disk, v window, from, n int64) error {
	got := make([]byte, n)
	if _, err := d.ReadAt(got, v.off+from); err != nil && v.off+from+n != w.size {
		return err
	}
	if want := v.want[from : from+n]; !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		return fmt.Errorf("byte %d of the disk is %#02x, want %#02x (read of [%d, %d))", v.off+from+int64(i), got[i], want[i], v.off+from, v.off+from+n)
	}
	return nil
}

// checkExtents compares the extents of a window with its expected content.
func (w *world) checkExtents(t *testing.T, d *Disk, v window) error {
	for e, err := range source.Covered(t.Context(), d, v.off, int64(len(v.want))) {
		if err != nil {
			return err
		}
		if e.Kind == source.Zero && !zero.Is(v.want[e.Off-v.off:e.End()-v.off]) {
			return fmt.Errorf("%+v is no zeros", e)
		}
	}
	return nil
}

// TestModel tests that after any sequence of calls the disk has the content of a plain
// array.
func TestModel(t *testing.T) {
	const length = 160 << 10
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 5))
		w := newWorld(t, 2*pageBlocks*testBlock+3*length+(int64(seed)%3)*1000, length)
		file, onRead, limit := "", seed%2 == 0, 1+int(seed%3)
		if seed%4 > 0 {
			file = filepath.Join(t.TempDir(), "cow")
		}
		d := w.open(t, file, onRead, limit, quick())
		for i := range 1500 {
			v := w.windows[r.IntN(len(w.windows))]
			from := r.Int64N(length)
			n := 1 + r.Int64N(min(length-from, []int64{100, 5000, 40000}[r.IntN(3)]))
			if r.IntN(3) == 0 { // whole blocks
				from -= (v.off + from) % testBlock
				from = max(0, from)
				n = min(length-from, (n+testBlock-1)&^(testBlock-1))
			}
			part := v.want[from : from+n]
			var err error
			what := r.IntN(12)
			switch what {
			case 0, 1, 2, 3:
				for k := range part {
					part[k] = byte(r.Uint32())
				}
				_, err = d.WriteAt(part, v.off+from)
			case 4, 5:
				clear(part)
				err = d.ZeroAt(t.Context(), v.off+from, n, source.ZeroFlags(r.IntN(2)))
			case 6:
				old := bytes.Clone(part)
				if err = d.Trim(t.Context(), v.off+from, n); err == nil {
					// The parts of blocks at both ends may not be zeroed.
					if _, err := d.ReadAt(part, v.off+from); err != nil && v.off+from+n != w.size {
						t.Fatal(err)
					}
					for k, b := range part {
						block := (v.off+from+int64(k))/testBlock*testBlock - v.off
						inner := block >= from && min(block+testBlock, w.size-v.off) <= from+n
						if b != 0 && (inner || b != old[k]) {
							t.Fatalf("seed %d, step %d: byte %d is %#02x after a trim of [%d, %d), and was %#02x", seed, i, v.off+from+int64(k), b, v.off+from, v.off+from+n, old[k])
						}
					}
				}
			case 7, 8, 9:
				err = w.check(d, v, from, n)
			case 10:
				err = d.Flush(t.Context())
			case 11:
				if err = w.checkExtents(t, d, v); err == nil && file != "" && r.IntN(8) == 0 {
					if err = d.Close(); err == nil {
						d = w.open(t, file, onRead, limit, quick())
					}
				}
			}
			if err != nil {
				t.Fatalf("seed %d, step %d, %d on [%d, %d): %v", seed, i, what, v.off+from, v.off+from+n, err)
			}
		}
		for _, v := range w.windows {
			if err := w.check(d, v, 0, length); err != nil {
				t.Errorf("seed %d: %v", seed, err)
			}
		}
		if len(d.table.clock) > limit {
			t.Errorf("seed %d: %d pages in memory, want at most %d", seed, len(d.table.clock), limit)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWritersShareBlocks tests that writers of one block never lose each other's bytes,
// and that readers never see a block that is only partly copied from the base.
func TestWritersShareBlocks(t *testing.T) {
	const length, writers, unit = 96 << 10, 6, 256
	for _, onRead := range []bool{false, true} {
		w := newWorld(t, 2*pageBlocks*testBlock+3*length, length)
		d := w.open(t, filepath.Join(t.TempDir(), "cow"), onRead, 2, quick())
		ctx := t.Context()
		var wg sync.WaitGroup
		for g := range writers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(g), 7))
				for i := range 1200 {
					v := w.windows[r.IntN(len(w.windows))]
					// Each writer has units of its own. The units of writer 0 are never
					// written.
					from := (r.Int64N(length/unit/writers)*writers + int64(g)) * unit
					part := v.want[from : from+unit]
					var err error
					switch what := r.IntN(8); {
					case g == 0 || what == 0:
						err = w.check(d, v, from, unit)
					case what == 1:
						clear(part)
						err = d.ZeroAt(ctx, v.off+from, unit, source.MayTrim)
					case what == 2 && i%50 == 0:
						err = d.Flush(ctx)
					default:
						for k := range part {
							part[k] = byte(r.Uint32())
						}
						if _, err = d.WriteAt(part, v.off+from); err == nil {
							err = w.check(d, v, from, unit)
						}
					}
					if err != nil {
						t.Errorf("writer %d: %v", g, err)
						return
					}
				}
			})
		}
		wg.Wait()
		for _, v := range w.windows {
			if err := w.check(d, v, 0, length); err != nil {
				t.Error(err)
			}
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestWholeBlockBesideItsPart tests that a write of a whole block is not overwritten by a
// copy of the block from the base that began before.
func TestWholeBlockBesideItsPart(t *testing.T) {
	base := memory(1 << 20)
	base.OnRead = func(int64, int) error {
		for range 20 {
			runtime.Gosched()
		}
		return nil
	}
	for _, onRead := range []bool{false, true} {
		d := make1(t, base, Options{BlockSize: minBlockSize, OnRead: onRead})
		whole := bytes.Repeat([]byte{1}, minBlockSize)
		for b := range int64(1<<20/minBlockSize) - 1 {
			var both sync.WaitGroup
			both.Go(func() {
				var err error
				if onRead {
					_, err = d.ReadAt(make([]byte, 512), b*minBlockSize)
				} else {
					_, err = d.WriteAt(bytes.Repeat([]byte{2}, 512), b*minBlockSize)
				}
				if err != nil {
					t.Error(err)
				}
			})
			both.Go(func() {
				runtime.Gosched()
				if b%3 == 0 {
					if err := d.ZeroAt(t.Context(), b*minBlockSize, minBlockSize, source.MayTrim); err != nil {
						t.Error(err)
					}
				} else if _, err := d.WriteAt(whole, b*minBlockSize); err != nil {
					t.Error(err)
				}
			})
			both.Wait()
			want := whole
			if b%3 == 0 {
				want = make([]byte, minBlockSize)
			}
			if got := read(t, d, b*minBlockSize, minBlockSize); !bytes.Equal(got[512:], want[512:]) {
				t.Fatalf("block %d holds %#02x and %#02x", b, got[0], got[512])
			}
		}
	}
}
