package vddk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/report"
)

const (
	movedDisk = "[other store] moved/c.vmdk"
	oldCookie = "old cookie of a session"
	newCookie = "new cookie of a session"
)

// errPlain is an error that says nothing about whether it is permanent.
var errPlain = errors.New("the inventory does not answer")

// kill kills the first n workers that are alive, or all of them if n is 0.
func (s *standIn) kill(n int) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	killed := 0
	for _, pid := range s.pids {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || n > 0 && killed == n {
			continue
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[0] == "Z" || fields[1] != fmt.Sprint(os.Getpid()) {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			s.t.Error(err)
		}
		killed++
	}
	if killed == 0 {
		s.t.Error("no worker is alive")
	}
}

// valid returns the parameters of the disk with a thumbprint that Params.Validate accepts.
func (s *standIn) valid() Params {
	p := s.remote
	p.Thumbprint = strings.Repeat("AA:", 19) + "AA"
	return p
}

// rename gives the disk another name.
func (s *standIn) rename(to string) {
	s.t.Helper()
	s.AddDisk(to, s.path)
	if err := os.Remove(s.Disk(standInDisk)); err != nil {
		s.t.Fatal(err)
	}
}

// waitForConnections waits until all connections that are opened in the background are open.
func waitForConnections(d *Disk) {
	d.pool.mu.Lock()
	defer d.pool.mu.Unlock()
	for d.pool.growth.opening {
		d.pool.changed.Wait()
	}
}

// refresher is an Options.Refresh of a test, which counts its calls.
type refresher struct {
	t      testing.TB
	answer func(n int, refused error) (Params, error) // for call n, from 1

	running        atomic.Bool
	calls, refused atomic.Int64
}

func (r *refresher) refresh(ctx context.Context, refused error) (Params, error) {
	if r.running.Swap(true) {
		r.t.Error("Refresh is called concurrently")
	}
	defer r.running.Store(false)
	if refused != nil {
		r.refused.Add(1)
	}
	return r.answer(int(r.calls.Add(1)), refused)
}

// TestStandInRefresh has changes of the host while a disk is open. After that all connections are
// lost. The disk can be read to its end, and its identity stays.
func TestStandInRefresh(t *testing.T) {
	const size = 16 << 20
	withCookie := func(p Params, cookie string) Params {
		p.Cookie, p.Password = NewSecret(cookie), Secret{}
		return p
	}
	for _, test := range []struct {
		name   string
		conf   []string
		first  func(p Params) Params // changes the parameters of the first opening; nil: it changes nothing
		change func(s *standIn)      // changes the host; nil: it changes nothing
		answer func(p Params, n int, refused error) (Params, error)
		asked  bool // Refresh must be called with a refused login
	}{
		{name: "nothing changes"},
		{name: "renamed", change: func(s *standIn) { s.rename(movedDisk) }, answer: func(p Params, _ int, _ error) (Params, error) {
			p.File = movedDisk
			return p, nil
		}},
		{name: "the new name is known late", change: func(s *standIn) { s.rename(movedDisk) }, answer: func(p Params, n int, _ error) (Params, error) {
			if n > 3 { // the calls for the other connections are the first ones
				p.File = movedDisk
			}
			return p, nil
		}},
		{name: "fails twice", change: func(s *standIn) { s.rename(movedDisk) }, answer: func(p Params, n int, _ error) (Params, error) {
			p.File = movedDisk
			return p, when(n <= 2, errPlain)
		}},
		{name: "new cookie", conf: []string{"cookie " + oldCookie}, first: func(p Params) Params { return withCookie(p, oldCookie) },
			change: func(s *standIn) { s.Conf("cookie " + newCookie) },
			answer: func(p Params, _ int, _ error) (Params, error) { return withCookie(p, newCookie), nil }},
		{name: "new cookie after a refusal", conf: []string{"cookie " + oldCookie}, first: func(p Params) Params { return withCookie(p, oldCookie) },
			change: func(s *standIn) { s.Conf("cookie " + newCookie) }, asked: true,
			answer: func(p Params, _ int, refused error) (Params, error) {
				if refused == nil {
					return withCookie(p, oldCookie), nil
				}
				return withCookie(p, newCookie), nil
			}},
		{name: "refused cookie at open", conf: []string{"cookie " + oldCookie, "login-at-open", "login-error 14009"},
			first:  func(p Params) Params { return withCookie(p, oldCookie) },
			change: func(s *standIn) { s.Conf("cookie " + newCookie) }, asked: true,
			answer: func(p Params, _ int, refused error) (Params, error) {
				if refused == nil {
					return withCookie(p, oldCookie), nil
				}
				return withCookie(p, newCookie), nil
			}},
	} {
		for _, connections := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s, %d connections", test.name, connections), func(t *testing.T) {
				t.Parallel()
				s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
				s.Conf(test.conf...)
				p := s.valid()
				if test.first != nil {
					p = test.first(p)
				}
				changed := atomic.Bool{}
				r := &refresher{t: t}
				afterChange := 0
				r.answer = func(_ int, refused error) (Params, error) {
					if !changed.Load() || test.answer == nil {
						return p, nil
					}
					afterChange++
					return test.answer(p, afterChange, refused)
				}
				var log bytes.Buffer // the handler of slog locks it
				d, err := s.open(t.Context(), p, Options{
					Connections: connections, Retry: fastRetry(-1), Refresh: r.refresh,
					Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
				})
				if err != nil {
					t.Fatal(err)
				}
				waitForConnections(d)
				before, _, _ := d.Identity(t.Context())
				if calls := r.calls.Load(); calls != int64(connections)-1 {
					t.Errorf("Refresh was called %d times for %d connections", calls, connections)
				}
				if test.change != nil {
					test.change(s)
				}
				changed.Store(true)
				s.kill(0)
				if err := s.copyAll(d, 8); err != nil {
					t.Fatal(err)
				}
				if after, proof, err := d.Identity(t.Context()); after != before || proof != "snapshot" || err != nil {
					t.Errorf("the identity was %q, and is %q (%s, %v)", before, after, proof, err)
				}
				d.Close()
				if n := r.refused.Load(); n > 0 != test.asked || n > int64(connections) {
					t.Errorf("Refresh was called %d times with a refused login", n)
				}
				text := log.String()
				for _, secret := range []string{oldCookie, newCookie, p.Password.Reveal()} {
					if secret != "" && strings.Contains(text, secret) {
						t.Error("a secret is in the log")
					}
				}
				if want := `login="session cookie"`; strings.Contains(text, want) != p.Cookie.IsSet() {
					t.Errorf("the log does not say which login was used: %v", p.Cookie.IsSet())
				}
			})
		}
	}
}

