package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// place is where a server listens.
type place struct {
	dir, port string // port: of TCP; "": a socket in dir
}

func (p place) socket() string  { return filepath.Join(p.dir, "s") }
func (p place) pidFile() string { return filepath.Join(p.dir, "pid") }

func (p place) uri(export string) string {
	if p.port != "" {
		return "nbd://127.0.0.1:" + p.port + "/" + export
	}
	return "nbd+unix:///" + export + "?socket=" + url.QueryEscape(p.socket())
}

// newPlace makes a place on a Unix domain socket, or on a free port of TCP.
func newPlace(t *testing.T, tcp bool) place {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd") // a path that a socket may have
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := place{dir: dir}
	if tcp {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		p.port = strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
		l.Close()
	}
	return p
}

// daemon runs a server that goes into the background when it listens. Kill kills
// it, if it is there still, and returns when it is gone.
func daemon(t *testing.T, p place, program string, args ...string) (kill func()) {
	t.Helper()
	// Some write their process id after the one that was started has ended.
	var fifo *os.File
	if program != "qemu-nbd" { // which locks its file
		err := unix.Mkfifo(p.pidFile(), 0o600)
		if err == nil {
			fifo, err = os.OpenFile(p.pidFile(), os.O_RDWR, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer fifo.Close()
		fifo.SetReadDeadline(time.Now().Add(time.Minute))
	}
	peer.Run(t, program, args...)
	var text string
	var err error
	if fifo != nil {
		text, err = bufio.NewReader(fifo).ReadString('\n')
	} else {
		var b []byte
		b, err = os.ReadFile(p.pidFile())
		text = string(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("%s ended at once: %v", program, err)
	}
	done := false
	kill = func() {
		if done {
			return
		}
		done = true
		defer unix.Close(fd)
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		for {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err != unix.EINTR {
				break
			}
		}
		os.Remove(p.socket())
		os.Remove(p.pidFile())
	}
	t.Cleanup(kill)
	return kill
}

func nbdkit(t *testing.T, p place, args ...string) (kill func()) {
	t.Helper()
	where := []string{"-U", p.socket()}
	if p.port != "" {
		where = []string{"-i", "127.0.0.1", "-p", p.port}
	}
	return daemon(t, p, "nbdkit", append(append(where, "-P", p.pidFile()), args...)...)
}

func qemuNBD(t *testing.T, p place, args ...string) {
	t.Helper()
	where := []string{"-k", p.socket()}
	if p.port != "" {
		where = []string{"-b", "127.0.0.1", "-p", p.port}
	}
	daemon(t, p, "qemu-nbd", append(append(where, "--fork", "--persistent", "--pid-file", p.pidFile()), args...)...)
}

func nbdServer(t *testing.T, p place, path string) {
	t.Helper()
	where := "unixsock = " + p.socket()
	if p.port != "" {
		where = "listenaddr = 127.0.0.1\nport = " + p.port
	}
	config := filepath.Join(p.dir, "config")
	text := fmt.Sprintf("[generic]\nallowlist = true\n%s\n[disk]\nexportname = %s\nflush = true\nfua = true\ntrim = true\n", where, path)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon(t, p, "nbd-server", "-C", config, "-p", p.pidFile())
	awaitListener(t, p)
}

// awaitListener returns when a server listens at p: nbd-server writes its process
// id before.
func awaitListener(t *testing.T, p place) {
	t.Helper()
	network, address := "unix", p.socket()
	if p.port != "" {
		network, address = "tcp", "127.0.0.1:"+p.port
	}
	for deadline := time.Now().Add(time.Minute); ; {
		conn, err := net.Dial(network, address)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// mixedDisk writes a disk with data, short and long holes, and returns its path
// and its content.
func mixedDisk(t *testing.T, size int) (path string, content []byte) {
	t.Helper()
	content = make([]byte, size)
	rand.NewChaCha8([32]byte{9}).Read(content)
	clear(content[size/4 : size/2])
	clear(content[size*5/8 : size*5/8+70000])
	path = filepath.Join(t.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(size)); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]int{{0, size / 4}, {size / 2, size * 5 / 8}, {size*5/8 + 70000, size}} {
		if _, err := f.WriteAt(content[r[0]:r[1]], int64(r[0])); err != nil {
			t.Fatal(err)
		}
	}
	return path, content
}

// junk fills a target with what must not be left of it.
func junk(t *testing.T, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "target.raw")
	if err := os.WriteFile(path, bytes.Repeat([]byte{0xAA}, size), 0o666); err != nil {
		t.Fatal(err)
	}
	return path
}

// copied runs a copy that must succeed, and returns its report.
func copied(t *testing.T, args ...string) (r report.Report) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "report.json")
	if got := vddkcp(t, append([]string{"--progress", "none", "--report", path}, args...)...); got.exit != 0 {
		t.Fatalf("exit status %d\n%s", got.exit, got.stderr)
	}
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// bothWays copies a disk to an export, which is the file target, and back.
func bothWays(t *testing.T, uri, disk, target string, content []byte) (to, from report.Report) {
	t.Helper()
	to = copied(t, "--verify", disk, uri)
	sameContent(t, target, content)
	out := filepath.Join(t.TempDir(), "out.raw")
	from = copied(t, "--verify", uri, out)
	sameContent(t, out, content)
	return to, from
}

func sameContent(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that differ from the disk's %d", path, len(got), len(want))
	}
}

func eachPlace(t *testing.T, test func(t *testing.T, p place)) {
	t.Run("unix", func(t *testing.T) { t.Parallel(); test(t, newPlace(t, false)) })
	t.Run("tcp", func(t *testing.T) { t.Parallel(); test(t, newPlace(t, true)) })
}

// Every kind of server that nbdkit can be.
func TestNBDWithNbdkit(t *testing.T) {
	peer.Need(t, "nbdkit")
	disk, content := mixedDisk(t, 8<<20)
	for _, c := range []struct {
		name          string
		before, after []string // of the plugin
		connections   int      // that reading uses
		tcp           bool     // in this way too
	}{
		{name: "plain", connections: 4, tcp: true},
		{name: "oldstyle", before: []string{"-o"}, connections: 4, tcp: true},
		{name: "no structured replies", before: []string{"--no-sr"}, connections: 4},
		{name: "newstyle not fixed, with padding", before: []string{"--mask-handshake=0"}, connections: 4},
		{name: "fixed newstyle with padding", before: []string{"--mask-handshake=1"}, connections: 4},
		{name: "newstyle not fixed", before: []string{"--mask-handshake=2"}, connections: 4},
		{name: "no extents", before: []string{"--filter=noextents"}, connections: 4},
		{name: "no zeroes", before: []string{"--filter=nozero"}, connections: 4},
		{name: "zeroes emulated", before: []string{"--filter=nozero"}, after: []string{"zeromode=emulate", "fastzeromode=slow"}, connections: 4},
		{name: "one request at a time", before: []string{"--filter=noparallel"}, after: []string{"serialize=requests"}, connections: 4},
		{name: "late", before: []string{"--filter=delay"}, after: []string{"delay-read=2ms", "delay-write=2ms", "delay-zero=2ms", "delay-extents=20ms"}, connections: 4},
		{name: "one connection", before: []string{"--filter=multi-conn"}, after: []string{"multi-conn-mode=disable"}, connections: 1, tcp: true},
		{name: "blocks of 512 to 1M", before: []string{"--filter=blocksize-policy"}, after: []string{"blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=1M", "blocksize-error-policy=error"}, connections: 4},
		{name: "blocks of 64K to 128K", before: []string{"--filter=blocksize-policy"}, after: []string{"blocksize-minimum=64K", "blocksize-preferred=64K", "blocksize-maximum=128K", "blocksize-error-policy=error"}, connections: 4},
		{name: "extents fail", before: []string{"--filter=error"}, after: []string{"error-extents-rate=50%"}, connections: 4},
		{name: "reads fail", before: []string{"--filter=error"}, after: []string{"error-pread-rate=10%"}, connections: 4},
		{name: "the server shuts down", before: []string{"--filter=error"}, after: []string{"error-pread-rate=10%", "error=ESHUTDOWN"}, connections: 4},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			places := []bool{false}
			if c.tcp {
				places = append(places, true)
			}
			for _, tcp := range places {
				p, target := newPlace(t, tcp), junk(t, len(content))
				log := filepath.Join(p.dir, "log")
				args := append([]string{"--filter=log"}, c.before...)
				nbdkit(t, p, append(append(args, "file", target, "logfile="+log), c.after...)...)
				if strings.HasPrefix(c.name, "reads fail") || c.name == "the server shuts down" {
					// Reading back what was written is not repeated.
					copied(t, disk, p.uri(""))
					out := filepath.Join(p.dir, "out")
					copied(t, p.uri(""), out)
					sameContent(t, out, content)
					continue
				}
				to, from := bothWays(t, p.uri(""), disk, target, content)
				if from.Connections != c.connections || from.Transport != "nbd" {
					t.Errorf("report: %d connections by %q, want %d by nbd", from.Connections, from.Transport, c.connections)
				}
				text, err := os.ReadFile(log)
				if n := strings.Count(string(text), " Connect "); err != nil || n != 2*c.connections {
					t.Errorf("%d connections for two copies, want %d: %v", n, 2*c.connections, err)
				}
				if unflushed := c.name == "oldstyle"; unflushed != strings.Contains(strings.Join(to.Warnings, "\n"), "does not support FLUSH") {
					t.Errorf("warnings %q, want one of FLUSH: %v", to.Warnings, unflushed)
				}
			}
		})
	}
}

