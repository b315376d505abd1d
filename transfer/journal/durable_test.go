package journal

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/transfer"
)

// disk simulates the disk below a journal. It holds the content that the file had when
// it was synced last.
type disk struct {
	path    string
	durable []byte
	syncs   int
	fail    error // of the next syncs
}

func (d *disk) fdatasync(int) error {
	if d.fail != nil {
		return d.fail
	}
	d.syncs++
	text, err := os.ReadFile(d.path)
	d.durable = bytes.Clone(text)
	return err
}

// crash returns the entries that remain after a power failure.
func (d *disk) crash(t *testing.T) []Entry {
	t.Helper()
	path := filepath.Join(t.TempDir(), "j")
	if err := os.WriteFile(path, d.durable, 0o600); err != nil {
		t.Fatal(err)
	}
	entries, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func openOn(t *testing.T) (*Journal, *disk) {
	t.Helper()
	d := &disk{path: filepath.Join(t.TempDir(), "j")}
	j, _, err := Open(d.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	j.fdatasync = d.fdatasync
	return j, d
}

func at(off int64) Entry {
	return Entry{Copy: Copy{Size: 1 << 30}, Checkpoint: transfer.Checkpoint{Offset: off}}
}

// TestWriteIsDurable checks that a power failure after Write has returned does not
// lose the entry.
func TestWriteIsDurable(t *testing.T) {
	j, d := openOn(t)
	for off := int64(1); off < 5; off++ {
		if err := j.Write(at(off)); err != nil {
			t.Fatal(err)
		}
		if left := d.crash(t); len(left) == 0 || left[0].Offset != off {
			t.Fatalf("after a loss of power the journal has %d entries, want the one at %d first: %+v", len(left), off, left)
		}
	}
}

// TestWriteReportsAFailedSync checks that Write fails if the entry cannot be made
// durable, and that the next entry does not overwrite the last durable one.
func TestWriteReportsAFailedSync(t *testing.T) {
	j, d := openOn(t)
	if err := j.Write(at(1)); err != nil {
		t.Fatal(err)
	}
	d.fail = errors.New("the disk is gone")
	for range 3 {
		if err := j.Write(at(2)); !errors.Is(err, d.fail) {
			t.Fatalf("error %v, want %v", err, d.fail)
		}
	}
	if entries, err := Load(d.path); err != nil || entries[len(entries)-1].Offset != 1 {
		t.Errorf("the durable entry is gone: %+v, %v", entries, err)
	}
}

// TestResetIsDurable checks that no entry reappears after Reset and a power failure.
func TestResetIsDurable(t *testing.T) {
	j, d := openOn(t)
	if err := j.Write(at(1)); err != nil {
		t.Fatal(err)
	}
	if err := j.Reset(); err != nil {
		t.Fatal(err)
	}
	if left := d.crash(t); len(left) != 0 {
		t.Errorf("after a loss of power the journal has %+v again", left)
	}
	syncs := d.syncs
	if err := j.Reset(); err != nil || d.syncs != syncs {
		t.Errorf("an empty journal was synced again: %v", err)
	}
}
