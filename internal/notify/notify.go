// Package notify tells a service manager, such as systemd, how the process is doing. It speaks the
// protocol of sd_notify(3): each message is a datagram of lines NAME=VALUE to a unix socket.
package notify

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// These are complete messages for [Notifier.Send].
const (
	Ready    = "READY=1"    // the service has started
	Stopping = "STOPPING=1" // the service is ending
	Alive    = "WATCHDOG=1" // the service still works; see Notifier.Watchdog
)

// Status returns a message with a text for people, which "systemctl status" shows.
func Status(text string) string { return "STATUS=" + printable.Line(text) }

// Notifier sends messages to the service manager that started the process. A Notifier is safe for
// concurrent use.
type Notifier struct {
	conn     *net.UnixConn
	watchdog time.Duration
}

// sendTimeout bounds how long Send waits for a service manager that does not read its socket.
const sendTimeout = time.Second

// FromEnvironment returns the Notifier for the service manager that the environment variables
// NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID name, or nil if there is none. It removes these
// variables from the environment, so that no child process sends messages in place of this
// process.
func FromEnvironment() (*Notifier, error) {
	socket, usec, pid := take("NOTIFY_SOCKET"), take("WATCHDOG_USEC"), take("WATCHDOG_PID")
	if socket == "" {
		return nil, nil
	}
	// Other kinds of addresses, such as vsock:2:1234, are for virtual machines. In package net, a
	// name that begins with @ is an abstract one, as in NOTIFY_SOCKET.
	if len(socket) < 2 || !strings.HasPrefix(socket, "/") && !strings.HasPrefix(socket, "@") {
		return nil, fmt.Errorf("NOTIFY_SOCKET=%s: want an absolute path, or @ and the name of an abstract socket", printable.Word(socket))
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: socket})
	if err != nil {
		return nil, fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	n := &Notifier{conn: conn}
	if usec == "" || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return n, nil
	}
	micro, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || micro <= 0 || micro > int64(time.Duration(1<<63-1)/time.Microsecond) {
		return n, fmt.Errorf("WATCHDOG_USEC=%s: want a number of microseconds", printable.Word(usec))
	}
	n.watchdog = time.Duration(micro) * time.Microsecond
	return n, nil
}

// The function take returns the value of an environment variable and removes the variable.
func take(name string) string {
	value := os.Getenv(name)
	os.Unsetenv(name)
	return value
}

// Watchdog returns the time within which the service manager expects a message [Alive]. If it gets
// none for so long, it kills the process. The result is 0 if it expects no such messages.
func (n *Notifier) Watchdog() time.Duration {
	return n.watchdog
}

// Send sends messages to the service manager.
func (n *Notifier) Send(messages ...string) error {
	err := n.conn.SetWriteDeadline(time.Now().Add(sendTimeout))
	_, written := n.conn.Write([]byte(strings.Join(messages, "\n") + "\n"))
	if err := errors.Join(err, written); err != nil {
		return fmt.Errorf("message to the service manager: %w", err)
	}
	return nil
}
