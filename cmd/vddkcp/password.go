package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/impatient"
	"github.com/vddkcp/vddkcp/vddk"
)

// secretFlag is the value of --password or --cookie, in one of the four forms of
// nbdkit's plugin.
type secretFlag struct {
	form  secretForm
	value string // the secret itself, or the file it is in
	fd    int
}

type secretForm int

const (
	notGiven   secretForm = iota
	inPlain               // VALUE
	inJobFile             // VALUE, that nobody sees on a command line
	onTerminal            // -
	inFile                // +FILE
	onFD                  // -FD
)

// Decode implements kong.MapperValue. It takes the next word whatever that
// begins with, and no error of it shows what it took.
func (f *secretFlag) Decode(ctx *kong.DecodeContext) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("want a value: the secret, - to be asked, +FILE or -FD")
	}
	return f.parse(fmt.Sprint(token.Value))
}

func (f *secretFlag) parse(s string) error {
	if name, ok := strings.CutPrefix(s, "+"); ok {
		*f = secretFlag{form: inFile, value: name}
		if name == "" {
			return errors.New("+: want the name of a file after it")
		}
		return nil
	}
	number, ok := strings.CutPrefix(s, "-")
	if !ok {
		*f = secretFlag{form: inPlain, value: s}
		return nil
	}
	if number == "" {
		*f = secretFlag{form: onTerminal}
		return nil
	}
	fd, err := strconv.ParseUint(number, 10, 31)
	if err != nil {
		return errors.New("it begins with - and is no number of a file descriptor: a secret that begins with - or + is given by +FILE or -FD")
	}
	if fd < 3 {
		return fmt.Errorf("-%d: file descriptors 0 to 2 have other uses: want 3 or more", fd)
	}
	*f = secretFlag{form: onFD, fd: int(fd)}
	return nil
}

// read returns the secret, which a prompt calls what. Pause takes the display off
// the terminal meanwhile; nil: there is none. No error has the word of the flag: it
// may be a password that somebody took for the name of a file.
func (f *secretFlag) read(ctx context.Context, pause func() (resume func()), what string) (vddk.Secret, error) {
	var text string
	var err error
	switch f.form {
	case notGiven:
		return vddk.Secret{}, nil
	case inPlain, inJobFile:
		text = f.value
	case onTerminal:
		if pause != nil {
			defer pause()()
		}
		text, err = askTerminal(grace.Original(ctx), what+": ")
	case inFile:
		text, err = impatient.Call(grace.Original(ctx), func() (string, error) { return readSecretFile(f.value) })
	case onFD:
		text, err = impatient.Call(grace.Original(ctx), func() (string, error) { return readFD(f.fd) })
	}
	if err != nil {
		return vddk.Secret{}, err
	}
	return vddk.NewSecret(text), nil
}

// readSecretFile returns the first line of the file, which its errors don't name.
func readSecretFile(name string) (string, error) {
	file, err := os.Open(name)
	if err == nil {
		defer file.Close()
		var text string
		if text, err = firstLine(file); err == nil {
			return text, nil
		}
	}
	var at *fs.PathError
	if errors.As(err, &at) {
		err = at.Err
	}
	return "", &hintedError{
		fmt.Errorf("cannot read the file that is named after +: %w", err),
		"a value that begins with + names a file, whose first line is the secret; give a secret that begins with + itself by +FILE, - or -FD",
	}
}

// readFD reads what whoever started us left open for it. No child of ours gets
// the descriptor.
func readFD(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("file descriptor %d: %w", fd, err)
	}
	if st.Mode&unix.S_IFMT == 0 { // one of the runtime's own, an epoll
		return "", fmt.Errorf("file descriptor %d: %w", fd, unix.EBADF)
	}
	unix.CloseOnExec(fd)
	file := os.NewFile(uintptr(fd), fmt.Sprintf("file descriptor %d", fd))
	defer file.Close()
	return firstLine(file)
}

// maxSecret bounds a secret, in bytes: a wrong file is not read to its end.
const maxSecret = 64 << 10

// firstLine reads the first line, without what ends it.
func firstLine(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, maxSecret+1)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", err
	}
	if len(line) > maxSecret {
		return "", fmt.Errorf("its first line is longer than %d bytes", maxSecret)
	}
	return strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r"), nil
}

// askTerminal asks on the terminal itself: standard input may be a disk, and
// standard output may become one. What is typed is not shown.
func askTerminal(ctx context.Context, prompt string) (text string, err error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("there is no terminal to ask on (%w)", err)
	}
	defer tty.Close()
	// The file stays with Go's poller, so that a signal can end the reading.
	raw, err := tty.SyscallConn()
	if err != nil {
		return "", err
	}
	var before *unix.Termios
	set := func(mode *unix.Termios) (err error) {
		if failed := raw.Control(func(fd uintptr) { err = unix.IoctlSetTermios(int(fd), unix.TCSETSF, mode) }); failed != nil {
			return failed
		}
		return err
	}
	if failed := raw.Control(func(fd uintptr) { before, err = unix.IoctlGetTermios(int(fd), unix.TCGETS) }); failed != nil {
		return "", failed
	}
	if err != nil {
		return "", err
	}
	forget := onAbruptEnd(func() { _ = set(before) })
	defer forget()
	silent := *before
	silent.Lflag = silent.Lflag&^unix.ECHO | unix.ICANON | unix.ISIG
	silent.Iflag |= unix.ICRNL
	if err := set(&silent); err != nil {
		return "", err
	}
	defer func() {
		io.WriteString(tty, "\n")
		err = errors.Join(err, set(before))
	}()
	if _, err := io.WriteString(tty, prompt); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { tty.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	line, err := bufio.NewReader(io.LimitReader(tty, maxSecret)).ReadString('\n')
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("nothing was typed: %w", err)
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// abruptEnd is what a signal that ends the process at once does before, while the
// terminal shows nothing of what is typed.
var abruptEnd atomic.Pointer[func()]

// onAbruptEnd has restore called if a signal ends the process at once, until forget
// is called: a second one of those that end the work, or SIGQUIT.
func onAbruptEnd(restore func()) (forget func()) {
	abruptEnd.Store(&restore)
	fatal := make(chan os.Signal, 1)
	signal.Notify(fatal, unix.SIGQUIT)
	gone := make(chan struct{})
	go func() {
		select {
		case s := <-fatal:
			restoreTerminal()
			signal.Reset(s)
			_ = unix.Kill(os.Getpid(), s.(unix.Signal)) // as if it had not been caught
		case <-gone:
		}
	}()
	return func() {
		close(gone)
		signal.Stop(fatal)
		abruptEnd.Store(nil)
	}
}

// restoreTerminal makes the terminal show again what is typed.
func restoreTerminal() {
	if restore := abruptEnd.Load(); restore != nil {
		(*restore)()
	}
}

// secretEnvironment are the secrets that the environment gave.
type secretEnvironment struct{ password, cookie vddk.Secret }

// takeSecrets takes them out of the environment: no child is to have them.
func takeSecrets() *secretEnvironment {
	take := func(name string) vddk.Secret {
		text, ok := os.LookupEnv(name)
		if !ok {
			return vddk.Secret{}
		}
		os.Unsetenv(name)
		if text == "" { // as good as unset, in scripts
			return vddk.Secret{}
		}
		return vddk.NewSecret(text)
	}
	return &secretEnvironment{take("VDDKCP_PASSWORD"), take("VDDKCP_COOKIE")}
}
