package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/eintr"
)

// startOnTerminal starts cmd with a new terminal as the one that controls it,
// and returns the other end of that.
func startOnTerminal(cmd *exec.Cmd) (*os.File, error) { return startOn(cmd, false) }

// startOn is startOnTerminal, where standard error may be the terminal too.
func startOn(cmd *exec.Cmd, stderr bool) (*os.File, error) { return startSized(cmd, stderr, 80, 24) }

// startSized is startOn for a terminal of the given size.
func startSized(cmd *exec.Cmd, stderr bool, columns, rows uint16) (*os.File, error) {
	other, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	number, err := unix.IoctlGetInt(int(other.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(other.Fd()), unix.TIOCSPTLCK, 0)
	}
	var tty *os.File
	if err == nil {
		tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		other.Close()
		return nil, err
	}
	defer tty.Close()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}); err != nil {
		other.Close()
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{tty}
	if stderr {
		cmd.Stderr = tty
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 3}
	if err := cmd.Start(); err != nil {
		other.Close()
		return nil, err
	}
	return other, nil
}

// answer waits for the prompt, types the answer, and returns all that the
// terminal showed until the process behind it ended.
func answer(terminal *os.File, prompt, text string) (shown string, err error) {
	var all bytes.Buffer
	typed := false
	b := make([]byte, 4096)
	for {
		n, err := terminal.Read(b)
		all.Write(b[:n])
		if !typed && strings.Contains(all.String(), prompt) {
			typed = true
			if _, err := terminal.WriteString(text); err != nil {
				return all.String(), err
			}
		}
		if errors.Is(err, unix.EIO) { // nobody has the other end
			if !typed {
				return all.String(), fmt.Errorf("%q was not asked", prompt)
			}
			return all.String(), nil
		}
		if err != nil {
			return all.String(), err
		}
	}
}

func TestAskTerminal(t *testing.T) {
	if os.Getenv("VDDKCP_TEST_ASK") != "" {
		ctx, stop := withSignals(context.Background(), func() {}, func() {})
		defer stop()
		text, err := askTerminal(ctx, "password: ", hidden)
		fmt.Printf("got %q %v\n", text, err)
		return
	}
	for name, c := range map[string]struct{ typed, want string }{
		"a password":       {"correct horse\n", `got "correct horse" <nil>`},
		"return":           {"correct horse\r", `got "correct horse" <nil>`},
		"with a -":         {"-3\n", `got "-3" <nil>`},
		"a correction":     {"xy\x7fz\n", `got "xz" <nil>`},
		"an empty one":     {"\n", `got "" <nil>`},
		"the end of it":    {"\x04", `got "" nothing was typed`},
		"an interruption":  {"half\x03", `got "" stopped by SIGINT`},
		"more than a line": {"one\ntwo\n", `got "one" <nil>`},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAskTerminal$")
			cmd.Env = append(os.Environ(), "VDDKCP_TEST_ASK=1")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out // no terminal: it asks on its own
			terminal, err := startOnTerminal(cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer terminal.Close()
			shown, err := answer(terminal, "password: ", c.typed)
			if waited := cmd.Wait(); err != nil || waited != nil {
				t.Fatalf("%v, %v\n%s%s", err, waited, shown, out.String())
			}
			if !strings.Contains(out.String(), c.want) {
				t.Errorf("%s\nwant %s", out.String(), c.want)
			}
			for _, word := range []string{"correct", "xy", "half"} {
				if strings.Contains(shown, word) {
					t.Errorf("the terminal shows %q: %q", word, shown)
				}
			}
		})
	}
}

func TestNoTerminalToAskOn(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAskTerminal$")
	cmd.Env = append(os.Environ(), "VDDKCP_TEST_ASK=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "there is no terminal to ask for the secret") {
		t.Errorf("%v\n%s", err, out)
	}
}

// cmdTerminal runs vddkcp on a new terminal, answers the prompt there, and checks
// the exit status: terminal PROMPT ANSWER STATUS ARGS... The output of the terminal
// is written to the file terminal, and standard output and error to the file out.
func cmdTerminal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 {
		ts.Fatalf("usage: terminal PROMPT ANSWER STATUS ARGS...")
	}
	program := ""
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if path := filepath.Join(dir, "vddkcp"); program == "" && exec.Command(path, "version").Run() == nil {
			program = path
		}
	}
	var out bytes.Buffer
	cmd := exec.Command(program, args[3:]...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Stdout, cmd.Stderr = &out, &out
	terminal, err := startOnTerminal(cmd)
	ts.Check(err)
	defer terminal.Close()
	shown, err := answer(terminal, args[0], args[1]+"\n")
	if err != nil {
		cmd.Process.Kill()
	}
	cmd.Wait()
	ts.Logf("[terminal]\n%s[out]\n%s", shown, out.String())
	ts.Check(err)
	if status := fmt.Sprint(cmd.ProcessState.ExitCode()); status != args[2] {
		ts.Fatalf("exit status %s, want %s", status, args[2])
	}
	ts.Check(os.WriteFile(ts.MkAbs("terminal"), []byte(shown), 0o644))
	ts.Check(os.WriteFile(ts.MkAbs("out"), out.Bytes(), 0o644))
}

// An end that no code of ours follows leaves a terminal that shows what is typed.
func TestEchoAfterSIGQUIT(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAskTerminal$")
	cmd.Env = append(os.Environ(), "VDDKCP_TEST_ASK=1", "GOTRACEBACK=none")
	terminal, err := startOnTerminal(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	shown, err := answer(terminal, "password: ", "half\x1c")
	if err != nil {
		t.Fatal(err, shown)
	}
	if err := cmd.Wait(); cmd.ProcessState.Success() {
		t.Fatalf("SIGQUIT did not end it: %v", err)
	}
	mode, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if mode.Lflag&unix.ECHO == 0 {
		t.Error("the terminal does not show what is typed")
	}
}

// The display is off the terminal while a password is asked for.
func TestPromptWithoutDisplay(t *testing.T) {
	for name, args := range map[string][]string{
		"copy":   {"copy", "[ds] a.vmdk", "null:"},
		"verify": {"verify", "[ds] a.vmdk", os.DevNull},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := command(t, append(args, "--progress", "bar", "--server", "h", "--user", "u", "--vm", "moref=1",
				"--thumbprint", strings.Repeat("ab", 20), "--libdir", t.TempDir(), "--password", "-")...)
			terminal, err := startOn(cmd, true)
			if err != nil {
				t.Fatal(err)
			}
			defer terminal.Close()
			var shown strings.Builder
			b := make([]byte, 4096)
			for !strings.HasSuffix(shown.String(), "password of u at h: ") {
				n, err := terminal.Read(b)
				if err != nil {
					t.Fatal(err, shown.String())
				}
				shown.Write(b[:n])
			}
			// Several times as long as a bar rests.
			const milliseconds = 1000
			n := 0
			err = eintr.Retry(func() (err error) { // a signal of the Go scheduler may end the wait
				n, err = unix.Poll([]unix.PollFd{{Fd: int32(terminal.Fd()), Events: unix.POLLIN}}, milliseconds)
				return err
			})
			if err != nil {
				t.Error(err)
			} else if n != 0 {
				n, _ = terminal.Read(b)
				t.Errorf("drawn over the prompt: %q", b[:max(n, 0)])
			}
			cmd.Process.Kill()
			cmd.Wait()
		})
	}
}
