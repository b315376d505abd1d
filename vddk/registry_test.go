package vddk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

func refusedLogin() error {
	return libraryError(3014, "Insufficient permissions in the host operating system")
}

// After one refused login, no other login with the same user and password is attempted, not even
// one that waits at that time.
func TestOneRefusedLogin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _ := newFakeHost(t, mib)
		var logins atomic.Int64
		host.onOpen = func(int, *worker.Opened) error {
			logins.Add(1)
			time.Sleep(time.Second)
			return refusedLogin()
		}
		registry := NewRegistry(1)
		var wg sync.WaitGroup
		for i := range 20 {
			wg.Go(func() {
				p := Params{File: fmt.Sprintf("[ds] %d.vmdk", i), Server: "ESXi", User: "root", Password: NewSecret("wrong")}
				if i%2 == 1 {
					p.Server, p.Port = "esxi.", certificate.DefaultPort // another form of the same server
				}
				_, err := host.open(t.Context(), p, Options{Connections: 4, Registry: registry, Retry: fastRetry(-1)})
				if err == nil || !source.IsPermanent(err) || !strings.Contains(err.Error(), "error 3014") || !strings.Contains(err.Error(), p.File) ||
					!strings.Contains(hintOf(err), "refused the login") {
					t.Errorf("%v, hint %q", err, hintOf(err))
				}
			})
		}
		wg.Wait()
		if n := logins.Load(); n != 1 {
			t.Errorf("%d logins", n)
		}
		for _, p := range []Params{
			{Server: "esxi", User: "root", Password: NewSecret("another")},
			{Server: "esxi", User: "other", Password: NewSecret("wrong")},
			{Server: "esxi2", User: "root", Password: NewSecret("wrong")},
			{Server: "esxi", Port: 8443, User: "root", Password: NewSecret("wrong")},
			{Server: "esxi", User: "root", Cookie: NewSecret("wrong")},
		} {
			before := logins.Load()
			if _, err := host.open(t.Context(), p, Options{Registry: registry}); err == nil || logins.Load() != before+1 {
				t.Errorf("%v: %d logins", p, logins.Load()-before)
			}
		}
		host.checkGone()
	})
}

// If a login is refused when a connection is opened again, the other connections do not log in
// again, but stay in use.
func TestRefusedAtReopening(t *testing.T) {
	for _, connections := range []int{1, 4} {
		synctest.Test(t, func(t *testing.T) {
			host, content := newFakeHost(t, 64*mib)
			host.delay = time.Millisecond
			var refused atomic.Int64
			host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 20, errCrash) }
			host.onOpen = func(n int, _ *worker.Opened) error {
				if n <= connections {
					return nil
				}
				refused.Add(1)
				return refusedLogin()
			}
			d := host.mustOpen(Params{Server: "esxi"}, Options{Connections: connections, Retry: fastRetry(-1)})
			synctest.Wait()
			err := readBoth(t, d, content)
			if (err != nil) != (connections == 1) {
				t.Errorf("%d connections: %v", connections, err)
			}
			for range connections {
				host.mu.Lock()
				for _, w := range host.workers {
					w.die(&worker.GoneError{PID: w.number, Killed: true})
				}
				host.mu.Unlock()
				time.Sleep(time.Minute)
			}
			if _, err = d.ReadAt(make([]byte, 512), 0); err == nil || source.IsPermanent(err) || !report.Of(err).Transient || !strings.Contains(err.Error(), "3014") {
				t.Errorf("%v: permanent %v", err, source.IsPermanent(err))
			}
			if refused.Load() != 1 {
				t.Errorf("%d connections: %d logins were refused", connections, refused.Load())
			}
			d.Close()
			host.checkGone()
		})
	}
}

