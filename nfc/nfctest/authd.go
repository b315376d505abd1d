package nfctest

import (
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/selfsigned"
)

// Lines of the host.
const (
	greeting    = "220 VMware Authentication Daemon Version 1.10: SSL Required, ServerDaemonProtocol:SOAP, MKSDisplayProtocol:VNC , VMXARGS supported"
	pleaseLogin = "530 Please login with USER and PASS"
	invalid     = "501 Invalid arguments"
)

// banner returns the greeting of the host.
func (h *Host) banner() string {
	line := greeting
	if !h.options.NoSSL {
		line += ", NFCSSL supported/t"
	}
	if h.traits.sha256 {
		line += ", SHA256 supported"
	}
	return line
}

// greet sends the greeting in clear, and waits for TLS.
func (c *conn) greet() error {
	if err := c.answerLine(c.fault(StepBanner, Read{}), c.wire, c.h.banner()); err != nil {
		return err
	}
	head, err := c.wire.peek(3)
	if err != nil {
		if len(head) > 0 {
			c.violation("%q came in clear before TLS", head)
		}
		return err
	}
	if head[0] != 0x16 || head[1] != 3 {
		return c.wrong("%q came in clear before TLS", head)
	}
	return nil
}

// answerLine sends a line.
func (c *conn) answerLine(r *Rule, w io.Writer, line string) error {
	switch {
	case r == nil:
	case r.Kind == Line:
		line = r.Text
	case r.Kind == EndlessLine:
		return c.endless(r, w)
	}
	c.logf("< %s", line)
	return c.strike(r, w, []byte(line+"\r\n"))
}

// endless writes a line without an end until the client has gone.
func (c *conn) endless(r *Rule, w io.Writer) error {
	if err := c.hold(r); err != nil {
		return err
	}
	text := []byte("220 " + strings.Repeat("A", 4092))
	for {
		if _, err := w.Write(text); err != nil {
			return err
		}
	}
}

// lines runs the first TLS session, up to the answer to PROXY. It reports whether a second TLS
// session follows.
func (c *conn) lines() (ssl bool, err error) {
	c.wire.records = true
	defer func() { c.wire.records = false }()
	c.certificate = c.h.currentCertificate()
	t, err := c.beginTLS(StepTLS, c.certificate)
	if err != nil {
		return false, err
	}
	in := newReader(t, true)
	for {
		line, err := c.readLine(in)
		if err != nil {
			return false, err
		}
		command, argument, _ := strings.Cut(line, " ")
		switch command {
		case "SESSION":
			if c.ticket != nil || argument == "" {
				c.violation("a SESSION without argument, or a second one")
			}
			if c.ticket = c.h.useTicket(argument); c.ticket == nil {
				c.logf("the ticket is unknown, used or expired")
			}
		case "BANNER":
			if line != "BANNER " {
				c.violation(`"BANNER" must be followed by a space and nothing else`)
			}
			err = c.answerLine(c.fault(StepSession, Read{}), t, c.h.banner())
		case "THUMBPRINT_SHA2":
			err = c.answerThumbprint(t, argument)
		case "PROXY":
			return c.proxy(t, in, argument)
		case "USER", "PASS":
			c.violation("%s was sent", command)
			err = c.answerLine(nil, t, pleaseLogin)
		default:
			c.violation("unknown line %q", line)
			err = c.answerLine(nil, t, "500 Unknown command")
		}
		if err != nil {
			return false, err
		}
	}
}

// maxLine is the length of the longest line that the host reads.
const maxLine = 4096

// readLine reads a line of the client.
func (c *conn) readLine(in *reader) (string, error) {
	if in.shares() {
		c.violation("two lines came in one TLS record")
	}
	var line []byte
	for !strings.HasSuffix(string(line), "\r\n") {
		b, err := in.take(1)
		if err != nil {
			return "", err
		}
		if line = append(line, b[0]); len(line) > maxLine {
			return "", c.wrong("a line is longer than %d bytes", maxLine)
		}
		if b[0] == '\n' && !strings.HasSuffix(string(line), "\r\n") {
			return "", c.wrong("the line %q does not end with CR LF", line)
		}
	}
	text := string(line[:len(line)-2])
	if strings.HasPrefix(text, "SESSION ") {
		c.logf("> SESSION ***")
	} else {
		c.logf("> %s", text)
	}
	return text, nil
}

// answerThumbprint answers THUMBPRINT_SHA2.
func (c *conn) answerThumbprint(w io.Writer, token string) error {
	r := c.fault(StepThumbprint, Read{})
	switch {
	case !c.h.traits.sha256 || c.h.options.Needs.NoSHA2:
		return c.answerLine(r, w, pleaseLogin)
	case token == "" || strings.ContainsAny(token, " :") || len(token) > messageSize-4:
		return c.answerLine(r, w, invalid)
	}
	c.token = token
	der := c.certificate.Certificate[0]
	if r != nil && r.Kind == WrongThumbprint {
		der = newCertificate().Certificate[0]
	}
	return c.answerLine(r, w, "200 "+selfsigned.SHA256(der))
}

// proxy answers PROXY. It reports whether a second TLS session follows.
func (c *conn) proxy(t *tls.Conn, in *reader, service string) (ssl bool, err error) {
	r := c.fault(StepProxy, Read{})
	if in.shares() {
		c.violation("bytes came after PROXY in the same TLS record")
	}
	answer, refused := "200 Connect ha-nfc", true
	switch service {
	case c.h.options.Service:
		refused = false
	case c.h.options.Service + "ssl":
		answer, ssl = answer+"ssl", true
		if refused = c.h.options.NoSSL; refused {
			c.violation("PROXY %s was sent to a host without NFCSSL", service)
		}
	default:
		c.violation("PROXY names the service %s, which is not that of the ticket", printable.Name(service))
	}
	if refused || c.ticket == nil {
		if err := c.answerLine(r, t, pleaseLogin); err != nil {
			return false, err
		}
		return false, fmt.Errorf("PROXY was refused")
	}
	if err := c.answerLine(r, t, answer); err != nil {
		return false, err
	}
	if r != nil && r.Kind == Line {
		return false, fmt.Errorf("PROXY was refused")
	}
	if r != nil && r.Kind == CloseNotify {
		err := t.CloseWrite()
		c.wire.SetWriteDeadline(time.Time{}) // package tls has let it pass
		return ssl, err
	}
	return ssl, nil
}