// Writes that fail are the end, and named.
func TestNBDWriteFails(t *testing.T) {
	peer.Need(t, "nbdkit")
	disk, content := mixedDisk(t, 8<<20)
	p := newPlace(t, false)
	nbdkit(t, p, "--filter=error", "memory", strconv.Itoa(len(content)), "error-pwrite-rate=100%", "error=ENOSPC")
	r := vddkcp(t, "--progress", "none", disk, p.uri(""))
	if r.exit != 1 || !strings.Contains(r.stderr, "): the server says: no space left (ENOSPC)") || !strings.Contains(r.stderr, p.uri("")) {
		t.Errorf("exit status %d\n%s", r.exit, r.stderr)
	}
}

// Servers that compare what is written with what they have.
func TestNBDCopyOfItself(t *testing.T) {
	peer.Need(t, "nbdkit")
	disk, _ := mixedDisk(t, 8<<20)
	for name, args := range map[string][]string{
		"sparse random":        {"sparse-random", "size=4G", "seed=7"},
		"checkwrite":           {"--filter=checkwrite", "file", disk},
		"checkwrite, oldstyle": {"-o", "--filter=checkwrite", "file", disk},
		"checkwrite, no zeros": {"--no-sr", "--filter=checkwrite", "--filter=nozero", "file", disk},
	} {
		t.Run(name, func(t *testing.T) {
			eachPlace(t, func(t *testing.T, p place) {
				nbdkit(t, p, args...)
				copied(t, p.uri(""), p.uri(""))
				if strings.HasPrefix(name, "sparse") {
					return
				}
				copied(t, disk, p.uri(""))
				// It finds what is wrong, or all of this proves nothing.
				other := junk(t, 8<<20)
				if r := vddkcp(t, "--progress", "none", other, p.uri("")); r.exit != 1 {
					t.Errorf("another disk: exit status %d\n%s", r.exit, r.stderr)
				}
			})
		})
	}
}

