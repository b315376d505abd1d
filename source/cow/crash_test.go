package cow

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// sector is the unit that a power cut leaves whole: a write of several sectors may be
// lost in part.
type sector [sectorSize]byte

// powerCut replaces the system calls of a layer and records what a power cut may leave
// of its file: everything that was written before the last fdatasync began, and any
// subset of the sectors written since.
type powerCut struct {
	mu      sync.Mutex
	durable map[int64]sector // by sector number; other sectors are zeros
	pending []pendingWrite
	before  func(what string) // called before each call; may be nil
	synced  func()            // called at the end of each fdatasync; may be nil
}

type pendingWrite struct {
	off, n int64
	data   []byte // nil stands for zeros
}

func (w pendingWrite) apply(to map[int64]sector, r *rand.Rand) {
	for at := w.off / sectorSize; at*sectorSize < w.off+w.n; at++ {
		if r != nil && r.IntN(2) == 0 {
			continue
		}
		s := to[at]
		begin := max(at*sectorSize, w.off)
		end := min((at+1)*sectorSize, w.off+w.n)
		part := s[begin-at*sectorSize : end-at*sectorSize]
		if w.data == nil {
			clear(part)
		} else {
			copy(part, w.data[begin-w.off:])
		}
		to[at] = s
	}
}

// left returns what a power cut may leave now. If r is nil, it returns everything that
// was written, which is what remains when only the process ends.
func (c *powerCut) left(r *rand.Rand) map[int64]sector {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := maps.Clone(c.durable)
	for _, w := range c.pending {
		w.apply(left, r)
	}
	return left
}

// leftOf returns what a power cut leaves that loses all writes which are not durable,
// except the writes for which reaches returns true.
func (c *powerCut) leftOf(reach func(pendingWrite) bool) map[int64]sector {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := maps.Clone(c.durable)
	for _, w := range c.pending {
		if reach(w) {
			w.apply(left, nil)
		}
	}
	return left
}

func (c *powerCut) add(w pendingWrite) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = append(c.pending, w)
}

// system returns system calls that record in p what they do.
func (c *powerCut) system() system {
	sys := kernel()
	sys.pwrite = func(f *os.File, p []byte, off int64) (int, error) {
		c.call("pwrite")
		n, err := f.WriteAt(p, off)
		c.add(pendingWrite{off, int64(n), bytes.Clone(p[:n])})
		return n, err
	}
	sys.fdatasync = func(*os.File) error { // the real file need not be durable
		c.call("fdatasync")
		c.mu.Lock()
		covered := c.pending
		c.pending = nil
		for _, w := range covered {
			w.apply(c.durable, nil)
		}
		c.mu.Unlock()
		if c.synced != nil {
			c.synced()
		}
		return nil
	}
	allocate := sys.fallocate
	sys.fallocate = func(f *os.File, mode uint32, off, n int64) error {
		c.call("fallocate")
		err := allocate(f, mode, off, n)
		if err == nil && mode&unix.FALLOC_FL_PUNCH_HOLE != 0 {
			c.add(pendingWrite{off: off, n: n})
		}
		return err
	}
	return sys
}

func (c *powerCut) call(what string) {
	if c.before != nil {
		c.before(what)
	}
}

// writeSparse creates the file of a layer from its sectors, for a disk of size bytes.
func writeSparse(t *testing.T, path string, sectors map[int64]sector, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := newLayout(size, testBlock)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(l.data + size); err != nil {
		t.Fatal(err)
	}
	for at, s := range sectors {
		if s == (sector{}) {
			continue
		}
		if _, err := f.WriteAt(s[:], at*sectorSize); err != nil {
			t.Fatal(err)
		}
	}
}

// The crash tests write whole sectors, each filled with one number of 8 bytes.
func fill(p []byte, stamp uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], stamp)
	}
}

// stampOf returns the number with which a sector is filled.
func stampOf(p []byte) (uint64, error) {
	stamp := binary.LittleEndian.Uint64(p)
	for i := 0; i < len(p); i += 8 {
		if s := binary.LittleEndian.Uint64(p[i:]); s != stamp {
			return 0, fmt.Errorf("it holds %d, and %d at byte %d", stamp, s, i)
		}
	}
	return stamp, nil
}

// stamps is a disk whose sector n is filled with the number 1<<40+n.
type stamps struct{}

func (stamps) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		at := off + int64(i)
		p[i] = byte((1<<40 + uint64(at/sectorSize)) >> (8 * (at % 8)))
	}
	return len(p), nil
}