// A registry allows the given number of refused logins in a row, and no more.
func TestRefusalsAreCounted(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	good := false
	host.onOpen = func(int, *worker.Opened) error { return when(!good, refusedLogin()) }
	registry := NewRegistry(3)
	p := Params{Server: "esxi", User: "root"}
	try := func() error {
		d, err := host.open(t.Context(), p, Options{Registry: registry})
		if err == nil {
			d.Close()
		}
		return err
	}
	for _, good = range []bool{false, false, true, false, false, false} {
		if err := try(); (err == nil) != good {
			t.Fatal(good, err)
		}
	}
	starts := host.starts
	good = true
	if err := try(); !errors.As(err, new(*LoginError)) || host.starts != starts {
		t.Errorf("%v, %d workers more", err, host.starts-starts)
	}
}

// Logins do not wait for a login that hangs, nor for each other after one has succeeded.
func TestLoginsSideBySide(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		registry := NewRegistry(1)
		p := &Params{Server: "esxi", User: "root"}
		first, err := registry.login(t.Context(), p)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		second, err := registry.login(t.Context(), p)
		if err != nil || time.Since(began) != loginWait {
			t.Fatalf("%v after %v", err, time.Since(began))
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("no patience")
		go cancel(why)
		if _, err := registry.login(ctx, p); err != why {
			t.Error(err)
		}
		second(nil)
		began = time.Now()
		for range 3 {
			if _, err := registry.login(t.Context(), p); err != nil || time.Since(began) != 0 {
				t.Errorf("%v after %v", err, time.Since(began))
			}
		}
		first(errors.New("it hung"))
		// Only errors that say that the login was refused count.
		if _, err := registry.login(t.Context(), p); err != nil {
			t.Error(err)
		}
	})
}

// After a connection was lost, a login waits for the logins that began before, even if an earlier one
// had succeeded. If one of these is refused, the waiting login is not attempted.
func TestLoginAfterALoss(t *testing.T) {
	for _, refused := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			registry := NewRegistry(1)
			p := &Params{Server: "esxi", User: "root"}
			login := func() func(error) {
				ended, err := registry.login(t.Context(), p)
				if err != nil {
					t.Fatal(err)
				}
				return ended
			}
			login()(nil)
			before := []func(error){login(), login()} // they need not wait
			registry.doubt(p)
			result := make(chan error, 1)
			go func() {
				_, err := registry.login(t.Context(), p)
				result <- err
			}()
			for _, ended := range before {
				synctest.Wait()
				if len(result) != 0 {
					t.Fatal("the login did not wait for one that began before the loss")
				}
				if refused {
					ended(&Error{Op: "open", Code: worker.CodeLoginRefused})
					break
				}
				ended(nil)
			}
			if err := <-result; errors.As(err, new(*LoginError)) != refused {
				t.Errorf("refused %v: %v", refused, err)
			}
		})
	}
}

