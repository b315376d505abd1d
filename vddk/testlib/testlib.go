// Package testlib gives tests a stand-in for libvixDiskLib.so:
//
//	lib := testlib.New(t)
//	lib.AddDisk("[ds] vm/vm.vmdk", "/tmp/disk.raw")
//	lib.Conf("latency read 1000")
//	// open the disk with the library in lib.Dir
//
// The stand-in has the functions of VDDK and serves raw files as disks. A script, the lines that
// a test passes to Conf, controls its speed and its failures. README.md lists the keys of the
// script.
//
// The stand-in counts all calls, and all violations of VDDK's rules for its callers. A test with
// a violation fails.
package testlib

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

//go:embed build src
var sources embed.FS

// Library is a stand-in library in a folder of its own, together with its script. The folder has
// the layout of the VDDK distribution. A Library is not safe for concurrent use.
type Library struct {
	Dir string // root folder of the distribution, for the flag --libdir

	t       testing.TB
	so      string   // path of the library
	allowed []string // rules that may be violated
}

// The variable builds records the options with which the build of the library failed, and the error
// of each such build. Its mutex is held during a build, so that tests that run in parallel build
// one library at a time.
var builds = struct {
	sync.Mutex
	failed map[string]error
}{failed: map[string]error{}}

// Build builds the library with the shell script "build" and returns its folder. Callers with
// the same options get the same folder and must not change it. The options are those of the
// shell script: "--version=7", "--without=Flush,QueryAllocatedBlocks", "--needs=libabsent.so.3",
// "--flat", "--cflags=...".
func Build(t testing.TB, options ...string) string {
	t.Helper()
	peer.Need(t, "gcc")
	builds.Lock()
	defer builds.Unlock()
	key := strings.Join(options, " ")
	if err := builds.failed[key]; err != nil {
		t.Fatalf("building the test library failed in an earlier test: %v", err)
	}
	dir, err := build(options)
	if err != nil {
		builds.failed[key] = err
		t.Fatalf("building the test library: %v", err)
	}
	return dir
}

// The function build returns the folder of a library that was built from the current sources with
// the given options. The name of the folder is a hash of the sources and the options.
//
// Several test binaries may build the same library at the same time. Each builds it in a
// temporary folder, which is renamed when it is complete.
func build(options []string) (string, error) {
	hash := sha256.New()
	fmt.Fprintf(hash, "%d %q\n", len(options), options)
	temp, err := os.MkdirTemp("", "vddktest-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	err = fs.WalkDir(sources, ".", func(path string, d fs.DirEntry, err error) error {
		to := filepath.Join(temp, path)
		if err != nil || d.IsDir() {
			return errOr(err, os.MkdirAll(to, 0o755))
		}
		text, err := sources.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(hash, "%s %d\n%s", path, len(text), text)
		return os.WriteFile(to, text, 0o755)
	})
	if err != nil {
		return "", err
	}
	cache, err := os.UserCacheDir()
	if err != nil { // the variable HOME is not set
		cache = filepath.Join(os.TempDir(), fmt.Sprintf("vddktest-%d", os.Getuid()))
	}
	cache = filepath.Join(cache, "vddkcp-testlib")
	dir := filepath.Join(cache, fmt.Sprintf("%x", hash.Sum(nil)[:12]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	out, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(out)
	if err := os.Chmod(out, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("sh", append([]string{filepath.Join(temp, "build")}, append(slices.Clone(options), out)...)...)
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, text)
	}
	if err := os.Rename(out, dir); err != nil {
		if _, there := os.Stat(dir); there != nil {
			return "", err
		}
	}
	return dir, nil
}

// errOr returns a if a is not nil, and b otherwise.
func errOr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// New returns a library in a new temporary folder. When the test ends, it fails if a caller of the
// library has violated a rule of VDDK, unless the rule was passed to Allow.
func New(t testing.TB, options ...string) *Library {
	t.Helper()
	built := Build(t, options...)
	l := &Library{Dir: t.TempDir(), t: t}
	found, err := filepath.Glob(filepath.Join(built, "lib64", "*.so.*"))
	if len(found) == 0 && err == nil {
		found, err = filepath.Glob(filepath.Join(built, "*.so.*"))
	}
	if err != nil || len(found) != 1 {
		t.Fatalf("test library: %s has %d libraries, expected one (%v)", built, len(found), err)
	}
	rel, err := filepath.Rel(built, found[0])
	if err != nil {
		t.Fatal(err)
	}
	l.so = filepath.Join(l.Dir, rel)
	l.must(os.MkdirAll(filepath.Dir(l.so), 0o755))
	if os.Link(found[0], l.so) != nil { // the folders may be on different file systems
		text, err := os.ReadFile(found[0])
		l.must(err)
		l.must(os.WriteFile(l.so, text, 0o755))
	}
	l.Reset()
	t.Cleanup(l.NoBroken)
	return l
}

func (l *Library) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatalf("test library: %v", err)
	}
}

// SO returns the path of the library's file, libvixDiskLib.so.N.
func (l *Library) SO() string { return l.so }

func (l *Library) conf() string { return filepath.Join(l.Dir, "vddktest.conf") }

