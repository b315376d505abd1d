package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// firstCheckpoint kills a copy to a file after its first checkpoint. With 1us between
// checkpoints this is the checkpoint of the first piece. firstInPlace does the same for
// a device or an export.
const (
	firstCheckpoint = "slot written:1"
	firstInPlace    = "slot written:2"
)

// killedAt runs a copy that is killed at a killpoint. every is the time between
// checkpoints.
func killedAt(t *testing.T, point, every string, args ...string) {
	t.Helper()
	cmd := exec.Command(chaosBinary(t), append([]string{"--progress", "none", "--request-size", "64KiB"}, args...)...)
	cmd.Env = append(os.Environ(), "VDDKCP_KILL_AT="+point, "VDDKCP_CHECKPOINT_EVERY="+every)
	out, err := cmd.CombinedOutput()
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Fatalf("vddkcp %s was not killed at %s: %v\n%s", strings.Join(args, " "), point, err, out)
	}
}

// content writes n bytes that depend on the seed, and returns them.
func content(t *testing.T, path string, seed byte, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	put(t, path, string(b))
	return b
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// goesOn runs vddkcp with args and --resume. The run must succeed and continue at a
// checkpoint.
func goesOn(t *testing.T, args ...string) {
	t.Helper()
	reportFile := filepath.Join(t.TempDir(), "report.json")
	copies(t, append([]string{"--resume", "--report", reportFile}, args...)...)
	var got report.Report
	if err := json.Unmarshal(read(t, reportFile), &got); err != nil || got.ResumedFrom == 0 {
		t.Errorf("vddkcp %s: resumed from %d, want a checkpoint: %v", strings.Join(args, " "), got.ResumedFrom, err)
	}
}

// TestResumeOfAnOverlay checks that an overlay is resumed with the same backing,
// whatever name it has, and with no other one.
func TestResumeOfAnOverlay(t *testing.T) {
	peer.Need(t, "qemu-img")
	const size = 4 << 20
	for _, c := range []struct {
		name   string
		change func(t *testing.T, dir string)
		args   []string // instead of --backing base.raw
		says   string   // ""; the copy goes on
	}{
		{name: "the same"},
		{name: "the same by a link", args: []string{"--backing", "link.raw", "--backing-format", "raw"},
			change: func(t *testing.T, dir string) { peer.Run(t, "ln", "-s", "base.raw", filepath.Join(dir, "link.raw")) }},
		{name: "no backing", args: []string{}, says: "there is no --backing, and the target was an overlay of"},
		{name: "another name", args: []string{"--backing", "other.raw", "--backing-format", "raw"}, says: "the backing is \".*/other.raw\", and was \".*/base.raw\"",
			change: func(t *testing.T, dir string) { content(t, filepath.Join(dir, "other.raw"), 9, size) }},
		{name: "another format", args: []string{"--backing", "base.raw", "--backing-format", "qcow2"}, says: "is read as qcow2, and was read as raw",
			change: func(t *testing.T, dir string) {
				peer.Run(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(dir, "base.raw"), strconv.Itoa(size))
			}},
		{name: "other content", says: "the content of the backing .* changed",
			change: func(t *testing.T, dir string) { content(t, filepath.Join(dir, "base.raw"), 9, size) }},
		{name: "replaced", says: "the content of the backing .* changed",
			change: func(t *testing.T, dir string) {
				content(t, filepath.Join(dir, "new"), 9, size)
				peer.Run(t, "mv", filepath.Join(dir, "new"), filepath.Join(dir, "base.raw"))
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, "o.qcow2")
			disk := content(t, src, 1, size)
			base := bytes.Clone(disk)
			copy(base[1<<20:], make([]byte, 2<<20))
			put(t, filepath.Join(dir, "base.raw"), string(base))
			backing := []string{"--backing", "base.raw", "--backing-format", "raw"}
			killedAt(t, firstCheckpoint, "1us", append(backing, src, dst)...)
			if c.change != nil {
				c.change(t, dir)
			}
			if c.args != nil {
				backing = c.args
			}
			if c.says == "" {
				goesOn(t, append(backing, src, dst)...)
				peer.Run(t, "qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", src, dst)
				return
			}
			refusedToGoOn(t, c.says, dst, append(backing, src, dst)...)
		})
	}
}

