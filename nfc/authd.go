package nfc

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

// keepAlive is the time between the packets that keep an idle TCP connection alive.
const keepAlive = time.Minute

// A dialogue brings one connection to the point at which frames can be sent: it connects to authd,
// presents the ticket, and performs the handshake. Only one goroutine uses it.
type dialogue struct {
	o       *Options
	quirks  Quirks
	ticket  Ticket
	address string // host and port

	raw   net.Conn // the socket
	nfc   net.Conn // for NFC: raw, or TLS over it
	trace *connTrace

	limit time.Duration // of a step after which another form of the handshake may work
	late  *time.Timer   // ends the dialogue when the limit is over; nil: there is none

	step         Step
	banner       wire.Banner
	major, minor uint32 // version of the host's NFC service; 0: not known yet
	thumbprint   string // SHA-256 of the host's certificate, after TLS
	token        string // announced to authd, and sent again in the handshake; "": none
}

// newDialogue returns a dialogue with the host that the ticket names.
func newDialogue(o *Options, q Quirks, t Ticket) *dialogue {
	d := &dialogue{o: o, quirks: q, ticket: t, address: o.address(t)}
	d.trace = o.Trace.connection(d.address, q)
	return d
}

// The method address returns the address, with the port, of the host that a ticket names.
func (o *Options) address(t Ticket) string {
	return net.JoinHostPort(t.Host, strconv.Itoa(o.port(t)))
}

// The method port returns the port of the host that a ticket names.
func (o *Options) port(t Ticket) int { return cmp.Or(o.HostPort, t.Port, DefaultPort) }

// The method begin records that a step begins.
func (d *dialogue) begin(s Step) {
	d.step = s
	if d.late != nil {
		d.late.Stop()
		if canVary(s) {
			d.late.Reset(d.limit)
		}
	}
	if d.o.Step != nil {
		d.o.Step(s)
	}
}

// The method fail returns the *Error for an error of the present step.
func (d *dialogue) fail(err error, hint string) error {
	e := &Error{Step: d.step, Err: err, Host: d.address, Banner: d.hide(d.banner.Text), Version: d.version(), hint: hint}
	d.trace.note(d.step, "failed: "+printable.Name(d.hide(err.Error())))
	if source.IsPermanent(err) {
		return source.Permanent(e)
	}
	return e
}

// The method version returns the version of the host's NFC service, such as "11.0". It is "" before the
// host has sent it.
func (d *dialogue) version() string {
	if d.major == 0 {
		return ""
	}
	return fmt.Sprintf("%d.%d", d.major, d.minor)
}

// checkedBySHA1 reports whether the host's certificate was compared with a SHA-1 thumbprint only.
func (d *dialogue) checkedBySHA1() bool { return d.token == "" && len(d.ticket.Certificate) == 0 }

// The method hide replaces the secret of the ticket in a text that comes from the host.
func (d *dialogue) hide(text string) string {
	if secret := d.ticket.Session.Reveal(); secret != "" {
		text = strings.ReplaceAll(text, secret, "***")
	}
	return text
}

// The method connect opens the socket.
func (d *dialogue) connect(ctx context.Context) error {
	d.begin(StepConnect)
	dialer := net.Dialer{KeepAlive: keepAlive}
	raw, err := dialer.DialContext(ctx, "tcp", d.address)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		server := "the server"
		if d.ticket.Giver != "" {
			server = printable.Name(d.ticket.Giver)
		}
		return d.fail(fmt.Errorf("cannot connect to the host that the ticket of %s names: %w", server, err),
			fmt.Sprintf("this machine must be able to resolve the name of the ESXi host and to reach its TCP port %d; --nfchostport changes the port", d.o.port(d.ticket)))
	}
	d.raw = raw
	return nil
}

// readBanner reads the banner, which authd sends first.
func (d *dialogue) readBanner() error {
	d.begin(StepBanner)
	line, err := d.readLine(d.raw)
	if err != nil {
		return d.fail(err, "")
	}
	if d.banner, err = wire.ParseBanner(line); err != nil {
		return d.fail(err, "another service than that of an ESXi host answers at this port")
	}
	if !d.o.Clear && !d.banner.NFCSSL {
		return d.fail(source.Permanent(errors.New("the host does not offer encrypted NFC connections")),
			"--transports nbd sends the data without encryption; nothing then protects it on the way")
	}
	return nil
}

