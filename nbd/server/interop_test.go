package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// file is a writable raw disk.
type file struct {
	*raw.Disk
	f *os.File
}

func openFile(t testing.TB, path string) file {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return file{openRaw(t, path), f}
}

func (f file) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

func (f file) ZeroAt(_ context.Context, off, n int64, flags source.ZeroFlags) error {
	mode := uint32(unix.FALLOC_FL_ZERO_RANGE)
	if flags.Has(source.MayTrim) {
		mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	}
	return unix.Fallocate(int(f.f.Fd()), mode, off, n)
}

func (f file) Trim(ctx context.Context, off, n int64) error {
	return f.ZeroAt(ctx, off, n, source.MayTrim)
}

func (f file) Flush(context.Context) error { return f.f.Sync() }

// place is the address of a server for other programs.
type place struct {
	*serving
	uri, dir string // dir is the directory with certificates
}

// qemu returns the arguments with which qemu-img and qemu-io open the export.
func (p place) qemu() []string {
	if p.dir == "" {
		return []string{"-f", "raw", p.uri}
	}
	a := p.Addr().(*net.TCPAddr)
	return append(p.object(), "--image-opts", fmt.Sprintf("driver=nbd,server.type=inet,server.host=localhost,server.port=%d,export=disk,tls-creds=t0", a.Port))
}

func (p place) object() []string {
	return []string{"--object", "tls-creds-x509,id=t0,dir=" + p.dir + ",endpoint=client"}
}

// places serves a disk over all kinds of sockets, with and without TLS.
func places(t *testing.T, d func() source.Disk, writable bool, run func(t *testing.T, p place)) {
	for _, way := range []string{"unix", "tcp", "tls"} {
		t.Run(way, func(t *testing.T) {
			p, o, address := place{}, server.Options{Writable: writable}, "tcp://127.0.0.1:0"
			switch way {
			case "unix":
				address = "unix:" + socketPath(t)
			case "tls":
				p.dir = certificates(t)
				o.TLS, o.TLSMode = loadTLS(t, p.dir, true), server.TLSRequire
			}
			p.serving = serve(t, one("disk", d()), o, address)
			p.uri = server.URI(p.Addr(), way == "tls", "disk")
			if way == "tls" {
				p.uri = strings.Replace(p.uri, "127.0.0.1", "localhost", 1) + "?tls-certificates=" + url.QueryEscape(p.dir)
			}
			run(t, p)
		})
	}
}

func sameFile(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s differs: %d bytes, want %d, %v", path, len(got), len(want), err)
	}
}

