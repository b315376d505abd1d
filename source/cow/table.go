package cow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// These are the states of a block, which take two bits each. The value 3 is not valid.
const (
	absent  = 0 // the base has the content; all blocks of an empty page are absent
	present = 1 // the layer has all of the block
	zeroed  = 2 // the block reads as zeros, whatever the file has in its place
)

const (
	// sectorSize is the number of bytes that a physical disk writes either completely
	// or not at all. Each sector of a page has its own checksum. If the power fails
	// while a page is written, some sectors have the new content and the others still
	// have the old content, and all of them are valid.
	sectorSize   = 512
	sectorWords  = 63 // words of 8 bytes; a mark and a checksum of 4 bytes each follow
	sectorBlocks = sectorWords * wordBlocks
	sectorMark   = 0x574f4376 // "vCOW" in little endian

	wordBlocks  = 32
	pageSize    = 4096
	pageSectors = pageSize / sectorSize
	pageWords   = pageSectors * sectorWords
	pageBlocks  = pageWords * wordBlocks
	// maxResident limits the number of pages in memory. This many pages take about 16
	// MiB. With blocks of 64 KiB they cover about 4 TiB of the disk.
	maxResident = 4000
	// maxRunPages limits the number of pages that one call of table.run examines. The
	// caller of table.run can check its context between two calls.
	maxRunPages = 1024
)

// page has the states of pageBlocks blocks, which are stored in words of 64 bits.
// Readers load these words without a lock. They may load them even after the page was
// written to the file and removed from the table. A reader may then see the state that
// a block had before a concurrent write. This is allowed, because the concurrent write
// has not returned yet.
type page struct {
	words [pageWords]atomic.Uint64
	used  atomic.Bool // used since drop last examined the page

	// The lock table.mu guards the following fields.
	dirty   bool            // the page has changes that are not in the file
	writing bool            // the page is being written and must not be dropped
	frozen  *[pageSize]byte // copy from the start of that write, if the page has changed since
}

// table has the states of all blocks of the disk. It is safe for concurrent use, but
// two goroutines must not change the state of the same block at the same time.
type table struct {
	store *store
	limit int // maximum number of pages in memory
	// pages has all pages of the table. An element is nil if all blocks of the page are
	// absent, and onFile if the page is in the file but not in memory.
	pages  []atomic.Pointer[page]
	onFile *page

	writes sync.Mutex // held while pages are written to the file; acquired before mu
	mu     sync.Mutex
	clock  []int64               // numbers of the pages in memory
	hand   int                   // index in clock of the page that drop examined last
	broken atomic.Pointer[error] // why nothing can be written any more, or nil
}

// newTable returns the table of the layer in the store s. It finds out which pages
// are in the file, but does not read them into memory.
func newTable(s *store) (*table, error) {
	t := &table{store: s, limit: maxResident, pages: make([]atomic.Pointer[page], s.pages), onFile: new(page)}
	if !s.found {
		return t, nil
	}
	// Most pages of a large disk are holes of the file, and need not be read.
	f := s.files[0]
	end := tableStart + s.pages*pageSize
	for pos := int64(tableStart); pos < end; {
		from, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		to := end
		if err != nil || from < pos {
			from = pos // the file system does not report holes
		} else if hole, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err == nil && hole > from {
			to = min(end, hole)
		}
		for i := (from - tableStart) / pageSize; i*pageSize+tableStart < to; i++ {
			t.pages[i].Store(t.onFile)
		}
		pos = max(to, from)
	}
	return t, nil
}

// failed returns an error if an earlier write of the table failed. Nothing may be
// written to the layer after that.
func (t *table) failed() error {
	if err := t.broken.Load(); err != nil {
		return fmt.Errorf("an earlier write of the layer failed: %w", *err)
	}
	return nil
}

// The method run examines n blocks, the first of which is block b. It returns the state
// of block b, and how many consecutive blocks, from b on, are known to have this state.
// The true number may be larger, because one call examines at most maxRunPages pages.
func (t *table) run(b, n int64) (state int, same int64, err error) {
	state = anyState
	for looked := 0; same < n && looked < maxRunPages; looked++ {
		at := b + same
		i, first := at/pageBlocks, at%pageBlocks
		count := min(n-same, pageBlocks-first)
		p := t.pages[i].Load()
		if p == t.onFile {
			if p, err = t.peek(i); err != nil {
				return 0, 0, err
			}
		}
		if p == nil {
			if same > 0 && state != absent {
				break
			}
			state = absent
			same += count
			continue
		}
		if !p.used.Load() {
			p.used.Store(true)
		}
		var got int64
		state, got = p.run(first, count, state)
		same += got
		if got < count {
			break
		}
	}
	return state, same, nil
}

// anyState is passed to page.run as the state if the caller does not know the state
// of the first block.
const anyState = -1

