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
)

// CommandStatus reports that Options.Command did not end with status 0.
type CommandStatus struct{ Status int }

func (e *CommandStatus) Error() string { return fmt.Sprintf("CMD ended with status %d", e.Status) }

// ExitStatus returns the status that the command ended with, or 128 and the number
// of the signal that ended it.
func (e *CommandStatus) ExitStatus() int { return e.Status }

// script sets the variables that nbdkit sets for CMD, in the shell and not in
// the environment, as nbdkit does.
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
		fmt.Fprintf(&script, "%s=%s\n", v[0], shellQuote(v[1]))
	}
	return script.String()
}

// shellQuote makes of s one word of a shell's.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'"'"'`) + "'" }

// runShell runs a script and returns nil, a *CommandStatus, or why it could
// not be run. The end of ctx ends it: by the signal that is the cause.
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
			return // a second one would end it at once
		}
		command.Process.Signal(kill) // it may have ended
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

// terminalSignals says whether a terminal's ^C reaches this process, and so
// what it has started.
func terminalSignals() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// parentEnded waits for the end of the process that started this one, or of
// ctx, and says whether it was the former. Parent is who it was at the start.
func parentEnded(ctx context.Context, parent int) bool {
	// PR_SET_PDEATHSIG would tell of the end of the thread that started us.
	const milliseconds = 200 // between two looks
	var wait []unix.PollFd
	// Before Linux 5.3 there is none, and the looks have to do.
	if fd, err := unix.PidfdOpen(parent, 0); err == nil {
		defer unix.Close(fd)
		wait = []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	}
	for ctx.Err() == nil {
		if os.Getppid() != parent {
			return true
		}
		unix.Poll(wait, milliseconds) // where it fails the loop only turns faster
	}
	return false
}
