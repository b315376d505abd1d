package nfc_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/nfc"
)

// A script is a host whose connections a test plays itself, for what nfctest.Host cannot do.
type script struct {
	t           *testing.T
	listener    net.Listener
	certificate tls.Certificate
}

// newScript starts a host that calls play for each connection. When play returns, the connection ends.
func newScript(t *testing.T, play func(s *script, conn net.Conn) error) *script {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &script{t: t, listener: l, certificate: newCertificate(t)}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				if err := play(s, conn); err != nil {
					t.Logf("the connection of the script ends: %v", err)
				}
			})
		}
	})
	return s
}

func newCertificate(t *testing.T) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func colons(sum []byte) string {
	return strings.ToUpper(strings.Join(strings.Fields(fmt.Sprintf("% x", sum)), ":"))
}

// Ticket implements nfc.Tickets.
func (s *script) Ticket(context.Context) (nfc.Ticket, error) {
	sum := sha1.Sum(s.certificate.Certificate[0])
	return nfc.Ticket{
		File: file, Host: "127.0.0.1", Port: s.listener.Addr().(*net.TCPAddr).Port, Service: "nfc",
		Session: secret.New("52 12 34"), SHA1: hex.EncodeToString(sum[:]), Giver: "vc1.test",
	}, nil
}

// sha256 is the answer to the question for the certificate's SHA-256 thumbprint.
func (s *script) sha256() string {
	sum := sha256.Sum256(s.certificate.Certificate[0])
	return "200 " + colons(sum[:])
}

// The method tls opens a TLS session as the host.
func (s *script) tls(conn net.Conn) *tls.Conn {
	return tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{s.certificate}, DynamicRecordSizingDisabled: true})
}

// authd plays the dialogue in lines of text for a client that wants NFC in clear.
func (s *script) authd(conn net.Conn) error {
	const banner = "220 VMware Authentication Daemon Version 1.10: SSL Required, NFCSSL supported/t, SHA256 supported\r\n"
	if _, err := io.WriteString(conn, banner); err != nil {
		return err
	}
	t := s.tls(conn)
	lines := bufio.NewReader(t)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		answer := ""
		switch {
		case strings.HasPrefix(line, "BANNER"):
			answer = banner
		case strings.HasPrefix(line, "THUMBPRINT_SHA2"):
			answer = s.sha256() + "\r\n"
		case strings.HasPrefix(line, "PROXY"):
			answer = "200 Connect ha-nfc\r\n"
		}
		if _, err := io.WriteString(t, answer); err != nil || strings.HasPrefix(line, "PROXY") {
			return err
		}
	}
}

// handshake plays the messages before the frames.
func (s *script) handshake(conn net.Conn) error {
	for {
		var m [264]byte
		if _, err := io.ReadFull(conn, m[:]); err != nil {
			return err
		}
		kind := binary.LittleEndian.Uint32(m[:])
		answer := make([]byte, 264)
		switch kind {
		case 33:
			answer[0], answer[16] = 36, 1
		case 51:
			answer[0], answer[4] = 51, 11
		case 52:
			answer[0] = 52
		case 54:
			io.CopyN(io.Discard, conn, int64(m[4])+int64(m[8]))
			continue
		default:
			continue
		}
		if _, err := conn.Write(answer); err != nil || kind == 52 {
			return err
		}
	}
}

// A frame is a frame without the magic number.
type frame struct {
	kind, op uint32
	payload  []byte
	extra    []byte
}

func (f frame) bytes() []byte {
	b := binary.LittleEndian.AppendUint32(nil, 0xA100DA7A)
	b = binary.LittleEndian.AppendUint32(b, f.kind)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.payload)))
	b = binary.LittleEndian.AppendUint32(b, f.op)
	return append(append(b, f.payload...), f.extra...)
}

// readFrame reads a request with its path or key.
func readFrame(conn net.Conn) (frame, error) {
	var head [16]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return frame{}, err
	}
	u32 := func(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	f := frame{kind: u32(head[:], 4), op: u32(head[:], 12), payload: make([]byte, u32(head[:], 8))}
	if _, err := io.ReadFull(conn, f.payload); err != nil {
		return f, err
	}
	switch f.kind {
	case 4:
		f.extra = make([]byte, u32(f.payload, 0))
	case 11:
		f.extra = make([]byte, u32(f.payload, 8))
	}
	_, err := io.ReadFull(conn, f.extra)
	return f, err
}

// fragment returns a fragment of an uncompressed answer to a read.
func (f frame) fragment(place uint32, data []byte) frame {
	p := make([]byte, 44)
	p[8] = 1
	copy(p[16:24], f.payload[16:24])
	copy(p[24:28], f.payload[32:36])
	binary.LittleEndian.PutUint32(p[28:], place)
	binary.LittleEndian.PutUint32(p[32:], uint32(len(data)))
	binary.LittleEndian.PutUint32(p[36:], uint32(len(data)))
	return frame{kind: 7, op: f.op, payload: p, extra: data}
}

// answer returns the right answer to a request of a disk of zeros that has the given capacity.
func (f frame) answer(capacity uint64) frame {
	switch f.kind {
	case 4:
		p := make([]byte, 60)
		p[8], p[16], p[20] = 99, 2, 0x1e
		binary.LittleEndian.PutUint64(p[28:], capacity)
		return frame{kind: 4, op: f.op, payload: p}
	case 7:
		return f.fragment(0, make([]byte, binary.LittleEndian.Uint32(f.payload[32:])))
	case 11:
		return frame{kind: 11, op: f.op, payload: make([]byte, 16)}
	}
	return frame{kind: f.kind, op: f.op, payload: make([]byte, len(f.payload))}
}
