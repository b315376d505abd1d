package durable_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/durable"
)

func TestLockHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	look := func(when string, want durable.Held, pid int) durable.Holder {
		t.Helper()
		h, err := durable.LockHolder(path)
		if err != nil || h.Held != want || h.PID != pid {
			t.Errorf("%s: %+v, %v; want %s, process %d", when, h, err, want, pid)
		}
		return h
	}
	look("no file", durable.HeldNo, 0)
	f, err := durable.Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	h := look("locked", durable.HeldYes, os.Getpid())
	if host, _ := os.Hostname(); h.Host != host || time.Since(h.Since) > time.Hour {
		t.Errorf("host %q, since %v", h.Host, h.Since)
	}
	// A look does not take the lock away from a process that wants it.
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	look("left by a killed process", durable.HeldNo, os.Getpid())
	for _, c := range []struct {
		text string
		want durable.Held
		pid  int
	}{
		{"", durable.HeldNo, 0},
		{"process 17 on another-host, since 2026-12-01T02:00:00Z\n", durable.HeldUnknown, 17},
		{"something else", durable.HeldNo, 0},
	} {
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		look(fmt.Sprintf("%q", c.text), c.want, c.pid)
	}
}