func TestReaders(t *testing.T) {
	peer.Need(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "qemu-nbd")
	path, want := sparseFile(t, 24<<20+2048) // a quarter of the file is a hole
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, want, 0o600); err != nil {
		t.Fatal(err)
	}
	memory := &sourcetest.Memory{Bytes: want, ExtentList: []source.Extent{
		{Len: 6<<20 + 512}, {Off: 6<<20 + 512, Len: 6<<20 + 512, Kind: source.Zero}, {Off: 12<<20 + 1024, Len: 12<<20 + 1024},
	}}
	for name, open := range map[string]func(t *testing.T) source.Disk{
		"file":   func(t *testing.T) source.Disk { return openRaw(t, path) },
		"memory": func(*testing.T) source.Disk { return memory },
	} {
		t.Run(name, func(t *testing.T) {
			places(t, func() source.Disk { return open(t) }, false, func(t *testing.T, p place) {
				if got := strings.TrimSpace(peer.Run(t, "nbdinfo", "--size", p.uri)); got != fmt.Sprint(len(want)) {
					t.Errorf("nbdinfo --size: %s", got)
				}
				var info struct {
					Protocol string
					TLS      bool
					Exports  []struct {
						Name        string `json:"export-name"`
						Description string
						Contexts    []string
						Size        int64 `json:"export-size"`
						ReadOnly    bool  `json:"is_read_only"`
						MultiConn   bool  `json:"can_multi_conn"`
						DF          bool  `json:"can_df"`
						Max         int64 `json:"block_size_maximum"`
					}
				}
				if err := json.Unmarshal([]byte(peer.Run(t, "nbdinfo", "--list", "--json", p.uri)), &info); err != nil {
					t.Fatal(err)
				}
				if len(info.Exports) != 1 || info.TLS != (p.dir != "") || info.Protocol != "newstyle-fixed" {
					t.Fatalf("nbdinfo --list: %+v", info)
				}
				if e := info.Exports[0]; e.Name != "disk" || e.Description != "a disk for tests" || e.Size != int64(len(want)) || !e.ReadOnly || !e.MultiConn || !e.DF || e.Max != 32<<20 || strings.Join(e.Contexts, " ") != "base:allocation" {
					t.Errorf("nbdinfo --list: %+v", e)
				}
				var extents []struct{ Offset, Length, Type int64 }
				if err := json.Unmarshal([]byte(peer.Run(t, "nbdinfo", "--map", "--json", p.uri)), &extents); err != nil {
					t.Fatal(err)
				}
				if len(extents) != 3 || extents[1].Type != 3 || extents[1].Offset < 6<<20+512 || extents[1].Offset > 6<<20+4096 || extents[1].Length < 6<<20-4096 {
					t.Errorf("nbdinfo --map: %v", extents)
				}
				dir := t.TempDir()
				for i, args := range [][]string{{}, {"--synchronous"}, {"--no-extents", "-S0", "--request-size=1048576"}, {"-C1"}, {"--request-size=33554432"}, {"--requests=1"}} {
					out := filepath.Join(dir, fmt.Sprint("out", i))
					peer.Run(t, "nbdcopy", append(args, p.uri, out)...)
					sameFile(t, out, want)
				}
				peer.Run(t, "qemu-img", append([]string{"map", "--output=json"}, p.qemu()...)...)
				if p.dir == "" {
					peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", p.uri, plain)
				}
				out := filepath.Join(dir, "out.qcow2")
				peer.Run(t, "qemu-img", append([]string{"convert", "-O", "qcow2", "-m", "16", "-W"}, append(p.qemu(), out)...)...)
				peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", plain, out)
				io := []string{"-r", "-c", "read -P 0 6295552 4M", "-c", "aio_read 0 1M", "-c", "aio_read 5M 3M", "-c", "aio_flush", "-c", "map"}
				if text := peer.Run(t, "qemu-io", append(io, p.qemu()...)...); strings.Contains(text, "fail") {
					t.Errorf("qemu-io: %s", text)
				}
				list := []string{"-L", "-k", p.Addr().String()}
				if a, ok := p.Addr().(*net.TCPAddr); ok {
					list = []string{"-L", "-b", "localhost", "-p", fmt.Sprint(a.Port)}
				}
				if p.dir != "" {
					list = append(append(list, p.object()...), "--tls-creds=t0", "--tls-hostname=localhost")
				}
				if text := peer.Run(t, "qemu-nbd", list...); !strings.Contains(text, "base:allocation") || !strings.Contains(text, "max block: 33554432") {
					t.Errorf("qemu-nbd -L: %s", text)
				}
				if p.dir != "" {
					plain := strings.Replace(p.uri, "nbds:", "nbd:", 1)
					plain, _, _ = strings.Cut(plain, "?")
					if text, err := exec.Command("nbdinfo", plain).CombinedOutput(); err == nil || !strings.Contains(string(text), "TLS") {
						t.Errorf("nbdinfo without TLS: %v, %s", err, text)
					}
				}
			})
		})
	}
}