// TestPowerCut tests that after a power cut or a kill at any moment everything that was
// flushed is there, and that each sector which was written since has either its old or
// its new content.
func TestPowerCut(t *testing.T) {
	const window = 24 << 10
	const size = pageBlocks*testBlock + 128<<10
	for seed := range uint64(4) {
		r := rand.New(rand.NewPCG(seed, 9))
		dir := t.TempDir()
		offs := []int64{0, sectorBlocks*testBlock - window/2, pageBlocks*testBlock - window/2, size - window}
		// may has the possible contents of each sector after a cut: that of the last
		// flush, and everything that was written since.
		may := make(map[int64][]uint64)
		for _, off := range offs {
			for at := off / sectorSize; at < (off+window)/sectorSize; at++ {
				may[at] = []uint64{1<<40 + uint64(at)}
			}
		}
		var cut *powerCut
		files, cuts, stamp := 0, 0, uint64(0)
		base := func() *sourcetest.Memory {
			return &sourcetest.Memory{Content: stamps{}, Length: size, ID: "stamps"}
		}
		reopen := func(left map[int64]sector, sys system) (*Disk, error) {
			files++
			path := filepath.Join(dir, fmt.Sprint(files))
			writeSparse(t, path, left, size)
			return newDisk(t.Context(), base(), Options{File: path, BlockSize: testBlock, OnRead: seed%2 == 1}, sys)
		}
		// look opens what a cut leaves and compares it with may.
		look := func(when string) {
			cuts++
			cutter := r
			if r.IntN(4) == 0 {
				cutter = nil
			}
			d, err := reopen(cut.left(cutter), kernel())
			if err != nil {
				t.Fatalf("seed %d, cut at %s: %v", seed, when, err)
			}
			defer d.Close()
			p := make([]byte, window)
			for _, off := range offs {
				if _, err := d.ReadAt(p, off); err != nil && off+window != size {
					t.Fatalf("seed %d, cut at %s: %v", seed, when, err)
				}
				for at := off / sectorSize; at < (off+window)/sectorSize; at++ {
					s := p[at*sectorSize-off:][:sectorSize]
					got, err := stampOf(s)
					if err != nil || !slices.Contains(may[at], got) {
						t.Fatalf("seed %d, cut at %s: sector %d holds %d (%v), want one of %d", seed, when, at, got, err, may[at])
					}
				}
			}
		}
		cut = &powerCut{durable: make(map[int64]sector)}
		d, err := newDisk(t.Context(), base(), Options{File: filepath.Join(dir, "first"), BlockSize: testBlock, OnRead: seed%2 == 1}, cut.system())
		if err != nil {
			t.Fatal(err)
		}
		// The write adds a possible content to each of its sectors.
		write := func(from, n int64) error {
			p := make([]byte, n*sectorSize)
			for k := range n {
				stamp++
				fill(p[k*sectorSize:][:sectorSize], stamp)
				may[from+k] = append(may[from+k], stamp)
			}
			_, err := d.WriteAt(p, from*sectorSize)
			return err
		}
		for i := range 400 {
			d.table.limit = 1 + int(seed%2)*10
			cut.synced = func() {
				// All pages fit into memory, so that a write needs no room for one and
				// no flush begins by itself.
				if d.table.limit > 1 && r.IntN(2) == 0 {
					off := offs[r.IntN(len(offs))]
					if err := write(off/sectorSize+r.Int64N(window/sectorSize-8), 1+r.Int64N(8)); err != nil {
						t.Error(err)
					}
				}
			}
			cut.before = func(what string) {
				if r.IntN(30) == 0 {
					look("before " + what)
				}
			}
			off := offs[r.IntN(len(offs))]
			from := off/sectorSize + r.Int64N(window/sectorSize)
			n := 1 + r.Int64N(min(24, (off+window)/sectorSize-from))
			switch what := r.IntN(10); {
			case what < 5:
				err = write(from, n)
			case what < 8:
				for k := range n {
					may[from+k] = append(may[from+k], 0)
				}
				if what == 7 {
					err = d.Trim(context.Background(), from*sectorSize, n*sectorSize)
				} else {
					err = d.ZeroAt(context.Background(), from*sectorSize, n*sectorSize, map[bool]source.ZeroFlags{true: source.MayTrim}[what == 6])
				}
			case what == 8:
				p := make([]byte, window)
				_, err = d.ReadAt(p[:window-sectorSize], off)
			default:
				// After the flush, the content is that of now, or of a write that runs
				// at the same time.
				now, written := make(map[int64]uint64), make(map[int64]int)
				p := make([]byte, sectorSize)
				for at := range may {
					if _, err := d.ReadAt(p, at*sectorSize); err != nil && (at+1)*sectorSize != size {
						t.Fatal(err)
					}
					s, err := stampOf(p)
					if err != nil || !slices.Contains(may[at], s) {
						t.Fatalf("seed %d, step %d: sector %d holds %d (%v), want one of %d", seed, i, at, s, err, may[at])
					}
					now[at], written[at] = s, len(may[at])
				}
				if err = d.Flush(context.Background()); err == nil {
					for at := range may {
						may[at] = append([]uint64{now[at]}, may[at][written[at]:]...)
					}
					look("after a flush")
				}
			}
			if err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, i, err)
			}
			if r.IntN(40) == 0 { // cut the power, and continue with what is left
				left := cut.left(r)
				cut.before, cut.synced = nil, nil
				d.Close()
				cut = &powerCut{durable: left}
				if d, err = reopen(left, cut.system()); err != nil {
					t.Fatal(err)
				}
			}
		}
		cut.before, cut.synced = nil, nil
		d.Close()
		if cuts < 30 {
			t.Errorf("seed %d: only %d cuts", seed, cuts)
		}
	}
}

