package vsphere

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
)

const (
	dialTimeout      = 30 * time.Second // for the TCP connection
	handshakeTimeout = 30 * time.Second // for TLS
	idleConnections  = 8                // connections that are kept open
	idleTimeout      = 90 * time.Second
	maxDrain         = 64 << 10    // bytes
	drainTimeout     = time.Second // for reading the end of an answer
)

// transport makes the HTTP requests of all logins of a Session, and checks the certificate of the
// server.
type transport struct {
	*http.Transport
	options *Options
	url     url.URL
}

func newTransport(o *Options, certs *certificates) *transport {
	t := &transport{options: o, url: url.URL{Scheme: "https", Host: o.hostPort(), Path: vim25.Path}}
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: 30 * time.Second}
	t.Transport = &http.Transport{
		Proxy:       o.proxy,
		DialContext: dialer.DialContext,
		// The same configuration is used for a direct connection and for one through the tunnel
		// of a proxy, so that the certificate of the server itself is checked in both cases.
		TLSClientConfig:     certs.config,
		TLSHandshakeTimeout: handshakeTimeout,
		MaxIdleConnsPerHost: idleConnections,
		IdleConnTimeout:     idleTimeout,
	}
	if proxy := t.proxy(); proxy != nil && proxy.Scheme == "https" {
		// The first TLS connection is one to the proxy, which has a certificate of its own.
		t.DialTLSContext = (&tls.Dialer{NetDialer: dialer}).DialContext
	}
	return t
}

// The method proxy returns the URL of the HTTP proxy, or nil for a direct connection.
func (t *transport) proxy() *url.URL {
	u, err := t.options.proxy(&http.Request{URL: &t.url})
	if err != nil {
		return nil // the first request fails with this error
	}
	return u
}

// newClient returns a client without a session. All clients share the connections.
func (t *transport) newClient() *soap.Client {
	u := t.url
	c := soap.NewClient(&u, false)
	c.Namespace = "urn:" + vim25.Namespace
	c.Version = vim25.Version
	c.UserAgent = t.options.UserAgent
	c.Transport = t
	return c
}

// RoundTrip implements http.RoundTripper. An answer that cannot be one of a vSphere server is a
// *statusError. So no redirection is followed, and the cookie never goes to another host.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := rewindable(r); err != nil {
		return nil, err
	}
	res, err := t.Transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	res.Body = drained{res.Body}
	kind := res.Header.Get("Content-Type")
	if ok := res.StatusCode == http.StatusOK || res.StatusCode == http.StatusInternalServerError; !ok || strings.HasPrefix(kind, "text/html") {
		res.Body.Close()
		return nil, &statusError{code: res.StatusCode, status: res.Status, kind: kind, location: res.Header.Get("Location")}
	}
	return res, nil
}

// rewindable gives the request a body that can be sent more than once. The HTTP package then sends
// it again by itself if the server has closed an idle connection and nothing of the request was
// written to it.
func rewindable(r *http.Request) error {
	if r.Body == nil || r.GetBody != nil {
		return nil
	}
	body, err := io.ReadAll(r.Body)
	r.Body.Close()
	if err != nil {
		return err
	}
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	r.Body, _ = r.GetBody()
	r.ContentLength = int64(len(body))
	return nil
}

// drained reads the rest of an answer before it is closed. Otherwise the connection could not be
// used again, because the decoder of answers stops before their end.
type drained struct{ io.ReadCloser }

func (d drained) Close() error {
	late := time.AfterFunc(drainTimeout, func() { d.ReadCloser.Close() })
	defer late.Stop()
	io.CopyN(io.Discard, d.ReadCloser, maxDrain)
	return d.ReadCloser.Close()
}

// statusError is an answer that is no SOAP answer.
type statusError struct {
	code     int
	status   string
	kind     string // media type
	location string // of a redirection
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("HTTP status %q", e.status)
	if e.location != "" {
		text += fmt.Sprintf(" (a redirection to %q)", e.location)
	} else if e.code == http.StatusOK {
		text += fmt.Sprintf(" and the media type %q", e.kind)
	}
	return text
}

// passing reports whether the same request may succeed later: the server is starting or overloaded,
// or a proxy does not reach it.
func (e *statusError) passing() bool {
	return e.code >= 500 || e.code == http.StatusTooManyRequests || e.code == http.StatusRequestTimeout
}

// starting reports whether a server that is starting gives such an answer: the services of vCenter
// start one after the other, and the first one answers for those that are not there yet.
func (e *statusError) starting() bool {
	return e.code == http.StatusNotFound || e.code == http.StatusOK
}

// dialAgain closes idle connections, so that the next request uses a new one. Otherwise a request
// could be sent on a connection that the server has already closed, and it would remain unknown
// whether the server has carried out the request.
func (t *transport) dialAgain() { t.CloseIdleConnections() }
