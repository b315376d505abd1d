package server_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// BenchmarkFile reads a file in the page cache with 16 requests in progress, from this server
// and from nbdkit, each in a process of its own.
func BenchmarkFile(b *testing.B) {
	const size = 1 << 30
	path := filepath.Join(b.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	random := rand.NewChaCha8([32]byte{1})
	if _, err := io.CopyN(f, random, size); err != nil {
		b.Fatal(err)
	}
	for name, start := range map[string]func(b *testing.B, path string) net.Conn{"vddkcp": startOwn, "nbdkit": startNbdkit} {
		conn := start(b, path)
		c := &client{t: b, Conn: conn}
		c.greet(3)
		c.structure()
		c.enter("")
		for _, n := range []int{4 << 10, 32 << 10, 64 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%s/%dKiB", name, n>>10), func(b *testing.B) { readAll(b, c, size, n) })
		}
	}
}

// BenchmarkMemory reads disks in memory of which 0, 50 and 100 percent are data.
func BenchmarkMemory(b *testing.B) {
	const size = 1 << 30
	for _, percent := range []int64{0, 50, 100} {
		var data []source.Extent
		for off := int64(0); off < size; off += 1 << 20 {
			if n := percent << 20 / 100; n > 0 {
				data = append(data, source.Extent{Off: off, Len: n})
			}
		}
		d := sourcetest.Pattern(size, data...)
		for _, n := range []int{4 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%d%%/%dKiB", percent, n>>10), func(b *testing.B) {
				readAll(b, ready(b, newServer(b, one("", d), server.Options{}), "", true), size, n)
			})
		}
	}
}

// readAll makes b.N reads of n bytes at random offsets, with 16 requests in progress.
func readAll(b *testing.B, c *client, size, n int) {
	b.SetBytes(int64(n))
	b.ReportAllocs()
	const depth = 16
	room := make(chan struct{}, depth)
	go func() {
		random := rand.New(rand.NewPCG(1, 2))
		var text []byte
		for i := range b.N {
			off := random.Int64N(int64(size/n)) * int64(n)
			text = nbd.Request{Type: nbd.CmdRead, Cookie: uint64(i), Off: uint64(off), Len: uint32(n)}.Append(text)
			room <- struct{}{}
			if len(room) == depth || i == b.N-1 || len(text) > depth*nbd.RequestSize/2 {
				if _, err := c.Write(text); err != nil {
					b.Error(err)
					return
				}
				text = text[:0]
			}
		}
	}()
	// One system call reads many replies, as in real clients.
	buffer := make([]byte, 256<<10)
	fill := 0 // bytes in buffer
	skip := 0 // bytes of data that must still be read
	for done := 0; done < b.N || skip > 0; {
		k, err := c.Read(buffer[fill:])
		if err != nil {
			b.Fatal(err)
		}
		rest := buffer[:fill+k]
		for {
			k := min(skip, len(rest))
			rest, skip = rest[k:], skip-k
			if skip > 0 || done == b.N || len(rest) < nbd.ChunkSize {
				break
			}
			h := nbd.ParseChunk((*[nbd.ChunkSize - 4]byte)(rest[4:]))
			if binary.BigEndian.Uint32(rest) != nbd.StructuredReplyMagic || h.Type.IsError() {
				b.Fatalf("%x", rest[:nbd.ChunkSize])
			}
			rest, skip = rest[nbd.ChunkSize:], int(h.Len)
			if h.Flags&nbd.ChunkDone != 0 {
				done++
				<-room
			}
		}
		fill = copy(buffer, rest)
	}
}

// startOwn starts TestActivated in a process of its own, where it serves the file path.
func startOwn(b *testing.B, path string) net.Conn {
	b.Helper()
	ours, theirs := pair(b)
	f, err := theirs.(*net.UnixConn).File()
	if err != nil {
		b.Fatal(err)
	}
	theirs.Close()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"`, "sh", os.Args[0], "-test.run=^TestActivated$")
	cmd.Env = append(os.Environ(), activated+"="+path)
	cmd.ExtraFiles = []*os.File{f}
	run(b, cmd, ours)
	f.Close()
	return ours
}

func startNbdkit(b *testing.B, path string) net.Conn {
	b.Helper()
	peer.Need(b, "nbdkit")
	socket := socketPath(b)
	cmd := exec.Command("nbdkit", "-f", "-r", "-U", socket, "file", path)
	run(b, cmd, nil)
	for range 100 {
		if conn, err := net.Dial("unix", socket); err == nil {
			return conn
		}
		time.Sleep(20 * time.Millisecond)
	}
	b.Fatal("nbdkit does not listen")
	return nil
}

// run starts a program and kills it at the end of the benchmark.
func run(b *testing.B, cmd *exec.Cmd, conn net.Conn) {
	b.Helper()
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if conn != nil {
			conn.Close()
		}
		cmd.Process.Kill()
		cmd.Wait()
		if b.Failed() {
			b.Logf("%s", text.Bytes())
		}
	})
}
