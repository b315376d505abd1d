package journal_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

func entry(off int64) journal.Entry {
	return journal.Entry{
		Copy: journal.Copy{Source: "file:1:2", Proof: "mtime", Size: 1 << 40, Target: "raw file", Options: map[string]string{"format": "raw"}},
		Checkpoint: transfer.Checkpoint{Offset: off, State: []byte("raw 1"), Sums: [][]byte{{1, 2}},
			Tail: []transfer.Stretch{{Off: off - 1, Len: 1, CRC: 7}}},
	}
}

func open(t *testing.T, path string) (*journal.Journal, []journal.Entry) {
	t.Helper()
	j, entries, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	return j, entries
}

func offsets(entries []journal.Entry) (offs []int64) {
	for _, e := range entries {
		offs = append(offs, e.Offset)
	}
	return offs
}

func equal(a []int64, b ...int64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func TestJournalKeepsTheLastTwo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.partial.journal")
	j, entries := open(t, path)
	if len(entries) != 0 {
		t.Errorf("a new journal has %d entries", len(entries))
	}
	info, _ := os.Stat(path)
	for off := int64(1); off < 6; off++ {
		if err := j.Write(entry(off)); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := journal.Open(path); err == nil || !strings.Contains(err.Error(), "another process uses the journal") {
		t.Errorf("opened twice: %v", err)
	}
	j.Close()
	if now, _ := os.Stat(path); now.Size() != info.Size() {
		t.Errorf("the journal grew from %d to %d bytes", info.Size(), now.Size())
	}
	j, entries = open(t, path)
	if !equal(offsets(entries), 5, 4) {
		t.Fatalf("offsets %v, want 5 and 4", offsets(entries))
	}
	if got, want := entries[0], entry(5); got.Differs(want.Copy) != "" || !bytes.Equal(got.State, want.State) || got.Tail[0] != want.Tail[0] {
		t.Errorf("entry %+v, want %+v", got, want)
	}
	// Going on writes over the older one.
	if err := j.Write(entry(6)); err != nil {
		t.Fatal(err)
	}
	if entries, err := journal.Load(path); err != nil || !equal(offsets(entries), 6, 5) {
		t.Errorf("offsets %v, %v", offsets(entries), err)
	}
	if err := j.Remove(); err != nil {
		t.Fatal(err)
	}
	if entries, err := journal.Load(path); err != nil || entries != nil {
		t.Errorf("after Remove: %v, %v", entries, err)
	}
}

// TestTornSlot checks that the other slot stays valid, however little of a slot was
// written before a crash.
func TestTornSlot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j, _ := open(t, path)
	j.Write(entry(1))
	j.Write(entry(2))
	before, _ := os.ReadFile(path)
	j.Write(entry(3))
	j.Close()
	after, _ := os.ReadFile(path)
	r := rand.New(rand.NewPCG(1, 1))
	for range 300 {
		torn := bytes.Clone(before)
		for off := 0; off < len(torn); off += 512 { // sectors are written whole or not, in any order
			if r.IntN(2) == 0 {
				copy(torn[off:off+512], after[off:])
			}
		}
		if r.IntN(3) == 0 {
			torn[r.IntN(400)] ^= 1 << r.IntN(8)
		}
		os.WriteFile(path, torn, 0o600)
		entries, err := journal.Load(path)
		if errors.As(err, new(*fileversion.Error)) {
			t.Fatalf("a torn slot is taken for another version's: %v", err)
		}
		if err != nil || len(entries) == 0 {
			t.Fatalf("no entry is left: %v", err)
		}
		for _, e := range entries {
			if e.Offset < 1 || e.Offset > 3 || e.Differs(entry(1).Copy) != "" {
				t.Fatalf("entry %+v was never written", e)
			}
		}
	}
}

func TestForeignFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "passwd")
	os.WriteFile(path, []byte("root:x:0:0\n"), 0o600)
	if _, _, err := journal.Open(path); err == nil || !strings.Contains(err.Error(), `begins with "root:x:0:0\n"`) {
		t.Errorf("error %v", err)
	}
	if text, _ := os.ReadFile(path); string(text) != "root:x:0:0\n" {
		t.Error("the file was changed")
	}
}