// The method run returns how many consecutive blocks of the page, from block b on, have
// the given state. This number is at most n. If the given state is anyState, the method
// counts the blocks that have the same state as block b. It also returns the state
// whose blocks it counted. The method must load the word that contains the state of
// block b only once, because a concurrent write may change this word between two loads.
func (p *page) run(b, n int64, state int) (_ int, same int64) {
	for same < n {
		at := b + same
		shift := at % wordBlocks
		word := p.words[at/wordBlocks].Load() >> (shift * 2)
		if state == anyState {
			state = int(word & 3)
		}
		if other := word ^ spread(state)>>(shift*2); other != 0 {
			return state, min(n, same+int64(bits.TrailingZeros64(other)/2))
		}
		same += wordBlocks - shift
	}
	return state, min(n, same)
}

// The function spread returns the word of 64 bits that contains the given state for
// each of 32 blocks.
func spread(state int) uint64 { return uint64(state) * 0x5555555555555555 }

// The method peek returns page i for reading, or nil if all of its blocks are absent.
func (t *table) peek(i int64) (*page, error) {
	p, err := t.acquire(i, false)
	if err == nil {
		t.mu.Unlock()
		return p, nil
	}
	if t.failed() != nil {
		// After a failed write of the table, changed pages can no longer be written to
		// the file, and must stay in memory. Therefore the method acquire has found no
		// room in memory for page i. The page is now read from the file for this caller
		// only, and the table does not keep it.
		return t.load(i)
	}
	return nil, err
}

// acquire returns page i, after reading it into memory if necessary. If acquire returns
// no error, it has locked the mutex t.mu, and the caller must unlock it. If all blocks
// of the page are absent, the page need not exist yet. In this case acquire creates the
// page if the parameter create is true, and returns nil if it is false.
func (t *table) acquire(i int64, create bool) (*page, error) {
	for {
		t.mu.Lock()
		p := t.pages[i].Load()
		if p != t.onFile && (p != nil || !create) {
			return p, nil
		}
		if len(t.clock) < t.limit || t.drop() {
			break
		}
		t.mu.Unlock()
		if err := t.write(false); err != nil {
			return nil, err
		}
	}
	p, err := new(page), error(nil)
	if t.pages[i].Load() == t.onFile {
		p, err = t.load(i)
	} else {
		// The space for the page in the file is reserved now. If there is no space,
		// only the write that needs the page fails. Without the reservation, a later
		// flush would fail, which affects many writes.
		err = t.store.reservePage(i)
	}
	if err != nil {
		t.mu.Unlock()
		return nil, err
	}
	p.used.Store(true)
	t.pages[i].Store(p)
	t.clock = append(t.clock, i)
	return p, nil
}

// The method drop removes one page from memory. It looks for a page without unwritten
// changes that was not used recently, and selects the page by the clock algorithm. It
// reports whether it found such a page. The caller must have locked the mutex t.mu.
func (t *table) drop() bool {
	for range 2 * len(t.clock) {
		t.hand = (t.hand + 1) % len(t.clock)
		i := t.clock[t.hand]
		p := t.pages[i].Load()
		if p.dirty || p.writing || p.used.Swap(false) {
			continue
		}
		t.pages[i].Store(t.onFile)
		last := len(t.clock) - 1
		t.clock[t.hand] = t.clock[last]
		t.clock = t.clock[:last]
		return true
	}
	return false
}

// The method set gives n blocks the given state. The first of these blocks is block b
// of the disk. It reports whether at least one of them was present or zeroed before.
func (t *table) set(b, n int64, state int) (had bool, err error) {
	for n > 0 {
		i, first := b/pageBlocks, b%pageBlocks
		count := min(n, pageBlocks-first)
		p, err := t.acquire(i, true)
		if err != nil {
			return had, err
		}
		if p.writing && p.frozen == nil {
			p.frozen = new([pageSize]byte)
			p.encode(i, p.frozen)
		}
		had = p.set(first, count, state) || had
		p.dirty = true
		t.mu.Unlock()
		b, n = b+count, n-count
	}
	return had, nil
}

// The method set gives n blocks the given state. The first of these blocks is block b
// of the page. It reports whether at least one of them was present or zeroed before.
func (p *page) set(b, n int64, state int) (had bool) {
	pattern := spread(state)
	for n > 0 {
		shift := b % wordBlocks
		count := min(n, wordBlocks-shift)
		mask := ^uint64(0) >> (2 * (wordBlocks - count)) << (2 * shift)
		w := &p.words[b/wordBlocks]
		old := w.Load()
		had = had || old&mask != 0
		w.Store(old&^mask | pattern&mask)
		b, n = b+count, n-count
	}
	return had
}

// The method write first makes the blocks in the file durable. Then it writes the
// changed pages of the table to the file. If the parameter durable is true, it also
// makes these pages durable. After one call has failed, every later call fails as well,
// because the kernel reports lost data only once.
func (t *table) write(durable bool) error {
	t.writes.Lock()
	defer t.writes.Unlock()
	if err := t.failed(); err != nil {
		return err
	}
	err := t.writePages(durable)
	if err != nil {
		t.broken.Store(&err)
	}
	return err
}

