package export

import (
	"bytes"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// brokenListener is a listener whose Accept always fails.
type brokenListener struct{ net.Listener }

func (brokenListener) Accept() (net.Conn, error) { return nil, errors.New("broken") }

// TestBrokenListenerBesideAClient has a listener that breaks while the client of a
// connection from socket activation stays: the error must not wait until it leaves.
func TestBrokenListenerBesideAClient(t *testing.T) {
	disk := &sourcetest.Memory{Content: bytes.NewReader(make([]byte, 4096)), Length: 4096}
	s, err := server.New(server.Fixed{{Disk: disk}}, server.Options{Grace: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ours, theirs := net.Pipe()
	defer ours.Close() // not before the server has ended
	both := &sockets{listeners: []net.Listener{brokenListener{l}}, conns: []net.Conn{theirs}}
	if err := both.serve(t.Context(), s); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken listener: %v", err)
	}
}