// The method readLine reads a line of text that ends with CR LF. It reads byte by byte, because the
// bytes after the line belong to another layer of the protocol.
func (d *dialogue) readLine(r io.Reader) (string, error) {
	line := make([]byte, 0, 256)
	for {
		n := len(line)
		if n > wire.MaxLine {
			return "", &wire.ProtocolError{Want: fmt.Sprintf("a line of at most %d bytes", wire.MaxLine), Got: "a longer one", Bytes: line[:64]}
		}
		line = append(line, 0)
		if _, err := io.ReadFull(r, line[n:]); err != nil {
			if n == 0 {
				return "", fmt.Errorf("the host sent no line: %w", lost(err))
			}
			return "", fmt.Errorf("the host sent an incomplete line, %s: %w", d.hide(printable.Name(string(line[:n]))), lost(err))
		}
		if line[n] == '\n' {
			text := d.hide(strings.TrimSuffix(string(line[:n]), "\r"))
			d.trace.text(received, d.step, text)
			return text, nil
		}
	}
}

// lost returns the error for a connection that ended while something was read from it.
func lost(err error) error {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return &lostError{err}
}

// The method run performs the whole dialogue. The steps after which another form of the handshake may
// work (see mayVary) may each take as long as the parameter limit says; 0 means that only ctx limits
// them. If run fails, it closes the socket.
func (d *dialogue) run(ctx context.Context, limit time.Duration) (err error) {
	if err := d.connect(ctx); err != nil {
		return err
	}
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(limited, func() { d.raw.Close() })
	defer func() {
		if !stop() && err == nil {
			err = net.ErrClosed
		}
		if cause := context.Cause(limited); err != nil && cause != nil {
			err = d.fail(cause, "")
		}
		if err != nil {
			d.raw.Close()
		}
	}()
	if limit > 0 {
		d.limit = limit
		d.late = time.AfterFunc(math.MaxInt64, func() {
			cancel(fmt.Errorf("the host did not answer within %v: %w", limit, os.ErrDeadlineExceeded))
		})
		defer d.late.Stop()
	}
	if err := d.readBanner(); err != nil {
		return err
	}
	d.begin(StepTLS)
	want, err := d.expectedThumbprint()
	if err != nil {
		return d.fail(source.Permanent(err), "")
	}
	first, err := d.startTLS(limited, &records{Conn: d.raw}, want)
	if err != nil {
		return err
	}
	if err := d.presentTicket(first); err != nil {
		return err
	}
	if err := d.leaveTLS(limited); err != nil {
		return err
	}
	return d.handshake()
}

// presentTicket sends the ticket and asks for the NFC service, in the first TLS session.
func (d *dialogue) presentTicket(first net.Conn) error {
	d.begin(StepSession)
	if err := d.send(first, "SESSION "+d.ticket.Session.Reveal(), "SESSION ***"); err != nil {
		return err
	}
	if err := d.send(first, "BANNER ", "BANNER "); err != nil {
		return err
	}
	if _, err := d.reply(first, 220, ""); err != nil {
		return err
	}
	if d.banner.SHA256 && !d.quirks.noSHA2 {
		if err := d.compareThumbprint(first); err != nil {
			return err
		}
	}
	d.begin(StepProxy)
	service := d.ticket.Service
	if !d.o.Clear {
		service += "ssl"
	}
	if err := d.send(first, "PROXY "+service, "PROXY "+service); err != nil {
		return err
	}
	_, err := d.reply(first, 200, "the host does not accept the ticket: it was used before, it has expired, or it is meant for another host")
	return err
}

// leaveTLS leaves the first TLS session and opens the second one. The protocol does not let the client
// end the first session with a message, because the host would take the message for one of NFC.
func (d *dialogue) leaveTLS(ctx context.Context) error {
	rest := &afterTLS{Conn: d.raw, skipped: func(head []byte) {
		d.trace.note(d.step, fmt.Sprintf("skipped a TLS record of the first session: %x", head))
	}}
	if d.o.Clear {
		d.nfc = rest
		return nil
	}
	d.begin(StepSecondTLS)
	second, err := d.startTLS(ctx, rest, d.thumbprint)
	if err != nil {
		return err
	}
	d.nfc = second
	return nil
}

