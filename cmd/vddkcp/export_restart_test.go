package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// TestExportRestarts shuts a server down and starts it again while a guest reads and
// writes. The guest must see no error: requests that the first server did not execute
// get no reply, so that qemu sends them to the next server.
func TestExportRestarts(t *testing.T) {
	peer.Need(t, "qemu-io", "stdbuf")
	for name, flags := range map[string][]string{"read-only": nil, "rw": {"--rw"}, "cow": {"--cow=LAYER"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t, false)
			disk := filepath.Join(p.dir, "disk.raw")
			if err := os.WriteFile(disk, bytes.Repeat([]byte{5}, 8<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			args := []string{"export", disk, "--listen", "unix:" + p.socket()}
			for _, f := range flags {
				args = append(args, strings.Replace(f, "LAYER", filepath.Join(p.dir, "layer"), 1))
			}
			server := listening(t, args...)
			image := "driver=nbd,server.type=unix,server.path=" + p.socket() + ",reconnect-delay=60"
			qemu := newQemuIO(t, flags == nil, image)
			qemu.say("read -P 5 4M 64k")
			qemu.await("read 65536/65536")
			for round := range 8 {
				for i := range 20 {
					if flags != nil {
						qemu.say("aio_write -P %d %d 64k", round+1, i<<16)
					}
					qemu.say("aio_read -P 5 %d 1M", 4<<20+i<<16)
				}
				if err := server.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				for i := range 20 { // some come when the server ends, some when it has ended
					qemu.say("aio_read -P 5 %d 64k", 6<<20+i<<16)
				}
				if err := server.Wait(); err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				server = listening(t, args...)
				if flags != nil {
					qemu.say("flush")
				}
				qemu.say("aio_flush")
				// It has come to this server before that is stopped too.
				n := 4096 + 512*round
				qemu.say("read -P 5 4M %d", n)
				qemu.await(fmt.Sprintf("read %d/%d", n, n))
			}
			if flags != nil {
				qemu.say("read -P 8 0 %d", 20<<16)
			}
			out := qemu.end()
			if lower := strings.ToLower(out); strings.Contains(lower, "fail") || strings.Contains(lower, "error") {
				t.Errorf("qemu-io saw errors:\n%s", out)
			}
			if n := strings.Count(out, "read "); n < 8*40 {
				t.Errorf("%d reads were done, want %d or more", n, 8*40)
			}
			server.Process.Signal(syscall.SIGTERM)
			if err := server.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// listening starts a server and returns when it listens.
func listening(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	cmd := command(t, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("vddkcp %s: it ended before it listened: %v", strings.Join(args, " "), err)
	}
	return cmd
}

// qemuIO is a qemu-io that takes commands until end.
type qemuIO struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser

	mu   sync.Mutex
	more *sync.Cond
	out  strings.Builder
}

func newQemuIO(t *testing.T, readOnly bool, image string) *qemuIO {
	t.Helper()
	// qemu-io polls its standard input, and so does not see what stdio has read
	// ahead.
	args := []string{"-i0", "qemu-io", "--image-opts", image}
	if readOnly {
		args = append(args, "-r")
	}
	q := &qemuIO{t: t, cmd: exec.Command("stdbuf", args...)}
	q.more = sync.NewCond(&q.mu)
	var err error
	if q.in, err = q.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	q.cmd.Stdout, q.cmd.Stderr = q, q
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { q.cmd.Process.Kill() })
	return q
}

// Write receives the output of qemu-io.
func (q *qemuIO) Write(p []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	defer q.more.Broadcast()
	return q.out.Write(p)
}

func (q *qemuIO) say(format string, args ...any) {
	q.t.Helper()
	if _, err := fmt.Fprintf(q.in, format+"\n", args...); err != nil {
		q.t.Fatalf("qemu-io: %v\n%s", err, q.end())
	}
}

// await waits until qemu-io has printed text.
func (q *qemuIO) await(text string) {
	q.t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	for !strings.Contains(q.out.String(), text) {
		if strings.Contains(q.out.String(), "ailed") {
			q.t.Fatalf("qemu-io did not say %q:\n%s", text, q.out.String())
		}
		q.more.Wait()
	}
}

// end ends qemu-io and returns all its output.
func (q *qemuIO) end() string {
	q.in.Close()
	err := q.cmd.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if err != nil {
		q.t.Errorf("qemu-io: %v", err)
	}
	return q.out.String()
}