// Conf appends lines to the script of the stand-in library. A process reads the script when it
// loads the library. No line may be removed from a script that contains faults, because the
// position of a fault in the script identifies the fault in all processes.
func (l *Library) Conf(lines ...string) {
	l.t.Helper()
	text, err := os.ReadFile(l.conf())
	l.must(err)
	for _, line := range lines {
		text = append(append(text, line...), '\n')
	}
	l.write(text)
}

// Reset replaces the script by the given lines. It does not reset the counts of calls.
func (l *Library) Reset(lines ...string) {
	l.t.Helper()
	l.write(nil)
	l.Conf(lines...)
}

// The method write replaces the script. A process that starts at the same time reads the old or the
// new script, and never a part of one.
func (l *Library) write(text []byte) {
	l.t.Helper()
	temp := l.conf() + ".new"
	l.must(os.WriteFile(temp, text, 0o644))
	l.must(os.Rename(temp, l.conf()))
}

// Disk returns the path of the file with the content of a disk. name is the name of the disk,
// such as "[ds] vm/vm.vmdk".
func (l *Library) Disk(name string) string {
	l.t.Helper()
	store, rest, ok := strings.Cut(strings.TrimPrefix(name, "["), "]")
	if !ok || !strings.HasPrefix(name, "[") {
		l.t.Fatalf("test library: %q is not [DATASTORE] PATH", name)
	}
	return l.Dir + "/disks/" + store + "/" + strings.TrimPrefix(rest, " ")
}

// AddDisk serves the raw file or block device at path as a disk. name is the name of the disk,
// such as "[ds] vm/vm.vmdk".
func (l *Library) AddDisk(name, path string) {
	l.t.Helper()
	at := l.Disk(name)
	path, err := filepath.Abs(path)
	l.must(err)
	l.must(os.MkdirAll(filepath.Dir(at), 0o755))
	l.must(os.Symlink(path, at))
}

// The method counters returns the counters of one kind that are not 0, by their names. The
// parameter kind is "call", "stat" or "broken", the first part of a counter's name in the file of
// the counters. All processes that load the library map this file into their memory, so the counts
// of killed processes are in it, too.
func (l *Library) counters(kind string) map[string]int64 {
	l.t.Helper()
	counts := map[string]int64{}
	state, err := os.ReadFile(filepath.Join(l.Dir, "vddktest.state"))
	if os.IsNotExist(err) {
		return counts // no process has loaded the library
	}
	l.must(err)
	const head, size, nameSize = 16, 48, 40
	if len(state) < head {
		return counts
	}
	n := int(binary.NativeEndian.Uint64(state[8:]))
	for i := range min(n, (len(state)-head)/size) {
		c := state[head+i*size:]
		name, _, _ := bytes.Cut(c[:nameSize], []byte{0})
		if key, ok := strings.CutPrefix(string(name), kind+":"); ok {
			if v := int64(binary.NativeEndian.Uint64(c[nameSize:])); v != 0 {
				counts[key] = v
			}
		}
	}
	return counts
}

// Calls returns how often each function of the library was called. It counts the calls in all
// processes, including killed ones. The keys are the names of the functions without
// "VixDiskLib_".
func (l *Library) Calls() map[string]int64 { l.t.Helper(); return l.counters("call") }

// Figures returns the counters that do not count calls, such as "bytes-read" and "max-in-flight".
// README.md lists them.
func (l *Library) Figures() map[string]int64 { l.t.Helper(); return l.counters("stat") }

// Rules returns how often each rule of VDDK was violated.
func (l *Library) Rules() map[string]int64 { l.t.Helper(); return l.counters("broken") }

// Broken returns a line for each violation of a rule, in the form "PID rule: what happened". It
// leaves out rules that were passed to Allow. Each process records at most a hundred violations.
func (l *Library) Broken() []string {
	l.t.Helper()
	var lines []string
	for _, line := range l.lines("vddktest.broken") {
		_, rest, _ := strings.Cut(line, " ")
		rule, _, _ := strings.Cut(rest, ":")
		if !slices.Contains(l.allowed, rule) {
			lines = append(lines, line)
		}
	}
	return lines
}

// Trace returns a line for each call with its arguments, such as "PID Read 0 2048". The script
// must have the key "trace".
func (l *Library) Trace() []string { l.t.Helper(); return l.lines("vddktest.trace") }

// The method lines returns the lines of a file that the stand-in library has written.
func (l *Library) lines(name string) []string {
	l.t.Helper()
	text, err := os.ReadFile(filepath.Join(l.Dir, name))
	if os.IsNotExist(err) {
		return nil
	}
	l.must(err)
	return strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
}

// Allow lets the test pass even if the given rules are violated.
func (l *Library) Allow(rules ...string) { l.allowed = append(l.allowed, rules...) }

// NoBroken fails the test if the test has violated a rule that was not passed to Allow. It is
// called at the end of the test.
func (l *Library) NoBroken() {
	l.t.Helper()
	for rule, n := range l.Rules() {
		if !slices.Contains(l.allowed, rule) {
			l.t.Errorf("rule %s of VDDK was violated %d times", rule, n)
		}
	}
	for _, line := range l.Broken() {
		l.t.Logf("violation: %s", line)
	}
}