// expectedThumbprint returns the thumbprint of the host's certificate that the ticket names.
func (d *dialogue) expectedThumbprint() (string, error) {
	if len(d.ticket.Certificate) == 0 {
		if d.ticket.SHA1 == "" {
			return "", errors.New("the ticket names neither a thumbprint nor a certificate of the host")
		}
		return d.ticket.SHA1, nil
	}
	block, _ := pem.Decode(d.ticket.Certificate)
	if block == nil || block.Type != "CERTIFICATE" {
		return "", errors.New("the certificate in the ticket is not in the format PEM")
	}
	sum := sha256.Sum256(block.Bytes)
	return hex.EncodeToString(sum[:]), nil
}

// The method startTLS opens a TLS session and checks the host's certificate against a thumbprint.
func (d *dialogue) startTLS(ctx context.Context, conn net.Conn, want string) (*tls.Conn, error) {
	config, err := certificate.Config(d.ticket.Host, 0, want, func(c *certificate.Certificate) { d.thumbprint = c.SHA256 })
	if err != nil {
		return nil, d.fail(source.Permanent(fmt.Errorf("the thumbprint in the ticket: %w", err)), "")
	}
	config.DynamicRecordSizingDisabled = true
	t := tls.Client(conn, config)
	err = t.HandshakeContext(ctx)
	var differs *certificate.Error
	switch {
	case err == nil:
		state := t.ConnectionState()
		d.trace.note(d.step, fmt.Sprintf("%s %s, certificate SHA-256 %s", tls.VersionName(state.Version), tls.CipherSuiteName(state.CipherSuite), d.thumbprint))
		return t, nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.As(err, &differs):
		hint := "another machine answers in place of the ESXi host, or the certificate of the host was renewed and vCenter does not know it yet"
		return nil, d.fail(source.Permanent(fmt.Errorf("the certificate of the host is not the one that its ticket names: %s", differs)), hint)
	}
	return nil, d.fail(lost(err), "")
}

// compareThumbprint asks authd for the SHA-256 thumbprint of its certificate and compares it with
// the certificate of the TLS session. A ticket may have only a SHA-1 thumbprint.
func (d *dialogue) compareThumbprint(conn net.Conn) error {
	d.begin(StepThumbprint)
	switch d.quirks.token {
	case "none":
		return nil
	case "plaintext":
		d.token = "PlainText"
	default:
		d.token = rand.Text()[:16]
	}
	if err := d.send(conn, "THUMBPRINT_SHA2 "+d.token, "THUMBPRINT_SHA2 ***"); err != nil {
		return err
	}
	answer, err := d.reply(conn, 200, "")
	if err != nil {
		return err
	}
	sum, err := wire.ParseSHA256(answer.Text)
	if err != nil {
		return d.fail(err, "")
	}
	got, err := certificate.ParseThumbprint(hex.EncodeToString(sum[:]))
	if err != nil {
		return d.fail(err, "")
	}
	if got != d.thumbprint {
		return d.fail(source.Permanent(fmt.Errorf("the host says that its certificate has the SHA-256 thumbprint %s, but the certificate of the connection has %s", got, d.thumbprint)),
			"another machine may be reading the connection")
	}
	return nil
}

// The method send sends a line in a write of its own. The parameter shown is the line as a trace
// records it, without secrets.
func (d *dialogue) send(conn net.Conn, line, shown string) error {
	d.trace.text(sent, d.step, shown)
	if _, err := io.WriteString(conn, line+"\r\n"); err != nil {
		return d.fail(&lostError{err}, "")
	}
	return nil
}

// The method reply reads an answer of authd, which must have the given code. The parameter hint is
// for the error of an answer with the code 530, with which authd refuses a ticket.
func (d *dialogue) reply(conn net.Conn, code int, hint string) (wire.Reply, error) {
	line, err := d.readLine(conn)
	if err != nil {
		return wire.Reply{}, d.fail(err, "")
	}
	r, err := wire.ParseReply(line)
	if err != nil {
		return r, d.fail(err, "")
	}
	if r.Code != code {
		if r.Code != codeLogin {
			hint = ""
		}
		return r, d.fail(&refusedError{want: code, line: line}, hint)
	}
	return r, nil
}

// codeLogin is the code with which authd answers that a login is needed.
const codeLogin = 530

// refusedError says that authd has answered with another code than the expected one.
type refusedError struct {
	want int
	line string
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("expected an answer with the code %d, found %s", e.want, printable.Name(e.line))
}
