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
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/impatient"
	"github.com/vddkcp/vddkcp/vddk"
)

// secretFlag is the value of --password or --cookie, in one of the four forms of
// nbdkit-vddk-plugin.
type secretFlag struct {
	form  secretForm
	value string // the secret itself, or the path of the file that contains it
	fd    int
}

type secretForm int

const (
	notGiven   secretForm = iota
	inPlain               // VALUE
	inJobFile             // VALUE in a job file, which is not visible to other users
	onTerminal            // -
	inFile                // +FILE
	onFD                  // -FD
)

// Decode implements kong.MapperValue. It accepts any word as the value, even
// one that begins with - or --. Its errors do not contain the value.
func (f *secretFlag) Decode(ctx *kong.DecodeContext) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("the value is missing: want the secret itself, \"-\" to type it on the terminal, +FILE to read it from a file, or -FD to read it from a file descriptor")
	}
	return f.parse(fmt.Sprint(token.Value))
}

func (f *secretFlag) parse(s string) error {
	if name, ok := strings.CutPrefix(s, "+"); ok {
		*f = secretFlag{form: inFile, value: name}
		if name == "" {
			return errors.New("the value \"+\": the path of a file is missing after the \"+\"")
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
		return errors.New("the value begins with \"-\", but no number of a file descriptor follows: a secret that begins with \"-\" or \"+\" must be read from a file (+FILE) or a file descriptor (-FD)")
	}
	if fd < 3 {
		return fmt.Errorf("the value \"-%[1]d\" means file descriptor %[1]d, but file descriptors 0 to 2 are standard input, output and error: want \"-3\" or a greater number", fd)
	}
	*f = secretFlag{form: onFD, fd: int(fd)}
	return nil
}

// The method read returns the secret. If the user must type the secret, it asks with the
// text label. While it asks, the progress display is hidden: it calls the function pause
// before, and the result of pause, which shows the display again, after that. The parameter
// pause may be nil. Errors do not contain the value of the flag, because a user may have
// typed a password where the name of a file is expected.
func (f *secretFlag) read(ctx context.Context, pause func() (resume func()), label string) (vddk.Secret, error) {
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
		text, err = askTerminal(grace.Original(ctx), label+": ", hidden)
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

// The method pathForJobs returns the value of the flag for a job file, as +FILE with an absolute
// path. It returns "" for the other forms, which a job file cannot or must not have.
func (f *secretFlag) pathForJobs() (string, error) {
	if f.form != inFile {
		return "", nil
	}
	path, err := filepath.Abs(f.value)
	return "+" + path, err
}

// readSecretFile returns the first line of a file. Its errors do not contain the
// name, which may be a secret.
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
	return "", hinted.Error(
		fmt.Errorf("cannot read the file whose path follows the \"+\": %w", err),
		`the text after the "+" must be the path of a file, and the first line of the file is the secret; if the secret itself begins with "+", use +FILE, "-" or -FD`,
	)
}

// readFD returns the first line from a file descriptor that the parent process has
// left open. No child process inherits the descriptor.
func readFD(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("file descriptor %d: %w", fd, err)
	}
	if st.Mode&unix.S_IFMT == 0 { // an internal descriptor of the Go runtime, such as an epoll
		return "", fmt.Errorf("file descriptor %d: %w", fd, unix.EBADF)
	}
	unix.CloseOnExec(fd)
	file := os.NewFile(uintptr(fd), fmt.Sprintf("file descriptor %d", fd))
	defer file.Close()
	return firstLine(file)
}

// maxSecret is the maximal length of a secret in bytes. Because of this limit, a large
// file that was named by mistake is not read to its end.
const maxSecret = 64 << 10

// firstLine returns the first line of r without its line ending.
func firstLine(r io.Reader) (string, error) {
	line, err := bufio.NewReader(io.LimitReader(r, maxSecret+1)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", err
	}
	if len(line) > maxSecret {
		return "", fmt.Errorf("the first line of the file is longer than %d bytes", maxSecret)
	}
	return strings.TrimSuffix(strings.TrimSuffix(line, "\n"), "\r"), nil
}

// The type visibility says whether the terminal shows what the user types.
type visibility bool

const (
	hidden  visibility = false
	visible visibility = true
)

// askTerminal asks for a line on the terminal itself, because standard input and output may
// be disks. Lines that were typed before the question do not count.
func askTerminal(ctx context.Context, prompt string, echo visibility) (text string, err error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		what := "the secret"
		if echo {
			what = "an answer"
		}
		return "", fmt.Errorf("there is no terminal to ask for %s (%w)", what, err)
	}
	defer tty.Close()
	// With SyscallConn, the terminal stays registered with the poller of the Go runtime.
	// Only then can a deadline interrupt a read from the terminal.
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
	asking := *before
	asking.Lflag |= unix.ICANON | unix.ISIG
	asking.Iflag |= unix.ICRNL
	if echo {
		asking.Lflag |= unix.ECHO
	} else {
		asking.Lflag &^= unix.ECHO
	}
	if err := set(&asking); err != nil {
		return "", err
	}
	defer func() {
		if !echo || err != nil {
			io.WriteString(tty, "\n")
		}
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

// The variable abruptEnd is a function that is called before a signal ends the process at
// once. It is set while the terminal does not show typed characters.
var abruptEnd atomic.Pointer[func()]

// onAbruptEnd registers the function restore. The function restore is called before a
// signal ends the process at once. These signals are a SIGQUIT, and a second SIGINT or
// SIGTERM. The result forget is a function that removes the registration.
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
			_ = unix.Kill(os.Getpid(), s.(unix.Signal)) // end the process as if the signal had not been caught
		case <-gone:
		}
	}()
	return func() {
		close(gone)
		signal.Stop(fatal)
		abruptEnd.Store(nil)
	}
}

// restoreTerminal makes the terminal show typed characters again.
func restoreTerminal() {
	if restore := abruptEnd.Load(); restore != nil {
		(*restore)()
	}
}

// secretEnvironment holds the secrets from environment variables.
type secretEnvironment struct{ password, cookie vddk.Secret }

// extractSecrets returns the secrets in the environment and removes them from it, so
// that no child process inherits them.
func extractSecrets() *secretEnvironment {
	take := func(name string) vddk.Secret {
		text, ok := os.LookupEnv(name)
		if !ok {
			return vddk.Secret{}
		}
		os.Unsetenv(name)
		if text == "" { // scripts leave variables empty instead of unsetting them
			return vddk.Secret{}
		}
		return vddk.NewSecret(text)
	}
	return &secretEnvironment{take("VDDKCP_PASSWORD"), take("VDDKCP_COOKIE")}
}