// TestStandInRefreshFails has changes of the host after which the disk cannot be read any more.
func TestStandInRefreshFails(t *testing.T) {
	const size = 8 << 20
	gone := source.Permanent(fmt.Errorf("no such snapshot: %w", source.ErrGone))
	for _, test := range []struct {
		name      string
		kill      int // workers to kill; 0: all
		change    func(s *standIn)
		answer    func(s *standIn, p Params) (Params, error)
		want      error
		message   string
		permanent bool
	}{
		{name: "another size", answer: func(s *standIn, p Params) (Params, error) {
			p.File = movedDisk
			return p, nil
		}, change: func(s *standIn) {
			path := filepath.Join(s.t.TempDir(), "other")
			if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size/2)); err != nil {
				s.t.Fatal(err)
			}
			s.AddDisk(movedDisk, path)
		}, want: source.ErrChanged, message: movedDisk + ": opening the disk again opened another disk", permanent: true},
		{name: "another snapshot", kill: 1, answer: func(s *standIn, p Params) (Params, error) {
			p.Snapshot = "snapshot-3"
			return p, nil
		}, want: source.ErrChanged, message: `is in the snapshot "snapshot-3" now, expected "snapshot-2"`, permanent: true},
		{name: "permanent, the other connections work", kill: 1, answer: func(s *standIn, p Params) (Params, error) {
			return p, gone
		}, want: source.ErrGone, message: "no such snapshot", permanent: true},
		{name: "permanent", answer: func(s *standIn, p Params) (Params, error) { return p, gone }, want: source.ErrGone, message: "no such snapshot", permanent: true},
		{name: "always fails", answer: func(s *standIn, p Params) (Params, error) { return p, errPlain }, want: errPlain, message: "gave up after 5 retries"},
		{name: "always not found", change: func(s *standIn) { s.rename(movedDisk) }, answer: func(s *standIn, p Params) (Params, error) { return p, nil }, message: "gave up after 5 retries"},
		{name: "invalid", answer: func(s *standIn, p Params) (Params, error) {
			p.VM = ""
			return p, nil
		}, message: "missing: --vm", permanent: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := newStandIn(t, size, source.Extent{Off: 0, Len: size})
			changed := atomic.Bool{}
			r := &refresher{t: t}
			r.answer = func(int, error) (Params, error) {
				if !changed.Load() {
					return s.valid(), nil
				}
				return test.answer(s, s.valid())
			}
			d, err := s.open(t.Context(), s.valid(), Options{Connections: 2, Retry: fastRetry(5), Refresh: r.refresh})
			if err != nil {
				t.Fatal(err)
			}
			waitForConnections(d)
			if test.change != nil {
				test.change(s)
			}
			changed.Store(true)
			s.kill(test.kill)
			d.pool.mu.Lock()
			for d.pool.dead == nil {
				d.pool.changed.Wait()
			}
			d.pool.mu.Unlock()
			if _, err = d.ReadAt(make([]byte, 512), 0); err == nil {
				t.Fatal("a dead disk can be read")
			}
			if test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.message) || source.IsPermanent(err) != test.permanent || report.Of(err).Transient == test.permanent {
				t.Errorf("%v; permanent %v", err, source.IsPermanent(err))
			}
		})
	}
}

