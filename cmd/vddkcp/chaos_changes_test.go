package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
)

const (
	changesSize = 24 << 20
	changesRate = 4 << 20     // bytes a second
	changesKill = time.Second // before a copy is killed, at most
	changesRuns = 24          // without VDDKCP_CHAOS: each kind of target twice
)

// changedCopy is a copy that is killed, and resumed after something was changed.
type changedCopy struct {
	dir, disk string
	dst       string
	args      []string
	env       []string
	format    string // of what the copy leaves at dst, as qemu-img calls it
	partial   string // the unfinished target, where that is a file of its own
	journal   string // where it is known
	zeroed    bool   // the target reads as zeros before the copy
	swap      func() // puts another device or export in the target's place; nil: there is none
}

// changedKind is a kind of target for changedCopy.
type changedKind struct {
	name  string
	start func(t *testing.T, c *changedCopy)
}

// file returns a function that prepares a copy to a file with flags.
func changedFile(name, format string, args ...string) changedKind {
	return changedKind{name, func(t *testing.T, c *changedCopy) {
		c.dst, c.format, c.args = filepath.Join(c.dir, "out."+format), format, args
		c.partial = c.dst + ".partial"
		c.journal = c.partial + ".journal"
	}}
}

// changedOverlay returns a function that prepares a copy to an overlay. The backing
// file differs from the source in the middle.
func changedOverlay(format string) changedKind {
	return changedKind{"overlay on " + format, func(t *testing.T, c *changedCopy) {
		changedFile("", "qcow2", "--backing", "base."+format, "--backing-format", format).start(t, c)
		base, raw := filepath.Join(c.dir, "base."+format), filepath.Join(c.dir, "base.raw")
		peer.Run(t, "cp", c.disk, raw)
		overwrite(t, raw, changesSize/2, 1<<20, 7)
		if format != "raw" {
			peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", format, raw, base)
		}
	}}
}

// changedDevice returns a function that prepares a copy to a loop device. The device
// holds old data unless zeroed is set.
func changedDevice(name, format string, zeroed bool, args ...string) changedKind {
	return changedKind{name, func(t *testing.T, c *changedCopy) {
		first, second := filepath.Join(c.dir, "first.img"), filepath.Join(c.dir, "second.img")
		oldDisk(t, first, zeroed)
		oldDisk(t, second, zeroed)
		c.dst = strings.TrimSpace(peer.Run(t, "losetup", "--find", "--show", first))
		t.Cleanup(func() { peer.Run(t, "losetup", "--detach", c.dst) })
		c.format, c.args, c.zeroed = format, args, zeroed
		c.swap = func() {
			peer.Run(t, "losetup", "--detach", c.dst)
			peer.Run(t, "losetup", c.dst, second)
		}
	}}
}

// changedExport returns a function that prepares a copy to an export of an NBD server.
func changedExport(name string, zeroed bool, args ...string) changedKind {
	return changedKind{name, func(t *testing.T, c *changedCopy) {
		socket := filepath.Join(c.dir, "s")
		for _, name := range []string{"first", "second"} {
			file := filepath.Join(c.dir, name+".img")
			oldDisk(t, file, zeroed)
			pid := filepath.Join(c.dir, name+".pid")
			peer.Run(t, "nbdkit", "-U", filepath.Join(c.dir, name), "-P", pid, "file", file)
			t.Cleanup(func() { exec.Command("sh", "-c", "kill $(cat "+pid+")").Run() })
		}
		link := func(to string) {
			os.Remove(socket)
			if err := os.Symlink(filepath.Join(c.dir, to), socket); err != nil {
				t.Fatal(err)
			}
		}
		link("first")
		c.dst, c.format, c.args, c.zeroed = "nbd+unix:///?socket="+socket, "raw", args, zeroed
		c.swap = func() { link("second") }
	}}
}

var changedKinds = []changedKind{
	changedFile("raw file", "raw"),
	changedFile("raw file, reserved", "raw", "--preallocation", "falloc"),
	changedFile("raw file, written", "raw", "--preallocation", "full"),
	changedFile("qcow2", "qcow2"),
	changedFile("qcow2, compressed", "qcow2", "--compress", "zlib", "--cluster-size", "4KiB"),
	changedFile("VMDK", "vmdk"),
	changedOverlay("raw"),
	changedOverlay("qcow2"),
	changedDevice("block device", "raw", false),
	changedDevice("zeroed block device", "raw", true, "--target-is-zero"),
	changedExport("export", false),
	changedExport("zeroed export", true, "--target-is-zero"),
}

// oldDisk creates a disk of zeros, or of old data.
func oldDisk(t *testing.T, path string, zeroed bool) {
	t.Helper()
	if err := os.WriteFile(path, bytes.Repeat([]byte("old!"), changesSize/4), 0o600); err != nil {
		t.Fatal(err)
	}
	if zeroed {
		if err := errors.Join(os.Truncate(path, 0), os.Truncate(path, changesSize)); err != nil {
			t.Fatal(err)
		}
	}
}

