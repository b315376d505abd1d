package vddk

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// TestRefreshedUUID opens a disk again that has another UUID under its new name.
func TestRefreshedUUID(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	p := Params{Server: "vc", User: "u", Password: NewSecret("password"), VM: "moref=vm-1", Snapshot: "snapshot-1", File: "[ds] a.vmdk"}
	moved := p
	moved.File = "[ds] b.vmdk"
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 2, errCrash) }
	host.onOpen = func(n int, o *worker.Opened) error {
		if n > 1 {
			o.UUID = "60 01"
		}
		return nil
	}
	d := host.mustOpen(p, Options{Connections: 1, Retry: fastRetry(-1), Refresh: func(context.Context, error) (Params, error) { return moved, nil }})
	if err := readBoth(t, d, content); !errors.Is(err, source.ErrChanged) || !strings.Contains(err.Error(), moved.File) {
		t.Error(err)
	}
}

// TestRefreshIsShared loses four connections at once. Refresh is called once for all of them.
func TestRefreshIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, content := newFakeHost(t, 8*mib)
		p := Params{File: "[ds] a.vmdk", Server: "vc", User: "u", Password: NewSecret("password"), VM: "moref=vm-1", Snapshot: "snapshot-1"}
		r := &refresher{t: t}
		r.answer = func(n int, _ error) (Params, error) {
			time.Sleep(time.Second)
			moved := p
			moved.File = fmt.Sprintf("[ds] %d.vmdk", n)
			return moved, nil
		}
		d := host.mustOpen(p, Options{Connections: 4, Retry: fastRetry(-1), Refresh: r.refresh})
		waitForConnections(d)
		if n := r.calls.Load(); n != 3 {
			t.Errorf("%d calls of Refresh for three further connections", n)
		}
		host.mu.Lock()
		for _, w := range host.workers {
			w.die(&worker.GoneError{PID: w.number, Killed: true})
		}
		host.mu.Unlock()
		if err := readBoth(t, d, content); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if n := r.calls.Load(); n != 4 {
			t.Errorf("%d calls of Refresh for four lost connections", n-3)
		}
		for i, request := range host.requests {
			if want := fmt.Sprintf("[ds] %d.vmdk", min(i, 4)); i > 0 && request.Path != want {
				t.Errorf("opening %d: %s, want %s", i+1, request.Path, want)
			}
		}
		d.Close()
	})
}

// TestRefreshMovesTheReservation moves a disk to another host. Its memory is then reserved in the
// Budget of that host, if there is some.
func TestRefreshMovesTheReservation(t *testing.T) {
	for _, full := range []bool{false, true} {
		host, content := newFakeHost(t, 4*mib)
		one, two := NewHostBudget(100*mib, 10), NewHostBudget(100*mib, 10)
		used := func(b *Budget) int64 { // in connections
			n := int64(0)
			var frees []func()
			for {
				free, ok := b.TryAcquire(10 * mib)
				if !ok {
					break
				}
				frees, n = append(frees, free), n+1
			}
			for _, free := range frees {
				free()
			}
			return 10 - n
		}
		if full {
			free, _ := two.TryAcquire(100 * mib)
			defer free()
		}
		p := Params{File: "[ds] a.vmdk", Server: "vc", User: "u", Password: NewSecret("password"), VM: "moref=vm-1", Snapshot: "snapshot-1", Budget: one}
		moved := p
		current := &p
		r := &refresher{t: t, answer: func(int, error) (Params, error) { return *current, nil }}
		d := host.mustOpen(p, Options{Connections: 2, Retry: fastRetry(-1), Refresh: r.refresh, Budget: NewHostBudget(1, 1)})
		waitForConnections(d)
		if n := used(one); n != 2 {
			t.Errorf("%d connections on the first host", n)
		}
		moved.Budget, current = two, &moved
		host.mu.Lock()
		lost := host.workers
		host.mu.Unlock()
		for _, w := range lost {
			w.die(&worker.GoneError{PID: w.number, Killed: true})
		}
		if err := readBoth(t, d, content); err != nil {
			t.Error(err)
		}
		d.pool.mu.Lock()
		for len(d.pool.handles) < 2 || d.pool.handles[0].session == nil || d.pool.handles[1].session == nil {
			d.pool.changed.Wait()
		}
		d.pool.mu.Unlock()
		check := func(when string, first, second int64) {
			t.Helper()
			if full {
				second = 10
			}
			if a, b := used(one), used(two); a != first || b != second {
				t.Errorf("full %v, %s: %d connections on the first host and %d on the second, want %d and %d", full, when, a, b, first, second)
			}
		}
		check("moved", 0, 2)
		d.Close()
		check("closed", 0, 0)
	}
}

// TestRefreshEndsGrowth has a permanent error of Refresh before a second connection is opened.
func TestRefreshEndsGrowth(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	gone := source.Permanent(source.ErrGone)
	var mu sync.Mutex
	var warnings []string
	p := Params{Server: "vc", User: "u", Password: NewSecret("password"), VM: "moref=vm-1", Snapshot: "snapshot-1"}
	d := host.mustOpen(p, Options{Connections: 2, Retry: fastRetry(-1), Refresh: func(context.Context, error) (Params, error) { return p, gone },
		Warn: func(text string) {
			mu.Lock()
			defer mu.Unlock()
			warnings = append(warnings, text)
		}})
	waitForConnections(d)
	if _, err := d.ReadAt(make([]byte, 512), 0); !errors.Is(err, source.ErrGone) || !source.IsPermanent(err) {
		t.Error(err)
	}
	d.Close()
	if len(warnings) > 0 {
		t.Errorf("%q", warnings)
	}
}