// refusedToGoOn runs vddkcp with args and --resume. The run must end with exit status
// 2 and change nothing of the earlier copy.
func refusedToGoOn(t *testing.T, says, dst string, args ...string) {
	t.Helper()
	before, noted := read(t, dst+".partial"), read(t, dst+".partial.journal")
	r := vddkcp(t, append([]string{"--resume", "--progress", "none"}, args...)...)
	if r.exit != 2 || !matches(t, says, r.stderr) {
		t.Errorf("vddkcp --resume %s: exit status %d, want 2 and %q\n%s", strings.Join(args, " "), r.exit, says, r.stderr)
	}
	if !bytes.Equal(read(t, dst+".partial"), before) || !bytes.Equal(read(t, dst+".partial.journal"), noted) {
		t.Error("the .partial or its journal changed")
	}
}

// TestResumeWithOtherFlags checks that a flag which decides the content of the target
// cannot change when a copy is resumed, and that other flags can.
func TestResumeWithOtherFlags(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, c := range []struct {
		target       string
		first, again []string
		says         string // ""; the copy goes on, and the target is right
	}{
		{"o.raw", nil, []string{"--source-format", "raw"}, `--source-format is "raw", and was ""`},
		{"o.raw", []string{"--source-format", "raw"}, nil, `--source-format is "", and was "raw"`},
		{"o.raw", nil, []string{"--digest"}, `--digest is "blksum"`},
		{"o.raw", []string{"--digest"}, []string{"--digest=sha256"}, `--digest is "sha256"`},
		{"o.raw", nil, []string{"--preallocation", "full"}, `--preallocation is "full"`},
		{"o.raw", nil, []string{"--format", "qcow2"}, "the target is a qcow2 file, and was a raw file"},
		{"o.raw", nil, []string{"--single-link"}, `--single-link is "true"`},
		{"o.raw", nil, []string{"--target-is-zero"}, `--target-is-zero is "true"`},
		{"o.raw", []string{"--target-is-zero"}, nil, `--target-is-zero is "", and was "true"`},
		{"o.qcow2", nil, []string{"--cluster-size", "128KiB"}, `--cluster-size is "131072", and was "65536"`},
		{"o.qcow2", nil, []string{"--compress", "zstd"}, `--compress is "zstd", and was "none"`},
		{"o.qcow2", []string{"--compress", "zlib"}, nil, `--compress is "none", and was "zlib"`},
		{"o.qcow2", []string{"--compress", "zlib"}, []string{"--compress", "zstd"}, `--compress is "zstd", and was "zlib"`},
		{"o.qcow2", nil, []string{"--backing", "b", "--backing-format", "raw"}, "is an overlay of .*, and had no --backing"},

		{"o.qcow2", nil, []string{"--cluster-size", "64KiB", "--compress", "none"}, ""},
		{"o.qcow2", []string{"--compress", "zlib:1"}, []string{"--compress", "zlib:9"}, ""},
		{"o.raw", nil, []string{"--verify"}, ""},
		{"o.raw", []string{"--sparse", "0"}, []string{"--sparse", "64KiB"}, ""},
		{"o.raw", nil, []string{"--sparse", "0", "--reflink", "never", "--cache", "drop", "--allow-path", "/"}, ""},
		{"o.raw", nil, []string{"--request-size", "4KiB", "--depth", "9", "--connections", "2", "--force"}, ""},
	} {
		t.Run(c.target+" "+strings.Join(append(append(c.first, "then"), c.again...), " "), func(t *testing.T) {
			dir := t.TempDir()
			src, dst := filepath.Join(dir, "src.raw"), filepath.Join(dir, c.target)
			disk := content(t, src, 1, 2<<20)
			clear(disk[1<<20 : 1<<20+300<<10])
			put(t, src, string(disk))
			put(t, filepath.Join(dir, "b"), "b")
			killedAt(t, firstCheckpoint, "1us", append(c.first, src, dst)...)
			args := append(c.again, src, dst)
			if c.says != "" {
				refusedToGoOn(t, c.says, dst, args...)
				return
			}
			goesOn(t, args...)
			if r := vddkcp(t, "verify", src, dst); r.exit != 0 {
				t.Errorf("the target is not the source: %+v", r)
			}
		})
	}
}

