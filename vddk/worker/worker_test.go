package worker_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// built is a folder with the programs and stubs that were needed so far.
var built struct {
	sync.Mutex
	dir string
}

func TestMain(m *testing.M) {
	if c := os.Getenv("WORKER_TEST_PARENT"); c != "" {
		parent(c)
		return
	}
	dir, err := os.MkdirTemp("", "worker-test")
	if err != nil {
		panic(err)
	}
	built.dir = dir
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// build runs a compiler once for each name.
func build(t testing.TB, name string, command ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("VDDK needs x86-64")
	}
	peer.Need(t, "gcc")
	built.Lock()
	defer built.Unlock()
	// That gcc reads them is no reason for go test to run again when they change.
	sources, _ := filepath.Glob("program/*")
	for _, f := range append(sources, "build", "testdata/stub.c") {
		if _, err := os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(built.dir, name)
	if _, err := os.Stat(out); err != nil {
		for i, c := range command {
			command[i] = strings.ReplaceAll(c, "OUT", out)
		}
		peer.Run(t, command[0], command[1:]...)
	}
	return out
}

func program(t testing.TB) string { return build(t, worker.ProgramName, "./build", "OUT") }

func sanitized(t testing.TB) string {
	return build(t, worker.ProgramName+"-sanitized", "./build", "OUT", "-sanitize")
}

// stub builds the tests' own library: with everything, or as one of version 5.
func stub(t testing.TB, old bool) string {
	args := []string{"gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-O1", "-o", "OUT", "testdata/stub.c", "-lpthread"}
	if old {
		return build(t, "libvixDiskLib.so.5", append(args, "-DOLD")...)
	}
	return build(t, "libvixDiskLib.so.8", args...)
}

// lines collects a worker's log.
type lines struct {
	sync.Mutex
	list []string
}

func (l *lines) add(level worker.Level, line string) {
	l.Lock()
	defer l.Unlock()
	l.list = append(l.list, level.String()+": "+line)
}

func (l *lines) all() string {
	l.Lock()
	defer l.Unlock()
	return strings.Join(l.list, "\n")
}

func config(t testing.TB, log *lines, env ...string) worker.Config {
	c := worker.Config{
		Library: stub(t, false), Root: "/opt/vddk", Dir: "/opt/vddk/lib64", Version: 8,
		Slots: 4, SlotSize: 1 << 20,
		Program: program(t), Env: append(os.Environ(), env...),
	}
	if log != nil {
		c.Log = log.add
	}
	return c
}

// start starts a worker that the test's end releases.
func start(t testing.TB, c worker.Config) *worker.Process {
	t.Helper()
	p, err := worker.Start(deadline(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Release)
	return p
}

// deadline is for what must not hang; it is not a measure.
func deadline(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func open(t testing.TB, c worker.Config, r worker.OpenRequest) (*worker.Process, worker.Opened) {
	t.Helper()
	p := start(t, c)
	o, err := p.Open(deadline(t), r)
	if err != nil {
		t.Fatal(err)
	}
	return p, o
}

var remote = worker.OpenRequest{
	Path: "[ds] vm/vm.vmdk", ReadOnly: true, Server: "esxi.example", Port: 443, NFCPort: 902, VMXSpec: "moref=vm-7",
	Thumbprint: "aa:bb", User: `DOMAIN\user`, Password: "hunter2 with spaces", Snapshot: "snapshot-9", Transports: "nbdssl:nbd",
}

// pattern is the stub's disk.
func pattern(sector uint64, sectors int) []byte {
	b := make([]byte, 0, sectors*512)
	for i := sector * 64; i < (sector+uint64(sectors))*64; i++ {
		b = binary.LittleEndian.AppendUint64(b, i*0x9e3779b97f4a7c15)
	}
	return b
}

// variants are the libraries and programs that everything must work with.
func variants(t *testing.T, run func(t *testing.T, c worker.Config, log *lines)) {
	for _, v := range []struct {
		name                string
		old, sanitizedBuild bool
	}{{"async", false, false}, {"sync", true, false}, {"async sanitized", false, true}, {"sync sanitized", true, true}} {
		t.Run(v.name, func(t *testing.T) {
			log := &lines{}
			c := config(t, log)
			if v.old {
				c.Library, c.Version = stub(t, true), 5
			}
			if v.sanitizedBuild {
				c.Program = sanitized(t)
			}
			run(t, c, log)
		})
	}
}

func TestRead(t *testing.T) {
	variants(t, func(t *testing.T, c worker.Config, log *lines) {
		p, o := open(t, c, remote)
		want := worker.Opened{Capacity: 16384, BIOSGeometry: [3]uint32{1, 2, 3}, Geometry: [3]uint32{4, 5, 6}, Adapter: 3, Links: 2,
			LogicalSector: 4096, PhysicalSector: 4096, Parent: "parent.vmdk", UUID: "60 00 c2", Transport: "nbdssl"}
		if c.Version < 7 {
			want.LogicalSector, want.PhysicalSector = 0, 0
		}
		if o != want {
			t.Errorf("opened %+v, want %+v", o, want)
		}
		ctx := deadline(t)
		var wg sync.WaitGroup
		for slot := range c.Slots {
			wg.Go(func() {
				for i := range 20 {
					sector, n := uint64((i*977+slot*4111)%14000), 1+(i*331+slot)%2048
					if err := p.Read(ctx, slot, sector, n); err != nil {
						t.Error(err)
						return
					}
					if !bytes.Equal(p.Slot(slot)[:n*512], pattern(sector, n)) {
						t.Errorf("slot %d: sectors [%d, +%d) differ", slot, sector, n)
						return
					}
				}
			})
		}
		wg.Wait()
		if err := p.Close(ctx); err != nil {
			t.Error(err)
		}
		var gone *worker.GoneError
		if !errors.As(p.Err(), &gone) || !gone.Closed || gone.Signal != 0 || gone.Status != 0 || gone.Killed {
			t.Errorf("closed worker: %v", p.Err())
		}
		if err := p.Read(ctx, 0, 0, 1); !errors.As(err, &gone) {
			t.Errorf("read after close: %v", err)
		}
		if err := p.Close(ctx); err != nil {
			t.Errorf("second close: %v", err)
		}
		version := "6.5"
		if c.Version < 7 {
			version = "5.5"
		}
		for _, want := range []string{
			"info: InitEx " + version + " dir=/opt/vddk config=(null)", "info: LD_LIBRARY_PATH=/opt/vddk/lib64",
			"info: ConnectEx vm=moref=vm-7 server=esxi.example thumb=aa:bb type=1 port=443 nfc=902 ro=1 snap=snapshot-9 modes=nbdssl:nbd creds=11,19,-1",
			"info: the password is ***!", "info: Open [ds] vm/vm.vmdk flags=4", "info: Close\ninfo: Disconnect\ninfo: Exit",
		} {
			if !strings.Contains(log.all(), want) {
				t.Errorf("the log lacks %q:\n%s", want, log.all())
			}
		}
	})
}

func TestLocalOpenHandsNoLoginOver(t *testing.T) {
	log := &lines{}
	p, _ := open(t, config(t, log), worker.OpenRequest{Path: "/disk.vmdk", Password: "x", User: "u"})
	if err := p.Close(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if want := "ConnectEx vm=(null) server=(null) thumb=(null) type=0 port=0 nfc=0 ro=0 snap=(null) modes=(null) creds=-1,-1,-1"; !strings.Contains(log.all(), want) {
		t.Errorf("no %q in\n%s", want, log.all())
	}
}

func TestCookie(t *testing.T) {
	log := &lines{}
	r := remote
	r.Cookie, r.Password = "cookie", ""
	open(t, config(t, log), r)
	if want := `type=2 port=443 nfc=902 ro=1 snap=snapshot-9 modes=nbdssl:nbd creds=6,11,0`; !strings.Contains(log.all(), want) {
		t.Errorf("no %q in\n%s", want, log.all())
	}
}

func TestWriteAndFlush(t *testing.T) {
	variants(t, func(t *testing.T, c worker.Config, log *lines) {
		ctx := deadline(t)
		p, _ := open(t, c, worker.OpenRequest{Path: "/disk.vmdk"})
		copy(p.Slot(1), bytes.Repeat([]byte{7}, 1024))
		if err := p.Write(ctx, 1, 100, 2); err != nil {
			t.Fatal(err)
		}
		err := p.Flush(ctx)
		var e *worker.Error
		if c.Version == 5 && (!errors.As(err, &e) || e.Kind() != worker.CodeNotSupported) || c.Version != 5 && err != nil {
			t.Errorf("flush: %v", err)
		}
		if err := p.Read(ctx, 0, 99, 4); err != nil {
			t.Fatal(err)
		}
		want := pattern(99, 4)
		copy(want[512:], bytes.Repeat([]byte{7}, 1024))
		if !bytes.Equal(p.Slot(0)[:4*512], want) {
			t.Error("what was written is not what is read")
		}
	})
}

func TestQuery(t *testing.T) {
	for _, name := range []string{"plain", "sanitized"} {
		t.Run(name, func(t *testing.T) {
			c := config(t, nil, fmt.Sprintf("STUB_SECTORS=%d", uint64(128*worker.MaxChunks)*4+1))
			if name == "sanitized" {
				c.Program = sanitized(t)
			}
			p, _ := open(t, c, remote)
			const n = 128 * worker.MaxChunks
			blocks, err := p.Query(deadline(t), n, n, 128)
			if err != nil {
				t.Fatal(err)
			}
			if len(blocks) != worker.MaxChunks/2 {
				t.Fatalf("%d blocks, want %d", len(blocks), worker.MaxChunks/2)
			}
			for i, b := range blocks {
				if want := (worker.Block{Start: n + uint64(i)*256, Count: 128}); b != want {
					t.Fatalf("block %d is %v, want %v", i, b, want)
				}
			}
		})
	}
}

func TestQueryThatBreaksTheRules(t *testing.T) {
	for deed, want := range map[string]string{
		"beyond": "VixDiskLib_QueryAllocatedBlocks: block at sector 1280 of 128 sectors, expected within [0, 1280) and ascending",
		"many":   "VixDiskLib_QueryAllocatedBlocks: it succeeded with no list, or with more blocks than chunks",
		"fail":   "VixDiskLib_QueryAllocatedBlocks: error 4000 (0x100000fa0): stub error 4000",
	} {
		p, _ := open(t, config(t, nil, "STUB_DO= Query="+deed+" "), remote)
		_, err := p.Query(deadline(t), 0, 1280, 128)
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", deed, err, want)
		}
		if err := p.Read(deadline(t), 0, 0, 8); err != nil {
			t.Errorf("%s: a read afterwards: %v", deed, err)
		}
	}
}

func TestRefusedBeforeTheWorkerSeesIt(t *testing.T) {
	p, _ := open(t, config(t, nil), remote)
	ctx := deadline(t)
	for name, err := range map[string]error{
		"slot -1":           p.Read(ctx, -1, 0, 1),
		"slot 4":            p.Read(ctx, 4, 0, 1),
		"no sectors":        p.Read(ctx, 0, 0, 0),
		"more than a slot":  p.Read(ctx, 0, 0, 2049),
		"past the end":      p.Read(ctx, 0, 16384, 1),
		"across the end":    p.Read(ctx, 0, 16383, 2),
		"overflow":          p.Read(ctx, 0, 1<<64-1, 2),
		"read-only":         p.Write(ctx, 0, 0, 1),
		"odd chunk":         second(p.Query(ctx, 0, 300, 150)),
		"small chunk":       second(p.Query(ctx, 0, 64, 64)),
		"unaligned":         second(p.Query(ctx, 64, 128, 128)),
		"nothing":           second(p.Query(ctx, 0, 0, 128)),
		"query past end":    second(p.Query(ctx, 16384, 128, 128)),
		"NUL in a path":     second(p.Open(ctx, worker.OpenRequest{Path: "a\x00b"})),
		"no path":           second(p.Open(ctx, worker.OpenRequest{})),
		"huge password":     second(p.Open(ctx, worker.OpenRequest{Path: "x", Server: "s", Password: strings.Repeat("p", 20000)})),
		"no identity":       p.EndAccess(ctx, remote),
		"no identity yet":   p.PrepareAccess(ctx, remote),
		"together too much": second(p.Open(ctx, worker.OpenRequest{Path: strings.Repeat("x", 16000), Server: strings.Repeat("x", 16000), User: strings.Repeat("x", 16000), Password: strings.Repeat("p", 16000), Snapshot: strings.Repeat("p", 16000)})),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		var gone *worker.GoneError
		if errors.As(err, &gone) {
			t.Fatalf("%s: reached the worker: %v", name, err)
		}
	}
	if err := p.Read(ctx, 3, 16383, 1); err != nil {
		t.Errorf("the last sector: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestErrors(t *testing.T) {
	for _, op := range []string{"InitEx", "ConnectEx", "Open", "GetInfo", "Read", "Async", "Queue", "Flush", "Close", "Disconnect", "PrepareForAccess", "EndAccess", "Cleanup"} {
		t.Run(op, func(t *testing.T) {
			ctx := deadline(t)
			log := &lines{}
			p, err := worker.Start(ctx, config(t, log, "STUB_DO= "+op+"=fail "))
			if err == nil {
				t.Cleanup(p.Release)
				r := remote
				r.Identity = "me"
				switch op {
				case "Cleanup":
					_, _, err = p.Cleanup(ctx, remote)
				case "PrepareForAccess":
					err = p.PrepareAccess(ctx, r)
				case "EndAccess":
					err = p.EndAccess(ctx, r)
				}
			}
			if err == nil {
				_, err = p.Open(ctx, remote)
			}
			if err == nil {
				err = p.Read(ctx, 0, 0, 1)
			}
			if err == nil {
				err = p.Flush(ctx)
			}
			if p != nil {
				closed := p.Close(ctx)
				if err == nil {
					err = closed
				} else if closed != nil {
					t.Errorf("close after the error: %v", closed)
				}
				if !strings.Contains(log.all(), "info: Exit") {
					t.Errorf("no Exit after the error:\n%s", log.all())
				}
			}
			var e *worker.Error
			want := "VixDiskLib_" + op
			if op == "Async" || op == "Queue" {
				want = "VixDiskLib_Read"
			}
			if !errors.As(err, &e) || e.Op != want || e.Code != 0x100000000+4000 || e.Kind() != 4000 || e.Text != "stub error 4000" {
				t.Errorf("%#v", err)
			}
		})
	}
}

func TestAccess(t *testing.T) {
	log := &lines{}
	r := remote
	r.Identity = "vddkcp-1"
	p := start(t, config(t, log))
	for _, call := range []func(context.Context, worker.OpenRequest) error{p.PrepareAccess, p.EndAccess} {
		if err := call(deadline(t), r); err != nil {
			t.Error(err)
		}
	}
	if err := p.Close(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if want := "info: PrepareForAccess vddkcp-1\ninfo: EndAccess vddkcp-1\ninfo: Exit"; !strings.Contains(log.all(), want) {
		t.Errorf("no %q in\n%s", want, log.all())
	}

	log = &lines{}
	p = start(t, config(t, log, "STUB_DO= PrepareForAccess=fail "))
	var e *worker.Error
	if err := p.PrepareAccess(deadline(t), r); !errors.As(err, &e) || e.Op != "VixDiskLib_PrepareForAccess" || e.Text != "stub error 4000" {
		t.Errorf("prepare that fails: %#v", err)
	}
	p.Close(deadline(t))
	if strings.Contains(log.all(), "EndAccess") {
		t.Error("an access that was not prepared was ended")
	}
}

// Opening and closing a disk does not touch the access: other disks of the VM may
// be open.
func TestOpenLeavesTheAccessAlone(t *testing.T) {
	log := &lines{}
	r := remote
	r.Identity = "vddkcp-1"
	p, _ := open(t, config(t, log), r)
	if err := p.Close(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(log.all(), "Access") {
		t.Errorf("the access was changed:\n%s", log.all())
	}
}

func TestCleanupAndEndAccessInAFreshWorker(t *testing.T) {
	log := &lines{}
	r := remote
	r.Identity = "lost"
	p := start(t, config(t, log))
	cleaned, remaining, err := p.Cleanup(deadline(t), r)
	if cleaned != 3 || remaining != 1 || err != nil {
		t.Errorf("cleanup: %d %d %v", cleaned, remaining, err)
	}
	if err := p.EndAccess(deadline(t), r); err != nil {
		t.Error(err)
	}
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	if !strings.Contains(log.all(), "info: Cleanup esxi.example\ninfo: EndAccess lost\ninfo: Exit") {
		t.Error(log.all())
	}
}

func TestDeaths(t *testing.T) {
	for _, test := range []struct {
		do     string
		signal syscall.Signal
		status int
		killed bool
		reason string
	}{
		{do: "Async=abort", signal: syscall.SIGABRT},
		{do: "Async=segfault", signal: syscall.SIGSEGV},
		{do: "Async=panic", signal: syscall.SIGABRT, reason: "ASSERT stub.c:42 bugNr=7"},
		{do: "Async=twice", status: 2, reason: "the library completed a request twice"},
		{do: "Async=stale", status: 2, reason: "the library completed a request twice"},
		{do: "Queue=zero", status: 2, reason: "the library neither queued nor refused an asynchronous request"},
		{do: "Queue=closesocket", status: 0},
		{do: "Open=abort", signal: syscall.SIGABRT},
		{do: "InitEx=segfault", signal: syscall.SIGSEGV},
		{do: "Close=abort", signal: syscall.SIGABRT},
	} {
		t.Run(test.do, func(t *testing.T) {
			ctx := deadline(t)
			p, err := worker.Start(ctx, config(t, nil, "STUB_DO= "+test.do+" "))
			if err == nil {
				t.Cleanup(p.Release)
				_, err = p.Open(ctx, remote)
			}
			if err == nil {
				err = p.Read(ctx, 0, 0, 1)
			}
			if test.do == "Async=stale" && err == nil {
				// The slot's second request must not end with the first one's completion.
				if err = p.Read(ctx, 0, 8, 1); err == nil {
					t.Fatal("a read succeeded before its completion")
				}
			}
			if test.do == "Async=twice" && err == nil {
				<-p.Done() // the first completion counts
				err = p.Read(ctx, 0, 0, 1)
			}
			if err == nil {
				err = p.Close(ctx)
			}
			var gone *worker.GoneError
			if !errors.As(err, &gone) {
				t.Fatalf("%#v", err)
			}
			if gone.Signal != test.signal || gone.Status != test.status || gone.Killed != test.killed || gone.Reason != test.reason {
				t.Errorf("%+v", gone)
			}
			if state := processState(gone.PID); state != "" {
				t.Errorf("process %d is still there: %s", gone.PID, state)
			}
		})
	}
}

func TestKilledByOthers(t *testing.T) {
	p, _ := open(t, config(t, nil), remote)
	syscall.Kill(p.PID(), syscall.SIGTERM) // a scheduler's, which is for the parent
	if err := p.Read(deadline(t), 0, 0, 1); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	syscall.Kill(p.PID(), syscall.SIGKILL)
	<-p.Done()
	var gone *worker.GoneError
	if err := p.Read(deadline(t), 0, 0, 1); !errors.As(err, &gone) || gone.Signal != syscall.SIGKILL || gone.Killed || gone.Closed {
		t.Errorf("%+v", err)
	}
}

func TestEndsAtOnce(t *testing.T) {
	for i := range 10 {
		p, _ := open(t, config(t, nil), remote)
		ctx := deadline(t)
		var wg, ends sync.WaitGroup
		for slot := range 4 {
			wg.Go(func() {
				for {
					err := p.Read(ctx, slot, 0, 2048)
					var gone *worker.GoneError
					if errors.As(err, &gone) {
						break
					}
					if err != nil && !errors.Is(err, worker.ErrBusy) {
						t.Error(err)
						return
					}
				}
				p.Slot(slot)[0] = 1 // the memory stays
			})
		}
		ends.Go(p.Kill)
		ends.Go(p.Kill)
		if i%2 == 0 {
			ends.Go(func() { p.Close(ctx) })
			ends.Go(func() { p.Close(ctx) })
		}
		ends.Wait()
		wg.Wait()
		p.Release()
		if s := processState(p.PID()); s != "" {
			t.Errorf("the process is still there: %s", s)
		}
	}
}

// A worker that dies with requests unread resets its socket; what it said before
// must come through all the same.
func TestLastWordsBeforeAReset(t *testing.T) {
	c := config(t, nil, "STUB_DO= Read=unread Read=tell Read=panic ")
	c.Library, c.Version = stub(t, true), 5
	var pid atomic.Int32
	c.Log = func(_ worker.Level, line string) {
		// Whatever follows is heard only after its death.
		for ctx := deadline(t); line == "about to act in Read" && processState(int(pid.Load())) != "Z" && ctx.Err() == nil; {
			runtime.Gosched()
		}
	}
	p, _ := open(t, c, remote)
	pid.Store(int32(p.PID()))
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			var gone *worker.GoneError
			if err := p.Read(deadline(t), slot, 0, 1); !errors.As(err, &gone) || gone.Reason != "ASSERT stub.c:42 bugNr=7" {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// What the library does to the process at its end loses nothing.
func TestDeathsInExit(t *testing.T) {
	for _, do := range []string{"Exit=segfault", "Exit=hang"} {
		ctx, cancel := context.WithCancel(deadline(t))
		c := config(t, nil, "STUB_DO= "+do+" ")
		c.Log = func(_ worker.Level, line string) {
			if line == "hangs in Exit" {
				cancel()
			}
		}
		p, _ := open(t, c, remote)
		if err := p.Close(ctx); err != nil {
			t.Errorf("%s: %v", do, err)
		}
		var gone *worker.GoneError
		if !errors.As(p.Err(), &gone) || !gone.Closed || gone.Signal == 0 {
			t.Errorf("%s: %+v", do, p.Err())
		}
		cancel()
	}
}

// processState is the state letter of a process, or "" when there is none.
func processState(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return string(b[bytes.LastIndexByte(b, ')')+2:][:1])
}

func TestHang(t *testing.T) {
	for _, do := range []string{"Async=hang", "Queue=hang", "Query=hang", "Open=hang", "InitEx=hang", "Close=hang"} {
		t.Run(do, func(t *testing.T) {
			long := deadline(t)
			ctx, cancel := context.WithCancelCause(long)
			cause := errors.New("out of patience")
			c := config(t, nil, "STUB_DO= "+do+" ")
			c.Log = func(_ worker.Level, line string) {
				if strings.HasPrefix(line, "hangs in ") {
					cancel(cause)
				}
			}
			p, err := worker.Start(ctx, c)
			if err == nil {
				t.Cleanup(p.Release)
				_, err = p.Open(ctx, remote)
			}
			if err == nil {
				_, err = p.Query(ctx, 0, 128, 128)
			}
			if err == nil {
				err = p.Read(ctx, 2, 0, 1)
			}
			if err == nil {
				err = p.Close(ctx)
			}
			if !errors.Is(err, cause) {
				t.Fatalf("%v", err)
			}
			if p == nil || do == "Close=hang" {
				return
			}
			if do == "Async=hang" {
				if err := p.Read(long, 2, 0, 1); !errors.Is(err, worker.ErrBusy) {
					t.Errorf("the slot of the lost request: %v", err)
				}
			}
			p.Kill()
			var gone *worker.GoneError
			if err := p.Read(long, 2, 0, 1); !errors.As(err, &gone) && do != "Open=hang" || gone != nil && (gone.Signal != syscall.SIGKILL || !gone.Killed) {
				t.Errorf("after Kill: %v", err)
			}
			p.Slot(3)[4095] = 1 // still there
		})
	}
}

func TestGivenUpReadGivesItsSlotBack(t *testing.T) {
	p, _ := open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	long := deadline(t)
	for i := range 50 {
		ctx, cancel := context.WithTimeout(long, time.Duration(i*100)*time.Microsecond)
		err := p.Read(ctx, 0, 0, 1)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		for {
			if err = p.Read(long, 0, uint64(i), 1); !errors.Is(err, worker.ErrBusy) {
				break
			}
			runtime.Gosched()
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p.Slot(0)[:512], pattern(uint64(i), 1)) {
			t.Fatalf("sector %d differs", i)
		}
	}
}

func TestCloseWaitsForRequests(t *testing.T) {
	p, _ := open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	ctx := deadline(t)
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			for {
				var gone *worker.GoneError
				err := p.Read(ctx, slot, 0, 1)
				if errors.Is(err, worker.ErrBusy) || errors.As(err, &gone) && gone.Closed {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if err := p.Close(ctx); err != nil {
		t.Error(err)
	}
	wg.Wait()
	// A request that nobody waits for any more is waited for all the same.
	p, _ = open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	gaveUp, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	p.Read(gaveUp, 0, 0, 1)
	if err := p.Close(ctx); err != nil {
		t.Error(err)
	}
}

func TestHostileLog(t *testing.T) {
	for _, name := range []string{"plain", "sanitized"} {
		t.Run(name, func(t *testing.T) {
			log := &lines{}
			c := config(t, log, "STUB_LOG=5000000")
			if name == "sanitized" {
				c.Program = sanitized(t)
			}
			p, _ := open(t, c, remote)
			if err := p.Read(deadline(t), 0, 0, 1); err != nil {
				t.Fatal(err)
			}
			if err := p.Close(deadline(t)); err != nil {
				t.Fatal(err)
			}
			all := log.all()
			for _, want := range []string{
				"warning: long xxxxx", "xxxxx...\n", "warning: hostile %s %n %d   [31mred  ? end\n", "warning: nul   after\n",
				"warning: stores %hhn here\n", "warning: %n is fine: 7%\n", "warning: (null)\n", "chatter of a thread %s %n ",
			} {
				if !strings.Contains(all, want) {
					t.Errorf("the log lacks %q", want)
				}
			}
			for _, line := range log.list {
				if len(line) > worker.MaxLine+20 {
					t.Errorf("line of %d bytes", len(line))
				}
			}
			lost := 0
			for _, line := range log.list {
				n := 0
				fmt.Sscanf(line, "warning: %d lines of the library came too fast", &n)
				lost += n
			}
			// 16000 of the chatter; what is lost after the last line that came
			// through is not told.
			if got := strings.Count(all, "chatter"); got+lost > 16000+1 || got == 0 {
				t.Errorf("%d lines came, %d were lost", got, lost)
			}
		})
	}
}

// A library that logs must never wait for the parent, and what it loses by that
// is told.
func TestLogToAParentThatDoesNotListen(t *testing.T) {
	logged := filepath.Join(t.TempDir(), "logged")
	log := &lines{}
	c := config(t, nil, "STUB_LOG=10", "STUB_LOGGED="+logged)
	listen := make(chan struct{})
	c.Log = func(level worker.Level, line string) {
		if strings.HasPrefix(line, "Open") {
			<-listen
		}
		log.add(level, line)
	}
	go func() {
		defer close(listen)
		for ctx := deadline(t); ctx.Err() == nil; runtime.Gosched() {
			if _, err := os.Stat(logged); err == nil {
				return
			}
		}
		t.Error("the library waits for somebody to read its log")
	}()
	p, _ := open(t, c, remote)
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	came, lost := strings.Count(log.all(), "chatter"), 0
	for _, line := range log.list {
		n := 0
		fmt.Sscanf(line, "warning: %d lines of the library came too fast", &n)
		lost += n
	}
	if lost == 0 || came+lost < 16000 {
		t.Errorf("%d lines came, %d are told lost, of 16000", came, lost)
	}
}

// Lines that the parent is too slow for must not hold up completions.
func TestReadsAmongTheLog(t *testing.T) {
	log := &lines{}
	p, _ := open(t, config(t, log, "STUB_DO= Read=chat "), remote)
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			for i := range 50 {
				if err := p.Read(deadline(t), slot, uint64(i), 1); err != nil {
					t.Error(err)
				} else if !bytes.Equal(p.Slot(slot)[:512], pattern(uint64(i), 1)) {
					t.Errorf("sector %d differs", i)
				}
			}
		})
	}
	wg.Wait()
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	if all := log.all(); !strings.Contains(all, "info: Close\n") && !strings.Contains(all, "came too fast") {
		t.Error("neither all lines nor their number")
	}
}

func TestOutput(t *testing.T) {
	log := &lines{}
	p, err := worker.Start(deadline(t), config(t, log, "STUB_DO= InitEx=print InitEx=abort "))
	if err == nil {
		p.Release()
	}
	var gone *worker.GoneError
	if p, err = worker.Start(deadline(t), config(t, log, "STUB_DO= InitEx=print Async=abort ")); err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.Open(deadline(t), remote)
	err = p.Read(deadline(t), 0, 0, 1)
	if !errors.As(err, &gone) || !slices.Equal(gone.Last, []string{"printed to stdout", "half a line of stderr", "free(): invalid pointer"}) {
		t.Errorf("%+v", err)
	}
	if all := log.all(); !strings.Contains(all, "output: half a line of stderr\n") || !strings.Contains(all, "output: free(): invalid pointer") {
		t.Error(log.all())
	}
}

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

// parent is the other process of TestParentKilled.
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

// What a request leaves in the worker's memory when its answer has come.
func TestSecretsAreWiped(t *testing.T) {
	peer.NeedRoot(t) // to look into a process that is not dumpable
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

// memoryHolds looks through all that a process can write to.
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
	p := start(t, c) // the poller's own descriptors exist now
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

func BenchmarkRead(b *testing.B) {
	for _, depth := range []int{1, 4} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			p, _ := open(b, config(b, nil), remote)
			ctx := context.Background()
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			var wg sync.WaitGroup
			work := make(chan int, depth)
			for slot := range depth {
				wg.Go(func() {
					for i := range work {
						if err := p.Read(ctx, slot, uint64(i%7)*2048, 2048); err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ResetTimer()
			for i := range b.N {
				work <- i
			}
			close(work)
			wg.Wait()
		})
	}
}

func BenchmarkStart(b *testing.B) {
	c := config(b, nil)
	for range b.N {
		p, err := worker.Start(context.Background(), c)
		if err != nil {
			b.Fatal(err)
		}
		p.Release()
	}
}
