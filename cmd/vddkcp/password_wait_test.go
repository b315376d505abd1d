package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/vddk"
)

// TestSecretThatNeverComes checks that a signal ends the wait for a secret or a
// configuration from a pipe to which nobody writes.
func TestSecretThatNeverComes(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	fd, err := unix.Dup(int(r.Fd())) // which the reading closes, when it ends
	if err != nil {
		t.Fatal(err)
	}
	why := errors.New("SIGTERM")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	for _, f := range []secretFlag{{form: inFile, value: fifo}, {form: onFD, fd: fd}} {
		if _, err := f.read(ctx, nil, "password"); !errors.Is(err, why) {
			t.Errorf("%+v: %v", f.form, err)
		}
	}
	if _, err := vddk.Open(ctx, vddk.Params{File: "/x.vmdk", Config: fifo}, vddk.Library{}, vddk.Options{}); !errors.Is(err, why) {
		t.Error(err)
	}
	// Let the goroutines end.
	if w, err := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0); err == nil {
		w.WriteString("\n")
		w.Close()
	}
}
