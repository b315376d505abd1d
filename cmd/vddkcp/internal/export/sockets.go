package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// The type sockets contains the listeners and connections through which clients reach the
// server.
type sockets struct {
	listeners []net.Listener
	conns     []net.Conn // connections that were accepted before the start
	activated bool
	folder    string // folder of a private socket
}

// activatedSockets returns the sockets that systemd or another parent process passed to
// this process by socket activation. The result is empty without socket activation.
func activatedSockets() (*sockets, error) {
	s := new(sockets)
	var err error
	if s.listeners, s.conns, err = server.Activated(); err != nil {
		return nil, err
	}
	s.activated = len(s.listeners)+len(s.conns) > 0
	return s, nil
}

// The method listen opens the sockets at the given addresses. The parameter captive is true
// if the server serves only the command of --run. If there are no addresses and no sockets
// from socket activation, a captive server listens on a private socket, and a server that
// is not captive listens on 127.0.0.1.
func (s *sockets) listen(ctx context.Context, addresses []string, captive bool) error {
	switch {
	case s.activated && captive:
		return usage.Errorf("--run cannot be used with socket activation")
	case len(addresses) > 0 || s.activated:
	case captive:
		addresses = []string{privateSocket}
	default:
		addresses = []string{"tcp://127.0.0.1:" + nbd.DefaultPort}
	}
	for _, address := range addresses {
		if address == "systemd" {
			if !s.activated {
				return errors.New("--listen systemd: systemd passed no sockets (LISTEN_PID is not the ID of this process)")
			}
			continue
		}
		if address == privateSocket {
			if s.folder == "" {
				folder, err := os.MkdirTemp("", "vddkcp-")
				if err != nil {
					return fmt.Errorf("cannot create a private socket: %w", err)
				}
				s.folder = folder
			}
			name := "socket"
			if n := len(s.listeners); n > 0 {
				name += strconv.Itoa(n)
			}
			address = "unix:" + filepath.Join(s.folder, name)
		}
		l, err := server.Listen(ctx, address)
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, l)
	}
	return nil
}

// CheckListen checks the syntax of addresses for Options.Listen. Its errors name
// the flag --listen.
func CheckListen(addresses []string) error {
	known := map[string]bool{}
	for _, address := range addresses {
		if address == privateSocket {
			continue // every private socket is a new one
		}
		checked := address
		if address != "systemd" {
			var err error
			if checked, err = server.CheckAddress(address); err != nil {
				return fmt.Errorf("--listen %w (or \"unix:-\" for a private socket, or \"systemd\" for sockets from systemd)", err)
			}
		}
		if known[checked] {
			return fmt.Errorf("--listen %s is given twice", address)
		}
		known[checked] = !strings.HasSuffix(checked, ":0") // port 0 is a different free port each time
	}
	return nil
}

// privateSocket is an address for the method listen. It stands for a socket that listen
// creates in a new folder.
const privateSocket = "unix:-"

func (s *sockets) uris(overTLS bool, name string) (all []string) {
	for _, l := range s.listeners {
		all = append(all, server.URI(l.Addr(), overTLS, name))
	}
	return all
}

// The method serve serves clients until ctx ends. If the sockets are only connections and
// not listeners, it also ends when the last client disconnects.
func (s *sockets) serve(ctx context.Context, server *server.Server) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	var clients sync.WaitGroup
	for _, c := range s.conns {
		clients.Go(func() { server.ServeConn(ctx, c) })
	}
	var err error
	if len(s.listeners) > 0 {
		if err = server.Serve(ctx, s.listeners...); err != nil {
			end() // report the error now and not when the last client leaves
		}
	}
	clients.Wait()
	return errors.Join(err, server.Err())
}

// The method close closes all sockets and removes their files.
func (s *sockets) close(log *slog.Logger) {
	for _, l := range s.listeners {
		l.Close()
	}
	for _, c := range s.conns {
		c.Close()
	}
	if s.folder != "" {
		if err := os.RemoveAll(s.folder); err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.Warn(fmt.Sprintf("cannot remove the folder of the private socket: %v", err))
		}
	}
}
