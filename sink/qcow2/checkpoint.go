package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/sink"
)

// The type state holds what a checkpoint of an image records. It does not contain
// the tables of the image, because they are in the file.
type state struct {
	size, cluster int64
	compression   Compression
	next          int64  // the first free cluster of the file
	head          int64  // offset in the file of the next write, bytes; in the last cluster in use (next-1), or at its end
	headCount     uint16 // refcount of the cluster that contains head
	file          []byte // state of the file itself
}

func (s state) bytes() []byte {
	return fmt.Appendf(nil, "qcow2 %d %d %s %d %d %d\n%s", s.size, s.cluster, s.compression, s.next, s.head, s.headCount, s.file)
}

func parseState(b []byte) (s state, err error) {
	line, file, _ := bytes.Cut(b, []byte("\n"))
	s.file = file
	if n, err := fmt.Sscanf(string(line), "qcow2 %d %d %s %d %d %d", &s.size, &s.cluster, &s.compression, &s.next, &s.head, &s.headCount); n != 6 {
		return s, fmt.Errorf("the checkpoint records %q, which does not describe a qcow2 image: %w", line, err)
	}
	return s, nil
}

// The method fits returns an error if the state of a checkpoint is damaged, or if it
// belongs to an image whose layout or options differ from the given ones.
func (s state) fits(l layout, o Options) error {
	if s.size != l.size || s.cluster != l.cluster || s.compression != o.Compression {
		return fmt.Errorf("the checkpoint was made for a disk of %d bytes with clusters of %d bytes and compression %s; want a disk of %d bytes with clusters of %d bytes and compression %s",
			s.size, s.cluster, s.compression, l.size, l.cluster, o.Compression)
	}
	if o.Resume < 0 || o.Resume > l.size || o.Resume%l.cluster != 0 && o.Resume != l.size {
		return fmt.Errorf("cannot resume at offset %d: want a multiple of the cluster size (%d bytes), or the end of the disk (offset %d)", o.Resume, l.cluster, l.size)
	}
	if s.next < l.first || s.next > maxHost>>l.shift {
		return fmt.Errorf("the checkpoint is damaged: it records that %d clusters of the file are in use, want %d to %d clusters", s.next, l.first, int64(maxHost)>>l.shift)
	}
	if end := s.next << l.shift; s.head > end || s.head <= end-l.cluster {
		return fmt.Errorf("the checkpoint is damaged: it records offset %d of the file for the next write, want an offset from %d to %d, because the last of the %d clusters in use is there", s.head, end-l.cluster+1, end, s.next)
	}
	return nil
}

func (d *disk) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	if err := d.life.Begin(d.life.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer d.life.Done()
	s := state{size: d.size, cluster: d.cluster, compression: d.o.Compression}
	sync, err := d.checkpoint(off, &s)
	if err != nil {
		return nil, nil, d.life.Fail(d.named(err))
	}
	return s.bytes(), func(ctx context.Context) error {
		return d.life.InAnyStage(ctx, func() error { return sync(ctx) })
	}, nil
}

func (d *disk) checkpoint(off int64, s *state) (sync func(context.Context) error, err error) {
	if off < d.at {
		return nil, fmt.Errorf("cannot take a checkpoint at offset %[1]d: want offset %[2]d or above, because the disk is already written up to offset %[2]d", off, d.at)
	}
	if err := d.save(off); err != nil {
		return nil, err
	}
	s.next, s.head = d.next, d.out.end()
	if c := s.head >> d.shift; c < d.next {
		s.headCount = binary.BigEndian.Uint16(d.counts[(c-d.block*d.perBlock)*2:])
	}
	s.file, sync, err = d.file.Checkpoint(d.next << d.shift)
	return sync, err
}

// The method save writes the tables and the data that are in memory to the file. A
// later copy that resumes at the given offset of the disk reads the tables with
// restore.
//
// An earlier checkpoint stays valid, because save changes only one of the entries
// that the earlier checkpoint has written. This entry is the refcount of the cluster
// in which the data ended at the earlier checkpoint: compressed data may have been
// added to this cluster since then. The state of the earlier checkpoint records the
// old refcount in its field headCount, and restore sets the refcount back to this
// value. All other changes of save fill entries that were empty.
func (t *tables) save(off int64) error {
	if err := t.saveL2(); err != nil {
		return err
	}
	// The method restore reads the L1 table up to the entry for the offset of the
	// checkpoint, so the table is written up to this entry. Entries without an L2
	// table are written as well, as zeros, because a device may have old content in
	// their place.
	end := min(max(t.l2Index, t.ceil(off, t.shift)>>t.l2Shift)+1, t.l1Entries) * entryBytes
	if err := t.out.patch(t.l1[t.l1Dirty*entryBytes:end], t.l1Offset()+t.l1Dirty*entryBytes); err != nil {
		return err
	}
	t.l1Dirty = t.l2Index
	if err := t.out.patch(t.counts, t.blockOffset(t.block)); err != nil {
		return err
	}
	if err := t.out.flush(); err != nil {
		return err
	}
	// The file must be long enough to contain all allocated clusters.
	if t.next == t.first {
		// No cluster after the L1 table is allocated yet, and the table is empty.
		// Writing the last byte of the table extends the file to the end of the table.
		_, err := t.out.file.WriteAt([]byte{0}, t.next<<t.shift-1)
		return err
	}
	if n := t.next<<t.shift - t.out.end(); n > 0 {
		_, err := t.out.file.WriteAt(make([]byte, n), t.out.end())
		return err
	}
	return nil
}

