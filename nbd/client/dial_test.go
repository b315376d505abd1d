package client

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
)

// serveGreetings listens on a port of this machine. The first connection receives first,
// and all later ones receive others. It returns the URI of the server.
func serveGreetings(t *testing.T, first, others []byte) *nbd.URI {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var count atomic.Int32
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			greeting := others
			if count.Add(1) == 1 {
				greeting = first
			}
			go func() {
				defer c.Close()
				c.Write(greeting)
				io.Copy(io.Discard, c)
			}()
		}
	}()
	uri, err := nbd.ParseURI(fmt.Sprintf("nbd://%v/", l.Addr()))
	if err != nil {
		t.Fatal(err)
	}
	return uri
}

// TestConnectionsDiffer opens two connections to a server that describes the export
// differently on the second one. The error must name exactly what differs.
func TestConnectionsDiffer(t *testing.T) {
	const flags = nbd.HasFlags | nbd.CanMultiConn
	greeting := func(structured, contexts nbd.OptionReplyType, size uint64, flags nbd.TransmissionFlags, sizes nbd.BlockSizes) []byte {
		b := be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(nbd.FixedNewstyle|nbd.NoZeroes), rep(nbd.OptStructuredReply, structured, nil))
		if structured == nbd.RepAck {
			if contexts == nbd.RepAck {
				b = append(b, rep(nbd.OptSetMetaContext, nbd.RepMetaContext, be(uint32(fakeContext), nbd.BaseAllocation))...)
			}
			b = append(b, rep(nbd.OptSetMetaContext, contexts, nil)...)
		}
		return be(b, rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoExport), size, uint16(flags))),
			rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoBlockSize), sizes.Append(nil))),
			rep(nbd.OptGo, nbd.RepAck, nil))
	}
	const ack, refusal = nbd.RepAck, nbd.RepErrUnsupported
	sizes := nbd.BlockSizes{Min: 512, Preferred: 4096, Max: 1 << 20}
	for _, c := range []struct {
		name   string
		second []byte
		want   string
	}{
		{"size", greeting(ack, ack, 2<<20, flags, sizes), "size of 2097152 bytes instead of 1048576 bytes"},
		{"flags", greeting(ack, ack, 1<<20, flags|nbd.ReadOnly, sizes), "transmission flags 0x103 instead of 0x101"},
		{"minimum", greeting(ack, ack, 1<<20, flags, nbd.BlockSizes{Min: 1024, Preferred: 4096, Max: 1 << 20}), "minimum block size of 1024 bytes instead of 512 bytes"},
		{"preferred", greeting(ack, ack, 1<<20, flags, nbd.BlockSizes{Min: 512, Preferred: 8192, Max: 1 << 20}), "preferred block size of 8192 bytes instead of 4096 bytes"},
		{"maximum", greeting(ack, ack, 1<<20, flags, nbd.BlockSizes{Min: 512, Preferred: 4096, Max: 2 << 20}), "maximum block size of 2097152 bytes instead of 1048576 bytes"},
		{"contexts", greeting(ack, refusal, 1<<20, flags, sizes), "metadata context base:allocation not negotiated instead of negotiated"},
		{"structured", greeting(refusal, refusal, 1<<20, flags, sizes), "structured replies not negotiated instead of negotiated, metadata context base:allocation not negotiated instead of negotiated"},
	} {
		t.Run(c.name, func(t *testing.T) {
			uri := serveGreetings(t, greeting(ack, ack, 1<<20, flags, sizes), c.second)
			_, err := dial(t.Context(), uri, Options{Connections: 2})
			want := "the server describes the export differently on connection 2 than on connection 1: " + c.want
			if err == nil || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("error %v, want one that ends with %q", err, want)
			}
		})
	}
}
