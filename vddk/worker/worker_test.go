package worker_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// built is the folder of the programs and libraries that tests have built so far.
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

// build runs a command that builds the file name, once for each name, and returns its path.
func build(t testing.TB, name string, command ...string) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("VDDK needs x86-64")
	}
	peer.Need(t, "gcc")
	built.Lock()
	defer built.Unlock()
	// go test runs a cached test again only if files have changed that the test itself reads,
	// and not those that gcc reads.
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

// stub builds a library for these tests, with all functions or with those of version 5.
func stub(t testing.TB, old bool) string {
	args := []string{"gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-O1", "-o", "OUT", "testdata/stub.c", "-lpthread"}
	if old {
		return build(t, "libvixDiskLib.so.5", append(args, "-DOLD")...)
	}
	return build(t, "libvixDiskLib.so.8", args...)
}

// lines collects the log lines of a worker.
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

// start starts a worker, which is released at the end of the test.
func start(t testing.TB, c worker.Config) *worker.Process {
	t.Helper()
	p, err := worker.Start(deadline(t), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Release)
	return p
}

// deadline returns a context for calls that must not hang. Its time is much longer than they need.
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

// pattern returns the content of sectors of the stub's disk.
func pattern(sector uint64, sectors int) []byte {
	b := make([]byte, 0, sectors*512)
	for i := sector * 64; i < (sector+uint64(sectors))*64; i++ {
		b = binary.LittleEndian.AppendUint64(b, i*0x9e3779b97f4a7c15)
	}
	return b
}

// variants runs a test with each kind of library and of worker program.
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
		"beyond": "VixDiskLib_QueryAllocatedBlocks returned a block of 128 sectors at sector 1280, expected a block that is not empty, begins at sector 0 or later, and ends at sector 1280 or earlier",
		"many":   "VixDiskLib_QueryAllocatedBlocks: the call succeeded without a list, or with more blocks than chunks",
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

// Opening and closing a disk does not end the access to the VM, because other disks of the VM may be
// open.
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
