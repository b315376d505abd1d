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
	"testing"

	"vddkcp/internal/peer"
)

// The way that the embedded program takes.
func TestStartFromMemory(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	peer.Need(t, "gcc")
	peer.Run(t, "./build", program)
	code, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	// With enough descriptors open that no number is free by luck.
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
