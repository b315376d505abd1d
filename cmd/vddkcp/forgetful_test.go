package main

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// forgetful is a disk on a server that loses unflushed writes when it crashes.
type forgetful struct {
	mu               sync.Mutex
	current, durable []byte
	lies             bool // about Flush, which does nothing
}

func (f *forgetful) Size() int64  { return int64(len(f.durable)) }
func (f *forgetful) Close() error { return nil }

func (f *forgetful) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return copy(p, f.current[off:]), nil
}

func (f *forgetful) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}

func (f *forgetful) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return copy(f.current[off:], p), nil
}

func (f *forgetful) ZeroAt(_ context.Context, off, n int64, _ source.ZeroFlags) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.current[off : off+n])
	return nil
}

func (f *forgetful) Trim(context.Context, int64, int64) error { return nil }

func (f *forgetful) Flush(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.lies {
		copy(f.durable, f.current)
	}
	return nil
}

func (f *forgetful) crash() {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.current, f.durable)
}

// crashing is a listener whose connections can be cut.
type crashing struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (c *crashing) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.mu.Lock()
		c.conns = append(c.conns, conn)
		c.mu.Unlock()
	}
	return conn, err
}

// serveForgetful serves the disk until crash is called. crash returns after the server
// has ended and lost the unflushed writes.
func serveForgetful(t *testing.T, disk *forgetful, socket string) (crash func()) {
	t.Helper()
	s, err := server.New(server.Fixed{{Disk: disk}}, server.Options{Writable: true, Grace: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen(t.Context(), "unix:"+socket)
	if err != nil {
		t.Fatal(err)
	}
	cut := &crashing{Listener: l}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, cut) }()
	return sync.OnceFunc(func() {
		cut.mu.Lock()
		for _, c := range cut.conns {
			c.Close()
		}
		cut.mu.Unlock()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the server: %v", err)
		}
		disk.crash()
	})
}

// TestForgetfulTarget copies to a server that crashes again and again and loses
// unflushed writes each time. The copy must be complete in the end.
func TestForgetfulTarget(t *testing.T) {
	needChaos(t)
	const size = 96 << 20
	binary := chaosBinary(t)
	dir := t.TempDir()
	src, socket := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "s")
	random(t, src, size)
	content, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	disk := &forgetful{current: make([]byte, size), durable: make([]byte, size)}
	crash := serveForgetful(t, disk, socket)
	defer func() { crash() }()
	target := chaosTarget{name: "nbd", args: []string{"--retries", "20"}}
	cmd, stderr := chaosCopy(t, binary, target, src, "nbd+unix:///?socket="+socket, filepath.Join(dir, "journal"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	r := rand.New(rand.NewPCG(4, 4))
	crashes := 0
	for running := true; running; {
		select {
		case err = <-ended:
			running = false
		case <-time.After(time.Duration(200+r.IntN(500)) * time.Millisecond):
			if crashes++; crashes <= 4 {
				crash()
				crash = serveForgetful(t, disk, socket)
			}
		}
	}
	if err != nil {
		t.Fatalf("after %d crashes: %v\n%s", crashes, err, stderr)
	}
	if crashes < 3 {
		t.Errorf("only %d crashes", crashes)
	}
	// The last crash of all: what the copy says is durable is what is left.
	crash()
	if string(disk.durable) != string(content) {
		t.Errorf("after %d crashes and exit 0 the content differs\n%s", crashes, stderr)
	}
}

// TestLyingTarget copies to a server that acknowledges a write without executing it.
// --verify must find the difference.
func TestLyingTarget(t *testing.T) {
	dir := t.TempDir()
	src, socket, reportFile := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "s"), filepath.Join(dir, "report.json")
	random(t, src, 8<<20)
	disk := &liar{forgetful{current: make([]byte, 8<<20), durable: make([]byte, 8<<20)}, 3 << 20}
	s, err := server.New(server.Fixed{{Disk: disk}}, server.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen(t.Context(), "unix:"+socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	defer func() { cancel(); <-ended }()
	r := vddkcp(t, "--verify", "--report", reportFile, src, "nbd+unix:///?socket="+socket)
	if r.exit != 3 {
		t.Errorf("exit status %d, want 3\n%s", r.exit, r.stderr)
	}
	text, err := os.ReadFile(reportFile)
	var got report.Report
	if err := errors.Join(err, json.Unmarshal(text, &got)); err != nil || got.Verify.Status != report.VerifyMismatch || got.Verify.Different == 0 {
		t.Errorf("report %s: %v", text, err)
	}
}

// liar is a disk that reports success for a write at one offset without writing.
type liar struct {
	forgetful
	at int64
}

func (l *liar) WriteAt(p []byte, off int64) (int, error) {
	if off <= l.at && l.at < off+int64(len(p)) {
		return len(p), nil
	}
	return l.forgetful.WriteAt(p, off)
}