// TestStandInCookieFallback opens disks whose session cookie the server refuses. Refresh may return
// user and password, and is not called after the server has refused them.
func TestStandInCookieFallback(t *testing.T) {
	for _, test := range []struct {
		name     string
		conf     []string
		password string
		err      string // part of the error; "": none
		refused  int64  // calls of Refresh with a refused login
		logins   int64  // at all
	}{
		{"accepted cookie", []string{"cookie " + oldCookie}, "", "", 0, 1},
		{"password", []string{"password pass; word"}, "pass; word", "", 1, 2},
		{"wrong password", []string{"password another"}, "pass; word", "error 3014", 1, 2},
		{"the same cookie", []string{"password another"}, "", "error 3014", 1, 1},
	} {
		for _, prepare := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, prepare %v", test.name, prepare), func(t *testing.T) {
				s := newStandIn(t, 4<<20, source.Extent{Off: 0, Len: 4 << 20})
				s.Conf(append(test.conf, "trace")...)
				withPassword := s.valid()
				withPassword.PrepareAccess = prepare
				withCookie := withPassword
				withCookie.Cookie, withCookie.Password = NewSecret(oldCookie), Secret{}
				current := withCookie
				r := &refresher{t: t}
				r.answer = func(_ int, refused error) (Params, error) {
					if refused != nil && test.password != "" {
						current = withPassword
					}
					return current, nil
				}
				d, err := s.open(t.Context(), withCookie, Options{Connections: 2, Retry: fastRetry(-1), Refresh: r.refresh, Registry: NewRegistry(3)})
				if err == nil {
					waitForConnections(d)
					err = s.copyAll(d, 4)
					d.Close()
				}
				if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err) || !source.IsPermanent(err)) {
					t.Errorf("%v, want %q", err, test.err)
				}
				if err != nil && (strings.Contains(err.Error(), oldCookie) || strings.Contains(err.Error(), "pass; word")) {
					t.Errorf("a secret is in %v", err)
				}
				calls := s.Calls()
				if prepare {
					if test.err == "" && (calls["PrepareForAccess"] != calls["EndAccess"]+test.refused || calls["EndAccess"] != 1) {
						t.Errorf("%v", calls)
					}
					return // PrepareForAccess has made logins of its own
				}
				if n := r.refused.Load(); n != test.refused {
					t.Errorf("Refresh was called %d times with a refused login, want %d", n, test.refused)
				}
				first := int64(0)
				for _, line := range s.Trace() {
					if strings.Contains(line, "refused login") {
						first++
					}
				}
				if want := test.logins - int64(map[bool]int{true: 1}[test.err == ""]); first != want {
					t.Errorf("%d logins were refused, want %d", first, want)
				}
			})
		}
	}
}

// TestRefreshIsEnded cancels a copy, or closes the disk, while Refresh waits.
func TestRefreshIsEnded(t *testing.T) {
	for _, how := range []string{"cancelled", "closed"} {
		t.Run(how, func(t *testing.T) {
			s := newStandIn(t, 4<<20, source.Extent{Off: 0, Len: 4 << 20})
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			why, begun := errors.New("the operator said stop"), make(chan struct{})
			d, err := s.open(ctx, s.valid(), Options{Connections: 1, Retry: fastRetry(-1), Refresh: func(ctx context.Context, _ error) (Params, error) {
				close(begun)
				<-ctx.Done()
				return Params{}, ctx.Err()
			}})
			if err != nil {
				t.Fatal(err)
			}
			s.kill(0)
			read := make(chan error, 1)
			go func() {
				_, err := d.ReadAt(make([]byte, 512), 0)
				read <- err
			}()
			<-begun
			want := why
			if how == "closed" {
				want = os.ErrClosed
				d.Close()
			} else {
				cancel(why)
			}
			if err := <-read; !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
			d.Close()
			s.checkGone()
		})
	}
}
