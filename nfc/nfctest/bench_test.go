package nfctest

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"testing"
)

// benchContent is content that costs nothing to read.
type benchContent struct{ block []byte }

func (b benchContent) ReadAt(p []byte, off int64) (int, error) { return copy(p, b.block), nil }

// BenchmarkRead measures the host with a client that discards what it reads, 16 reads of 1 MiB in
// flight. BenchmarkCopy is the limit.
func BenchmarkRead(b *testing.B) {
	block := testContent(1 << 20)
	for i := range block {
		block[i] |= 1
	}
	for _, zeros := range []bool{false, true} {
		for _, w := range []way{{clear: true}, {}, {clear: true, buffer: 1 << 20, count: 4}, {buffer: 1 << 20, count: 4}} {
			for _, compression := range []uint32{plain, withSkipZ} {
				b.Run(fmt.Sprintf("clear=%v,buffer=%d,compression=%d,zeros=%v", w.clear, w.buffer, compression, zeros), func(b *testing.B) {
					h := New(b, Options{})
					content := block
					if zeros {
						content = make([]byte, 1<<20)
					}
					h.AddDisk(diskFile, Disk{Content: benchContent{content}, Size: 1 << 40})
					c, err := connect(h.Ticket(), w)
					if err != nil {
						b.Fatal(err)
					}
					benchRead(b, c, compression)
					c.close()
				})
			}
		}
	}
}

func benchRead(b *testing.B, c *client, compression uint32) {
	buf := make([]byte, 2<<20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	b.ResetTimer()
	asked := 0
	for ; asked < min(b.N, 16); asked++ {
		c.ask(compression, int64(asked)<<20, 1<<20)
	}
	for done := int64(0); done < int64(b.N)<<20; {
		if _, err := io.ReadFull(c.in, buf[:fragmentHead]); err != nil {
			b.Fatal(err)
		}
		n := le.Uint32(buf[52:])
		before := done >> 20
		done += int64(le.Uint32(buf[48:]))
		if _, err := io.ReadFull(c.in, buf[:n]); err != nil {
			b.Fatal(err)
		}
		if done>>20 > before && asked < b.N {
			c.ask(compression, int64(asked)<<20, 1<<20)
			asked++
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	for _, clear := range []bool{true, false} {
		for _, size := range []int{64 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("clear=%v,write=%d", clear, size), func(b *testing.B) {
				listener, err := net.Listen("tcp", "127.0.0.1:0")
				if err != nil {
					b.Fatal(err)
				}
				defer listener.Close()
				config := &tls.Config{Certificates: []tls.Certificate{newCertificate()}, DynamicRecordSizingDisabled: true}
				done := make(chan struct{})
				go func() {
					defer close(done)
					conn, err := listener.Accept()
					if err != nil {
						return
					}
					defer conn.Close()
					if !clear {
						conn = tls.Server(conn, config)
					}
					block := make([]byte, size)
					for range b.N << 20 / size {
						conn.Write(block)
					}
				}()
				conn, err := net.Dial("tcp", listener.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				if !clear {
					conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
				}
				b.SetBytes(1 << 20)
				b.ResetTimer()
				io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{conn}, make([]byte, 256<<10))
				conn.Close()
				<-done
			})
		}
	}
}
