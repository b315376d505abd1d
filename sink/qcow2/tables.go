package qcow2

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/sink"
)

// The type tables holds the metadata of an image that is written in order. Three
// tables are in memory: the L1 table, the L2 table for the current position in the
// disk, and the refcount block for the current position in the file. Earlier L2
// tables and refcount blocks are in the file.
type tables struct {
	layout
	out  run
	next int64 // the first free cluster of the file

	l1      []byte
	l1Dirty int64 // the first entry that is not yet in the file

	l2       []byte
	l2Index  int64 // index of l2 in the L1 table
	l2Offset int64 // offset of l2 in the file; 0 until it is allocated
	l2Used   bool  // l2 may have entries

	counts []byte // the refcount block in memory
	block  int64  // number of the range that counts is for

	tails []tail
}

// The type tail is the unused end of a cluster that contains compressed data. More
// compressed data can be stored there. To store them, the refcount of the cluster
// must be incremented. This is possible only as long as the refcount block that
// counts the cluster is in memory.
type tail struct{ off, end int64 }

const maxTails = 32

func newTables(l layout, out run) *tables {
	t := &tables{
		layout: l, out: out,
		l1: make([]byte, l.l1Entries*entryBytes), l2: make([]byte, l.cluster), counts: make([]byte, l.cluster),
	}
	return t
}

// The method begin initializes the tables of an empty image.
func (t *tables) begin() error {
	t.out.start, t.next = t.first<<t.shift, t.first
	for c := range t.first {
		if t.block = c / t.perBlock; c%t.perBlock == 0 && c > 0 {
			if err := t.out.patch(t.counts, t.blockOffset(t.block-1)); err != nil {
				return err
			}
			clear(t.counts)
		}
		if err := t.count(c); err != nil {
			return err
		}
	}
	return nil
}

// The method count increments the refcount of cluster c of the file. The refcount
// must be in the refcount block that is in memory.
func (t *tables) count(c int64) error {
	b := t.counts[(c-t.block*t.perBlock)*2:][:2]
	n := binary.BigEndian.Uint16(b)
	if n == 1<<16-1 {
		return fmt.Errorf("cannot increase the refcount of cluster %d of the file: it is already %d, the largest possible refcount", c, n)
	}
	binary.BigEndian.PutUint16(b, n+1)
	return nil
}

// openRange starts a new range of clusters if the next free cluster is the first
// cluster of a range. A range consists of the clusters that one refcount block
// counts. The refcount block itself is the first cluster of its range.
func (t *tables) openRange() error {
	if t.next%t.perBlock != 0 {
		return nil
	}
	if err := t.pad(); err != nil {
		return err
	}
	t.tails = t.tails[:0] // their refcounts are no longer in memory
	if err := t.out.patch(t.counts, t.blockOffset(t.block)); err != nil {
		return err
	}
	t.block = t.next / t.perBlock
	if (t.block+2)*entryBytes > maxRefTable {
		return t.tooLarge()
	}
	clear(t.counts)
	if err := t.count(t.next); err != nil {
		return err
	}
	t.next++
	return t.pad()
}

func (t *tables) tooLarge() error {
	return fmt.Errorf("the image grows beyond %s, the maximum of qemu for clusters of %d bytes: use larger clusters",
		bytesize.Format(t.next<<t.shift), t.cluster)
}

// The method pad writes zeros up to the next free cluster of the file. If these
// zeros begin within a cluster, they fill the unused end of this cluster, and pad
// adds their range to t.tails.
func (t *tables) pad() error {
	to := t.next << t.shift
	if end := t.out.end(); end%t.cluster != 0 {
		if len(t.tails) == maxTails {
			t.tails = slices.Delete(t.tails, 0, 1)
		}
		t.tails = append(t.tails, tail{end, to})
	}
	return t.out.addZeros(to)
}

// The method allocate allocates consecutive clusters of the file, at least one
// and at most n. It sets their refcounts, and returns the offset of the first of
// them and their number. The caller must write the content of these clusters
// next.
func (t *tables) allocate(n int64) (off, got int64, err error) {
	if err := t.openRange(); err != nil {
		return 0, 0, err
	}
	if err := t.pad(); err != nil {
		return 0, 0, err
	}
	off = t.next << t.shift
	got = min(n, t.perBlock-t.next%t.perBlock)
	if off > maxHost-got<<t.shift {
		return 0, 0, fmt.Errorf("the image grows beyond %s, the largest file size that its tables can address", bytesize.Format(maxHost))
	}
	for range got {
		if err := t.count(t.next); err != nil {
			return 0, 0, err
		}
		t.next++
	}
	return off, got, nil
}