// The method restore reads the tables of a checkpoint from the file. It clears in
// memory all entries that were added after this checkpoint. The parameters are
// the state of the checkpoint and its offset in the disk.
func (d *disk) restore(s state, off int64) error {
	t := d.tables
	t.next, t.out.start = s.next, s.head
	g := t.ceil(off, t.shift) // the first cluster of the disk that is not complete
	t.l2Index = g >> t.l2Shift
	t.l1Dirty = t.l2Index
	known := t.l1[:min(t.l2Index+1, t.l1Entries)*entryBytes]
	if err := d.read(known, t.l1Offset()); err != nil {
		return err
	}
	last := known[len(known):]
	if t.l2Index < t.l1Entries {
		last = known[t.l2Index*entryBytes:]
		known = known[:t.l2Index*entryBytes]
	}
	for i := 0; i < len(known); i += entryBytes {
		if entry := binary.BigEndian.Uint64(known[i:]); entry != 0 && !t.isTable(entry) {
			return sink.Unfit(fmt.Errorf("entry %d of the L1 table is %#x, which does not point to one of the %d clusters of the checkpoint: the file is damaged, or is not the file of the checkpoint", i/entryBytes, entry, t.next))
		}
	}
	if len(last) > 0 {
		entry := binary.BigEndian.Uint64(last)
		if entry != 0 && !t.isEntry(entry) {
			return sink.Unfit(fmt.Errorf("entry %d of the L1 table is %#x, which vddkcp never writes: the file is damaged, or is not the file of the checkpoint", t.l2Index, entry))
		}
		in := g & (1<<t.l2Shift - 1)
		if in == 0 || !t.isTable(entry) {
			clear(last) // the entry was added after the checkpoint
		} else {
			t.l2Offset = int64(entry &^ copied)
			if err := d.read(t.l2, t.l2Offset); err != nil {
				return err
			}
			clear(t.l2[in*entryBytes:])
			t.l2Used = !zero.Is(t.l2)
		}
	}
	t.block = (t.next - 1) / t.perBlock
	if err := d.read(t.counts, t.blockOffset(t.block)); err != nil {
		return err
	}
	clear(t.counts[(t.next-t.block*t.perBlock)*2:])
	if c := s.head >> t.shift; c < t.next {
		binary.BigEndian.PutUint16(t.counts[(c-t.block*t.perBlock)*2:], s.headCount)
	}
	return t.checkCounts()
}

// checkCounts checks the refcount block that is in memory. It returns an error if
// one of the clusters before the first free cluster has the refcount 0. In this
// case the checkpoint belongs to another file or device, or the file is damaged.
// The other checks of restore do not find every such error.
func (t *tables) checkCounts() error {
	for c := t.block * t.perBlock; c < t.next; c++ {
		if binary.BigEndian.Uint16(t.counts[(c-t.block*t.perBlock)*2:]) == 0 {
			return sink.Unfit(fmt.Errorf("cluster %d of the file has refcount 0, but all %d clusters of the checkpoint are in use: the file is damaged, or is not the file of the checkpoint", c, t.next))
		}
	}
	return nil
}

// isTable reports whether an L1 entry points to a cluster of the file that was
// already allocated when the checkpoint was made.
func (t *tables) isTable(entry uint64) bool {
	return t.isEntry(entry) && int64(entry&^copied) < t.next<<t.shift
}

// isEntry reports whether this package can have written a given L1 entry. Such
// an entry points to the beginning of a cluster after the L1 table. The cluster
// may have been allocated after the checkpoint was made.
func (t *tables) isEntry(entry uint64) bool {
	off := int64(entry &^ copied)
	return entry&copied != 0 && off%t.cluster == 0 && off >= t.first<<t.shift
}

func (d *disk) read(p []byte, off int64) error {
	n, err := d.file.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return errors.Join(fmt.Errorf("cannot read bytes [%d, %d) of the image: got only %d bytes", off, off+int64(len(p)), n), err)
}
