package server_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// logLines receives the lines of a log.
type logLines chan map[string]any

func (l logLines) Write(p []byte) (int, error) {
	line := map[string]any{}
	if err := json.Unmarshal(p, &line); err != nil {
		return 0, err
	}
	l <- line
	return len(p), nil
}

func (l logLines) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// next returns the next line with the given message.
func (l logLines) next(message string) map[string]any {
	for {
		if line := <-l; line["msg"] == message {
			return line
		}
	}
}

// TestClientsAreLogged checks the lines that the log has for each client.
func TestClientsAreLogged(t *testing.T) {
	for _, c := range []struct {
		name, address, ended string
		leave                func(t *testing.T, c *client, s *serving)
	}{
		{"disconnect", "unix", "disconnect", func(_ *testing.T, c *client, _ *serving) { c.send(nbd.CmdDisconnect, 0, 0, 0, nil) }},
		{"closed", "tcp", "closed", func(_ *testing.T, c *client, _ *serving) { c.Close() }},
		{"reset", "tcp", "reset", func(t *testing.T, c *client, _ *serving) {
			if err := c.Conn.(*net.TCPConn).SetLinger(0); err != nil {
				t.Fatal(err)
			}
			c.Close()
		}},
		{"shutdown", "unix", "shutdown", func(_ *testing.T, _ *client, s *serving) { s.end() }},
		{"error", "unix", "error", func(_ *testing.T, c *client, _ *serving) { c.write(bytes.Repeat([]byte{7}, nbd.RequestSize)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			address := "tcp://127.0.0.1:0"
			if c.address == "unix" {
				address = "unix:" + socketPath(t)
			}
			lines := make(logLines, 100)
			s := serve(t, one("", newDisk(1<<20)), server.Options{Writable: true, Log: lines.logger()}, address)
			stranger, err := net.Dial(s.Addr().Network(), s.Addr().String()) // it never chooses an export, and is not logged
			if err != nil {
				t.Fatal(err)
			}
			defer stranger.Close()
			conn := s.dial(t, true)
			conn.do(nbd.CmdRead, 0, 0, 4096, nil)
			conn.do(nbd.CmdRead, 0, 1<<20, 4096, nil) // fails
			conn.do(nbd.CmdWrite, 0, 0, 512, make([]byte, 512))
			conn.do(nbd.CmdTrim, 0, 0, 4096, nil)
			begin := lines.next("client connected")
			c.leave(t, conn, s)
			end := lines.next("client left")
			if begin["level"] != "DEBUG" || begin["export"] != "" || begin["tls"] != false || begin["client"] != end["client"] {
				t.Errorf("at the beginning: %v", begin)
			}
			if want := fmt.Sprintf("process %d of user %d", os.Getpid(), os.Getuid()); c.address == "unix" && begin["client"] != want {
				t.Errorf("the client is %v, want %s", begin["client"], want)
			}
			if c.address == "tcp" && !strings.HasPrefix(begin["client"].(string), "127.0.0.1:") {
				t.Errorf("the client is %v", begin["client"])
			}
			if end["level"] != "DEBUG" || end["read"] != 4096. || end["written"] != 512. || end["requests"].(float64) < 4 || end["ended"] != c.ended {
				t.Errorf("at the end: %v", end)
			}
			if _, ok := end["seconds"].(float64); !ok {
				t.Errorf("at the end: %v", end)
			}
		})
	}
}

// TestRateLimitOfServer checks that reads and writes wait for the limit, that other requests do
// not, and that the server and its connections end nevertheless.
func TestRateLimitOfServer(t *testing.T) {
	lines := make(logLines, 100)
	s := serve(t, one("", newDisk(1<<20)), server.Options{Writable: true, RateLimit: 10, Log: lines.logger()}, "unix:"+socketPath(t))
	for _, command := range []nbd.Command{nbd.CmdRead, nbd.CmdWrite} {
		waiting, other := s.dial(t, false), s.dial(t, false)
		// 64 KiB take 109 minutes.
		if command == nbd.CmdWrite {
			waiting.write(nbd.Request{Type: command, Cookie: 1, Len: 64 << 10}.Append(nil))
		} else {
			waiting.send(command, 0, 0, 64<<10, nil)
		}
		for _, c := range []nbd.Command{nbd.CmdFlush, nbd.CmdTrim, nbd.CmdWriteZeroes} {
			if a := other.do(c, 0, 0, map[bool]uint32{false: 1 << 20}[c == nbd.CmdFlush], nil); a.errno != 0 {
				t.Errorf("%v: %v", c, a.errno)
			}
		}
		other.send(nbd.CmdDisconnect, 0, 0, 0, nil)
		if end := lines.next("client left"); end["ended"] != "disconnect" || end["requests"] != 3. {
			t.Errorf("at the end: %v", end)
		}
	}
	s.end()
	for range 2 {
		if end := lines.next("client left"); end["ended"] != "shutdown" || end["read"] != 0. || end["written"] != 0. {
			t.Errorf("at the end: %v", end)
		}
	}
}