// overwrite writes n bytes at off. Their content depends on seed.
func overwrite(t *testing.T, path string, off int64, n int, seed byte) {
	t.Helper()
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, off)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// change changes something between two runs. It returns false if the change does not
// apply to the copy.
type change struct {
	name  string
	apply func(t *testing.T, c *changedCopy, r *rand.Rand) bool
}

// with returns a change that adds a flag, or replaces its value.
func with(name string, values ...string) change {
	return change{name + " " + strings.Join(values, "|"), func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		if i := slices.Index(c.args, name); i >= 0 {
			c.args = slices.Delete(c.args, i, min(i+1+min(len(values), 1), len(c.args)))
		} else if c.format == "vmdk" || c.format == "raw" && (name == "--cluster-size" || name == "--compress") || c.format != "raw" && name == "--preallocation" || c.partial == "" && name == "--preallocation" {
			return false
		}
		c.args = append(c.args, name)
		if len(values) > 0 {
			c.args = append(c.args, values[r.IntN(len(values))])
		}
		return true
	}}
}

// file returns a change of a file of the copy, which applies if the file exists.
func changeOf(name string, path func(*changedCopy) string, apply func(t *testing.T, path string)) change {
	return change{name, func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		p := path(c)
		if _, err := os.Lstat(p); p == "" || errors.Is(err, fs.ErrNotExist) {
			return false
		}
		apply(t, p)
		return true
	}}
}

func partialOf(c *changedCopy) string { return c.partial }
func journalOf(c *changedCopy) string { return c.journal }
func backingOf(c *changedCopy) string {
	if i := slices.Index(c.args, "--backing"); i >= 0 {
		return filepath.Join(c.dir, c.args[i+1])
	}
	return ""
}

func removed(t *testing.T, path string) {
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

var changes = []change{
	{"nothing", func(*testing.T, *changedCopy, *rand.Rand) bool { return true }},
	{"the source", func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		overwrite(t, c.disk, r.Int64N(changesSize-1<<20), 1<<20, 9)
		return true
	}},
	{"a hole in the source", func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		peer.Run(t, "fallocate", "--punch-hole", "--offset", strconv.FormatInt(r.Int64N(16)<<20, 10), "--length", strconv.Itoa(4<<20), c.disk)
		return true
	}},
	{"the device or export", func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		if c.swap == nil {
			return false
		}
		c.swap()
		return true
	}},
	{"the flag for a target of zeros dropped", func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		i := slices.Index(c.args, "--target-is-zero")
		if i < 0 {
			return false
		}
		c.args = slices.Delete(c.args, i, i+1)
		return true
	}},
	{"the backing dropped", func(t *testing.T, c *changedCopy, r *rand.Rand) bool {
		i := slices.Index(c.args, "--backing")
		if i < 0 {
			return false
		}
		c.args = slices.Delete(c.args, i, i+4)
		return true
	}},
	changeOf("the backing's content", backingOf, func(t *testing.T, path string) {
		if strings.HasSuffix(path, ".raw") {
			overwrite(t, path, 1<<20, 8<<20, 11)
		} else {
			peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 5 1M 8M", path)
		}
	}),
	changeOf("the unfinished target removed", partialOf, removed),
	changeOf("the unfinished target replaced", partialOf, func(t *testing.T, path string) {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		removed(t, path)
		if err := os.WriteFile(path, bytes.Repeat([]byte("else"), int(fi.Size()/4)), 0o600); err != nil {
			t.Fatal(err)
		}
	}),
	changeOf("the unfinished target cut", partialOf, func(t *testing.T, path string) {
		if err := os.Truncate(path, 1<<20); err != nil {
			t.Fatal(err)
		}
	}),
	changeOf("the journal removed", journalOf, removed),
	changeOf("the journal cut", journalOf, func(t *testing.T, path string) {
		if err := os.Truncate(path, 100<<10); err != nil {
			t.Fatal(err)
		}
	}),
	with("--digest=sha256"), with("--verify"),
	with("--sparse", "0", "1MiB"), with("--cluster-size", "64KiB", "8KiB"), with("--compress", "zstd", "none", "zlib:1"),
	with("--preallocation", "off", "full", "falloc"), with("--source-format", "raw"), with("--connections", "1"),
}

