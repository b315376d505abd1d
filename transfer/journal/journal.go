// Package journal keeps the checkpoints of a copy in a small file, so that a later run can
// continue the copy even after the machine has crashed. A copy calls [Open], and then
// [Journal.Write] for each checkpoint. At its end it calls [Journal.Close] if a later run may
// continue the copy, and otherwise [Journal.Remove]. [Load] reads a journal without locking it.
//
// The file has two slots, which are written alternately. Each slot is durable before the other
// one is overwritten. A slot that was only partly written is recognised by its checksum, and
// the other slot is still valid. The size of the file does not depend on the size of the disk.
// docs/journal.md describes the format.
package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
	"github.com/vddkcp/vddkcp/transfer"
)

// Entry is the content of one slot of the journal: a checkpoint, and a description of the copy
// that it belongs to.
type Entry struct {
	Copy
	transfer.Checkpoint
	sequence uint64
}

// Copy describes a copy. Each checkpoint in a journal has the description of the copy that took it.
// A copy with a different description cannot continue at the checkpoint (see Differs).
// docs/journal.md says which flags are part of the description.
type Copy struct {
	Source   string            `json:"source"`            // identity of the source
	Proof    string            `json:"proof"`             // what proves the identity: "snapshot", "mtime" or "none"
	Size     int64             `json:"size"`              // of the disk, in bytes
	Target   string            `json:"target"`            // format and kind of the target, such as "raw file"
	Identity string            `json:"identity"`          // of the file, device or export that is written; "" if it has none
	Backing  *Backing          `json:"backing,omitempty"` // of a target that is an overlay; nil for other targets
	Options  map[string]string `json:"options"`           // flags that decide what is written
	// Doubtful says that a run has read from a source whose protocol is not known for certain (see
	// source.Rereadable). Such a copy can be continued from another source.
	Doubtful bool `json:"doubtful,omitempty"`
}

// Backing describes the backing image of a target that is an overlay.
type Backing struct {
	Path     string `json:"path"`     // absolute, symbolic links resolved
	Format   string `json:"format"`   // as the overlay records it
	Identity string `json:"identity"` // of all files of the backing
	Proof    string `json:"proof"`    // as Copy.Proof
}

const (
	magic    = "vddkcp journal\n\x00"
	slotSize = 128 << 10
)

// format says which versions of the format this package reads.
var format = fileversion.Format{
	Name: "journal", Oldest: 2, Newest: 2,
	Otherwise: "run again with --force and without --resume, which drops what was copied and starts over",
}

// record is the format of a slot, which docs/journal.md describes.
var record = durable.Record{Magic: magic, Version: uint32(format.Newest), SlotSize: slotSize, Numbered: true}

// Journal is an open journal, locked against other processes. It is not safe for
// concurrent use.
type Journal struct {
	f       *os.File
	path    string
	next    int    // the slot that Write writes next, 0 or 1
	last    uint64 // sequence number of the newest entry; 0: there is none
	durable bool   // the name of the file is durable

	// fdatasync makes the data of the file durable. Tests replace the function.
	fdatasync func(fd int) error
}