func TestNBDWithQemu(t *testing.T) {
	peer.Need(t, "qemu-nbd", "qemu-img")
	disk, content := mixedDisk(t, 8<<20)
	for _, format := range []string{"raw", "qcow2", "vmdk"} {
		t.Run(format, func(t *testing.T) {
			eachPlace(t, func(t *testing.T, p place) {
				target := filepath.Join(p.dir, "target")
				peer.Run(t, "qemu-img", "create", "-q", "-f", format, target, strconv.Itoa(len(content)))
				qemuNBD(t, p, "-f", format, "--shared", "8", "--export-name", "a/b", target)
				copied(t, "--verify", disk, p.uri("a/b"))
				out := filepath.Join(p.dir, "out")
				if r := copied(t, "--verify", p.uri("a/b"), out); r.Connections != 4 || r.ExtentsSource != "map" && format != "vmdk" {
					t.Errorf("report: %d connections, extents by %s", r.Connections, r.ExtentsSource)
				}
				sameContent(t, out, content)
				copied(t, p.uri("a/b"), p.uri("a/b"))
				peer.Run(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", format, disk, target)
			})
		})
	}
	t.Run("one client", func(t *testing.T) {
		// Asking it is no use of it: it waits for its client all the same.
		p, target := newPlace(t, false), junk(t, len(content))
		daemon(t, p, "qemu-nbd", "-k", p.socket(), "--fork", "--pid-file", p.pidFile(), "-f", "raw", target)
		for range 2 {
			if r := vddkcp(t, "--dry-run", disk, p.uri("")); r.exit != 0 || strings.Contains(r.stderr, "not checked") {
				t.Fatalf("exit status %d\n%s", r.exit, r.stderr)
			}
		}
		copied(t, "--verify", disk, p.uri(""))
		sameContent(t, target, content)
	})
}

func TestNBDWithNBDServer(t *testing.T) {
	peer.Need(t, "nbd-server")
	disk, content := mixedDisk(t, 8<<20)
	eachPlace(t, func(t *testing.T, p place) {
		target := junk(t, len(content))
		nbdServer(t, p, target)
		bothWays(t, p.uri("disk"), disk, target, content)
		if r := vddkcp(t, "--dry-run", disk, p.uri("disk")); r.exit != 0 || !strings.Contains(r.stderr, "not checked") {
			t.Errorf("exit status %d\n%s", r.exit, r.stderr)
		}
		if r := vddkcp(t, disk, p.uri("other")); r.exit != 1 || !strings.Contains(r.stderr, `no export "other"`) || !strings.Contains(r.stderr, `hint: the server has "disk"`) {
			t.Errorf("exit status %d\n%s", r.exit, r.stderr)
		}
	})
}

// TestNBDHints checks that errors say what to do, both in a copy and in a dry run.
func TestNBDHints(t *testing.T) {
	peer.Need(t, "nbdkit")
	disk, content := mixedDisk(t, 1<<20)
	size := strconv.Itoa(len(content))
	serve := func(args ...string) func(t *testing.T) string {
		return func(t *testing.T) string {
			p := newPlace(t, false)
			nbdkit(t, p, args...)
			return p.uri("")
		}
	}
	for _, c := range []struct {
		name       string
		uri        func(t *testing.T) string
		want, hint string
	}{
		{"nobody on the port", func(t *testing.T) string { return newPlace(t, true).uri("") }, "connection refused", "hint: check that the server runs on host 127.0.0.1 and listens on port"},
		{"no socket", func(t *testing.T) string { return newPlace(t, false).uri("") }, "there is no socket", "hint: start the server, which creates the socket"},
		{"nobody on the socket", func(t *testing.T) string {
			p := newPlace(t, false)
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.socket()})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			l.Close()
			return p.uri("")
		}, "connection refused", "hint: start the server again: the socket exists"},
		{"another export", func(t *testing.T) string {
			p := newPlace(t, false)
			nbdkit(t, p, "--filter=exportname", "memory", size, "exportname-strict=true", "exportname-list=explicit", "exportname=one", "exportname=two")
			return p.uri("three")
		}, `no export "three"`, `hint: the server has "one", "two"`},
		{"read-only", serve("-r", "memory", size), "the export is read-only", "hint: start the server without -r"},
		{"too small", serve("memory", "512K"), "too small: the export has 524288 bytes (512.0 KiB), and the disk has 1048576", "hint: export a disk of at least 1048576 bytes"},
		{"no TLS", func(t *testing.T) string { return "nbds" + strings.TrimPrefix(serve("memory", size)(t), "nbd") }, "the server does not support TLS", "hint: use nbd:// or nbd+unix://"},
		{"TLS", func(t *testing.T) string {
			p := newPlace(t, false)
			secret := filepath.Join(p.dir, "psk")
			if err := os.WriteFile(secret, []byte("alice:0123456789abcdef0123456789abcdef\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			nbdkit(t, p, "--tls=require", "--tls-psk="+secret, "memory", size)
			return p.uri("")
		}, "the server demands TLS", "hint: use nbds+unix:///?socket="},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			uri := c.uri(t)
			for _, flag := range []string{"--progress=none", "--dry-run"} {
				if r := vddkcp(t, flag, disk, uri); r.exit != 1 || !strings.Contains(r.stderr, c.want) || !strings.Contains(r.stderr, c.hint) || !strings.Contains(r.stderr, uri) {
					t.Errorf("%s: exit status %d\n%s\nwant %q and %q", flag, r.exit, r.stderr, c.want, c.hint)
				}
			}
		})
	}
}

