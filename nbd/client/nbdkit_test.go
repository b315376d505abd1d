package client_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// serve starts nbdkit on a Unix domain socket, and returns its URI.
func serve(t testing.TB, args ...string) string {
	t.Helper()
	peer.Need(t, "nbdkit")
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir is too long for the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket, pidFile := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	return start(t, pidFile, socketURI(socket), "nbdkit", append([]string{"-f", "-U", socket, "-P", pidFile}, args...)...)
}

func socketURI(socket string) string { return "nbd+unix:///?socket=" + url.QueryEscape(socket) }

// start starts a server and waits until it listens, which is when it has written its process
// ID.
func start(t testing.TB, pidFile, uri, program string, args ...string) string {
	t.Helper()
	if err := exec.Command("mkfifo", pidFile).Run(); err != nil {
		t.Fatal(err)
	}
	// The pipe is opened for reading and writing, so that the opening does not block.
	ready, err := os.OpenFile(pidFile, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ready.Close() })
	ready.SetReadDeadline(time.Now().Add(time.Minute))
	cmd := exec.Command(program, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	t.Cleanup(func() {
		select {
		case <-exited:
			if t.Failed() {
				t.Logf("%v had ended by itself: %v\n%s", cmd.Args, cmd.ProcessState, stderr.String())
			}
		default:
		}
		cmd.Process.Kill()
		<-exited
	})
	go func() {
		cmd.Wait()
		close(exited)
		ready.SetReadDeadline(time.Now()) // ends the wait for the process ID
	}()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		cmd.Process.Kill()
		<-exited
		t.Fatalf("%v did not start: %v\n%s", cmd.Args, err, stderr.String())
	}
	return uri
}

// content returns the content of a disk with data, short and long holes, and a size that is
// not a multiple of 512 bytes.
func content(size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{7}).Read(b)
	clear(b[size/4 : size/2])
	clear(b[size*5/8 : size*5/8+70000])
	return b
}

// sparse writes content to a file with holes where it is zero.
func sparse(t testing.TB, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero := make([]byte, 4096)
	for off := 0; off < len(content); off += 4096 {
		p := content[off:min(off+4096, len(content))]
		if bytes.Equal(p, zero[:len(p)]) {
			continue
		}
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSource(t *testing.T) {
	odd := content(1<<20 + 777)
	even := content(1 << 20)
	for _, c := range []struct {
		name    string
		content []byte
		before  []string // arguments before the plugin
		after   []string
	}{
		{name: "plain", content: odd},
		{name: "oldstyle", content: odd, before: []string{"-o"}},
		{name: "newstyle not fixed", content: even, before: []string{"--mask-handshake=0"}},
		{name: "no structured replies", content: odd, before: []string{"--no-sr"}},
		{name: "no extents", content: even, before: []string{"--filter=noextents"}},
		{name: "one connection", content: even, before: []string{"--filter=multi-conn"}, after: []string{"multi-conn-mode=disable"}},
		{name: "blocks", content: even, before: []string{"--filter=blocksize-policy"}, after: []string{"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"}},
		{name: "extents fail", content: even, before: []string{"--filter=error"}, after: []string{"error-extents-rate=100%"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			args := append(append([]string{"-r"}, c.before...), "file", sparse(t, c.content))
			args = append(args, c.after...)
			sourcetest.Run(t, sourcetest.Config{Content: c.content, Open: func(ctx context.Context, sub testing.TB) source.Disk {
				// nbdkit 1.32 crashes now and then after a client has disconnected
				// (connections.c, raw_send_socket: Assertion `sock >= 0' failed). So each
				// disk has an nbdkit of its own.
				d, err := client.Open(ctx, parseURI(sub, serve(sub, args...)), client.Options{})
				if err != nil {
					sub.Fatal(err)
				}
				return d
			}})
		})
	}
}

// exported is a target that an nbdkit of its own exports.
type exported struct {
	uri string
	has int64
	t   testing.TB
}

func (e exported) Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error) {
	return client.Create(ctx, parseURI(e.t, e.uri), size, client.SinkOptions{Options: o})
}

func (e exported) Published() ([]byte, bool) {
	d, err := client.Open(e.t.Context(), parseURI(e.t, e.uri), client.Options{})
	if err != nil {
		e.t.Error(err)
		return nil, false
	}
	defer d.Close()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		e.t.Error(err)
	}
	return b, true
}

func (exported) Leftovers() []string { return nil }

func TestSink(t *testing.T) {
	for _, c := range []struct {
		name          string
		unit          int64
		before, after []string
	}{
		{name: "plain", unit: 512},
		{name: "no zeroes", unit: 512, before: []string{"--filter=nozero"}},
		{name: "slow zeroes", unit: 512, before: []string{"--filter=nozero"}, after: []string{"zeromode=emulate", "fastzeromode=slow"}},
		{name: "blocks", unit: 4096, before: []string{"--filter=blocksize-policy"}, after: []string{"blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			size := sinktest.MaxSize(c.unit)
			path := filepath.Join(t.TempDir(), "target")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			uri := serve(t, append(append(c.before, "file", path), c.after...)...)
			sinktest.Test(t, sinktest.Config{Unit: c.unit, InPlace: true, New: func(t testing.TB) sinktest.Target {
				if err := os.WriteFile(path, bytes.Repeat([]byte{0xAA}, int(size)), 0o600); err != nil {
					t.Fatal(err)
				}
				return exported{uri, size, t}
			}})
		})
	}
}

func parseURI(t testing.TB, s string) *nbd.URI {
	t.Helper()
	uri, err := nbd.ParseURI(s)
	if err != nil {
		t.Fatal(err)
	}
	return uri
}