// The method add stores p, which is the content of cluster g of the disk and of
// the clusters after it, in new clusters of the file. If p ends within a cluster,
// the rest of this cluster is filled with zeros.
func (t *tables) add(g int64, p []byte) error {
	for len(p) > 0 {
		if err := t.enter(g); err != nil {
			return err
		}
		n := min(t.ceil(int64(len(p)), t.shift), 1<<t.l2Shift-g&(1<<t.l2Shift-1))
		off, n, err := t.allocate(n)
		if err != nil {
			return err
		}
		bytes := min(n<<t.shift, int64(len(p)))
		if err := t.out.add(p[:bytes]); err != nil {
			return err
		}
		if err := t.out.addZeros(t.next << t.shift); err != nil {
			return err
		}
		t.point(g, n, off)
		g, p = g+n, p[bytes:]
	}
	return nil
}

// The method point sets n entries of the L2 table, beginning with the entry of
// cluster g of the disk. The entries then point to n consecutive clusters of the
// file, the first of which is at the given offset of the file.
func (t *tables) point(g, n, off int64) {
	for i := range n {
		t.put(g+i, uint64(off+i<<t.shift)|copied)
	}
}

// The method pack stores the compressed content of cluster g of the disk directly
// after other compressed data. The compressed content must be shorter than a
// cluster.
func (t *tables) pack(g int64, code []byte) error {
	if err := t.enter(g); err != nil {
		return err
	}
	off, err := t.fit(code)
	if err != nil {
		return err
	}
	// This is the "Compressed Clusters Descriptor" of the specification. It contains
	// the offset of the data, and the number of sectors that the data occupy, not
	// counting the first one.
	n := int64(len(code))
	sectors := (off+n-1)>>sectorShift - off>>sectorShift
	x := 62 - (t.shift - 8)
	if limit := min(int64(maxHost), 1<<x); off+n > limit {
		return fmt.Errorf("the image grows beyond %s, the largest file size that the entries of compressed clusters can address", bytesize.Format(limit))
	}
	for c := off >> t.shift; c <= (off+n-1)>>t.shift; c++ {
		if err := t.count(c); err != nil {
			return err
		}
	}
	t.put(g, uint64(off)|uint64(sectors)<<x|compressed)
	return nil
}

// The method fit writes compressed data into one of the tails (unused ends of
// clusters), the smallest one that is large enough. If no tail is large enough, it
// writes the data at the end of the file. It returns the offset of the data in the
// file.
func (t *tables) fit(code []byte) (off int64, err error) {
	n := int64(len(code))
	best := -1
	for i, s := range t.tails {
		if s.off >= t.out.start && s.end-s.off >= n && (best < 0 || s.end-s.off < t.tails[best].end-t.tails[best].off) {
			best = i
		}
	}
	if best >= 0 {
		s := &t.tails[best]
		off, s.off = s.off, s.off+n
		return off, t.out.patch(code, off)
	}
	if last := (t.out.end() + n - 1) >> t.shift; last >= t.next {
		if err := t.openRange(); err != nil {
			return 0, err
		}
		t.next = (t.out.end()+n-1)>>t.shift + 1
	}
	off = t.out.end()
	return off, t.out.add(code)
}

// The method zero makes cluster g of the disk read as zeros, whatever the backing
// disk contains.
func (t *tables) zero(g int64) error {
	if err := t.enter(g); err != nil {
		return err
	}
	t.put(g, readsZero)
	return nil
}

// The method enter makes sure that the L2 table in memory is the one with the
// entry for cluster g of the disk. If another table is in memory, enter saves that
// table to the file and starts an empty one. The caller must not go back to a
// cluster whose entry is in a table that was saved in this way.
func (t *tables) enter(g int64) error {
	index := g >> t.l2Shift
	if index == t.l2Index {
		return nil
	}
	if err := t.saveL2(); err != nil {
		return err
	}
	if t.l2Used {
		clear(t.l2)
	}
	t.l2Index, t.l2Offset, t.l2Used = index, 0, false
	return nil
}

func (t *tables) put(g int64, entry uint64) {
	binary.BigEndian.PutUint64(t.l2[g&(1<<t.l2Shift-1)*entryBytes:], entry)
	t.l2Used = true
}

