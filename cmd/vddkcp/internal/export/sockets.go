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

// sockets are what clients come by.
type sockets struct {
	listeners []net.Listener
	conns     []net.Conn // that were accepted before the start
	activated bool
	folder    string // of a private socket
}

// activatedSockets are those of socket activation; there may be none.
func activatedSockets() (*sockets, error) {
	s := new(sockets)
	var err error
	if s.listeners, s.conns, err = server.Activated(); err != nil {
		return nil, err
	}
	s.activated = len(s.listeners)+len(s.conns) > 0
	return s, nil
}

// listen opens the sockets that are asked for; captive says that they are for
// CMD of --run.
func (s *sockets) listen(ctx context.Context, addresses []string, captive bool) error {
	switch {
	case s.activated && captive:
		return usage.Errorf("--run and socket activation: want one of the two")
	case len(addresses) > 0 || s.activated:
	case captive:
		addresses = []string{privateSocket}
	default:
		addresses = []string{"tcp://127.0.0.1:" + nbd.DefaultPort}
	}
	for _, address := range addresses {
		if address == "systemd" {
			if !s.activated {
				return errors.New("--listen systemd: no sockets were passed (LISTEN_PID is not this process)")
			}
			continue
		}
		if address == privateSocket {
			if s.folder == "" {
				folder, err := os.MkdirTemp("", "vddkcp-")
				if err != nil {
					return fmt.Errorf("private socket: %w", err)
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

// CheckListen checks how the addresses of Options.Listen are written. Its errors
// name the flag --listen.
func CheckListen(addresses []string) error {
	known := map[string]bool{}
	for _, address := range addresses {
		if address == privateSocket {
			continue // each is another one
		}
		checked := address
		if address != "systemd" {
			var err error
			if checked, err = server.CheckAddress(address); err != nil {
				return fmt.Errorf("--listen %w, unix:- or systemd", err)
			}
		}
		if known[checked] {
			return fmt.Errorf("--listen %s is given twice", address)
		}
		known[checked] = !strings.HasSuffix(checked, ":0") // a free port is another one each time
	}
	return nil
}

// privateSocket is a socket in a folder that is made for it.
const privateSocket = "unix:-"

func (s *sockets) uris(overTLS bool, name string) (all []string) {
	for _, l := range s.listeners {
		all = append(all, server.URI(l.Addr(), overTLS, name))
	}
	return all
}

// serve serves until ctx ends, or until the last client of those that came
// before the start has left where nobody listens.
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
			end() // the clients would keep the error back until they leave
		}
	}
	clients.Wait()
	return errors.Join(err, server.Err())
}

// close removes sockets too.
func (s *sockets) close(log *slog.Logger) {
	for _, l := range s.listeners {
		l.Close()
	}
	for _, c := range s.conns {
		c.Close()
	}
	if s.folder != "" {
		if err := os.RemoveAll(s.folder); err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.Warn(fmt.Sprintf("private socket: %v", err))
		}
	}
}
