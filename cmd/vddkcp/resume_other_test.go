package main

import (
	"bytes"
	endian "encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// A VMDK can't be resumed, which is no reason to drop a copy in another format that
// can be.
func TestResumeAsVMDKKeepsOtherFormats(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	refusedToGoOn(t, "the target is a vmdk file, and was a raw file", dst, "--format", "vmdk", src, dst)
	goesOn(t, src, dst)
	if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
		t.Errorf("the target is not the source: %+v", r)
	}
}

// otherVersion makes a journal one of another version.
func otherVersion(t *testing.T, path string) {
	t.Helper()
	const slot = 128 << 10
	b := read(t, path)
	for i := 0; i < len(b); i += slot {
		if !bytes.HasPrefix(b[i:], []byte("vddkcp journal")) {
			continue
		}
		h := b[i : i+slot]
		endian.LittleEndian.PutUint32(h[16:], 1)
		table := crc32.MakeTable(crc32.Castagnoli)
		sum := crc32.Update(crc32.Checksum(h[:32], table), table, h[36:36+endian.LittleEndian.Uint32(h[20:])])
		endian.LittleEndian.PutUint32(h[32:], sum)
	}
	put(t, path, string(b))
}

// The journal of another version of vddkcp is kept by --resume, which never can go
// on by it, and is in the way of nothing else.
func TestJournalOfAnotherVersion(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	otherVersion(t, dst+".partial.journal")
	refusedToGoOn(t, "another version of vddkcp: it has version 1, want 2(?s:.*)--force and without --resume, which drops", dst, src, dst)
	killedAt(t, "slot written:1", "1us", "--force", src, dst)
	goesOn(t, src, dst) // by the new journal, of which nothing is of the other version
	if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
		t.Errorf("the target is not the source: %+v", r)
	}
}

// A backing that is replaced by a rename while an overlay is written is another one,
// although the copy still has the first one open.
func TestBackingReplacedByRename(t *testing.T) {
	dir := t.TempDir()
	src, base, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "base.raw"), filepath.Join(dir, "o.qcow2")
	content(t, src, 1, 16<<20)
	content(t, base, 2, 16<<20)
	content(t, filepath.Join(dir, "new"), 3, 16<<20)
	_, wait := started(t, "--backing", "base.raw", "--backing-format", "raw", src, dst)
	if err := os.Rename(filepath.Join(dir, "new"), base); err != nil {
		t.Fatal(err)
	}
	r := wait()
	if partial, _ := isKept(dst, dst+".partial.journal"); r.exit != 1 || partial || !strings.Contains(r.stderr, "the backing changed while the target was written") {
		t.Errorf("exit status %d, .partial %v, want 1 and none\n%s", r.exit, partial, r.stderr)
	}
}

// A source is the same when its file system was mounted again as another device, as
// after a reboot.
func TestResumeAfterTheSourceIsMountedAgain(t *testing.T) {
	peer.Need(t, "mke2fs", "losetup")
	peer.NeedRoot(t)
	dir := t.TempDir()
	fs, folder := filepath.Join(dir, "fs"), filepath.Join(dir, "mounted")
	put(t, fs, "")
	if err := os.Truncate(fs, 32<<20); err != nil {
		t.Fatal(err)
	}
	peer.Run(t, "mkdir", folder)
	peer.Run(t, "mke2fs", "-q", "-t", "ext4", fs)
	device, _ := loopDevice(t, "", fs)
	peer.Run(t, "mount", device, folder)
	src, dst := filepath.Join(folder, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	peer.Run(t, "umount", folder)
	again, _ := loopDevice(t, "", fs)
	peer.Run(t, "mount", again, folder)
	t.Cleanup(func() { peer.Run(t, "umount", folder) })
	goesOn(t, src, dst)
	if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
		t.Errorf("the target is not the source: %+v", r)
	}
}

// A checkpoint that does not hold for the target is not in the journal any more when
// the copy has gone on from the one before: a later run could take it for its own.
func TestDroppedCheckpointStaysDropped(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, "slot written:2", "1us", "--rate-limit", "4MiB", src, dst)
	checkpoints := func() (offsets []int64) {
		entries, err := journal.Load(dst + ".partial.journal")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			offsets = append(offsets, e.Offset)
		}
		return offsets
	}
	before := checkpoints()
	if len(before) != 2 || before[0] <= before[1] {
		t.Fatalf("checkpoints %v, want two", before)
	}
	partial := read(t, dst+".partial")
	partial[before[0]-1] ^= 1
	put(t, dst+".partial", string(partial))
	killedAt(t, "checkpoint:1", "1us", "--resume", "--rate-limit", "4MiB", src, dst)
	if after := checkpoints(); len(after) != 2 || after[0] != before[1] || after[1] != before[1] {
		t.Errorf("checkpoints %v, want %d alone", after, before[1])
	}
	goesOn(t, src, dst)
	if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
		t.Errorf("the target is not the source: %+v", r)
	}
}

// A single link that goes on with --verify, without a digest of what was copied
// before, is held against the source and the backing together.
func TestVerifyOfASingleLinkThatGoesOn(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	base, src, dst := filepath.Join(dir, "base.raw"), filepath.Join(dir, "src.qcow2"), filepath.Join(dir, "o.qcow2")
	content(t, base, 1, 4<<20)
	peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", src)
	peer.Run(t, "qemu-io", "-c", "write -q -P 5 0 2M", src)
	args := []string{"--single-link", "--backing", base, "--backing-format", "raw", src, dst}
	killedAt(t, firstCheckpoint, "1us", args...)
	goesOn(t, append([]string{"--verify"}, args...)...)
	peer.Run(t, "qemu-img", "compare", "-q", src, dst)
}

// A file that came to DST meanwhile stays in the way: no later run without --force
// goes on.
func TestResumeWhereTheTargetExists(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	put(t, dst, "another file")
	refusedToGoOn(t, "file already exists(?s:.*)--resume and --force, which replaces", dst, src, dst)
	goesOn(t, "--force", src, dst)
}