// Open opens and locks the journal at path. If there is no such file, Open creates it and fills it
// with zeros up to its full size. Open returns the entries of the journal, at most two, the newest
// first. A file that is not a journal is an error and stays unchanged. For a journal of
// an unknown version, Open returns no entries, while Load returns a *fileversion.Error.
func Open(path string) (j *Journal, entries []Entry, err error) {
	f, err := durable.Open(path, os.O_RDWR|os.O_CREATE, durable.Private)
	if err != nil {
		return nil, nil, fmt.Errorf("journal: %w", err)
	}
	defer func() {
		if err != nil {
			durable.CloseLocked(f)
			err = fmt.Errorf("journal %s: %w", path, err)
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil, errors.New("another process uses the journal")
	}
	j = &Journal{f: f, path: path, fdatasync: unix.Fdatasync}
	if info.Size() == 0 {
		inPlace(f)
		// The zeros are really written, because a checkpoint must still fit when the file system
		// is full. Space that is only reserved does not ensure this.
		if _, err := f.Write(make([]byte, 2*slotSize)); err != nil {
			os.Remove(path)
			return nil, nil, err
		}
		return j, nil, nil
	}
	if entries, err = j.read(); errors.As(err, new(*fileversion.Error)) {
		entries, err, j.last = nil, nil, max(j.last, 1) // so that Reset removes them
	}
	return j, entries, err
}

// noCopyOnWrite is the attribute FS_NOCOW_FL of linux/fs.h.
const noCopyOnWrite = 0x00800000

// inPlace sets an attribute of an empty file, so that a file system with copy on write (btrfs)
// overwrites the file in place. Without the attribute, each write would need new space there, and a
// checkpoint would not fit when the file system is full. Other file systems do not know the
// attribute and do not need it.
func inPlace(f *os.File) {
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return
	}
	_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags|noCopyOnWrite))
}

// Load returns the entries of the journal at path, the newest first. It neither creates nor locks
// the file. If the file does not exist, Load returns no entries and no error.
func Load(path string) ([]Entry, error) {
	f, err := durable.Open(path, os.O_RDONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	defer f.Close()
	j := &Journal{f: f, path: path}
	entries, err := j.read()
	if err != nil {
		err = fmt.Errorf("journal %s: %w", path, err)
	}
	return entries, err
}

func (j *Journal) read() (entries []Entry, err error) {
	slots, err := record.ReadSlots(j.f)
	if err != nil {
		return nil, err
	}
	if info, err := j.f.Stat(); err != nil {
		return nil, err
	} else if info.Size() > 2*slotSize {
		return nil, fmt.Errorf("the file has %d bytes, but a journal of vddkcp has at most %d; remove the file, or name another one with --journal", info.Size(), 2*slotSize)
	}
	ours, used := false, false
	for i, slot := range slots {
		e, err := parse(slot)
		if errors.As(err, new(*fileversion.Error)) {
			return nil, err
		}
		if err == nil {
			entries = append(entries, e)
			if e.sequence > j.last {
				j.last, j.next = e.sequence, 1-i
			}
		}
		ours = ours || err != durable.ErrNoRecord
		used = used || len(bytes.TrimRight(slot.Bytes, "\x00")) > 0
	}
	if used && !ours {
		head := slots[0].Bytes
		return nil, fmt.Errorf("the file begins with %q and is no journal of vddkcp; remove the file, or name another one with --journal", head[:min(len(head), 16)])
	}
	slices.SortFunc(entries, func(a, b Entry) int { return int(int64(b.sequence - a.sequence)) })
	return entries, nil
}

// parse returns the entry in one slot. The error is durable.ErrNoRecord if the bytes are no slot of
// a journal, durable.ErrTorn if the slot is damaged, and a *fileversion.Error if it has an unknown
// version.
func parse(slot durable.Slot) (e Entry, err error) {
	var version *durable.VersionError
	if errors.As(slot.Err, &version) {
		return e, format.Check(int64(version.Got))
	}
	if slot.Err != nil {
		return e, slot.Err
	}
	if err := json.Unmarshal(slot.Payload, &e); err != nil {
		return e, durable.ErrTorn
	}
	if e.Size < 0 || e.Offset < 0 || e.Offset > e.Size {
		return e, durable.ErrTorn
	}
	e.sequence = slot.Sequence
	return e, nil
}

// Write durably writes e over the older of the two entries.
func (j *Journal) Write(e Entry) error {
	payload, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal %s: %w", j.path, err)
	}
	if len(payload) > record.Room() {
		return fmt.Errorf("journal %s: the checkpoint has %d bytes, but a slot holds at most %d", j.path, len(payload), record.Room())
	}
	slot := record.Encode(j.last+1, payload)
	if _, err := j.f.WriteAt(slot, int64(j.next)*slotSize); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	killpoint.At("slot written")
	if err := j.sync(); err != nil {
		return err
	}
	j.last, j.next = j.last+1, 1-j.next
	return nil
}

