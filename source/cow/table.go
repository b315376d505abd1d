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

// The states of a block, two bits each.
const (
	absent  = 0 // as the disk below has it; an empty page is all below
	present = 1 // in the file, all of it
	zeroed  = 2 // zeros, whatever the file has there
)

const (
	// sectorSize is what a disk writes whole or not at all. Each sector of a
	// page has a checksum of its own, so that a page of which only some sectors
	// were written is as good as one that was written before or after.
	sectorSize   = 512
	sectorWords  = 63 // of 8 bytes, then a mark and a checksum of 4 bytes each
	sectorBlocks = sectorWords * wordBlocks
	sectorMark   = 0x574f4376 // "vCOW"

	wordBlocks  = 32
	pageSize    = 4096
	pageSectors = pageSize / sectorSize
	pageWords   = pageSectors * sectorWords
	pageBlocks  = pageWords * wordBlocks
	// maxResident bounds the pages that are in memory, about 16 MiB of them. At
	// 64 KiB a block that many cover 4 TiB.
	maxResident = 4000
	// maxRunPages bounds what one run looks at, so that its caller sees the end
	// of a context.
	maxRunPages = 1024
)

// page is the state of pageBlocks blocks. Readers look at words without a lock,
// and may do so in a page that was written out and dropped meanwhile: they see
// a state from before a write that has not returned.
type page struct {
	words [pageWords]atomic.Uint64
	used  atomic.Bool // since the hand of the clock passed

	// Under table.mu.
	dirty   bool            // not in the file as it is
	writing bool            // being written: not to be dropped
	frozen  *[pageSize]byte // as it was when that began, if it was changed since
}

// table is the state of all blocks. It is safe for concurrent use; of one block
// the caller orders the changes.
type table struct {
	store *store
	limit int // pages in memory
	// pages are nil where all blocks are below, and onFile where they are in the
	// file only.
	pages  []atomic.Pointer[page]
	onFile *page

	writes sync.Mutex // held while pages are written out; taken before mu
	mu     sync.Mutex
	clock  []int64 // the numbers of the pages that are in memory
	hand   int     // in clock
	broken atomic.Pointer[error]
}

// newTable returns the table that the store has.
func newTable(s *store) (*table, error) {
	t := &table{store: s, limit: maxResident, pages: make([]atomic.Pointer[page], s.pages), onFile: new(page)}
	if !s.found {
		return t, nil
	}
	// Most pages of a large disk are holes, and need never be read.
	f := s.files[0]
	end := tableStart + s.pages*pageSize
	for pos := int64(tableStart); pos < end; {
		from, err := unix.Seek(int(f.Fd()), pos, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		to := end
		if err != nil || from < pos {
			from = pos // it can't tell
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

// failed returns the error after which nothing is written any more.
func (t *table) failed() error {
	if err := t.broken.Load(); err != nil {
		return fmt.Errorf("after an earlier error: %w", *err)
	}
	return nil
}

// run returns the state of block b and how many of n blocks from it on have the
// same; it may stop early in a long run.
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

// anyState asks page.run for the state of the first block.
const anyState = -1

// run returns how many of n blocks from b on have the state. If state is
// anyState, run returns the state of block b and at least one block: it takes
// the state and the length from one load of the block's word, since a write may
// change the block between two loads.
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

// spread is a word of one state.
func spread(state int) uint64 { return uint64(state) * 0x5555555555555555 }

// peek returns page i, nil where all of it is below, for looking at.
func (t *table) peek(i int64) (*page, error) {
	p, err := t.acquire(i, false)
	if err == nil {
		t.mu.Unlock()
		return p, nil
	}
	if t.failed() != nil {
		// No page can be written out to make room. Reading goes on.
		return t.load(i)
	}
	return nil, err
}

// acquire returns page i in memory with mu held; where it is all below it makes
// it, or returns nil.
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
		// Its space now: where there is none a write fails, not the flush of all
		// that was written before.
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

// drop lets go of a page that is in the file as it is, the one that was not used
// for the longest time or nearly so. It reports whether there was one. The
// caller holds mu.
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

// set gives n blocks from b on a state, and reports whether any of them had
// another one than below.
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

// write writes the pages out that are not in the file as they are, after what
// they tell of is durable; with durable it makes them so too. An error of it is
// final: the kernel reports that something was lost only once.
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
			return fmt.Errorf("write the table: %w", cause(err))
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

// encode makes what the file has of page i. A sector that is all below is all
// zeros, as in a hole.
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

func seal(sector []byte, number int64) {
	binary.LittleEndian.PutUint32(sector[sectorWords*8:], sectorMark)
	binary.LittleEndian.PutUint32(sector[sectorWords*8+4:], sectorSum(sector, number))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sectorSum is the checksum of a sector of the table, with its number, since one
// in another's place is wrong too.
func sectorSum(sector []byte, number int64) uint32 {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(number))
	return crc32.Update(crc32.Checksum(n[:], castagnoli), castagnoli, sector[:sectorSize-4])
}

// load reads page i from the file.
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
	if at, err := p.decode(i, &image, t.store.blocks); err != nil {
		return nil, fmt.Errorf("table of the layer %s at offset %d: %w", t.store.name, pos+at, err)
	}
	return p, nil
}

// decode fills p from what the file has of page i of a disk of so many blocks.
// An error is of the sector at the offset at.
func (p *page) decode(i int64, b *[pageSize]byte, blocks int64) (at int64, err error) {
	for s := range int64(pageSectors) {
		sector := b[s*sectorSize : (s+1)*sectorSize]
		number := i*pageSectors + s
		some, bad := uint64(0), uint64(0)
		for w := range int64(sectorWords) {
			word := binary.LittleEndian.Uint64(sector[w*8:])
			some |= word
			bad |= word & (word >> 1) & spread(1) // no state is 3
			if end := blocks - (number*sectorBlocks + w*wordBlocks); end < wordBlocks {
				bad |= word >> (2 * max(0, end)) // past the end of the disk
			}
			p.words[s*sectorWords+w].Store(word)
		}
		mark := binary.LittleEndian.Uint32(sector[sectorWords*8:])
		sum := binary.LittleEndian.Uint32(sector[sectorWords*8+4:])
		switch {
		case some == 0 && mark == 0 && sum == 0:
		case mark != sectorMark:
			return s * sectorSize, fmt.Errorf("damaged: mark %#08x, want %#08x", mark, sectorMark)
		case sum != sectorSum(sector, number):
			return s * sectorSize, fmt.Errorf("damaged: checksum %#08x, want %#08x", sum, sectorSum(sector, number))
		case bad != 0:
			return s * sectorSize, errors.New("damaged: a state that no block has")
		}
	}
	return 0, nil
}