// saveL2 writes the L2 table to the file. It does nothing if the table is empty.
func (t *tables) saveL2() error {
	if !t.l2Used {
		return nil
	}
	killpoint.At("l2")
	if t.l2Offset > 0 {
		return t.out.patch(t.l2, t.l2Offset)
	}
	off, _, err := t.allocate(1)
	if err != nil {
		return err
	}
	t.l2Offset = off
	binary.BigEndian.PutUint64(t.l1[t.l2Index*entryBytes:], uint64(off)|copied)
	return t.out.add(t.l2)
}

// The method finish writes everything that is still in memory, and the refcount
// table. It returns the offset of the refcount table and its number of clusters.
func (t *tables) finish(zeroed bool) (refTable, clusters int64, err error) {
	if err := t.saveL2(); err != nil {
		return 0, 0, err
	}
	if err := t.pad(); err != nil {
		return 0, 0, err
	}
	if err := t.saveL1(zeroed); err != nil {
		return 0, 0, err
	}
	// Usually a refcount block is the first cluster of the range of clusters that it
	// counts. The refcount table must be contiguous, so there can be no refcount block
	// inside the table. If a range begins inside the table, the refcount block of this
	// range therefore lies directly before the table. The size of the table depends on
	// the number of refcount blocks before it, and this number depends on the size of
	// the table. The loop below finds the size and the number.
	begun := t.block + 1
	ranges := begun
	for {
		clusters = t.ceil(ranges*entryBytes, t.shift)
		end := t.next + ranges - begun + clusters
		if n := (end-1)/t.perBlock + 1; n > ranges {
			ranges = n
			continue
		}
		break
	}
	if ranges*entryBytes > maxRefTable {
		return 0, 0, t.tooLarge()
	}
	blocks := t.next
	refTable = (blocks + ranges - begun) << t.shift
	end := refTable>>t.shift + clusters
	for c := t.next; ; c++ {
		if c == end || c/t.perBlock > t.block {
			off := t.blockOffset(t.block)
			if t.block >= begun {
				off = (blocks + t.block - begun) << t.shift
			}
			if err := t.saveCounts(off); err != nil {
				return 0, 0, err
			}
			t.block = c / t.perBlock
		}
		if c == end {
			break
		}
		if err := t.count(c); err != nil {
			return 0, 0, err
		}
	}
	var b [entryBytes]byte
	for i := range ranges {
		off := t.blockOffset(i)
		if i >= begun {
			off = (blocks + i - begun) << t.shift
		}
		binary.BigEndian.PutUint64(b[:], uint64(off))
		if err := t.out.add(b[:]); err != nil {
			return 0, 0, err
		}
	}
	t.next = end
	if err := t.out.addZeros(end << t.shift); err != nil {
		return 0, 0, err
	}
	return refTable, clusters, t.out.flush()
}

// saveCounts writes the refcount block that is in memory to the given offset of
// the file. Then it clears the block in memory, for the next range of clusters.
func (t *tables) saveCounts(off int64) error {
	defer clear(t.counts)
	if off == t.out.end() {
		return t.out.add(t.counts)
	}
	return t.out.patch(t.counts, off)
}

// saveL1 writes the L1 table to the file. The parameter zeroed says that
// unwritten parts of the file read as zeros. In that case saveL1 does not write
// parts of the table that are zeros.
func (t *tables) saveL1(zeroed bool) error {
	for off := 0; off < len(t.l1); off += len(zeros) {
		p := t.l1[off:min(off+len(zeros), len(t.l1))]
		if zeroed && zero.Is(p) {
			continue
		}
		if err := t.out.patch(p, t.l1Offset()+int64(off)); err != nil {
			return err
		}
	}
	return nil
}

// The method share makes n clusters of the disk, beginning with cluster g, share
// blocks with the file f. In f, the content of these clusters begins at the offset
// pos. The result done is the number of clusters that share blocks now. It is valid
// even if an error is returned.
func (t *tables) share(file sink.Cloner, f *os.File, pos, g, n int64) (done int64, err error) {
	for done < n {
		if err := t.enter(g); err != nil {
			return done, err
		}
		if err := t.openRange(); err != nil {
			return done, err
		}
		if err := t.out.flush(); err != nil {
			return done, err
		}
		off := t.next << t.shift
		some := min(n-done, 1<<t.l2Shift-g&(1<<t.l2Shift-1), t.perBlock-t.next%t.perBlock)
		if err := file.CloneFrom(f, pos, off, some<<t.shift); err != nil {
			return done, err
		}
		for range some {
			if err := t.count(t.next); err != nil {
				return done, err
			}
			t.next++
		}
		t.out.start = t.next << t.shift
		t.point(g, some, off)
		g, done, pos = g+some, done+some, pos+some<<t.shift
	}
	return done, nil
}
