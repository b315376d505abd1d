package notify_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/notify"
)

// manager is a service manager that listens on a socket.
func manager(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: name})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestSend(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "s"), fmt.Sprintf("@vddkcp-test-%d", os.Getpid())} {
		conn := manager(t, name)
		t.Setenv("NOTIFY_SOCKET", name)
		t.Setenv("WATCHDOG_USEC", "30000000")
		t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
		n, err := notify.FromEnvironment()
		if err != nil {
			t.Fatal(err)
		}
		for _, variable := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
			if _, ok := os.LookupEnv(variable); ok {
				t.Errorf("%s is still in the environment of children", variable)
			}
		}
		if n.Watchdog() != 30*time.Second {
			t.Errorf("watchdog %v, want 30s", n.Watchdog())
		}
		if err := n.Send(notify.Ready, notify.Status("two\nlines \x1b[31m"), notify.Alive); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1000)
		got, err := conn.Read(b)
		if want := "READY=1\nSTATUS=two\\nlines \\x1b[31m\nWATCHDOG=1\n"; err != nil || string(b[:got]) != want {
			t.Errorf("%s: received %q, %v; want %q", name, b[:got], err, want)
		}
	}
}

// TestEnvironment tests values that come from another program, or that are meant for another
// process.
func TestEnvironment(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	manager(t, socket)
	for _, c := range []struct{ socket, usec, pid, err string }{
		{"", "1000", "", ""},
		{socket, "", "", ""},
		{socket, "1000", "1", ""}, // the watchdog is for another process
		{socket, "soon", "", "WATCHDOG_USEC=soon"},
		{socket, "-5", "", "WATCHDOG_USEC=-5"},
		{socket, "9223372036854775807", "", "WATCHDOG_USEC"},
		{"vsock:2:1234", "", "", "NOTIFY_SOCKET=vsock:2:1234: want an absolute path"},
		{"relative", "", "", "NOTIFY_SOCKET=relative"},
		{socket + "-none", "", "", "no such file"},
	} {
		t.Setenv("NOTIFY_SOCKET", c.socket)
		t.Setenv("WATCHDOG_USEC", c.usec)
		t.Setenv("WATCHDOG_PID", c.pid)
		n, err := notify.FromEnvironment()
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%+v: %v", c, err)
		}
		if c.socket != socket && n != nil {
			t.Errorf("%+v: there is a Notifier, want none", c)
		}
		if n != nil && n.Watchdog() != 0 {
			t.Errorf("%+v: watchdog %v, want none", c, n.Watchdog())
		}
	}
}
