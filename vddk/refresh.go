package vddk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// maxLogins is the number of logins that one opening of the disk tries if the server refuses session
// cookies: with the old cookie, with a new one, and with user and password.
const maxLogins = 3

// destination says where the disk is and how to log in there. It never changes; Options.Refresh
// leads to a new one.
type destination struct {
	params     Params
	request    worker.OpenRequest // the login of params, and the disk
	thumbprint string             // SHA-1 that the library expects of the server's certificate
	budget     *Budget            // of the host; nil: no limit
}

func newDestination(p Params, thumbprint string, o *Options) *destination {
	at := &destination{params: p, request: openRequest(&p, thumbprint, o.Writable), thumbprint: thumbprint, budget: p.Budget}
	if at.budget == nil {
		at.budget = o.Budget
	}
	return at
}

// locator knows where the disk is now.
type locator struct {
	at         atomic.Pointer[destination]
	refreshing chan struct{}                                  // a mutex for Options.Refresh: has one element while it is unlocked
	check      func(context.Context, *Params) (string, error) // checks the certificate of a server; tests replace it
}

func (l *locator) init(first *destination) {
	l.at.Store(first)
	l.refreshing, l.check = make(chan struct{}, 1), libraryThumbprint
	l.refreshing <- struct{}{}
}

// The method login names the kind of login that is used, for the log.
func (at *destination) login() string {
	if at.params.Cookie.IsSet() {
		return "session cookie"
	}
	return "user and password"
}

// refreshError is a permanent error of Options.Refresh, after which the disk is not opened any more.
type refreshError struct{ error }

func (e *refreshError) Unwrap() error { return e.error }

// isFinal reports whether err ends the disk even if it has other connections.
func isFinal(err error) bool {
	return errors.Is(err, source.ErrChanged) || errors.As(err, new(*refreshError))
}

// The method refresh asks Options.Refresh how the disk is reached now. The parameter used is the
// destination that the caller knows. The parameter refused is the error of a login that the server
// refused at that destination; it is nil before a connection is opened.
//
// Several connections may be opened at the same time, for example after a host was restarted. They
// share one call of Options.Refresh.
func (op *opener) refresh(ctx context.Context, used *destination, refused error) (*destination, error) {
	if op.o.Refresh == nil || !op.params.Remote() {
		return used, nil
	}
	timeout := 5 * op.o.Timeout
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %v", timeout))
	defer cancel()
	select {
	case <-op.refreshing:
	case <-ctx.Done():
		return nil, op.notRefreshed(ctx, used, context.Cause(ctx))
	}
	defer func() { op.refreshing <- struct{}{} }()
	now := op.at.Load()
	if now != used && (refused == nil || now.params.account() != used.params.account()) {
		return now, nil // another connection has asked in the meantime
	}
	p, err := op.o.Refresh(ctx, refused)
	if err != nil {
		return nil, op.notRefreshed(ctx, now, err)
	}
	next, err := op.moved(ctx, now, p)
	if err != nil {
		return nil, err
	}
	op.log.hide(&next.params)
	op.at.Store(next)
	return next, nil
}

// notRefreshed returns the error for a failed call of Options.Refresh.
func (op *opener) notRefreshed(ctx context.Context, now *destination, err error) error {
	if ctx.Err() != nil {
		if ended := op.life.ended(); ended != nil {
			return ended
		}
		err = context.Cause(ctx)
	} else if retry.IsPermanent(err) {
		return &refreshError{fmt.Errorf("%s: %w", now.params.File, err)}
	}
	return fmt.Errorf("%s: cannot find out where the disk is now: %w", now.params.File, err)
}

// The method moved returns the destination for the parameters p, which Options.Refresh has returned.
func (op *opener) moved(ctx context.Context, now *destination, p Params) (*destination, error) {
	if p.Snapshot != op.params.Snapshot {
		return nil, source.Changed(fmt.Errorf("%s: the disk is in the snapshot %q now, expected %q", p.File, p.Snapshot, op.params.Snapshot))
	}
	next := *op.params
	next.File, next.Server, next.Port, next.NFCHostPort, next.VM = p.File, p.Server, p.Port, p.NFCHostPort, p.VM
	next.User, next.Password, next.Cookie, next.Thumbprint, next.Budget = p.User, p.Password, p.Cookie, p.Thumbprint, p.Budget
	if err := next.Validate(); err != nil {
		return nil, &refreshError{source.Permanent(err)}
	}
	thumbprint, was := now.thumbprint, &now.params
	if next.Server != was.Server || next.Port != was.Port || next.Thumbprint != was.Thumbprint {
		var err error
		if thumbprint, err = op.check(ctx, &next); err != nil {
			return nil, op.notRefreshed(ctx, now, err)
		}
	}
	if next.File != was.File || next.Server != was.Server {
		op.report.debug("", "the disk has moved", "file", next.File, "server", next.Server)
	}
	return newDestination(next, thumbprint, op.o), nil
}

// withLogins calls attempt, which opens the disk or makes another call at the given destination. If
// the server refuses a session cookie, and Options.Refresh returns another login, withLogins calls
// attempt again with that login.
func (op *opener) withLogins(ctx context.Context, at *destination, attempt func(*destination) error) error {
	for logins := 1; ; logins++ {
		err := attempt(at)
		if logins >= maxLogins {
			return err
		}
		if at, err = op.afterRefusal(ctx, at, err); at == nil {
			return err
		}
	}
}

// afterRefusal is called when an attempt at the destination at has ended with err. If the server has
// refused a session cookie, and Options.Refresh returns another login, afterRefusal returns the
// destination with that login. Otherwise the result is nil, with the error of the attempt.
func (op *opener) afterRefusal(ctx context.Context, at *destination, err error) (*destination, error) {
	if op.o.Refresh == nil || !at.params.Cookie.IsSet() || !refusesCookie(err) {
		return nil, err
	}
	next, refreshed := op.refresh(ctx, at, err)
	switch {
	case refreshed != nil:
		if isFinal(refreshed) || op.life.ended() != nil {
			return nil, refreshed
		}
		// The refusal is only a part of the text, because a refused login would count as permanent.
		return nil, fmt.Errorf("%w (needed because the server refused the session cookie: %v)", refreshed, err)
	case next.params.account() == at.params.account():
		return nil, err
	}
	op.report.debug("", "the server refused the session cookie; logging in with another login", "login", next.login(), "error", err)
	return next, nil
}

// refusesCookie reports whether err says that the server does not know the session of a cookie. Some
// versions of the library return a general error in this case, and only their log tells more.
func refusesCookie(err error) bool {
	e := asError(err)
	switch {
	case e == nil:
		return false
	case e.loginRefused():
		return true
	}
	return e.Op == "open" && (e.code() == worker.CodeFail || e.code() == worker.CodeRefused) && slices.ContainsFunc(e.lines(), loginWords.MatchString)
}