// TestRefusedCookieIsAsked lets a transient error of Refresh follow a refused cookie. The refusal
// must not make the error permanent.
func TestRefusedCookieIsAsked(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	p := Params{Server: "vc", User: "u", Cookie: NewSecret(oldCookie), VM: "moref=vm-1", Snapshot: "snapshot-1", File: "[ds] a.vmdk"}
	next := p
	next.Cookie = NewSecret(newCookie)
	host.onOpen = func(n int, _ *worker.Opened) error {
		host.mu.Lock()
		defer host.mu.Unlock()
		return when(n > 1 && host.requests[len(host.requests)-1].Cookie == oldCookie, refusedLogin())
	}
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 2, errCrash) }
	r := &refresher{t: t}
	failures := 0
	r.answer = func(_ int, refused error) (Params, error) {
		if refused == nil {
			return p, nil
		}
		if failures++; failures <= 2 {
			return p, errPlain
		}
		return next, nil
	}
	d := host.mustOpen(p, Options{Connections: 1, Retry: fastRetry(-1), Refresh: r.refresh})
	if err := readBoth(t, d, content); err != nil {
		t.Error(err)
	}
	if n := r.refused.Load(); n != 3 {
		t.Errorf("%d refused logins", n)
	}
}

// TestRefreshedLoginsAreBounded has a server that refuses every cookie, and a Refresh that always
// returns a new one.
func TestRefreshedLoginsAreBounded(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	host.onOpen = func(n int, _ *worker.Opened) error { return when(n > 1, refusedLogin()) }
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 2, errCrash) }
	p := Params{Server: "vc", User: "u", Cookie: NewSecret(oldCookie), VM: "moref=vm-1", Snapshot: "snapshot-1", File: "[ds] a.vmdk"}
	r := &refresher{t: t}
	r.answer = func(n int, _ error) (Params, error) {
		next := p
		next.Cookie = NewSecret(fmt.Sprintf("cookie %d", n))
		return next, nil
	}
	d := host.mustOpen(p, Options{Connections: 1, Retry: fastRetry(-1), Refresh: r.refresh, Registry: NewRegistry(3)})
	err := readBoth(t, d, content)
	if err == nil || source.IsPermanent(err) || !report.Of(err).Transient || !strings.Contains(err.Error(), "3014") {
		t.Errorf("%v: permanent %v", err, source.IsPermanent(err))
	}
	if host.starts != 1+maxLogins {
		t.Errorf("%d logins after the loss, want %d", host.starts-1, maxLogins)
	}
}

// TestCookiesAreAccounts checks that the refusals of a cookie do not block another cookie, and that
// three refusals of a password block it, whatever cookies were refused in between.
func TestCookiesAreAccounts(t *testing.T) {
	registry := NewRegistry(3)
	refused := &Error{Op: "open", Code: worker.CodeLoginRefused}
	try := func(p Params) error {
		t.Helper()
		ended, err := registry.login(t.Context(), &p)
		if err == nil {
			ended(refused)
		}
		return err
	}
	cookie := func(text string) Params { return Params{Server: "vc", User: "u", Cookie: NewSecret(text)} }
	password := Params{Server: "vc", User: "u", Password: NewSecret("wrong")}
	for i := range 3 {
		if err := errors.Join(try(cookie("old")), try(password), try(cookie(fmt.Sprint("new ", i)))); err != nil {
			t.Errorf("attempt %d: %v", i+1, err)
		}
	}
	for _, p := range []Params{cookie("old"), password} {
		if err := try(p); !errors.As(err, new(*LoginError)) {
			t.Errorf("a fourth login: %v", err)
		}
	}
	if err := try(cookie("new 3")); err != nil {
		t.Error(err)
	}
}

// TestRefreshedServer moves a disk to another server. The certificate of that server is checked
// before the library logs in there. A check that fails is repeated.
func TestRefreshedServer(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 2, errCrash) }
	p := Params{Server: "one", User: "u", Password: NewSecret("password"), VM: "moref=vm-1", Snapshot: "snapshot-1", File: "[ds] a.vmdk"}
	moved := p
	moved.Server = "two"
	d := host.mustOpen(p, Options{Connections: 1, Retry: fastRetry(-1), Refresh: func(context.Context, error) (Params, error) { return moved, nil }})
	checks := 0
	d.pool.opener.check = func(_ context.Context, p *Params) (string, error) {
		checks++
		return "11:22 of " + p.Server, when(checks == 1, errPlain)
	}
	if err := readBoth(t, d, content); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if last := host.requests[len(host.requests)-1]; len(host.requests) != 2 || last.Server != "two" || last.Thumbprint != "11:22 of two" || checks != 2 {
		t.Errorf("%d openings, the last at %s with the thumbprint %s; %d checks", len(host.requests), last.Server, last.Thumbprint, checks)
	}
}
