package server_test

import (
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// flaky is a disk. One of eight calls to it fails, and one of 64 panics.
type flaky struct{ *disk }

func (flaky) fault() error {
	switch n := rand.IntN(64); {
	case n == 0:
		panic("a broken disk")
	case n < 8:
		return unix.EIO
	}
	return nil
}

func (f flaky) ReadAt(p []byte, off int64) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.disk.ReadAt(p, off)
}

func (f flaky) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fault(); err != nil {
		return 0, err
	}
	return f.disk.WriteAt(p, off)
}

// TestNothingLeaks runs clients that send random requests, take only some replies and
// disconnect at any time, while memory is short and disks fail. Afterwards the server must
// hold no resources for them, also if it was shut down meanwhile.
func TestNothingLeaks(t *testing.T) {
	path, _ := sparseFile(t, 8<<20)
	exports := server.Fixed{
		{Export: server.Export{Name: "memory"}, Disk: flaky{newDisk(8 << 20)}},
		{Export: server.Export{Name: "file"}, Disk: openRaw(t, path)},
	}
	for _, ends := range []bool{false, true} {
		s := serve(t, exports, server.Options{Writable: true, Memory: 4 << 20, Grace: 20 * time.Millisecond}, "unix:"+socketPath(t))
		var clients sync.WaitGroup
		for i := range 24 {
			clients.Go(func() {
				for range 8 {
					vandal(s.Addr(), []string{"memory", "file"}[i%2])
				}
			})
		}
		if ends {
			time.AfterFunc(50*time.Millisecond, s.end)
		}
		clients.Wait()
		s.end()
		if err := <-s.done; err != nil {
			t.Error(err)
		}
		s.done <- nil
		if leaks := s.Leaks(); leaks != "" {
			t.Errorf("ended in the middle %v: %s", ends, leaks)
		}
	}
}

// vandal is a client of an export that behaves badly.
func vandal(addr net.Addr, export string) error {
	conn, err := net.Dial(addr.Network(), addr.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	option := func(o nbd.Option, data []byte) { conn.Write(nbd.AppendOption(nil, o, data)) }
	conn.Write([]byte{0, 0, 0, 3})
	if rand.IntN(3) > 0 {
		option(nbd.OptStructuredReply, nil)
		option(nbd.OptSetMetaContext, nbd.AppendMetaContext(nil, export, nbd.BaseAllocation))
	}
	option(nbd.OptGo, nbd.AppendGo(nil, export))
	sink := make([]byte, rand.IntN(1<<20))
	for range rand.IntN(80) {
		r := nbd.Request{Type: nbd.Command(rand.IntN(8)), Cookie: rand.Uint64(), Off: uint64(rand.IntN(9 << 20)), Len: uint32(rand.IntN(1 << rand.IntN(22)))}
		if r.Type == nbd.CmdDisconnect && rand.IntN(8) > 0 {
			r.Type = nbd.CmdRead
		}
		if rand.IntN(4) == 0 {
			r.Flags = nbd.CommandFlags(1 << rand.IntN(5))
		}
		if _, err := conn.Write(r.Append(nil)); err != nil {
			return err
		}
		if r.Type == nbd.CmdWrite {
			n := int(r.Len)
			if rand.IntN(8) == 0 {
				n = rand.IntN(n + 1)
			}
			if _, err := conn.Write(make([]byte, n)); err != nil || n < int(r.Len) {
				return errors.Join(err, net.ErrClosed)
			}
		}
		if rand.IntN(2) == 0 {
			conn.SetReadDeadline(time.Now().Add(time.Millisecond))
			conn.Read(sink)
		}
	}
	return nil
}
