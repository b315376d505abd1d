package nfc_test

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

const (
	benchDisk = 1 << 30 // bytes of the disks in the benchmarks
	benchRead = 1 << 20 // bytes of one read
)

// repeated is the content of a disk that consists of copies of its bytes.
type repeated []byte

func (r repeated) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		n += copy(p[n:], r[(off+int64(n))%int64(len(r)):])
	}
	return len(p), nil
}

// zeros is the content of an empty disk.
type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// randomBytes returns data without zeros.
func randomBytes(n int) repeated {
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(1 + r.IntN(255))
	}
	return p
}

// thirdData returns 6 MiB of which a third are data, in runs of 64 KiB.
func thirdData() repeated {
	p := make([]byte, 6<<20)
	data := randomBytes(2 << 20)
	for i := 0; i < len(data); i += 64 << 10 {
		copy(p[3*i:], data[i:i+64<<10])
	}
	return p
}

// benchmarkDisk opens a disk with the given content for a benchmark.
func benchmarkDisk(b *testing.B, content io.ReaderAt, size int64, h nfctest.Options, o nfc.Options) (*nfctest.Host, source.Disk) {
	b.Helper()
	host := nfctest.New(b, h)
	host.AddDisk(file, nfctest.Disk{Content: content, Size: size, DDB: ddb("1")})
	return host, open(b, &tickets{host: host}, nfc.Params{Name: file, Frozen: true}, o)
}

// readAtOnce reads size bytes in reads of 1 MiB, depth of them at the same time, as a copy does.
func readAtOnce(b *testing.B, d source.Disk, size int64, buffers [][]byte) {
	b.Helper()
	var next atomic.Int64
	var running sync.WaitGroup
	for _, p := range buffers {
		running.Go(func() {
			for {
				off := next.Add(benchRead) - benchRead
				if off >= size {
					return
				}
				n := min(benchRead, size-off)
				if _, err := d.ReadAt(p[:n], off); err != nil && !errors.Is(err, io.EOF) {
					b.Error(err)
					return
				}
			}
		})
	}
	running.Wait()
}

func newBuffers(depth int) [][]byte {
	buffers := make([][]byte, depth)
	for i := range buffers {
		buffers[i] = make([]byte, benchRead)
	}
	return buffers
}

// BenchmarkRead reads disks from a host in the same process. The metric wire/data is the number of
// bytes on the network for each byte of the disk that is not zero.
func BenchmarkRead(b *testing.B) {
	data := randomBytes(4 << 20)
	text := pattern(4<<20, 3)
	for _, test := range []struct {
		name    string
		content io.ReaderAt
		data    float64 // share of the disk that is not zero
		options nfc.Options
	}{
		{"none/clear", data, 1, nfc.Options{Compression: "none", Clear: true}},
		{"none/tls", data, 1, nfc.Options{Compression: "none"}},
		{"skipz/clear/zeros", zeros{}, 0, nfc.Options{Clear: true}},
		{"skipz/clear/third", thirdData(), 1. / 3, nfc.Options{Clear: true}},
		{"skipz/clear/data", data, 1, nfc.Options{Clear: true}},
		{"skipz/tls/third", thirdData(), 1. / 3, nfc.Options{}},
		{"zlib/clear/text", repeated(text), 1, nfc.Options{Compression: "zlib", Clear: true}},
	} {
		b.Run(test.name, func(b *testing.B) {
			host, d := benchmarkDisk(b, test.content, benchDisk, nfctest.Options{}, test.options)
			buffers := newBuffers(nfc.DefaultDepth)
			before := host.Stats().Sent
			b.SetBytes(benchDisk)
			b.ReportAllocs()
			for b.Loop() {
				readAtOnce(b, d, benchDisk, buffers)
			}
			sent := float64(host.Stats().Sent-before) / float64(b.N)
			if test.data > 0 {
				b.ReportMetric(sent/(test.data*benchDisk), "wire/data")
			} else {
				b.ReportMetric(sent/(benchDisk/benchRead), "wire/request")
			}
		})
	}
}

// BenchmarkRequest measures a read of one sector, which is the cost of a request without its data.
func BenchmarkRequest(b *testing.B) {
	for _, depth := range []int{1, nfc.DefaultDepth} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			_, d := benchmarkDisk(b, zeros{}, benchDisk, nfctest.Options{}, nfc.Options{Clear: true})
			b.ReportAllocs()
			var next atomic.Int64
			var running sync.WaitGroup
			b.ResetTimer()
			for range depth {
				running.Go(func() {
					var p [512]byte
					for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
						if _, err := d.ReadAt(p[:], i%1000*512); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			running.Wait()
		})
	}
}

// BenchmarkIOCopy is the yardstick for BenchmarkRead: io.Copy of as many bytes over the same kind of
// connection, from memory.
func BenchmarkIOCopy(b *testing.B) {
	web := httptest.NewTLSServer(nil) // has a certificate
	defer web.Close()
	data := randomBytes(4 << 20)
	for _, secure := range []bool{false, true} {
		b.Run(map[bool]string{false: "clear", true: "tls"}[secure], func(b *testing.B) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			if secure {
				listener = tls.NewListener(listener, &tls.Config{Certificates: web.TLS.Certificates})
			}
			var running sync.WaitGroup
			defer running.Wait()
			defer listener.Close()
			running.Go(func() {
				for {
					c, err := listener.Accept()
					if err != nil {
						return
					}
					for sent := 0; sent < benchDisk && err == nil; sent += benchRead {
						at := sent % len(data)
						_, err = c.Write(data[at : at+benchRead])
					}
					c.Close()
				}
			})
			b.SetBytes(benchDisk)
			b.ReportAllocs()
			for b.Loop() {
				c, err := net.Dial("tcp", listener.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				if secure {
					c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
				}
				// Without ReadFrom, io.Copy uses a larger buffer than io.Discard has.
				n, err := io.Copy(struct{ io.Writer }{io.Discard}, c)
				if err != nil || n != benchDisk {
					b.Fatalf("%d bytes: %v", n, err)
				}
				c.Close()
			}
		})
	}
}

// BenchmarkLatency reads from a host that takes 20 ms for each answer.
func BenchmarkLatency(b *testing.B) {
	for _, depth := range []int{1, 16} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			size := int64(16*depth) << 20
			_, d := benchmarkDisk(b, randomBytes(4<<20), size, nfctest.Options{Latency: 20 * time.Millisecond}, nfc.Options{Compression: "none", Clear: true, Depth: depth})
			buffers := newBuffers(depth)
			b.SetBytes(size)
			for b.Loop() {
				readAtOnce(b, d, size, buffers)
			}
		})
	}
}
