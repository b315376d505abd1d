package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/notify"
)

// TestService checks what a service manager is told while a command works, while it hangs, after a
// signal and at the end.
func TestService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // guards got
		var got []string
		s := &service{watchdog: 8 * time.Second, send: func(messages ...string) error {
			mu.Lock()
			defer mu.Unlock()
			got = append(got, messages...)
			return nil
		}}
		sent := func() []string {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(got)
		}
		count := func(message string) (n int) {
			for _, m := range sent() {
				if m == message {
					n++
				}
			}
			return n
		}
		pass := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		work := make(chan struct{}, 1) // a lock that the work needs; the work hangs while the test has it
		ctx, cancel := context.WithCancel(t.Context())
		done := s.begin(ctx, slog.New(slog.DiscardHandler), func() string {
			work <- struct{}{}
			<-work
			return "1 of 2 done"
		})
		synctest.Wait()
		if want := []string{notify.Ready, "STATUS=1 of 2 done", notify.Alive}; !slices.Equal(sent(), want) {
			t.Errorf("at the start %q, want %q", sent(), want)
		}
		pass(time.Minute + time.Second)
		if n := count(notify.Alive); n != 1+15 {
			t.Errorf("fed %d times in a minute, want one time every 4 s", n)
		}
		work <- struct{}{}
		pass(4 * time.Second)
		before := count(notify.Alive)
		pass(time.Hour)
		if n := count(notify.Alive); n != before {
			t.Errorf("fed %d times while the work hangs", n-before)
		}
		<-work
		cancel()
		synctest.Wait()
		if count(notify.Stopping) != 1 {
			t.Errorf("after a signal %q", sent())
		}
		pass(10 * time.Second)
		if n := count(notify.Alive); n < before+3 || count(notify.Stopping) != 1 {
			t.Errorf("fed %d times while it stops", n-before)
		}
		done()
		if all := sent(); count(notify.Ready) != 1 || all[len(all)-1] != notify.Stopping {
			t.Errorf("at the end %q", all)
		}
	})
}

// TestServiceManagerIsBusy checks that a service manager that does not read its socket at first
// learns later that the command has started.
func TestServiceManagerIsBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		var busy atomic.Bool
		busy.Store(true)
		s := &service{send: func(messages ...string) error {
			if busy.Load() {
				return errors.New("timeout")
			}
			got = append(got, messages...)
			return nil
		}}
		done := s.begin(t.Context(), slog.New(slog.DiscardHandler), func() string { return "works" })
		synctest.Wait()
		busy.Store(false)
		time.Sleep(21 * time.Second)
		synctest.Wait()
		if want := []string{notify.Ready, "STATUS=works", notify.Alive, "STATUS=works", notify.Alive}; !slices.Equal(got, want) {
			t.Errorf("sent %q, want %q", got, want)
		}
		done()
	})
}

// TestNotifySocket runs commands as a service manager does, and checks what they send to its
// socket.
func TestNotifySocket(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	disk := write("disk.raw", strings.Repeat("some bytes", 1000))
	jobs := write("jobs.json", `{"version":1,"jobs":[{"source":"disk.raw","target":"t.raw","source_format":"raw"}]}`)
	for _, c := range []struct {
		args   []string
		status string // of the last message with a status, or a part of it
		signal bool   // the command runs until it gets a signal
	}{
		{[]string{"copy", disk, filepath.Join(dir, "u.raw"), "--source-format", "raw", "--metrics", filepath.Join(dir, "u.prom")}, "STATUS=", false},
		{[]string{"run", jobs}, "STATUS=0 of 1 done", false},
		{[]string{"export", disk, "--source-format", "raw", "--listen", "unix:" + filepath.Join(dir, "n")}, "STATUS=serving 1 disk to 0 clients\n", true},
	} {
		socket := filepath.Join(dir, c.args[0]+".socket")
		manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: socket})
		if err != nil {
			t.Fatal(err)
		}
		defer manager.Close()
		cmd := command(t, c.args...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+socket, "WATCHDOG_USEC=60000000")
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		receive := func(want string) {
			b := make([]byte, 4096)
			n, err := manager.Read(b)
			if err != nil || !strings.HasPrefix(string(b[:n]), want) {
				t.Errorf("%s: received %q, %v; want %q", c.args[0], b[:n], err, want)
			}
		}
		receive("READY=1\n")
		receive(c.status)
		if c.signal {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		receive("STOPPING=1\n")
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s: %v", c.args[0], err)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "u.prom"))
	if err != nil || !strings.Contains(string(text), `vddkcp_exit_status{command="copy",name="u"} 0`) || !strings.Contains(string(text), `vddkcp_read_bytes_total{command="copy",name="u"} 10000`) {
		t.Errorf("metrics of a copy: %s, %v", text, err)
	}
}