// writePages writes the changed pages. If the parameter durable is true, it also makes
// them durable. The caller has locked the mutex t.writes.
func (t *table) writePages(durable bool) error {
	t.mu.Lock()
	var changed []int64
	for _, i := range t.clock {
		if p := t.pages[i].Load(); p.dirty {
			p.dirty, p.writing = false, true
			changed = append(changed, i)
		}
	}
	t.mu.Unlock()
	if len(changed) > 0 || durable {
		if err := t.store.sync(); err != nil {
			return err
		}
	}
	var image [pageSize]byte
	for _, i := range changed {
		t.mu.Lock()
		p := t.pages[i].Load()
		if p.frozen != nil {
			image = *p.frozen
		} else {
			p.encode(i, &image)
		}
		t.mu.Unlock()
		if _, err := t.store.sys.pwrite(t.store.files[0], image[:], tableStart+i*pageSize); err != nil {
			return fmt.Errorf("cannot write the table of the layer: %w", cause(err))
		}
		t.mu.Lock()
		p.writing, p.frozen = false, nil
		t.mu.Unlock()
	}
	if durable && len(changed) > 0 {
		return t.store.sync()
	}
	return nil
}

// The method encode writes page p, which has the number i, into the buffer b, in the
// form in which the file of the layer has it. A sector whose blocks are all absent
// consists of zeros. It is therefore equal to a hole of the file.
func (p *page) encode(i int64, b *[pageSize]byte) {
	for s := range int64(pageSectors) {
		sector := b[s*sectorSize : (s+1)*sectorSize]
		some := uint64(0)
		for w := range int64(sectorWords) {
			word := p.words[s*sectorWords+w].Load()
			some |= word
			binary.LittleEndian.PutUint64(sector[w*8:], word)
		}
		clear(sector[sectorWords*8:])
		if some != 0 {
			seal(sector, i*pageSectors+s)
		}
	}
}

// The function seal fills in the fixed mark and the checksum at the end of a sector of
// the table.
func seal(sector []byte, number int64) {
	binary.LittleEndian.PutUint32(sector[sectorWords*8:], sectorMark)
	binary.LittleEndian.PutUint32(sector[sectorWords*8+4:], sectorSum(sector, number))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sectorSum returns the checksum of a sector of the table. The number of the sector
// is included in the checksum, so that a sector in the wrong place is detected.
func sectorSum(sector []byte, number int64) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(number))
	return crc32.Update(crc32.Checksum(n[:], castagnoli), castagnoli, sector[:sectorSize-4])
}

// The method load reads page i from the file.
func (t *table) load(i int64) (*page, error) {
	var image [pageSize]byte
	pos := tableStart + i*pageSize
	if _, err := t.store.files[0].ReadAt(image[:], pos); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("table of the layer %s at offset %d: %w", t.store.name, pos, cause(err))
	}
	p := new(page)
	if offset, err := p.decode(i, &image, t.store.blocks); err != nil {
		return nil, fmt.Errorf("table of the layer %s at offset %d: %w", t.store.name, pos+offset, err)
	}
	return p, nil
}

// The method decode fills page p with the states in b, which are the bytes that the
// file has for page i. The parameter blocks is the number of blocks of the disk. If a
// sector is damaged, decode returns an error and the offset of the sector in the page.
func (p *page) decode(i int64, b *[pageSize]byte, blocks int64) (offset int64, err error) {
	for s := range int64(pageSectors) {
		sector := b[s*sectorSize : (s+1)*sectorSize]
		number := i*pageSectors + s
		some, bad := uint64(0), uint64(0)
		for w := range int64(sectorWords) {
			word := binary.LittleEndian.Uint64(sector[w*8:])
			some |= word
			bad |= word & (word >> 1) & spread(1) // two bits are set: state 3 is not valid
			if end := blocks - (number*sectorBlocks + w*wordBlocks); end < wordBlocks {
				bad |= word >> (2 * max(0, end)) // a block past the end of the disk has a state
			}
			p.words[s*sectorWords+w].Store(word)
		}
		mark := binary.LittleEndian.Uint32(sector[sectorWords*8:])
		sum := binary.LittleEndian.Uint32(sector[sectorWords*8+4:])
		switch {
		case some == 0 && mark == 0 && sum == 0:
		case mark != sectorMark:
			return s * sectorSize, fmt.Errorf("the sector is damaged: the mark at its end is %#08x, want %#08x", mark, sectorMark)
		case sum != sectorSum(sector, number):
			return s * sectorSize, fmt.Errorf("the sector is damaged: the checksum at its end is %#08x, want %#08x", sum, sectorSum(sector, number))
		case bad != 0:
			return s * sectorSize, errors.New("the sector is damaged: a block has an invalid state")
		}
	}
	return 0, nil
}