// A server that is killed in mid-copy and started again.
func TestNBDServerKilled(t *testing.T) {
	peer.Need(t, "nbdkit")
	needChaos(t)
	binary := chaosBinary(t)
	const size = 48 << 20
	disk, content := mixedDisk(t, size)
	eachPlace(t, func(t *testing.T, p place) {
		for _, way := range []string{"source", "target"} {
			out, reportFile := junk(t, size), filepath.Join(p.dir, "report.json")
			args := []string{"--filter=delay", "file", out, "delay-write=300ms", "delay-zero=300ms"}
			src, dst := disk, p.uri("")
			if way == "source" {
				args = []string{"-r", "--filter=delay", "file", disk, "delay-read=300ms"}
				src, dst = p.uri(""), filepath.Join(p.dir, "out.raw")
				out = dst
			}
			kill := nbdkit(t, p, args...)
			cmd, _ := chaosCopy(t, binary, chaosTarget{name: "nbd"}, src, dst, filepath.Join(p.dir, "journal-"+way))
			cmd.Args = append(cmd.Args[:1:1], append([]string{"--progress", "json", "--request-size", "256KiB"}, withoutProgress(cmd.Args[1:])...)...)
			cmd.Stderr = nil
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			kills, last := 0, int64(0)
			var text strings.Builder
			for lines := bufio.NewScanner(stderr); lines.Scan(); {
				text.WriteString(lines.Text() + "\n")
				var line struct {
					Type  string `json:"type"`
					Done  int64  `json:"bytes_done"`
					Phase string `json:"phase"`
				}
				if json.Unmarshal(lines.Bytes(), &line) != nil || line.Type != "progress" || line.Phase != "copy" {
					continue
				}
				if kills < 2 && line.Done > last && line.Done < size/2 {
					kill()
					kill = nbdkit(t, p, args...)
					kills, last = kills+1, line.Done
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%s: %v\n%s", way, err, text.String())
			}
			if kills == 0 {
				t.Errorf("%s: the server was never killed\n%s", way, text.String())
			}
			sameContent(t, out, content)
			var r report.Report
			b, err := os.ReadFile(reportFile)
			if err == nil {
				err = json.Unmarshal(b, &r)
			}
			if err != nil || r.Status != report.StatusOK || way == "source" && r.Retries == 0 {
				t.Errorf("%s: report %s: %v", way, b, err)
			}
			kill()
		}
	})
}

// withoutProgress drops what chaosCopy says of progress.
func withoutProgress(args []string) []string {
	for i, a := range args {
		if a == "--progress" {
			return append(args[:i:i], args[i+2:]...)
		}
	}
	return args
}
