package vsphere

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
)

// Session is an open session on a server. Its methods are safe for concurrent use.
//
// If the server ends the session, the next call logs in again. So one Session may use several
// sessions of the server, one after the other. Close logs out of all of them.
type Session struct {
	Options
	// client makes the calls to the server. Its RoundTripper repeats calls and logs in again. The
	// HTTP client in it has no cookie; it must not be used for calls.
	client *vim25.Client

	transport *transport
	certs     *certificates
	logins    *logins
	progress  *retry.Progress
	connected atomic.Bool // a call has succeeded: from now on, lost calls are repeated
	nfc       nfcService

	stop      context.CancelFunc // ends the background calls
	keepAlive sync.WaitGroup
	closing   sync.Once
	closeErr  error

	closeTimeout time.Duration // how long Close may take, and each attempt to log out
}

// defaultCloseTimeout is how long Close may take.
const defaultCloseTimeout = 10 * time.Second

var errClosed = errors.New("the session is closed")

// Connect connects to a server and logs in. The caller must call Close at the end.
//
// A refused login is a *LoginError. A certificate that is not accepted is a *certificate.Error.
// Connect makes only one attempt: if the server cannot be reached, it returns that error at once,
// because the name of the server may be wrong. If Connect fails, no session is left on the server,
// with one exception: the answer to the login was lost. If ctx ends during the login, Connect waits
// up to 10 s for that answer.
func Connect(ctx context.Context, o Options) (*Session, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Session{Options: o, progress: retry.NewProgress(), closeTimeout: defaultCloseTimeout}
	if s.certs, err = newCertificates(&s.Options); err != nil {
		return nil, err
	}
	s.transport = newTransport(&s.Options, s.certs)
	s.logins = newLogins(s)
	client := s.transport.newClient()
	s.client = &vim25.Client{Client: client, RoundTripper: roundTripper{Session: s}}
	background, stop := context.WithCancel(context.Background())
	s.stop = stop
	if err := s.open(ctx); err != nil {
		s.Close()
		return nil, err
	}
	s.keepAlive.Go(func() { s.stayAlive(background) })
	return s, nil
}

// open asks the server what it is, and logs in.
func (s *Session) open(ctx context.Context) error {
	content, err := methods.GetServiceContent(ctx, s.client)
	if err != nil {
		return err
	}
	if content.SessionManager == nil {
		return fmt.Errorf("%s is neither a vCenter server nor an ESXi host", s.address())
	}
	s.client.ServiceContent = content
	if _, err := s.logins.get(ctx, nil); err != nil {
		return err
	}
	s.connected.Store(true)
	s.Log.Debug("vsphere: logged in", "server", s.address(), "product", content.About.FullName)
	return nil
}

// Close logs out of all sessions that were opened by a login, and closes the connections. It does
// not end the session of Options.Cookie. It takes at most 10 s, also if the server does not answer.
// Calls that are made at the same time, or later, fail. Only the first call of Close has an effect;
// all calls return the same error.
func (s *Session) Close() error {
	s.closing.Do(func() {
		s.stop()
		s.keepAlive.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), s.closeTimeout)
		defer cancel()
		s.closeErr = s.logins.close(ctx)
		s.transport.CloseIdleConnections()
	})
	return s.closeErr
}

// Cookie returns the value of the cookie vmware_soap_session of the session, without quotes. With
// this cookie, another program can use the session. If the session has ended, Cookie logs in again.
func (s *Session) Cookie(ctx context.Context) (secret.Secret, error) {
	var cookie secret.Secret
	err := s.together(ctx, func(ctx context.Context) error {
		_, err := s.activeSession(ctx)
		if err == nil {
			cookie = groupOf(ctx).login.cookie()
		}
		return err
	})
	return cookie, err
}
