package server_test

import (
	"bytes"
	"io"
	"net"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// TestClientLeavesWhileItWaits checks that requests of clients that have left do not wait for the
// limit. Each of them would take 109 minutes.
func TestClientLeavesWhileItWaits(t *testing.T) {
	for _, address := range []string{"unix", "tcp"} {
		for _, c := range []struct {
			name    string
			request nbd.Command
			data    int // bytes of the data of a write
			reset   bool
		}{
			{"reads", nbd.CmdRead, 0, false},
			{"reads and breaks off", nbd.CmdRead, 0, true},
			{"writes in part", nbd.CmdWrite, 1000, false},
		} {
			t.Run(address+" "+c.name, func(t *testing.T) {
				lines := make(logLines, 100)
				s := serve(t, one("", newDisk(1<<20)), server.Options{Writable: true, RateLimit: 10, Log: lines.logger()}, addressFor(t, address))
				conn := s.dial(t, false)
				for i := range 3 {
					conn.write(nbd.Request{Type: c.request, Cookie: uint64(i), Len: 64 << 10}.Append(nil), make([]byte, c.data))
				}
				if tcp, ok := conn.Conn.(*net.TCPConn); ok && c.reset {
					if err := tcp.SetLinger(0); err != nil {
						t.Fatal(err)
					}
				}
				conn.Close()
				if end := lines.next("client left"); end["read"] != 0. || end["written"] != 0. {
					t.Errorf("at the end: %v", end)
				}
			})
		}
	}
}

// TestClientHasAnnouncedItsEnd checks that the requests before DISC are carried out although the
// client has closed its side of the connection.
func TestClientHasAnnouncedItsEnd(t *testing.T) {
	for _, address := range []string{"unix", "tcp"} {
		t.Run(address, func(t *testing.T) {
			lines, disk := make(logLines, 100), newDisk(1<<20)
			s := serve(t, one("", disk), server.Options{Writable: true, RateLimit: 64 << 10, Log: lines.logger()}, addressFor(t, address))
			conn := s.dial(t, false)
			conn.write(
				nbd.Request{Type: nbd.CmdRead, Cookie: 1, Len: 16 << 10}.Append(nil),
				nbd.Request{Type: nbd.CmdRead, Cookie: 2, Len: 16 << 10}.Append(nil),
				nbd.Request{Type: nbd.CmdDisconnect}.Append(nil))
			if err := conn.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(conn.Conn); err != nil || len(got) < 32<<10 {
				t.Errorf("received %d bytes, error %v", len(got), err)
			}
			if end := lines.next("client left"); end["read"] != float64(32<<10) {
				t.Errorf("at the end: %v", end)
			}

			conn = s.dial(t, false)
			data := bytes.Repeat([]byte{7}, 16<<10)
			conn.write(nbd.Request{Type: nbd.CmdWrite, Cookie: 1, Len: 16 << 10}.Append(nil), data,
				nbd.Request{Type: nbd.CmdDisconnect}.Append(nil))
			conn.Close()
			if end := lines.next("client left"); end["written"] != float64(16<<10) {
				t.Errorf("at the end: %v", end)
			}
			if !bytes.Equal(disk.settled()[:16<<10], data) {
				t.Error("the disk does not have the data of the client")
			}
		})
	}
}

// addressFor returns an address on which a test can listen.
func addressFor(t *testing.T, network string) string {
	if network == "tcp" {
		return "tcp://127.0.0.1:0"
	}
	return "unix:" + socketPath(t)
}