// TestChaosChanges kills copies at random moments, changes something and resumes them.
// A copy may end with status 0 only if its target is right. If it is refused, the
// unfinished target must stay.
func TestChaosChanges(t *testing.T) {
	peer.Need(t, "nbdkit", "cmp", "qemu-img", "qemu-io", "losetup", "fallocate")
	peer.NeedRoot(t)
	needChaos(t)
	runs := chaosSetting("VDDKCP_CHAOS", changesRuns)
	binary := chaosBinary(t)
	counts, kills := map[string]int{}, 0
	for run := range runs {
		r := rand.New(rand.NewPCG(uint64(run), 3))
		kind := changedKinds[run%len(changedKinds)]
		end, killed := chaosOfChanges(t, binary, run, kind, r)
		counts[end]++
		kills += killed
	}
	t.Logf("%d runs over %d kinds of targets, %d kills: %v", runs, len(changedKinds), kills, counts)
	if kills < runs {
		t.Errorf("only %d kills in %d runs", kills, runs)
	}
}

// chaosOfChanges kills one copy up to three times and changes something each time. It
// returns how the copy ended and how often it was killed.
func chaosOfChanges(t *testing.T, binary string, run int, kind changedKind, r *rand.Rand) (end string, kills int) {
	c := &changedCopy{dir: t.TempDir()}
	c.disk = filepath.Join(c.dir, "disk.raw")
	c.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(c.dir, "state"), "VDDKCP_CHECKPOINT_EVERY=30ms")
	scatteredDisk(t, c.disk, r)
	kind.start(t, c)
	story := []string{fmt.Sprintf("run %d: %s", run, kind.name)}
	for range 1 + r.IntN(3) {
		ended, code, stderr := c.run(binary, time.Duration(r.Int64N(int64(changesKill))), "--resume")
		if ended {
			c.judge(t, story, code, stderr)
			return "ended before a kill", kills
		}
		kills++
		if c.whole() {
			return "killed once it was whole", kills
		}
		for {
			change := changes[r.IntN(len(changes))]
			if r.IntN(3) == 0 {
				change = changes[0]
			}
			if change.apply(t, c, r) {
				story = append(story, change.name)
				break
			}
		}
	}
	before := c.there()
	_, code, stderr := c.run(binary, 0, "--resume")
	c.judge(t, story, code, stderr)
	if code == 0 {
		return "resumed", kills
	}
	if before && !c.there() {
		t.Errorf("%q: %s was removed with status %d:\n%s", story, c.partial, code, stderr)
	}
	// The run that the hint describes drops the copied data and starts over.
	args := []string{"--force"}
	_, code, stderr = c.run(binary, 0, args...)
	if c.judge(t, story, code, stderr); code != 0 {
		t.Errorf("%q: --force ended with status %d:\n%s", story, code, stderr)
	}
	return "refused", kills
}

// scatteredDisk creates a disk with data in several places.
func scatteredDisk(t *testing.T, path string, r *rand.Rand) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, changesSize); err != nil {
		t.Fatal(err)
	}
	for off := r.Int64N(changesSize / 4); off < changesSize; off += r.Int64N(2<<20) + 4<<20 {
		overwrite(t, path, off&^4095, int(min(1<<20+r.Int64N(3<<20), changesSize-off)), byte(off>>20))
	}
}

// whole reports whether the target has its final name.
func (c *changedCopy) whole() bool {
	_, err := os.Lstat(c.dst)
	return c.partial != "" && err == nil
}

// there reports whether an unfinished target exists.
func (c *changedCopy) there() bool {
	_, err := os.Lstat(c.partial)
	return c.partial != "" && err == nil
}

// run runs the copy and kills it after the given time. 0: it is not killed.
func (c *changedCopy) run(binary string, kill time.Duration, flags ...string) (ended bool, code int, stderr string) {
	args := append([]string{"--progress", "none", "--request-size", "256KiB", "--reflink", "never", "--rate-limit", strconv.Itoa(changesRate)}, flags...)
	cmd := exec.Command(binary, append(append(args, c.args...), c.disk, c.dst)...)
	cmd.Env = c.env
	var text bytes.Buffer
	cmd.Stderr = &text
	if err := cmd.Start(); err != nil {
		return true, -1, err.Error()
	}
	if kill > 0 {
		defer time.AfterFunc(kill, func() { cmd.Process.Kill() }).Stop()
	}
	cmd.Wait()
	code = cmd.ProcessState.ExitCode()
	return code != -1, code, text.String()
}

// judge checks that the files that a copy left agree with its exit status.
func (c *changedCopy) judge(t *testing.T, story []string, code int, stderr string) {
	t.Helper()
	switch code {
	case 0:
		if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", c.format, "-U", c.disk, c.target()).CombinedOutput(); err != nil {
			t.Errorf("%q: status 0, and qemu-img compare: %v\n%s%s", story, err, out, stderr)
		}
		if c.there() {
			t.Errorf("%q: status 0, and %s is left", story, c.partial)
		}
	case 2:
	default:
		t.Errorf("%q: status %d:\n%s", story, code, stderr)
	}
}

// target returns dst in the form that qemu-img accepts.
func (c *changedCopy) target() string {
	if socket, ok := strings.CutPrefix(c.dst, "nbd+unix:///?socket="); ok {
		return "nbd+unix:///?socket=" + socket
	}
	return c.dst
}
