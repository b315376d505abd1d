package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

// TestReaderLeavesASilentStream checks that a copy to standard output ends when the
// reader has closed it, although nothing more comes on standard input.
func TestReaderLeavesASilentStream(t *testing.T) {
	in, feed, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer feed.Close() // not before the copy has ended
	gone, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	defer out.Close()
	var stderr bytes.Buffer
	cmd := command(t, "-", "-", "--size", "8MiB", "--source-format", "raw", "--request-size", "64KiB", "--progress", "none")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	written := make(chan error)
	go func() {
		_, err := feed.Write(bytes.Repeat([]byte{1}, 100<<10))
		written <- err
	}()
	cmd.Wait()
	in.Close() // which ends the write above, if it was not read
	<-written
	if got := cmd.ProcessState.ExitCode(); got != 1 || !strings.Contains(stderr.String(), "broken pipe") {
		t.Errorf("exit status %d: %s", got, &stderr)
	}
}
