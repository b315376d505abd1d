package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// Starts a program from memory, as the embedded program is started.
func TestStartFromMemory(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	peer.Need(t, "gcc")
	peer.Run(t, "./build", program)
	code, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	// Many descriptors are open, so that the expected numbers are not free by chance.
	for range 20 {
		f, err := os.Open(program)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
	}
	c := Config{Library: compile(t, "-shared", "-fPIC", "testdata/stub.c"), Root: "/", Version: 8, Slots: 1, SlotSize: 4096}
	start := func(env []string, files []*os.File) (*os.Process, error) { return startMemory(code, env, files) }
	p, err := spawn(c, start)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	if err := p.init(context.Background()); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID()))
	if err != nil || !strings.HasPrefix(exe, "/memfd:"+ProgramName) {
		t.Errorf("it runs %q, %v", exe, err)
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID()))
	if err != nil || string(name) != "vddkcp-worker\n" {
		t.Errorf("it is called %q, %v", name, err)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	if err != nil || len(fds) != 4 {
		t.Errorf("descriptors %v, %v, want 0 to 3", fds, err)
	}
}

func TestInstalled(t *testing.T) {
	want := []string{"/opt/v/bin/vddkcp-vddk-worker", "/opt/v/libexec/vddkcp/vddkcp-vddk-worker"}
	if got := installed("/opt/v/bin/vddkcp"); !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestProgramThatCannotRun(t *testing.T) {
	dir := t.TempDir()
	noInterpreter := filepath.Join(dir, "musl")
	if err := os.WriteFile(noInterpreter, []byte("#!/lib64/none\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := startFile(noInterpreter, nil, nil); err == nil || !strings.Contains(err.Error(), "needs a system with glibc") {
		t.Errorf("no interpreter: %v", err)
	}
	if _, err := startFile(filepath.Join(dir, "none"), nil, nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// If a program exists and the kernel does not find it, its dynamic linker is missing, or it was
// started through /proc, which is not mounted.
func TestNotFound(t *testing.T) {
	if err := notFound(t.TempDir()); !strings.Contains(err.Error(), "linker") {
		t.Error(err)
	}
	if err := notFound(filepath.Join(t.TempDir(), "proc/self/fd")); !strings.Contains(err.Error(), "/proc is not mounted") || strings.Contains(err.Error(), "linker") {
		t.Error(err)
	}
}

// A lack of processes or descriptors is not reported as a missing program, and no other program is
// tried.
func TestNoProcessOrDescriptor(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	low := limit
	low.Cur = 3 // no further descriptor can be opened
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Config{Library: "/l.so", Root: "/", Version: 8, Slots: 1, SlotSize: 4096})
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	var start *StartError
	if !errors.As(err, &start) || !strings.Contains(start.Hint(), "ulimit -n") || strings.Contains(err.Error(), "no "+ProgramName) {
		t.Errorf("%v", err)
	}
	for errno, want := range map[syscall.Errno]string{syscall.EAGAIN: "TasksMax", syscall.ENOMEM: "memory"} {
		if h := (&StartError{Err: &os.PathError{Err: errno}}).Hint(); !strings.Contains(h, want) || strings.Contains(h, "make") {
			t.Errorf("%v: %q", errno, h)
		}
	}
}

func TestEnviron(t *testing.T) {
	got := environ([]string{
		"PATH=/bin", "HOME=/root", "LANG=C", "https_proxy=http://p", "TMPDIR=/t", "LD_LIBRARY_PATH=/usr/mine",
		"VDDKCP_PASSWORD=a", "VDDKCP_COOKIE=b", "GOVC_PASSWORD=c", "AWS_SECRET_ACCESS_KEY=d", "GITHUB_TOKEN=e", "db_passwd=f",
	}, "/opt/vddk/lib64")
	want := []string{"PATH=/bin", "HOME=/root", "LANG=C", "https_proxy=http://p", "TMPDIR=/t",
		"LD_LIBRARY_PATH=/opt/vddk/lib64:/usr/mine", "LIBC_FATAL_STDERR_=1"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
