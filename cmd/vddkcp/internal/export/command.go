package export

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// CommandStatus reports that Options.Command ended with a status other than 0.
type CommandStatus struct{ Status int }

func (e *CommandStatus) Error() string { return fmt.Sprintf("CMD ended with status %d", e.Status) }

// ExitStatus returns the exit status of the command or, if a signal ended the
// command, 128 plus the number of the signal.
func (e *CommandStatus) ExitStatus() int { return e.Status }

// The method script returns shell commands that set variables such as $uri and $port. They
// run before the command of --run. nbdkit sets the same variables. As with nbdkit, the
// variables are not exported to the environment.
func (s *sockets) script(uri, name string) string {
	port, path := "", ""
	switch a := s.listeners[0].Addr().(type) {
	case *net.TCPAddr:
		port = strconv.Itoa(a.Port)
	case *net.UnixAddr:
		path = a.Name
	}
	var script strings.Builder
	for _, v := range [][2]string{{"uri", uri}, {"nbd", uri}, {"port", port}, {"unixsocket", path}, {"exportname", name}} {
		fmt.Fprintf(&script, "%s=%s\n", v[0], printable.Word(v[1]))
	}
	return script.String()
}

// runShell runs a script. It returns nil, a *CommandStatus, or the reason why the
// script could not be run. When ctx ends because of a signal, runShell sends the same
// signal to the script. When ctx ends for another reason, it sends SIGTERM.
func runShell(ctx context.Context, script string) error {
	command := exec.Command("/bin/sh", "-c", script)
	command.Stdin, command.Stdout, command.Stderr = os.Stdin, os.Stdout, os.Stderr
	if err := command.Start(); err != nil {
		return fmt.Errorf("--run: %w", err)
	}
	stop := context.AfterFunc(ctx, func() {
		kill := syscall.SIGTERM
		var stopped interface{ Signal() syscall.Signal }
		if errors.As(context.Cause(ctx), &stopped) {
			kill = stopped.Signal()
		}
		if kill == syscall.SIGINT && terminalSignals() {
			return // the terminal has already sent SIGINT to the script, and a second one would end the script at once
		}
		command.Process.Signal(kill) // fails if the script has ended already
	})
	defer stop()
	err := command.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	status := exit.ExitCode()
	if w, ok := exit.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		status = 128 + int(w.Signal())
	}
	return &CommandStatus{status}
}

// terminalSignals reports whether Ctrl-C on a terminal reaches this process and the
// processes that it started.
func terminalSignals() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// parentEnded waits until the parent process or ctx has ended. It returns true if the
// parent process has ended. The caller passes the process ID that the parent had when this
// process started.
func parentEnded(ctx context.Context, parent int) bool {
	// PR_SET_PDEATHSIG is not suitable here. It reports the end of the thread that started
	// this process, not the end of the parent process, which may outlive that thread.
	const milliseconds = 200 // time between two checks of the parent's ID
	var wait []unix.PollFd
	// The loop below waits in poll. With a pidfd, poll returns as soon as the parent
	// process ends. Linux before 5.3 has no pidfd. There, poll returns only when its time
	// is over, and then the loop checks the ID of the parent.
	if fd, err := unix.PidfdOpen(parent, 0); err == nil {
		defer unix.Close(fd)
		wait = []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	}
	for ctx.Err() == nil {
		if os.Getppid() != parent {
			return true
		}
		unix.Poll(wait, milliseconds) // if poll fails, the loop only checks more often
	}
	return false
}