// WriteBack writes e, the older of the two entries, over the newer one. It is called if the
// newer entry does not describe the target, so that no later run uses the newer entry.
func (j *Journal) WriteBack(e Entry) error {
	j.next = 1 - j.next
	return j.Write(e)
}

// The method sync makes the data of the file durable. The first call makes the name of the file
// durable too.
func (j *Journal) sync() error {
	if err := j.fdatasync(int(j.f.Fd())); err != nil {
		return fmt.Errorf("journal %s: fdatasync: %w", j.path, err)
	}
	if !j.durable {
		if err := durable.SyncFolder(filepath.Dir(j.path)); err != nil {
			return fmt.Errorf("journal: %w", err)
		}
		j.durable = true
	}
	return nil
}

// Reset durably removes all entries. It is called for a new target. Without it, a run after a
// crash could find the entries of an earlier copy and take them for checkpoints of the new target.
func (j *Journal) Reset() error {
	if j.last == 0 {
		return nil
	}
	if _, err := j.f.WriteAt(make([]byte, 2*slotSize), 0); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	j.next, j.last = 0, 0
	return j.sync()
}

// Close closes the journal and keeps it for a later run.
func (j *Journal) Close() error { return durable.CloseLocked(j.f) }

// Remove closes the journal and removes the file. It is for a copy that is complete, or that no
// later run may continue.
func (j *Journal) Remove() error {
	defer j.Close()
	// Another process may have put another file at the path. Only the file that this process
	// has locked may be removed.
	held, err := j.f.Stat()
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if named, err := os.Lstat(j.path); err != nil || !os.SameFile(held, named) {
		return nil
	}
	if err := os.Remove(j.path); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	return nil
}

// Differs compares the copy c with saved, the description of a copy in a checkpoint. It returns a
// text about the first difference, or "" if there is no difference. Differs does not compare the
// field Identity, because some kinds of targets have another identity when the copy continues.
func (c Copy) Differs(saved Copy) string {
	switch {
	case c.Size != saved.Size:
		return fmt.Sprintf("the source has %d bytes, and had %d", c.Size, saved.Size)
	case c.Source != saved.Source:
		return fmt.Sprintf("the source is %s, and was %s", c.Source, saved.Source)
	case c.Target != saved.Target:
		return fmt.Sprintf("the target is a %s, and was a %s", c.Target, saved.Target)
	}
	if diff := c.Backing.differs(saved.Backing); diff != "" {
		return diff
	}
	for _, name := range optionNames(c.Options, saved.Options) {
		if c.Options[name] != saved.Options[name] {
			return fmt.Sprintf("--%s is %q, and was %q", name, c.Options[name], saved.Options[name])
		}
	}
	return ""
}

func (b *Backing) differs(want *Backing) string {
	switch {
	case b == nil && want == nil:
		return ""
	case want == nil:
		return fmt.Sprintf("the target is an overlay of %q, and had no --backing", b.Path)
	case b == nil:
		return fmt.Sprintf("there is no --backing, and the target was an overlay of %q", want.Path)
	case b.Path != want.Path:
		return fmt.Sprintf("the backing is %q, and was %q", b.Path, want.Path)
	case b.Format != want.Format:
		return fmt.Sprintf("the backing %q is read as %s, and was read as %s", b.Path, b.Format, want.Format)
	case b.Identity != want.Identity || b.Proof != want.Proof:
		return fmt.Sprintf("the content of the backing %q changed: its identity is %s, and was %s", b.Path, b.Identity, want.Identity)
	}
	return ""
}

func optionNames(sets ...map[string]string) (names []string) {
	for _, set := range sets {
		for name := range set {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}
