package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestLoadErrors(t *testing.T) {
	dir := t.TempDir()
	program(t)
	compile := func(name, code string, args ...string) string {
		source := filepath.Join(dir, name+".c")
		os.WriteFile(source, []byte(code), 0o600)
		peer.Run(t, "gcc", append([]string{"-shared", "-fPIC", "-o", filepath.Join(dir, name), source, "-L" + dir}, args...)...)
		return filepath.Join(dir, name)
	}
	compile("libgone1.so", "int gone1;", "-Wl,-soname,libgone1.so.3")
	compile("libgone2.so", "int gone2;", "-Wl,-soname,libgone2.so.9")
	compile("libmiddle.so", "extern int gone1; int middle(void){return gone1;}", "-lgone1", "-Wl,-soname,libmiddle.so")
	broken := compile("libvixDiskLib.so.8", "extern int middle(void), gone2; int f(void){return middle()+gone2;}", "-lmiddle", "-lgone2")
	c := config(t, nil)
	c.Library, c.Dir = broken, dir
	_, err := worker.Start(deadline(t), c)
	var load *worker.LoadError
	if !errors.As(err, &load) || !slices.Equal(load.Libraries, []string{"libgone1.so.3", "libgone2.so.9"}) || !strings.Contains(load.Text, "cannot open shared object file") || load.Functions != nil {
		t.Errorf("missing dependencies: %#v", err)
	} else if want := "install libgone1.so.3, libgone2.so.9, or use a VDDK made for this system"; load.Hint() != want {
		t.Errorf("hint %q, want %q", load.Hint(), want)
	}
	if hint := (&worker.LoadError{Libraries: []string{"libssl.so.3"}}).Hint(); !strings.Contains(hint, "8.0.1") {
		t.Errorf("hint for OpenSSL 3: %q", hint)
	}

	c.Library = compile("libfew.so", "void VixDiskLib_InitEx(void){} void VixDiskLib_Exit(void){} void VixDiskLib_Open(void){}")
	_, err = worker.Start(deadline(t), c)
	want := []string{"VixDiskLib_GetErrorText", "VixDiskLib_FreeErrorText", "VixDiskLib_ConnectEx", "VixDiskLib_Disconnect",
		"VixDiskLib_Close", "VixDiskLib_GetInfo", "VixDiskLib_FreeInfo", "VixDiskLib_Read"}
	if !errors.As(err, &load) || !slices.Equal(load.Functions, want) {
		t.Errorf("missing functions: %v", err)
	}

	c.Library = filepath.Join(dir, "none.so")
	if _, err = worker.Start(deadline(t), c); !errors.As(err, &load) {
		t.Errorf("no file: %v", err)
	}
	c.Library = filepath.Join(dir, "libfew.so.c")
	if _, err = worker.Start(deadline(t), c); !errors.As(err, &load) || !strings.Contains(load.Text, "invalid ELF header") {
		t.Errorf("no library: %v", err)
	}
}

func TestFunctions(t *testing.T) {
	p := start(t, config(t, nil))
	if !p.Has("VixDiskLib_QueryAllocatedBlocks") || p.Has("VixDiskLib_CheckRepair") || p.Has("nonsense") {
		t.Error(p.Functions())
	}
	c := config(t, nil)
	c.Library, c.Version = stub(t, true), 5
	p = start(t, c)
	if p.Has("VixDiskLib_ReadAsync") || !p.Has("VixDiskLib_Read") {
		t.Error(p.Functions())
	}
	if p.TransportModes() != "file:nbdssl:nbd" {
		t.Error(p.TransportModes())
	}
}

func TestProgramNotFound(t *testing.T) {
	c := config(t, nil)
	c.Program = filepath.Join(t.TempDir(), "none")
	_, err := worker.Start(deadline(t), c)
	var e *worker.ProgramError
	if !errors.As(err, &e) || e.Hint() == "" {
		t.Errorf("%#v", err)
	}
}

// parent runs in the process that TestParentKilled kills.
func parent(library string) {
	p, err := worker.Start(context.Background(), worker.Config{
		Library: library, Root: "/", Version: 8, Slots: 4, SlotSize: 1 << 20, Program: os.Getenv("WORKER_TEST_PROGRAM"),
	})
	if err == nil {
		_, err = p.Open(context.Background(), remote)
	}
	if err != nil {
		panic(err)
	}
	go p.Read(context.Background(), 0, 0, 1)
	fmt.Println(p.PID())
	select {}
}

func TestParentKilled(t *testing.T) {
	for _, do := range []string{"", "Async=hang", "Queue=hang"} {
		t.Run(do, func(t *testing.T) {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "WORKER_TEST_PARENT="+stub(t, false), "WORKER_TEST_PROGRAM="+program(t), "STUB_DO= "+do+" ")
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var pid int
			if _, err := fmt.Fscan(out, &pid); err != nil {
				t.Fatal(err)
			}
			if processState(pid) == "" {
				t.Fatal("the worker is not there")
			}
			cmd.Process.Kill()
			cmd.Wait()
			for ctx := deadline(t); ; {
				if s := processState(pid); s == "" || s == "Z" {
					break
				}
				if ctx.Err() != nil {
					t.Fatalf("the worker %d outlives its parent: %s", pid, processState(pid))
				}
				runtime.Gosched()
			}
		})
	}
}

