package vsphere

import (
	"crypto/tls"
	"errors"
	"fmt"
	"sync"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// certificates checks the certificate on every connection to the server. It is safe for concurrent
// use.
type certificates struct {
	server string
	config *tls.Config

	mu   sync.Mutex
	last *certificate.Certificate // the one that was accepted last; nil if none was
}

func newCertificates(o *Options) (*certificates, error) {
	c := &certificates{server: o.address()}
	config, err := certificate.Config(o.Server, o.Port, o.Thumbprint, c.accepted)
	if err != nil {
		return nil, err
	}
	verify := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error { return c.explain(verify(state)) }
	c.config = config
	return c, nil
}

func (c *certificates) accepted(got *certificate.Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = got
}

// explain returns the error of a certificate that was not accepted. After a certificate was
// accepted on an earlier connection, this is a *ChangedError.
func (c *certificates) explain(err error) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if wrong := (*certificate.Error)(nil); errors.As(err, &wrong) && c.last != nil {
		err = &ChangedError{Server: c.server, Old: *c.last, Err: wrong}
	}
	return retry.Permanent(err)
}

// ChangedError says that a server has another certificate than at an earlier connection, and that
// this one is not accepted.
type ChangedError struct {
	Server string
	Old    certificate.Certificate // at the last connection that was accepted
	Err    *certificate.Error      // has the new certificate
}

func (e *ChangedError) Error() string {
	hash, old := e.Old.Thumbprint(e.Err.Want)
	_, now := e.Err.Got.Thumbprint(e.Err.Want)
	text := fmt.Sprintf("%s: the certificate has changed: its %s thumbprint was %s and is now %s", e.Server, hash, old, now)
	if e.Err.Want == "" {
		text += fmt.Sprintf(", and it does not verify: %v", e.Err.Got.Trust)
	}
	return text
}

func (e *ChangedError) Unwrap() error { return e.Err }

// Hint tells the user what to do about the error.
func (e *ChangedError) Hint() string {
	return "compare the new thumbprint with the one that the server itself shows: if the two are equal, the certificate was renewed, and a run with the new thumbprint as --thumbprint can continue; otherwise another machine answers in place of the server"
}

// ExitStatus is the exit status of the command; package transfer/report uses it. A later run can
// continue with the new thumbprint.
func (*ChangedError) ExitStatus() int { return exit.Resumable }

// Transient tells transfer/report that the same run would fail again.
func (*ChangedError) Transient() bool { return false }
