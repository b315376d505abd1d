package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

// ErrAddress is wrapped by the errors of CheckAddress. The text of ErrAddress names the
// forms of an address that Listen accepts.
var ErrAddress = errors.New("invalid address: want tcp://HOST:PORT or unix:PATH")

// CheckAddress checks the syntax of an address for Listen, without using the network or the
// file system. It returns a normal form, which is the same for all ways to write one
// address: the path of a socket is absolute, and a port is a number.
func CheckAddress(address string) (string, error) {
	if hostPort, ok := strings.CutPrefix(address, "tcp://"); ok {
		return checkTCP(address, hostPort)
	}
	path, ok := strings.CutPrefix(address, "unix:")
	switch {
	case !ok:
		return "", fmt.Errorf("%q: %w", address, ErrAddress)
	case path == "":
		return "", fmt.Errorf("%q has no path: %w", address, ErrAddress)
	}
	path, err := filepath.Abs(path) // so that clients in any directory can use the URI
	if err != nil {
		return "", err
	}
	const longest = len(unix.RawSockaddrUnix{}.Path) - 1
	if len(path) > longest {
		return "", fmt.Errorf("%q: the absolute path of the socket has %d bytes, want at most %d bytes: %w", address, len(path), longest, ErrAddress)
	}
	return "unix:" + path, nil
}

// checkTCP does the work of CheckAddress for addresses of the form tcp://HOST:PORT.
func checkTCP(address, hostPort string) (string, error) {
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		var wrong *net.AddrError
		if errors.As(err, &wrong) {
			return "", fmt.Errorf("%q: %s: %w", address, wrong.Err, ErrAddress)
		}
		return "", fmt.Errorf("%q: %w: %w", address, err, ErrAddress)
	}
	if host == "" {
		return "", fmt.Errorf("%q has no host (use 127.0.0.1 for clients on this machine, 0.0.0.0 or [::] for all): %w", address, ErrAddress)
	}
	if strings.ContainsAny(host, "/@ ") {
		return "", fmt.Errorf("%q: %q is not a host name or IP address: %w", address, host, ErrAddress)
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil || port == "" || n < 0 || n > 65535 {
		return "", fmt.Errorf("%q: invalid port %q, want 0 to 65535: %w", address, port, ErrAddress)
	}
	return "tcp://" + net.JoinHostPort(host, strconv.Itoa(n)), nil
}

// Listen listens on tcp://HOST:PORT or unix:PATH. For port 0 the system chooses a free port.
// If PATH is a Unix socket on which no server listens any more, Listen replaces it. The new
// Unix socket has mode 0600, and is removed when the listener is closed.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	checked, err := CheckAddress(address)
	if err != nil {
		return nil, fmt.Errorf("listen on %w", err)
	}
	var l net.Listener
	if hostPort, ok := strings.CutPrefix(checked, "tcp://"); ok {
		l, err = new(net.ListenConfig).Listen(ctx, "tcp", hostPort)
	} else {
		l, err = listenUnix(ctx, strings.TrimPrefix(checked, "unix:"))
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return l, nil
}

// listenUnix listens on a Unix socket at path.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// Mode 0600 is set before bind, which creates the file of the socket with this mode.
	// Other users can therefore never connect. The umask can only remove permissions from
	// this mode.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	return config.Listen(ctx, "unix", path)
}

// removeStale removes the socket at path if no server listens on it.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%q exists and is not a socket", path)
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return fmt.Errorf("another server already listens on %q", path)
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("cannot find out whether another server listens on %q: %w", path, err)
}

// firstActivated is the number of the first file descriptor that socket activation passes.
const firstActivated = 3

// Activated returns the sockets that systemd passed to this process by socket activation
// (see sd_listen_fds(3)): listeners, and connections that were already accepted. It
// returns no sockets if LISTEN_PID is not the ID of this process. Activated removes the
// variables of socket activation from the environment, so that child processes and later
// calls do not use the same sockets.
func Activated() (listeners []net.Listener, conns []net.Conn, err error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil, nil
	}
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > 64 {
		return nil, nil, fmt.Errorf("socket activation: invalid environment variable LISTEN_FDS=%s, want 1 to 64", nbd.Text([]byte(count)))
	}
	for fd := firstActivated; fd < firstActivated+n; fd++ {
		l, c, e := adopt(fd)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("socket activation: file descriptor %d: %w", fd, e))
			continue
		}
		if l != nil {
			listeners = append(listeners, l)
		} else {
			conns = append(conns, c)
		}
	}
	if err != nil {
		for _, l := range listeners {
			l.Close()
		}
		for _, c := range conns {
			c.Close()
		}
		return nil, nil, err
	}
	return listeners, conns, nil
}

// The function adopt returns a listener or a connection for a file descriptor. It
// closes the descriptor, since the listener or connection uses a copy of it.
func adopt(fd int) (net.Listener, net.Conn, error) {
	unix.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "socket "+strconv.Itoa(fd))
	if f == nil {
		return nil, nil, os.ErrInvalid
	}
	defer f.Close()
	listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return nil, nil, err
	}
	if listens != 0 {
		l, err := net.FileListener(f)
		return l, nil, err
	}
	c, err := net.FileConn(f)
	return nil, c, err
}

// URI returns the URI of an export, for clients of a server that listens on the given
// address. If the server listens on all addresses of the machine, the host in the URI
// is "localhost".
func URI(addr net.Addr, overTLS bool, export string) string {
	scheme := "nbd"
	if overTLS {
		scheme = "nbds"
	}
	u := url.URL{Scheme: scheme, Path: "/" + export}
	switch a := addr.(type) {
	case *net.UnixAddr:
		path := a.Name
		if abs, err := filepath.Abs(path); err == nil {
			path = abs
		}
		// url.QueryEscape encodes a space as +. Not all clients decode this, so it is
		// replaced by %20.
		return scheme + "+unix://" + u.EscapedPath() + "?socket=" + strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(path))
	case *net.TCPAddr:
		host := a.IP.String()
		if a.IP.IsUnspecified() {
			host = "localhost"
		}
		u.Host = net.JoinHostPort(host, strconv.Itoa(a.Port))
	default:
		u.Host = addr.String()
	}
	if export == "" {
		u.Path = ""
	}
	return u.String()
}
