package nfc_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// TestCertificates connects to hosts whose certificate is not the one that it must be. The secret
// of the ticket is sent to none of them.
func TestCertificates(t *testing.T) {
	content := pattern(1<<20, 30)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, pem := range []bool{false, true} {
			for _, clear := range []bool{false, true} {
				name := fmt.Sprintf("%s/PEM=%v/clear=%v", tls.VersionName(version), pem, clear)
				options := nfctest.Options{MaxTLS: version, PEM: pem}
				o := patient()
				o.Clear = clear
				t.Run(name+"/ticket", func(t *testing.T) {
					h, ts := newHost(t, content, options)
					noLeaks(t, h)
					ts.before = func(n int, _ *nfc.Ticket) error {
						if n == 2 {
							h.RenewCertificate() // after the ticket was given
						}
						return nil
					}
					d := open(t, ts, nfc.Params{Name: file}, o)
					h.Cut()
					_, err := d.ReadAt(make([]byte, 512), 0)
					checkCertificateError(t, err, nfc.StepTLS, "not the one that its ticket names")
					if s := h.Stats(); s.UnusedTickets != 1 || s.Tickets != 2 { // the second ticket was not sent
						t.Errorf("%+v", s)
					}
				})
				t.Run(name+"/SHA-256", func(t *testing.T) {
					h, ts := newHost(t, content, options)
					noLeaks(t, h)
					h.On(nfctest.Fault{Step: nfctest.StepThumbprint, Kind: nfctest.WrongThumbprint})
					_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, o)
					checkCertificateError(t, err, nfc.StepThumbprint, "but the certificate of the connection has")
					if n := h.Stats().Tickets; n != 1 {
						t.Errorf("%d tickets: another form of the handshake must not be tried", n)
					}
				})
				if clear {
					continue
				}
				t.Run(name+"/second TLS", func(t *testing.T) {
					h, ts := newHost(t, content, options)
					noLeaks(t, h)
					h.On(nfctest.Fault{Step: nfctest.StepSecondTLS, Kind: nfctest.OtherCertificate, Connection: 2})
					d := open(t, ts, nfc.Params{Name: file}, o)
					h.Cut()
					_, err := d.ReadAt(make([]byte, 512), 0)
					checkCertificateError(t, err, nfc.StepSecondTLS, "not the one that")
				})
			}
		}
	}
}

func checkCertificateError(t *testing.T, err error, step nfc.Step, text string) {
	t.Helper()
	var e *nfc.Error
	if !errors.As(err, &e) || e.Step != step || !source.IsPermanent(err) || !strings.Contains(err.Error(), text) || e.Hint() == "" {
		t.Errorf("permanent %v: %v", source.IsPermanent(err), err)
	}
}

// TestNoEncryption connects to a host that offers no encryption. Data are read in clear only if that is
// asked for.
func TestNoEncryption(t *testing.T) {
	content := pattern(1<<20, 31)
	h, ts := newHost(t, content, nfctest.Options{NoSSL: true})
	noLeaks(t, h)
	_, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, patient())
	var e *nfc.Error
	if !errors.As(err, &e) || e.Step != nfc.StepBanner || !source.IsPermanent(err) || !strings.Contains(e.Hint(), "--transports nbd") {
		t.Errorf("permanent %v: %v", source.IsPermanent(err), err)
	}
	if s := h.Stats(); s.Requests != 0 || s.Tickets != 1 || s.UnusedTickets != 1 {
		t.Errorf("%+v", s)
	}
	h.ExpireTickets()
	o := patient()
	o.Clear = true
	d := open(t, ts, nfc.Params{Name: file}, o)
	readAll(t, d, content, 1<<20)
	if i, _ := source.Ability[source.Described](d); i.Info().Subformat != "nfc" {
		t.Errorf("%+v", i.Info())
	}
}

// TestEncryption looks for the content of a disk in what a host sends.
func TestEncryption(t *testing.T) {
	marker := bytes.Repeat([]byte("a sector that is easy to find..."), 16)
	content := bytes.Repeat(marker, 1<<20/len(marker))
	for _, clear := range []bool{false, true} {
		h, ts := newHost(t, content, nfctest.Options{})
		w := newWiretap(t, h.Port())
		ts.before = func(_ int, ticket *nfc.Ticket) error { ticket.Port = w.port(); return nil }
		o := patient()
		o.Clear, o.Compression = clear, "none"
		d := open(t, ts, nfc.Params{Name: file}, o)
		readAll(t, d, content, 1<<20)
		d.Close()
		sent := w.seen()
		if bytes.Contains(sent, marker) != clear || bytes.Contains(sent, []byte(file)) != clear {
			t.Errorf("clear=%v: the content is in clear", clear)
		}
		if leak := ts.leaks(string(sent)); leak != "" {
			t.Errorf("clear=%v: the secret of the ticket is in clear", clear)
		}
	}
}

// TestCloseNotify ends the first TLS session with a message of the host, which belongs to no layer that
// follows.
func TestCloseNotify(t *testing.T) {
	content := pattern(1<<20, 32)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, clear := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/clear=%v", tls.VersionName(version), clear), func(t *testing.T) {
				h, ts := newHost(t, content, nfctest.Options{MaxTLS: version})
				noLeaks(t, h)
				rule := h.On(nfctest.Fault{Step: nfctest.StepProxy, Kind: nfctest.CloseNotify})
				written := new(syncbuffer.Buffer)
				o := patient()
				o.Clear, o.Trace = clear, nfc.NewTrace(written)
				d := open(t, ts, nfc.Params{Name: file}, o)
				readAll(t, d, content, 1<<20)
				d.Close()
				if rule.Hits() != 1 || h.Stats().Connections != 1 || strings.Count(written.String(), "skipped a TLS record of the first session") != 1 {
					t.Errorf("%d hits, %s", rule.Hits(), written)
				}
			})
		}
	}
}