func TestWriters(t *testing.T) {
	peer.Need(t, "nbdcopy", "qemu-img", "qemu-io", "nbdinfo")
	const size = 24 << 20
	from, want := sparseFile(t, size)
	path := filepath.Join(t.TempDir(), "target")
	reset := func() source.Disk {
		if err := os.WriteFile(path, bytes.Repeat([]byte{0xAA}, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return openFile(t, path)
	}
	places(t, reset, true, func(t *testing.T, p place) {
		for _, can := range []string{"write", "flush", "fua", "trim", "zero", "fast-zero", "multi-conn", "cache", "df", "structured-reply"} {
			peer.Run(t, "nbdinfo", "--can", can, p.uri)
		}
		peer.Run(t, "nbdcopy", "--flush", from, p.uri)
		sameFile(t, path, want)
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > size*9/10 {
			t.Errorf("%d bytes allocated: the hole was written", st.Blocks*512)
		}
		io := append([]string{
			"-c", "write -P 0x5a 0 1M", "-c", "write -f -P 0x11 1M 64k", "-c", "write -z -u 512k 64k", "-c", "write -z 0 4k",
			"-c", "discard 1M 64k", "-c", "flush", "-c", "read -P 0 512k 512", "-c", "read -P 0x5a 4k 4k",
			"-c", "write -P 3 2000001 777", "-c", "read -P 3 2000001 777",
			"-c", "aio_write -P 7 2M 1M", "-c", "aio_read 0 1M", "-c", "aio_flush", "-c", "read -P 7 2M 1M", "-c", "map"}, p.qemu()...)
		if text := peer.Run(t, "qemu-io", io...); strings.Contains(text, "fail") {
			t.Errorf("qemu-io: %s", text)
		}
		if text, err := exec.Command("qemu-io", append([]string{"-c", "read 64M 512"}, p.qemu()...)...).CombinedOutput(); err == nil && !strings.Contains(string(text), "fail") {
			t.Errorf("qemu-io past the end: %s", text)
		}
		if p.dir == "" {
			peer.Run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", from, p.uri)
			sameFile(t, path, want)
		}
		peer.Run(t, "nbdcopy", "--request-size=33554432", from, p.uri)
		sameFile(t, path, want)
	})
}

func TestNBDClientLists(t *testing.T) {
	peer.Need(t, "nbd-client")
	exports := server.Fixed{
		{Export: server.Export{Name: "one"}, Disk: newDisk(4096)},
		{Export: server.Export{Name: "two", Description: "second"}, Disk: newDisk(4096)},
	}
	check := func(args ...string) {
		t.Helper()
		if text := peer.Run(t, "nbd-client", args...); !strings.Contains(text, "one\n") || !strings.Contains(text, "two: second\n") {
			t.Errorf("nbd-client %v: %s", args, text)
		}
	}
	s := serve(t, exports, server.Options{}, "tcp://127.0.0.1:0")
	check("-l", "127.0.0.1", fmt.Sprint(s.Addr().(*net.TCPAddr).Port))
	s = serve(t, exports, server.Options{}, "unix:"+socketPath(t))
	check("-l", "-unix", s.Addr().String())
}

// activated is the environment variable with the path of the disk that TestActivated serves.
const activated = "VDDKCP_TEST_ACTIVATED"

// TestActivated is the server that TestActivation starts in a process of its own.
func TestActivated(t *testing.T) {
	path := os.Getenv(activated)
	if path == "" {
		t.Skip("TestActivation runs it")
	}
	listeners, conns, err := server.Activated()
	if err != nil || len(listeners)+len(conns) != 1 {
		t.Fatalf("%v, %v, %v", listeners, conns, err)
	}
	if again, _, err := server.Activated(); again != nil || err != nil || os.Getenv("LISTEN_FDS") != "" {
		t.Fatalf("a second time: %v, %v", again, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := newServer(t, one("", openRaw(t, path)), server.Options{Left: func(others int) {
		if others == 0 {
			cancel()
		}
	}})
	for _, c := range conns {
		s.ServeConn(ctx, c)
	}
	if len(listeners) > 0 {
		if err := s.Serve(ctx, listeners...); err != nil {
			t.Fatal(err)
		}
	}
}

func TestActivation(t *testing.T) {
	path, want := sparseFile(t, 2<<20)
	t.Setenv(activated, path)
	command := []string{"[", os.Args[0], "-test.run=^TestActivated$", "]"}
	t.Run("listening", func(t *testing.T) {
		peer.Need(t, "nbdinfo", "nbdcopy")
		if got := peer.Run(t, "nbdinfo", append([]string{"--size", "--"}, command...)...); !strings.Contains(got, fmt.Sprint(2<<20)) {
			t.Errorf("nbdinfo --size: %s", got)
		}
		out := filepath.Join(t.TempDir(), "out")
		peer.Run(t, "nbdcopy", append(append([]string{"--"}, command...), out)...)
		sameFile(t, out, want)
	})
	t.Run("connected", func(t *testing.T) {
		ours, theirs := pair(t)
		defer ours.Close()
		f, err := theirs.(*net.UnixConn).File()
		if err != nil {
			t.Fatal(err)
		}
		theirs.Close()
		// The shell sets LISTEN_PID, since the process ID is known only after the fork.
		cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"`, "sh", os.Args[0], "-test.run=^TestActivated$")
		cmd.ExtraFiles = []*os.File{f}
		var text bytes.Buffer
		cmd.Stdout, cmd.Stderr = &text, &text
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		f.Close()
		c := &client{t: t, Conn: ours}
		c.greet(3)
		c.structure()
		c.enter("")
		c.reads(want, 0, 1<<20)
		c.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %s", err, text.String())
		}
	})
	t.Run("not for this process", func(t *testing.T) {
		t.Setenv("LISTEN_PID", "1")
		t.Setenv("LISTEN_FDS", "1")
		if listeners, conns, err := server.Activated(); listeners != nil || conns != nil || err != nil {
			t.Errorf("%v, %v, %v", listeners, conns, err)
		}
	})
	t.Run("nonsense", func(t *testing.T) {
		for _, n := range []string{"", "0", "-1", "x", "1000000000"} {
			t.Setenv("LISTEN_PID", fmt.Sprint(os.Getpid()))
			t.Setenv("LISTEN_FDS", n)
			if _, _, err := server.Activated(); err == nil {
				t.Errorf("LISTEN_FDS=%s: no error", n)
			}
		}
	})
}
