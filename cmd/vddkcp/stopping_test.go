package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// serveStuck serves a disk whose reads wait until the function resume is called. Each read that
// arrives is sent to the channel arrived.
func serveStuck(t *testing.T) (uri string, arrived <-chan struct{}, resume func()) {
	t.Helper()
	const size = 64 << 20
	reads, stuck, opened := make(chan struct{}, 1000), make(chan struct{}), false
	d := sourcetest.Pattern(size, source.Extent{Len: size})
	d.OnRead = func(int64, int) error {
		reads <- struct{}{}
		<-stuck
		return nil
	}
	resume = func() {
		if !opened {
			opened = true
			close(stuck)
		}
	}
	s, err := server.New(server.Fixed{{Disk: d}}, server.Options{Grace: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := server.Listen(t.Context(), "unix:"+socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		resume()
		cancel()
		<-ended
	})
	return "nbd+unix:///?socket=" + socket, reads, resume
}

// TestStoppingNamesReads sends the first signal to a copy whose reads wait, and checks the message.
func TestStoppingNamesReads(t *testing.T) {
	for _, c := range []struct {
		name, want string
		args       []string
	}{
		{"text", "vddkcp: stopping: waiting for 3 reads (again to end at once)\n", nil},
		{"json", `"level":"INFO","msg":"stopping: waiting for 3 reads (again to end at once)","type":"log"}`, []string{"--progress", "json"}},
		{"log format", `"msg":"stopping: waiting for 3 reads (again to end at once)","type":"log"}`, []string{"--log-format", "json", "--progress", "none"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			uri, arrived, resume := serveStuck(t)
			dst := filepath.Join(t.TempDir(), "disk.raw")
			// The source is opened for reading its first bytes, which do not count as reads of the
			// copy.
			cmd := command(t, append([]string{uri, dst, "--source-format", "raw", "--connections", "1", "--depth", "3"}, c.args...)...)
			var stderr syncbuffer.Buffer
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				<-arrived
			}
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			var err error
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				err = cmd.Wait()
			}()
			for running := true; running && !strings.Contains(stderr.String(), "stopping"); {
				select {
				case <-ended:
					running = false
				case <-time.After(time.Millisecond):
				}
			}
			resume()
			<-ended
			if cmd.ProcessState.ExitCode() != 130 {
				t.Errorf("%v", err)
			}
			if got := stderr.String(); !strings.Contains(got, c.want) || strings.Count(got, "stopping") != 1 {
				t.Errorf("%s\nwant %s", got, c.want)
			}
			if len(c.args) > 0 {
				onlyJSON(t, stderr.String())
			}
		})
	}
}

// TestStoppingExport checks that an export that is stopped names its clients.
func TestStoppingExport(t *testing.T) {
	uri, arrived, resume := serveStuck(t)
	defer resume()
	socket := filepath.Join(t.TempDir(), "e")
	export := command(t, "export", uri, "--source-format", "raw", "--listen", "unix:"+socket)
	var stderr syncbuffer.Buffer
	export.Stderr = &stderr
	if err := export.Start(); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	copying := command(t, "nbd+unix:///?socket="+socket, "null:", "--source-format", "raw", "--connections", "1")
	if err := copying.Start(); err != nil {
		t.Fatal(err)
	}
	<-arrived
	if err := export.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	resume()
	if err := export.Wait(); err != nil {
		t.Errorf("%v", err)
	}
	copying.Process.Kill()
	copying.Wait()
	if want := "vddkcp: stopping: waiting for 1 client (again to end at once)\n"; !strings.Contains(stderr.String(), want) {
		t.Errorf("%s\nwant %s", stderr.String(), want)
	}
}

// onlyJSON checks that each line of a text is a JSON object with a known type.
func onlyJSON(t *testing.T, text string) (types map[string]int) {
	t.Helper()
	types = map[string]int{}
	for line := range strings.Lines(text) {
		var object struct{ Type string }
		if err := json.Unmarshal([]byte(line), &object); err != nil {
			t.Errorf("%v: %s", err, line)
		}
		types[object.Type]++
	}
	for kind := range types {
		if kind != "log" && kind != "error" && kind != "progress" {
			t.Errorf("a line of type %q:\n%s", kind, text)
		}
	}
	return types
}
