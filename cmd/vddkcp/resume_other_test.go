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

// TestResumeAsVMDKKeepsOtherFormats checks that a copy to a VMDK, which cannot be
// resumed, does not remove the .partial of a copy in another format, which can be
// resumed.
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

// otherVersion turns a journal into one that another version of vddkcp wrote.
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

// TestJournalOfAnotherVersion checks that --resume refuses and keeps the journal of
// another version of vddkcp, and that a copy without --resume ignores it.
func TestJournalOfAnotherVersion(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	otherVersion(t, dst+".partial.journal")
	refusedToGoOn(t, "version 1(?s:.*)--force and without --resume, which drops", dst, src, dst)
	killedAt(t, "slot written:1", "1us", "--force", src, dst)
	goesOn(t, src, dst) // by the new journal, of which nothing is of the other version
	if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
		t.Errorf("the target is not the source: %+v", r)
	}
}

// TestBackingReplacedByRename replaces the backing by a rename while an overlay is
// written. The copy must notice, although it still has the old backing open.
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
	if partial, _ := isKept(dst, dst+".partial.journal"); r.exit != 1 || partial || !strings.Contains(r.stderr, "the backing image changed while the target was written") {
		t.Errorf("exit status %d, .partial %v, want 1 and none\n%s", r.exit, partial, r.stderr)
	}
}

// TestResumeAfterTheSourceIsMountedAgain checks that a source counts as unchanged
// after its file system is mounted again as another device, for example after a
// reboot.
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

// TestDroppedCheckpointStaysDropped checks that a checkpoint which does not describe
// the target is removed from the journal when the copy continues at the one before.
// Otherwise a later run could use it.
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

// TestVerifyOfASingleLinkThatGoesOn resumes a copy of a single link with --verify. The
// first run computed no digest, so the target is compared with the source and the
// backing together.
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

// TestResumeWhereTheTargetExists checks that a file which appears at DST prevents
// resuming until --force is given.
func TestResumeWhereTheTargetExists(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "dst.raw")
	content(t, src, 1, 4<<20)
	killedAt(t, firstCheckpoint, "1us", src, dst)
	put(t, dst, "another file")
	refusedToGoOn(t, "file already exists(?s:.*)--resume and --force, which replaces", dst, src, dst)
	goesOn(t, "--force", src, dst)
}
