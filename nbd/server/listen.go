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

// ErrAddress is what CheckAddress returns, wrapped: nobody can listen on the
// address as it is written.
var ErrAddress = errors.New("want tcp://HOST:PORT or unix:PATH")

// CheckAddress checks how an address for Listen is written, without a look at
// the network or the file system. It returns the address in one form for all
// ways to write it.
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
	path, err := filepath.Abs(path) // its URI is for any folder
	if err != nil {
		return "", err
	}
	const longest = len(unix.RawSockaddrUnix{}.Path) - 1
	if len(path) > longest {
		return "", fmt.Errorf("%q: the absolute path of a socket has at most %d bytes, and this one has %d: %w", address, longest, len(path), ErrAddress)
	}
	return "unix:" + path, nil
}

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
		return "", fmt.Errorf("%q has no host (127.0.0.1 is this machine, 0.0.0.0 and [::] are all its addresses): %w", address, ErrAddress)
	}
	if strings.ContainsAny(host, "/@ ") {
		return "", fmt.Errorf("%q: %q is no host: %w", address, host, ErrAddress)
	}
	n, err := net.LookupPort("tcp", port)
	if err != nil || port == "" || n < 0 || n > 65535 {
		return "", fmt.Errorf("%q: port %q is not 0 to 65535: %w", address, port, ErrAddress)
	}
	return "tcp://" + net.JoinHostPort(host, strconv.Itoa(n)), nil
}

// Listen listens on tcp://HOST:PORT or unix:PATH. Port 0 is one that is free. A
// socket that no server listens on any more is replaced; the socket's mode is
// 0600, and it is removed when the listener is closed.
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

func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// The mode of the socket before bind is the one that its file gets, so
	// there is no moment at which others can connect. The umask can only take
	// from it.
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		if err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	return config.Listen(ctx, "unix", path)
}

// removeStale removes a socket that nobody listens on.
func removeStale(ctx context.Context, path string) error {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.Mode().Type() != fs.ModeSocket:
		return errors.New("there is something else than a socket")
	}
	c, err := new(net.Dialer).DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return errors.New("another server listens there")
	case errors.Is(err, unix.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("is another server there? %w", err)
}

// firstActivated is the first file that socket activation passes.
const firstActivated = 3

// Activated returns what was passed by socket activation (sd_listen_fds(3)):
// sockets to listen on, and connections that were accepted already. There is
// none where LISTEN_PID is not this process. The environment is changed, so
// that no child and no second call takes the same.
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
		return nil, nil, fmt.Errorf("socket activation: LISTEN_FDS=%s: want 1 to 64", nbd.Text([]byte(count)))
	}
	for fd := firstActivated; fd < firstActivated+n; fd++ {
		l, c, e := adopt(fd)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("socket activation: file %d: %w", fd, e))
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

// adopt makes a listener or a connection of a file, which it closes.
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

// URI returns how clients name an export of a server that listens at addr.
// Where that is all addresses it names this machine.
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
		// Not all clients take + for a space.
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