func TestSecretsStayInside(t *testing.T) {
	const password, cookie = "MarkerPassword17", "MarkerCookie18"
	t.Setenv("VDDKCP_PASSWORD", password)
	t.Setenv("VDDKCP_COOKIE", cookie)
	t.Setenv("VCENTER_PASSWORD", password)
	log := &lines{}
	r := remote
	r.Password, r.Cookie = password, cookie
	p, _ := open(t, config(t, log), r)
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.PID(), file))
		if err != nil || len(b) == 0 {
			t.Fatalf("%s: %v", file, err)
		}
		if bytes.Contains(b, []byte("Marker")) {
			t.Errorf("a secret is in %s", file)
		}
		if file == "environ" && !bytes.Contains(b, []byte("LD_LIBRARY_PATH=/opt/vddk/lib64")) {
			t.Error("no library path")
		}
		if file == "cmdline" && string(b) != worker.ProgramName+"\x00" {
			t.Errorf("command line %q", b)
		}
	}
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.all(), "info: dumpable=0 core=0\n") {
		t.Errorf("a crash would leave secrets in a core file:\n%s", log.all())
	}
	if s := fmt.Sprintf("%v %+v %#v %s %q", r, r, r, r, &r) + log.all(); strings.Contains(s, "Marker") {
		t.Errorf("a secret is printed: %s", s)
	}
}

// After the answer to a request, the worker's memory has no secrets of it, except those of an open
// connection.
func TestSecretsAreWiped(t *testing.T) {
	peer.NeedRoot(t) // only root can read the memory of a process that is not dumpable
	r := remote
	r.Server, r.Identity = "MarkerServer", "lost"
	r.Password, r.Cookie = "MarkerPassword17", "MarkerCookie18"
	p := start(t, config(t, nil))
	if _, _, err := p.Cleanup(deadline(t), r); err != nil {
		t.Fatal(err)
	}
	if err := p.EndAccess(deadline(t), r); err != nil {
		t.Fatal(err)
	}
	if memoryHolds(t, p.PID(), "MarkerPassword17") || memoryHolds(t, p.PID(), "MarkerCookie18") {
		t.Error("a secret is still in the worker's memory")
	}
	if _, err := p.Open(deadline(t), r); err != nil {
		t.Fatal(err)
	}
	if !memoryHolds(t, p.PID(), "MarkerPassword17") {
		t.Error("a connection's password is not found, so that this test proves nothing")
	}
}

// memoryHolds reports whether the writable memory of a process contains a text.
func memoryHolds(t *testing.T, pid int, what string) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	found := false
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var access string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &access); err != nil || !strings.HasPrefix(access, "rw") {
			continue
		}
		b := make([]byte, to-from)
		n, _ := mem.ReadAt(b, from)
		found = found || bytes.Contains(b[:n], []byte(what))
	}
	return found
}

func TestDescriptorsOfTheWorker(t *testing.T) {
	other, err := os.Open("worker.go")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	check := func(p *worker.Process) {
		t.Helper()
		dir := fmt.Sprintf("/proc/%d/fd", p.PID())
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			target, _ := os.Readlink(filepath.Join(dir, e.Name()))
			kind, _, _ := strings.Cut(target, ":")
			got = append(got, e.Name()+" "+kind)
		}
		if want := []string{"0 /dev/null", "1 pipe", "2 pipe", "3 socket"}; !slices.Equal(got, want) {
			t.Errorf("descriptors %q, want %q", got, want)
		}
	}
	p, _ := open(t, config(t, nil), remote)
	check(p)
	q, _ := open(t, config(t, nil), remote)
	check(q)
}

func TestNoDescriptorStaysBehind(t *testing.T) {
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	c := config(t, nil)
	p := start(t, c) // opens the descriptors that Go's poller keeps
	p.Kill()
	before := count()
	for i := range 10 {
		p, _ := open(t, c, remote)
		if i%2 == 0 {
			p.Close(deadline(t))
		}
		p.Release()
		bad := c
		bad.Library = "/nowhere.so"
		worker.Start(deadline(t), bad)
		bad.Program = "/nowhere"
		worker.Start(deadline(t), bad)
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func TestRunsOnOldSystems(t *testing.T) {
	peer.Need(t, "objdump")
	out := peer.Run(t, "objdump", "-T", program(t))
	found := 0
	for line := range strings.Lines(out) {
		var major, minor int
		_, version, ok := strings.Cut(line, "GLIBC_")
		if !ok {
			continue
		}
		found++
		fmt.Sscanf(version, "%d.%d", &major, &minor)
		if major != 2 || minor > 17 {
			t.Errorf("newer than glibc 2.17: %s", line)
		}
	}
	if found == 0 {
		t.Errorf("no versions in\n%s", out)
	}
	for _, library := range []string{"libdl.so.2", "libpthread.so.0", "libc.so.6"} {
		if !strings.Contains(peer.Run(t, "objdump", "-p", program(t)), "NEEDED               "+library) {
			t.Errorf("%s is not among the needed libraries", library)
		}
	}
}
