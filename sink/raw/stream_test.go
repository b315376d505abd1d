package raw

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestBrokenPipe(t *testing.T) {
	for name, open := range pipes {
		r, w, err := open()
		if err != nil {
			t.Fatal(err)
		}
		d, err := Stream(t.Context(), w, "standard output", diskSize)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		if err := fillDisk(d); !errors.Is(err, unix.EPIPE) || !strings.HasPrefix(err.Error(), "cannot write to standard output at offset 0: ") {
			t.Errorf("%s: %v", name, err)
		}
		if err := d.Abort(); err != nil {
			t.Errorf("%s: Abort: %v", name, err)
		}
	}
}

// A write that nobody reads ends with the context.
func TestBlockedStreamStops(t *testing.T) {
	for name, open := range pipes {
		for _, zero := range []bool{false, true} {
			r, w, err := open()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			why := errors.New("stop")
			ctx, stop := context.WithCancelCause(t.Context())
			d, err := Stream(ctx, w, "-", 1<<40)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() {
				if zero {
					done <- d.ZeroAt(t.Context(), 0, 1<<40)
					return
				}
				_, err := d.WriteAt(make([]byte, 64<<20), 0)
				done <- err
			}()
			r.Read(make([]byte, 1)) // now it is under way
			stop(why)
			select {
			case err := <-done:
				if !errors.Is(err, why) {
					t.Errorf("%s: %v", name, err)
				}
			case <-time.After(20 * time.Second):
				t.Fatalf("%s: blocked for ever", name)
			}
			if err := d.Abort(); err != nil {
				t.Errorf("%s: Abort: %v", name, err)
			}
		}
	}
}

// TestStreamLeavesFlagsAlone checks that the pipe stays blocking for the other
// processes that share it.
func TestStreamLeavesFlagsAlone(t *testing.T) {
	for name, open := range pipes {
		if name == "pipe" {
			continue // is non-blocking already
		}
		r, w, err := open()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		d, err := Stream(t.Context(), w, "-", 10)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Abort()
		if _, err := d.WriteAt(make([]byte, 10), 0); err != nil {
			t.Fatal(err)
		}
		if flags, err := unix.FcntlInt(w.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
			t.Errorf("%s: flags %#x, %v", name, flags, err)
		}
	}
}

func TestStreamOutOfOrder(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, name := range []string{"gap", "again", "short"} {
		fd, err := unix.Dup(int(w.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		d, err := Stream(t.Context(), os.NewFile(uintptr(fd), "w"), "-", 100)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt(make([]byte, 10), 0); err != nil {
			t.Fatal(err)
		}
		switch name {
		case "gap":
			err = d.ZeroAt(t.Context(), 11, 10)
		case "again":
			_, err = d.WriteAt(make([]byte, 10), 0)
		case "short":
			err = d.Finish(t.Context())
		}
		if err == nil || !strings.Contains(err.Error(), "10") {
			t.Errorf("%s: %v", name, err)
		}
		d.Abort()
	}
	w.Close()
}

func TestStreamToFullDevice(t *testing.T) {
	w, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	d, err := Stream(t.Context(), w, "/dev/full", diskSize)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Abort()
	if err := fillDisk(d); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error %v", err)
	}
}