// TestEveryFlagIsHeldOrHarmless checks that docs/journal.md lists every flag of copy,
// either as a flag that decides the content of the target or as one that does not. The
// fingerprint of a job covers the flags of the first kind.
func TestEveryFlagIsHeldOrHarmless(t *testing.T) {
	text := string(read(t, "../../docs/journal.md"))
	_, text, found := strings.Cut(text, "## What decides the content of a target")
	held, harmless, both := strings.Cut(text, "## What does not decide the content of a target")
	if !found || !both {
		t.Fatal("docs/journal.md has no tables of flags")
	}
	firstColumn := func(text string) (rows string) {
		for _, line := range strings.Split(text, "\n") {
			if cells := strings.Split(line, "|"); len(cells) > 2 {
				rows += cells[1] + "\n"
			}
		}
		return rows
	}
	held, harmless = firstColumn(held), firstColumn(harmless)
	p, spec := jobSpec(t)
	tuning := map[string]bool{}
	for _, f := range spec.Fields {
		tuning["--"+strings.ReplaceAll(f.Name, "_", "-")] = f.Tuning || f.Secret
	}
	seen := 0
	for _, flag := range p.parser.Model.Flags {
		name := "--" + flag.Name
		seen++
		decides, not := hasWord(held, name), hasWord(harmless, name)
		if name == "--compress" { // its method does, its level does not
			not = false
		}
		if decides == not {
			t.Errorf("%s: docs/journal.md says that it decides: %v, that it does not: %v", name, decides, not)
		}
		if decides && tuning[name] {
			t.Errorf("%s decides what a target holds, and is not in the fingerprint of jobs", name)
		}
	}
	if seen < 40 {
		t.Errorf("only %d flags were looked at", seen)
	}
}

// TestResumeOfAnotherPartial checks a .partial file that does not belong to its
// journal. If its content differs, it stays unchanged. If only zeros were copied
// before, it is replaced.
func TestResumeOfAnotherPartial(t *testing.T) {
	for _, c := range []struct {
		name, target string
		args         []string
		data         int  // where the disk's data begins
		moved        bool // it is the same file, in another folder
		exit         int
		says         string
	}{
		{"other data", "o.raw", nil, 0, false, 2, "does not hold the data that was written last according to its journal"},
		{"other tables", "o.qcow2", nil, 0, false, 2, "the file is damaged, or is not the file of the checkpoint"},
		{"after zeros", "o.raw", nil, 6 << 20, false, 0, "nothing proves that the source and the target are those of the copy that stopped: the target has the identity inode .*; the copy starts over"},
		{"moved", "o.raw", nil, 0, true, 0, ""},
		{"moved image", "o.qcow2", nil, 0, true, 0, ""},
		{"moved overlay", "o.qcow2", []string{"--backing", "/dev/null"}, 0, true, 0, "nothing proves that the source and the target are those of the copy that stopped: the target has the identity inode .*; the copy starts over"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			src, disk := sparseDisk(t, dir, c.data)
			if c.args != nil {
				base := filepath.Join(dir, "base")
				put(t, base, string(disk[:1<<20]))
				c.args = []string{"--backing", base, "--backing-format", "raw"}
			}
			dst := filepath.Join(dir, c.target)
			killedAt(t, firstCheckpoint, "1us", append(c.args, src, dst)...)
			partial := dst + ".partial"
			before := read(t, partial)
			if c.moved {
				other := filepath.Join(dir, "other")
				peer.Run(t, "mkdir", other)
				peer.Run(t, "cp", partial, partial+".journal", other)
				peer.Run(t, "rm", partial)
				dst = filepath.Join(other, c.target)
			} else {
				before = bytes.Repeat([]byte("P"), len(before))
				if c.data > 0 {
					clear(before)
				}
				peer.Run(t, "rm", partial)
				put(t, partial, string(before))
			}
			r := vddkcp(t, append(c.args, "--resume", "--progress", "none", src, dst)...)
			if r.exit != c.exit || !matches(t, c.says, r.stderr) || c.says == "" && strings.Contains(r.stderr, "anew") {
				t.Errorf("exit status %d, want %d and %q\n%s", r.exit, c.exit, c.says, r.stderr)
			}
			if c.exit != 0 {
				// Above the checkpoint it was cut.
				if !bytes.HasPrefix(read(t, partial), before[8<<10:64<<10]) && c.target == "o.raw" {
					t.Error("the .partial changed below the checkpoint")
				}
				return
			}
			if r := vddkcp(t, "verify", "--allow-path", dir, src, dst); r.exit != 0 {
				t.Errorf("the target is not the source: %+v", r)
			}
		})
	}
}

