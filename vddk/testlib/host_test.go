package testlib_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

func TestHostOverProcesses(t *testing.T) {
	exe := driver(t, true)
	config := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(config, []byte("tmpDirectory=\"/tmp\"\nvixDiskLib.nfcAio.Session.BufSizeIn64KB=16\n vixDiskLib.nfcAio.Session.BufCount = \"3\"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	l := newLibrary(t, "host-memory 5", "trace")
	line := slices.Concat(words("init 6 5 "+config), remote, openIt)
	holder, stdin := start(t, exe, l, slices.Concat(line, words("hold"), finish)...)
	got, _, err := run(t, exe, l, slices.Concat(line, words("disconnect freeparams exit"))...)
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, got, []string{"open 2"})
	stdin.Close()
	if err := holder.Wait(); err != nil {
		t.Fatalf("holder: %v", err)
	}
	// The resources of a closed handle are free again, and so are those of a killed process,
	// which Cleanup reports.
	holder, _ = start(t, exe, l, slices.Concat(line, words("hold"))...)
	holder.Process.Kill()
	// The process has ended but was not waited for. A zombie holds no resources.
	if err := unix.Waitid(unix.P_PID, holder.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	got, _, err = run(t, exe, l, slices.Concat(line, words("cleanup"), finish)...)
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, got, []string{"open 0", "cleanup 0 1 0"})
	if n := l.Figures()["max-reserved"]; n != 3<<20 {
		t.Errorf("%d bytes reserved at most, want 3 MiB", n)
	}
	if !slices.ContainsFunc(l.Trace(), func(s string) bool { return strings.HasSuffix(s, "Open "+diskName+" flags=4") }) {
		t.Errorf("no Open in the trace: %q", l.Trace())
	}
	if trace := strings.Join(l.Trace(), "\n"); strings.Contains(trace, "secret") {
		t.Errorf("a secret in the trace:\n%s", trace)
	}

	// The limit of one session, and resources that are not free at once.
	l.Reset("host-memory 5", "session-memory 2")
	got, _, _ = run(t, exe, l, slices.Concat(line, words("disconnect freeparams exit"))...)
	wantLines(t, got, []string{"open 2"})
	l.Reset("host-memory 5", "linger 3600000")
	holder, _ = start(t, exe, l, slices.Concat(line, words("hold"))...)
	holder.Process.Kill()
	holder.Wait()
	got, _, _ = run(t, exe, l, slices.Concat(line, words("cleanup disconnect freeparams exit"))...)
	wantLines(t, got, []string{"open 2", "cleanup 0 0 1"})
}

// The variables of the environment name a script and add lines to it, and Exit appends the counts to
// a file.
func TestEnvironment(t *testing.T) {
	l := newLibrary(t, "no such key, were it read")
	elsewhere := t.TempDir()
	script := filepath.Join(elsewhere, "script")
	counts := filepath.Join(elsewhere, "counts")
	if err := os.WriteFile(script, []byte("# comment\n\nfault Read at=1 do=fail code=9\naccounting "+counts+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	exe := driver(t, true)
	t.Setenv("VDDK_TEST_SCRIPT", script)
	t.Setenv("VDDK_TEST_ROOT", filepath.Join(l.Dir, "disks"))
	t.Setenv("VDDK_TEST_CONF", "fault Read at=2 do=fail code=10;logical-sector-size 4096")
	got, stderr, err := run(t, exe, l, whole("info read 0 1 read 0 1")...)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	wantLines(t, got, []string{"info capacity=20483 links=1 adapter=3 parent=no sector=4096", "read 9 ", "read 10 "})
	text, err := os.ReadFile(counts)
	if err != nil || !strings.Contains(string(text), "call:Read=2\n") || !strings.Contains(string(text), "stat:faults=2\n") {
		t.Errorf("counts: %v\n%s", err, text)
	}
}

// NoBroken fails a test with a violation that Allow does not name.
func TestNoBroken(t *testing.T) {
	exe := driver(t, true)
	l := newLibrary(t)
	if l.Calls()["InitEx"] != 0 || l.Broken() != nil {
		t.Errorf("calls before there was any: %v, %q", l.Calls(), l.Broken())
	}
	l.Allow("io-empty") // so that this test itself passes
	if _, stderr, err := run(t, exe, l, whole("read 0 0 read 0 8")...); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	if got := l.Rules(); len(got) != 1 || got["io-empty"] != 1 {
		t.Errorf("rules %v", got)
	}
	if got := l.Broken(); got != nil {
		t.Errorf("allowed, yet %q", got)
	}
	if c := l.Calls(); c["InitEx"] != 1 || c["Read"] != 2 || c["Exit"] != 1 {
		t.Errorf("calls %v", c)
	}
	if f := l.Figures(); f["bytes-read"] != 4096 || f["max-request"] != 4096 || f["handles"] != 1 {
		t.Errorf("figures %v", f)
	}

	failed := &recorder{TB: t}
	other := testlib.New(failed, sanitized)
	path := filepath.Join(t.TempDir(), "disk")
	writeSparse(t, path, content())
	other.AddDisk(diskName, path)
	if _, stderr, err := run(t, exe, other, whole("read 0 0")...); err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	failed.cleanup()
	if len(failed.errors) != 1 || failed.errors[0] != "rule io-empty of VDDK was violated 1 times" {
		t.Errorf("the test that broke a rule got %q", failed.errors)
	}
}

// recorder records the errors of a test.
type recorder struct {
	testing.TB
	errors  []string
	cleanup func()
}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func (r *recorder) Cleanup(f func()) { r.cleanup = f }

func TestHangs(t *testing.T) {
	exe := driver(t, true)
	for _, tt := range []struct{ conf, words string }{
		{"fault Read do=hang log=hung", "read 0 1"},
		{"fault ReadAsync at=2 do=hang log=hung", "READ 0 1 4"},
		{"fault ReadAsync at=2 where=call do=hang log=hung", "READ 0 1 4"},
		{"fault ReadAsync at=2 do=drop log=hung", "READ 0 1 4"},
		{"fault Close do=hang log=hung", "close"},
	} {
		t.Run(tt.conf, func(t *testing.T) {
			t.Parallel()
			l := newLibrary(t, tt.conf)
			cmd := exec.Command(exe, append([]string{l.SO()}, slices.Concat(opened, words(tt.words))...)...)
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var text []byte
			buffer := make([]byte, 4096)
			for !bytes.Contains(text, []byte("hung")) {
				n, err := stderr.Read(buffer)
				if err != nil {
					t.Fatalf("it does not hang: %v\n%s", err, text)
				}
				text = append(text, buffer[:n]...)
			}
			// A process that did not hang would end by itself, without a signal.
			time.AfterFunc(100*time.Millisecond, func() { cmd.Process.Kill() })
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Errorf("it does not hang: %v", err)
			}
		})
	}
}

func TestClosedDescriptors(t *testing.T) {
	l := newLibrary(t, "fault Read at=2 do=closefds")
	got, _, err := run(t, driver(t, true), l, slices.Concat(opened, words("read 0 1 read 0 1 alive"))...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() == 0 {
		t.Errorf("standard output still works: %v, %q", err, got)
	}
	wantLines(t, got, []string{"read 0 "})
}

func TestLocalDisks(t *testing.T) {
	exe := driver(t, true)
	l := newLibrary(t)
	disk := content()
	path := filepath.Join(t.TempDir(), "new disk.vmdk")
	begin := slices.Concat(initialise, words("local 0"))
	got, stderr, err := run(t, exe, l, slices.Concat(begin, []string{"create", path, "256", "open", path, "0"},
		words("WRITE 0 16 4 write 100 1 flush read 0 128 info transport"), []string{"open", path, "0"}, finish)...)
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr)
	}
	want := make([]byte, 128*512)
	copy(want, bytes.Repeat([]byte{0x77}, 64*512))
	copy(want[100*512:], bytes.Repeat([]byte{0x77}, 512))
	wantLines(t, got, []string{"create 0 100", "open 0", "WRITE 0 ", "write 0 ", "flush 0", "read 0 " + sum(want),
		"info capacity=256 links=1 adapter=3 parent=no sector=512", "transport file", "open 15"})
	file, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(file[:len(want)], want) {
		t.Errorf("the file holds something else (%v)", err)
	}
	if f := l.Figures(); f["bytes-written"] != 65*512 || f["callbacks"] != 4 {
		t.Errorf("figures %v", f)
	}

	// A query after a write violates a rule.
	l.Allow("query-after-write")
	if _, _, err := run(t, exe, l, slices.Concat(begin, []string{"open", path, "0"}, words("write 0 1 query 0 128 128"), finish)...); err != nil {
		t.Fatal(err)
	}
	if l.Rules()["query-after-write"] != 1 {
		t.Errorf("rules %v", l.Rules())
	}

	// This disk has a parent, and one page of its own data.
	child := filepath.Join(t.TempDir(), "child")
	own := make([]byte, len(disk))
	copy(own[8<<20:], bytes.Repeat([]byte{5}, 4096))
	writeSparse(t, child, own)
	writeSparse(t, child+".parent", disk)
	copy(disk[8<<20:], own[8<<20:8<<20+4096])
	for _, tt := range []struct {
		flags string
		want  []string
	}{
		{"4", []string{"info capacity=20483 links=2 adapter=3 parent=yes sector=512", "query 0 4096+6144 16384+128", "read 0 " + sum(disk)}},
		{"6", []string{"info capacity=20483 links=2 adapter=3 parent=yes sector=512", "query 0 16384+128", "read 0 " + sum(own)}},
	} {
		got, stderr, err := run(t, exe, l, slices.Concat(initialise, words("local 1"), []string{"open", child, tt.flags},
			words("info query 0 20352 128 read 0 20483"), finish)...)
		if err != nil {
			t.Fatalf("%v\n%s", err, stderr)
		}
		wantLines(t, got, tt.want)
	}
}

func TestVariants(t *testing.T) {
	exe := driver(t, false)
	for _, tt := range []struct {
		options []string
		so      string
		missing string
	}{
		{nil, "lib64/libvixDiskLib.so.8", ""},
		{[]string{"--version=9", "--flat"}, "libvixDiskLib.so.9", ""},
		{[]string{"--without=Flush,QueryAllocatedBlocks"}, "lib64/libvixDiskLib.so.8", "Flush QueryAllocatedBlocks"},
		{[]string{"--version=6"}, "lib64/libvixDiskLib.so.6", "AllocateConnectParams FreeConnectParams QueryAllocatedBlocks FreeBlockList"},
		{[]string{"--version=5"}, "lib64/libvixDiskLib.so.5", "AllocateConnectParams FreeConnectParams QueryAllocatedBlocks FreeBlockList Flush Wait ReadAsync WriteAsync"},
	} {
		t.Run(tt.so+tt.missing, func(t *testing.T) {
			l := testlib.New(t, append(tt.options, "--cflags=-O0")...) // builds quickly
			if l.SO() != filepath.Join(l.Dir, tt.so) {
				t.Errorf("the library is %s", l.SO())
			}
			path := filepath.Join(t.TempDir(), "disk")
			writeSparse(t, path, content())
			l.AddDisk(diskName, path)
			names := peer.Run(t, "nm", "-D", "--defined-only", l.SO())
			if n := strings.Count(names, " T VixDiskLib_"); n != 29-len(words(tt.missing)) || strings.Count(names, " T ") != n {
				t.Errorf("%d functions:\n%s", n, names)
			}
			for _, name := range words(tt.missing) {
				if strings.Contains(names, "VixDiskLib_"+name+"\n") {
					t.Errorf("%s is there", name)
				}
			}
			if got := peer.Run(t, "objdump", "-p", l.SO()); !strings.Contains(got, "SONAME               "+filepath.Base(tt.so)) {
				t.Errorf("wrong soname:\n%s", got)
			}
			got, stderr, err := run(t, exe, l, slices.Concat(words("init 5 5 -"), remote, openIt, words("info read 0 1"), finish)...)
			if err != nil {
				t.Fatalf("%v\n%s", err, stderr)
			}
			wantLines(t, got, []string{"open 0", "info ", "read 0 "})
		})
	}
	t.Run("needs", func(t *testing.T) {
		l := testlib.New(t, "--needs=libabsent.so.3")
		if _, stderr, err := run(t, exe, l, "modes"); err == nil || !strings.Contains(stderr, "libabsent.so.3: cannot open shared object file") {
			t.Errorf("%v: %s", err, stderr)
		}
	})
	t.Run("no such key", func(t *testing.T) {
		l := testlib.New(t)
		l.Conf("latencies read 5")
		if _, stderr, err := run(t, exe, l, "modes"); err == nil || !strings.Contains(stderr, "vddktest.conf: latencies read 5: no such key") {
			t.Errorf("%v: %s", err, stderr)
		}
	})
}