// TestTableIsNotAheadOfBlocks tests that a table on the disk never refers to a block that is
// not on the disk, even if the block is written at the same time as the table.
func TestTableIsNotAheadOfBlocks(t *testing.T) {
	const size = 1 << 20
	base := func() *sourcetest.Memory {
		return &sourcetest.Memory{Content: stamps{}, Length: size, ID: "stamps"}
	}
	dir := t.TempDir()
	cut := &powerCut{durable: make(map[int64]sector)}
	d, err := newDisk(t.Context(), base(), Options{File: filepath.Join(dir, "a"), BlockSize: testBlock}, cut.system())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, testBlock)
	fill(p, 7)
	cuts := 0
	cut.before = func(what string) {
		path := filepath.Join(dir, fmt.Sprint(cuts))
		cuts++
		writeSparse(t, path, cut.leftOf(func(w pendingWrite) bool { return w.off < d.store.data }), size)
		again, err := New(t.Context(), base(), Options{File: path})
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		for at := range int64(8 * testBlock / sectorSize) {
			p := make([]byte, sectorSize)
			if _, err := again.ReadAt(p, at*sectorSize); err != nil {
				t.Fatal(err)
			}
			if s, err := stampOf(p); err != nil || s != 7 && s != 1<<40+uint64(at) {
				t.Errorf("cut before %s: sector %d holds %d, %v", what, at, s, err)
			}
		}
	}
	write := func(block int64) {
		if _, err := d.WriteAt(p, block*testBlock); err != nil {
			t.Error(err)
		}
	}
	write(1)
	var once sync.Once
	cut.synced = func() { once.Do(func() { write(2); write(3) }) }
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(4)
	if err := d.table.write(false); err != nil { // as acquire does to make room
		t.Fatal(err)
	}
	write(5)
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	cut.before, cut.synced = nil, nil
	if cuts < 10 {
		t.Errorf("only %d cuts", cuts)
	}
}

// TestFlushBesideFlush tests that a flush covers all writes that returned before it was
// called, even if it waits for another flush that began earlier.
func TestFlushBesideFlush(t *testing.T) {
	cut := &powerCut{durable: make(map[int64]sector)}
	const size = 1 << 20
	base := func() *sourcetest.Memory {
		return &sourcetest.Memory{Content: stamps{}, Length: size, ID: "stamps"}
	}
	dir := t.TempDir()
	d, err := newDisk(t.Context(), base(), Options{File: filepath.Join(dir, "a"), BlockSize: testBlock}, cut.system())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	write := func(block int64) {
		p := make([]byte, testBlock)
		fill(p, uint64(block))
		if _, err := d.WriteAt(p, block*testBlock); err != nil {
			t.Error(err)
		}
	}
	write(1)
	second := make(chan error, 1)
	var once sync.Once
	cut.synced = func() {
		once.Do(func() {
			write(2)
			go func() { second <- d.Flush(context.Background()) }()
			for d.flushes.Calls() < 2 {
				runtime.Gosched()
			}
		})
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "b")
	writeSparse(t, path, cut.durable, size)
	again, err := New(t.Context(), base(), Options{File: path})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for block := range int64(4) {
		p := make([]byte, testBlock)
		if _, err := again.ReadAt(p, block*testBlock); err != nil {
			t.Fatal(err)
		}
		s, err := stampOf(p[:sectorSize])
		if want := uint64(block); (s == want) != (block == 1 || block == 2) || err != nil {
			t.Errorf("block %d holds %d, %v", block, s, err)
		}
	}
}
