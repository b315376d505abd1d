package cow_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/cow"
	"github.com/vddkcp/vddkcp/source/raw"
)

// serve exports a writable disk on a Unix socket. It returns the URI and a function
// that ends the server.
func serve(t testing.TB, d source.Disk) (uri string, end func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "cow") // a path that is short enough for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := server.New(server.Fixed{{Disk: d}}, server.Options{Writable: true})
	if err != nil {
		t.Fatal(err)
	}
	l, err := server.Listen(t.Context(), "unix:"+filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	return server.URI(l.Addr(), false, ""), func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
}

// TestQemuWrites tests that qemu can write to an exported layer and find its data again after
// the server was restarted, and that the base never changes.
func TestQemuWrites(t *testing.T) {
	peer.Need(t, "qemu-io", "qemu-img")
	const size = 24 << 20
	for _, onRead := range []bool{false, true} {
		t.Run(fmt.Sprintf("onRead=%v", onRead), func(t *testing.T) {
			dir := t.TempDir()
			path, expected, file := filepath.Join(dir, "disk"), filepath.Join(dir, "expected"), filepath.Join(dir, "d.cow")
			content := random(7, size)
			clear(content[8<<20 : 16<<20])
			for _, p := range []string{path, expected} {
				if err := os.WriteFile(p, content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(path, 0o400); err != nil {
				t.Fatal(err)
			}
			open := func() *cow.Disk {
				base, err := raw.Open(t.Context(), path)
				if err != nil {
					t.Fatal(err)
				}
				d, err := cow.New(t.Context(), base, cow.Options{File: file, OnRead: onRead})
				if err != nil {
					t.Fatal(err)
				}
				return d
			}
			rounds := [][]string{{
				"write -P 0x11 1000k 4k", "read -P 0x11 1000k 4k", "write -P 0x12 3M 2M", "write -P 0x13 9M 12k",
				"read -P 0 10M 1M", "write -z -u 4M 512k", "write -z 5000k 100k", "read -P 0 4M 512k", "flush",
			}, {
				"read -P 0x11 1000k 4k", "read -P 0x12 3M 1M", "read -P 0 4M 512k", "read -P 0x13 9M 12k",
				"write -P 0x14 4100k 512", "read -P 0x14 4100k 512", "write -f -P 0x15 23M 1M", "aio_write -P 0x16 15M 1M", "aio_write -P 0x17 16M 1M", "aio_flush",
			}}
			for i, commands := range rounds {
				d := open()
				uri, end := serve(t, d)
				for _, target := range []string{uri, expected} {
					var args []string
					for _, c := range commands {
						args = append(args, "-c", c)
					}
					if out := peer.Run(t, "qemu-io", append(args, "-f", "raw", target)...); strings.Contains(out, "verification failed") || strings.Contains(out, "rror") {
						t.Errorf("round %d: %s", i, out)
					}
				}
				peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, expected)
				peer.Run(t, "qemu-io", "-c", "discard 18M 1M", "-f", "raw", uri) // the content after a discard is undefined
				peer.Run(t, "qemu-io", "-c", "write -P 0x21 18M 1M", "-f", "raw", uri)
				peer.Run(t, "qemu-io", "-c", "write -P 0x21 18M 1M", "-f", "raw", expected)
				peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri, expected)
				if i == 0 && !onRead {
					// Zeroed blocks are holes, as are absent blocks where the base is
					// zero.
					m := peer.Run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)
					if !strings.Contains(m, `"start": 4194304, "length": 524288, "depth": 0, "present": true, "zero": true`) {
						t.Errorf("map: %s", m)
					}
				}
				copied := filepath.Join(dir, "copied")
				peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, copied)
				sameFiles(t, copied, expected)
				end()
				if err := d.Close(); err != nil {
					t.Error(err)
				}
			}
			if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
				t.Errorf("the disk below was changed, %v", err)
			}
		})
	}
}

func sameFiles(t *testing.T, a, b string) {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x, y) {
		t.Errorf("%s and %s differ", a, b)
	}
}

// BenchmarkServed reads 4 KiB at random offsets, with 16 requests in flight, from a
// server of a file and of a layer over the file.
func BenchmarkServed(b *testing.B) {
	const size = 512 << 20
	path := filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, random(1, size), 0o600); err != nil {
		b.Fatal(err)
	}
	for _, layer := range []string{"without", "empty", "half here"} {
		b.Run(layer, func(b *testing.B) {
			var d source.Disk
			d, err := raw.Open(b.Context(), path)
			if err != nil {
				b.Fatal(err)
			}
			if layer != "without" {
				c, err := cow.New(b.Context(), d, cow.Options{})
				if err != nil {
					b.Fatal(err)
				}
				for off := int64(0); layer == "half here" && off < size; off += 128 << 10 {
					if _, err := c.WriteAt(make([]byte, 64<<10), off); err != nil {
						b.Fatal(err)
					}
				}
				d = c
			}
			defer d.Close()
			uri, end := serve(b, d)
			defer end()
			c, err := client.Open(b.Context(), parseURI(b, uri), client.Options{Connections: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			b.SetBytes(4096)
			b.ReportAllocs()
			b.ResetTimer()
			var left atomic.Int64
			left.Store(int64(b.N))
			var all sync.WaitGroup
			for g := range 16 {
				all.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 1))
					p := make([]byte, 4096)
					for left.Add(-1) >= 0 {
						if _, err := c.ReadAt(p, r.Int64N(size/4096)*4096); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
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