// TestPlantedFile checks that a file which is no journal stays unchanged, and that
// opening a FIFO at the path does not block.
func TestPlantedFile(t *testing.T) {
	for name, plant := range map[string]func(victim, path string) error{
		"symbolic link":        os.Symlink,
		"hard link":            os.Link,
		"FIFO":                 func(_, path string) error { return unix.Mkfifo(path, 0o600) },
		"folder":               func(_, path string) error { return os.Mkdir(path, 0o700) },
		"large file of zeros":  func(_, path string) error { return os.WriteFile(path, make([]byte, 1<<20), 0o600) },
		"hard link of a large": func(victim, path string) error { return errors.Join(os.Truncate(victim, 1<<20), os.Link(victim, path)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			victim, path := filepath.Join(dir, "victim"), filepath.Join(dir, "j")
			os.WriteFile(victim, nil, 0o600)
			if err := plant(victim, path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.Stat(victim)
			if j, _, err := journal.Open(path); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("Open: %v", err)
				j.Close()
			}
			if _, err := journal.Load(path); err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("Load: %v", err)
			}
			if after, _ := os.Stat(victim); after.Size() != before.Size() {
				t.Errorf("the victim had %d bytes and has %d", before.Size(), after.Size())
			}
		})
	}
}

func TestDiffers(t *testing.T) {
	base := entry(1).Copy
	for _, c := range []struct {
		change func(*journal.Copy)
		want   string
	}{
		{func(*journal.Copy) {}, ""},
		{func(c *journal.Copy) { c.Size++ }, "has 1099511627777 bytes, and had 1099511627776"},
		{func(c *journal.Copy) { c.Source = "x" }, "the source is x, and was file:1:2"},
		{func(c *journal.Copy) { c.Target = "qcow2 file" }, "the target is a qcow2 file, and was a raw file"},
		{func(c *journal.Copy) { c.Options = map[string]string{"format": "raw", "compress": "zstd"} }, `--compress is "zstd", and was ""`},
		{func(c *journal.Copy) { c.Backing = &journal.Backing{Path: "/b"} }, `the target is an overlay of "/b", and had no --backing`},
		{func(c *journal.Copy) { c.Identity = "another file" }, ""},
	} {
		now := base
		c.change(&now)
		if got := now.Differs(base); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}

func TestBackingDiffers(t *testing.T) {
	was := journal.Copy{Backing: &journal.Backing{Path: "/b", Format: "raw", Identity: "file:1", Proof: "mtime"}}
	for _, c := range []struct {
		now  *journal.Backing
		want string
	}{
		{&journal.Backing{Path: "/b", Format: "raw", Identity: "file:1", Proof: "mtime"}, ""},
		{nil, `there is no --backing, and the target was an overlay of "/b"`},
		{&journal.Backing{Path: "/c", Format: "raw", Identity: "file:1", Proof: "mtime"}, `the backing is "/c", and was "/b"`},
		{&journal.Backing{Path: "/b", Format: "qcow2", Identity: "file:1", Proof: "mtime"}, `the backing "/b" is read as qcow2, and was read as raw`},
		{&journal.Backing{Path: "/b", Format: "raw", Identity: "file:2", Proof: "mtime"}, `the content of the backing "/b" changed: its identity is file:2, and was file:1`},
		{&journal.Backing{Path: "/b", Format: "raw", Identity: "file:1", Proof: "none"}, `the content of the backing "/b" changed`},
	} {
		if got := (journal.Copy{Backing: c.now}).Differs(was); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.now, got, c.want)
		}
	}
}

func TestDefaultPath(t *testing.T) {
	state := t.TempDir()
	t.Setenv("XDG_STATE_HOME", state)
	a, err := journal.DefaultPath("/dev/sdb")
	if err != nil || filepath.Dir(a) != filepath.Join(state, "vddkcp") || !strings.Contains(filepath.Base(a), "dev_sdb-") {
		t.Errorf("%s, %v", a, err)
	}
	if b, _ := journal.DefaultPath("/dev_sdb"); b == a {
		t.Error("two targets share a journal")
	}
}

// FuzzJournal loads journals of arbitrary bytes.
func FuzzJournal(f *testing.F) {
	dir := f.TempDir()
	path := filepath.Join(dir, "seed")
	for n := range 4 {
		j, _, err := journal.Open(path)
		if err != nil {
			f.Fatal(err)
		}
		if n > 0 {
			j.Write(entry(int64(n)))
		}
		j.Close()
		whole, _ := os.ReadFile(path)
		f.Add(whole)
		f.Add(whole[:len(whole)/2])
	}
	f.Add([]byte{})
	f.Add([]byte("vddkcp journal\n\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(t.TempDir(), "j")
		os.WriteFile(path, b, 0o600)
		entries, err := journal.Load(path)
		if err != nil {
			return
		}
		for _, e := range entries {
			if e.Offset < 0 || e.Offset > e.Size {
				t.Errorf("offset %d of %d bytes", e.Offset, e.Size)
			}
		}
	})
}