// A VM is prepared once for all its disks, and stays prepared until the last one is closed.
func TestPrepareAccessOnce(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	registry := NewRegistry(1)
	p := Params{Server: "vc", VM: "moref=vm-1", PrepareAccess: true}
	open := func(p Params) *Disk {
		d, err := host.open(t.Context(), p, Options{Registry: registry, Connections: 1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	a, b := open(p), open(p)
	p.VM = "moref=vm-2"
	other := open(p)
	counts := func(prepares, ends int) {
		t.Helper()
		host.mu.Lock()
		defer host.mu.Unlock()
		if host.prepares != prepares || host.endAccess != ends {
			t.Errorf("prepared %d times, ended %d times; want %d, %d", host.prepares, host.endAccess, prepares, ends)
		}
	}
	counts(2, 0)
	a.Close()
	counts(2, 0)
	b.Close()
	counts(2, 1)
	other.Close()
	counts(2, 2)
	open(p).Close()
	counts(3, 3)

	// A batch opens the disks of a VM one after the other.
	registry.Expect(&p)
	registry.Expect(&p)
	open(p).Close()
	counts(4, 3)
	registry.Done(&p)
	open(p).Close()
	counts(4, 3)
	registry.Done(&p)
	counts(4, 4)
	registry.Expect(&p) // this disk is never opened
	registry.Done(&p)
	counts(4, 4)
	ids := map[string]bool{}
	for range 3 {
		ids[NewRegistry(1).identity] = true
	}
	if len(ids) != 3 {
		t.Errorf("identities %v", ids)
	}
}

// An error of PrepareForAccess is a warning with an explanation, and does not make Open fail.
func TestPrepareAccessFails(t *testing.T) {
	for _, test := range []struct {
		line string
		err  error
		want string
		ends int
	}{
		{"", libraryError(6, "The operation is not supported"), "ESXi hosts", 0},
		{"VODL: vim.fault.MethodAlreadyDisabledFault", libraryError(1, "Unknown error"), "another program prevents the migration", 0},
		{"", libraryError(3014, "Insufficient permissions"), "error 3014", 0},
		{"", errCrash, "worker was lost", 1},
		{"", errHang, "deadline exceeded", 1},
	} {
		synctest.Test(t, func(t *testing.T) {
			host, _ := newFakeHost(t, mib)
			host.onPrepare = func(w *fakeWorker) error {
				w.log(worker.Warning, test.line)
				return test.err
			}
			var warnings []string
			var log bytes.Buffer
			o := Options{Connections: 1, Log: slog.New(slog.NewTextHandler(&log, nil)), Registry: NewRegistry(1), Warn: func(s string) { warnings = append(warnings, s) }}
			d := host.mustOpen(Params{Server: "vc", VM: "moref=vm-1", PrepareAccess: true}, o)
			if !strings.Contains(log.String(), o.Registry.identity) {
				t.Errorf("the identity is not logged, but %s", &log)
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0], test.want) || strings.Contains(warnings[0], "ESXi") != strings.Contains(test.want, "ESXi") {
				t.Errorf("%q, want %q", warnings, test.want)
			}
			d.Close()
			if host.endAccess != test.ends {
				t.Errorf("%v: ended %d times, want %d", test.err, host.endAccess, test.ends)
			}
		})
	}
}

// A change of the transport mode is a warning, and Stats reports the last mode.
func TestTransportChanges(t *testing.T) {
	host, content := newFakeHost(t, 8*mib)
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
	host.onOpen = func(n int, o *worker.Opened) error {
		if n > 1 {
			o.Transport = "hotadd"
		}
		return nil
	}
	var mu sync.Mutex
	var warnings []string
	d := host.mustOpen(Params{Server: "vc"}, Options{Connections: 1, Retry: fastRetry(-1), Warn: func(s string) {
		mu.Lock()
		defer mu.Unlock()
		warnings = append(warnings, s)
	}})
	if err := readBoth(t, d, content); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(warnings) != 1 || !strings.Contains(warnings[0], `"hotadd", the one before it used "nbd"`) || d.Stats().Transport != "hotadd" {
		t.Errorf("%q, %+v", warnings, d.Stats())
	}
}

// The hint of a refused login describes a likely mistake in the password or cookie.
func TestHintOfAnOddSecret(t *testing.T) {
	for _, test := range []struct{ secret, want string }{
		{"pass word", ""}, {"pass\n", "the password has a newline at its end"}, {"pass\r", "newline"}, {"pass ", "a blank at one of its ends"},
		{"\tpass", "a blank"}, {"\ufeffpass", "byte order mark"}, {"\xff\xfep", "byte order mark"},
	} {
		host, _ := newFakeHost(t, mib)
		host.onOpen = func(int, *worker.Opened) error { return refusedLogin() }
		_, err := host.open(t.Context(), Params{Server: "esxi", User: "u", Password: NewSecret(test.secret)}, Options{})
		hint := hintOf(err)
		if !strings.Contains(hint, "refused the login") || !strings.Contains(hint, test.want) || test.want == "" && strings.Contains(hint, "has") ||
			strings.Contains(hint, "pass ") || strings.Contains(hint, test.secret) {
			t.Errorf("%q: %q", test.secret, hint)
		}
	}
}