// TestResumeOfAChangedExport checks that a source which cannot prove its identity is
// refused if it has changed. The checkpoint before is not used either, although the
// data below it may be unchanged.
func TestResumeOfAChangedExport(t *testing.T) {
	peer.Need(t, "nbdkit")
	dir := t.TempDir()
	disk := content(t, filepath.Join(dir, "a"), 1, 2<<20)
	uri, dst := "nbd+unix:///?socket="+filepath.Join(dir, "s"), filepath.Join(dir, "o.raw")
	serveFile(t, dir, "a")
	killedAt(t, "slot written:2", "1us", "--rate-limit", "4MiB", "--request-size", "64KiB", "--connections", "1", "--depth", "1", uri, dst)
	entries, err := journal.Load(dst + ".partial.journal")
	if err != nil || len(entries) != 2 {
		t.Fatalf("%d checkpoints: %v", len(entries), err)
	}
	// Only what was read after the first checkpoint changed.
	disk[entries[1].Offset] ^= 1
	put(t, filepath.Join(dir, "a"), string(disk))
	noted, written := read(t, dst+".partial.journal"), read(t, dst+".partial")[:entries[0].Offset]
	r := vddkcp(t, "--resume", "--progress", "none", uri, dst)
	if r.exit != 2 || !strings.Contains(r.stderr, "--resume: the source changed since the copy stopped") {
		t.Errorf("%+v", r)
	}
	if !bytes.Equal(read(t, dst+".partial.journal"), noted) || !bytes.HasPrefix(read(t, dst+".partial"), written) {
		t.Error("what was copied changed")
	}
}

// TestResumeOfAnotherExportAfterZeros checks that a copy starts over if the source
// cannot prove its identity and only zeros were read.
func TestResumeOfAnotherExportAfterZeros(t *testing.T) {
	peer.Need(t, "nbdkit")
	dir := t.TempDir()
	a, _ := sparseDisk(t, dir, 6<<20)
	uri, dst := "nbd+unix:///?socket="+filepath.Join(dir, "s"), filepath.Join(dir, "o.raw")
	stop := serveFile(t, dir, filepath.Base(a))
	killedAt(t, firstCheckpoint, "1us", uri, dst)
	stop()
	disk := content(t, filepath.Join(dir, "b"), 5, 8<<20)
	serveFile(t, dir, "b")
	r := vddkcp(t, "--resume", "--progress", "none", uri, dst)
	if r.exit != 0 || !strings.Contains(r.stderr, "the earlier copy has read only zeros, which every disk may have; the copy starts over") {
		t.Errorf("%+v", r)
	}
	if !bytes.Equal(read(t, dst), disk) {
		t.Error("the target is not the source")
	}
}
