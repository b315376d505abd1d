package client_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// blank is a disk that accepts all writes and stores nothing.
type blank struct{ source.Disk }

func (blank) WriteAt(p []byte, _ int64) (int, error)                         { return len(p), nil }
func (blank) ZeroAt(_ context.Context, _, _ int64, _ source.ZeroFlags) error { return nil }
func (blank) Trim(context.Context, int64, int64) error                       { return nil }
func (blank) Flush(context.Context) error                                    { return nil }

// benchServer serves a disk in this process, so that benchmarks measure client and server
// without a slow disk.
func benchServer(b *testing.B, tcp bool, d source.Disk) (uri string) {
	b.Helper()
	s, err := server.New(server.Fixed{{Disk: d}}, server.Options{Writable: true})
	if err != nil {
		b.Fatal(err)
	}
	where := "unix:" + filepath.Join(b.TempDir(), "s")
	if tcp {
		where = "tcp://127.0.0.1:0"
	}
	l, err := server.Listen(b.Context(), where)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	b.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			b.Error(err)
		}
	})
	if tcp {
		return fmt.Sprintf("nbd://127.0.0.1:%d", l.Addr().(*net.TCPAddr).Port)
	}
	return socketURI(l.Addr().String())
}

// pattern returns a disk of 1 GiB. The given percentage of each MiB is data.
func pattern(percent int64) source.Disk {
	const size = 1 << 30
	var data []source.Extent
	for off := int64(0); off < size; off += 1 << 20 {
		if n := percent << 20 / 100; n > 0 {
			data = append(data, source.Extent{Off: off, Len: n})
		}
	}
	return sourcetest.Pattern(size, data...)
}

// workers calls do b.N times, with 16 calls in progress at once.
func workers(b *testing.B, n int, do func(i int64, p []byte) error) {
	b.SetBytes(int64(n))
	b.ReportAllocs()
	const depth = 16
	next := make(chan int64, depth)
	var g errgroup.Group
	for range depth {
		p := make([]byte, n)
		g.Go(func() error {
			var failed error
			for i := range next {
				if err := do(i, p); err != nil {
					failed = err
				}
			}
			return failed
		})
	}
	for i := range b.N {
		next <- int64(i)
	}
	close(next)
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkRead(b *testing.B) {
	for _, tcp := range []bool{false, true} {
		for _, percent := range []int64{0, 50, 100} {
			d := pattern(percent)
			for _, n := range []int{4 << 10, 256 << 10, 1 << 20} {
				b.Run(fmt.Sprintf("tcp=%v/%d%%/%dKiB", tcp, percent, n>>10), func(b *testing.B) {
					c, err := client.Open(b.Context(), parseURI(b, benchServer(b, tcp, d)), client.Options{})
					if err != nil {
						b.Fatal(err)
					}
					defer c.Close()
					blocks := c.Size() / int64(n)
					b.ResetTimer()
					workers(b, n, func(i int64, p []byte) error {
						_, err := c.ReadAt(p, i%blocks*int64(n))
						if i%blocks == blocks-1 {
							err = nil // io.EOF
						}
						return err
					})
				})
			}
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, tcp := range []bool{false, true} {
		for _, n := range []int{4 << 10, 256 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("tcp=%v/%dKiB", tcp, n>>10), func(b *testing.B) {
				d := blank{pattern(0)}
				c, err := client.Create(b.Context(), parseURI(b, benchServer(b, tcp, d)), d.Size(), client.SinkOptions{Options: sink.Options{}})
				if err != nil {
					b.Fatal(err)
				}
				defer c.Abort()
				blocks := d.Size() / int64(n)
				b.ResetTimer()
				workers(b, n, func(i int64, p []byte) error {
					_, err := c.WriteAt(p, i%blocks*int64(n))
					return err
				})
			})
		}
	}
}
