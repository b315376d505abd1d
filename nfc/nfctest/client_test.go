package nfctest

import (
	"bufio"
	"bytes"
	"compress/zlib"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/selfsigned"
)

// client is a simple client: one goroutine that sends requests and reads answers.
type client struct {
	conn    net.Conn
	nfc     io.ReadWriter
	in      *bufio.Reader
	banner  string
	op      uint32
	handle  uint64
	size    int64
	version uint32
	sha2    bool
}

// way says how a client connects.
type way struct {
	clear         bool
	buffer, count uint32
	file          string
	tls0          func(t *tls.Conn)            // before SESSION
	tls1          func(c *client, t *tls.Conn) // after PROXY
	dialed        func(conn net.Conn)
}

const diskFile = "[ds1] web01/web01.vmdk"

// connect does everything up to the opened file.
func connect(ticket Ticket, w way) (*client, error) {
	conn, err := net.Dial("tcp", net.JoinHostPort(ticket.Host, strconv.Itoa(ticket.Port)))
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	c := &client{conn: conn}
	if w.dialed != nil {
		w.dialed(conn)
	}
	if err := c.connect(ticket, w); err != nil {
		conn.Close()
		return nil, err
	}
	return c, nil
}

func (c *client) connect(ticket Ticket, w way) error {
	line, err := readLine(c.conn)
	if err != nil {
		return err
	}
	c.banner = line
	c.sha2 = strings.Contains(line, "SHA256 supported")
	config := &tls.Config{InsecureSkipVerify: true}
	t := tls.Client(&oneRecord{Conn: c.conn}, config)
	if err := t.Handshake(); err != nil {
		return err
	}
	der := t.ConnectionState().PeerCertificates[0].Raw
	if ticket.SHA1 != "" && ticket.SHA1 != selfsigned.SHA1(der) {
		return errors.New("wrong certificate")
	}
	say := func(format string, args ...any) { fmt.Fprintf(t, format+"\r\n", args...) }
	expect := func(want string) error {
		got, err := readLine(t)
		if err == nil && !strings.HasPrefix(got, want) {
			err = fmt.Errorf("got %q, want %q", got, want)
		}
		return err
	}
	if w.tls0 != nil {
		w.tls0(t)
	}
	say("SESSION %s", ticket.Session)
	say("BANNER ")
	if err := expect("220 "); err != nil {
		return err
	}
	if c.sha2 {
		say("THUMBPRINT_SHA2 abc")
		if err := expect("200 " + selfsigned.SHA256(der)); err != nil {
			return err
		}
	}
	service := ticket.Service
	if !w.clear {
		service += "ssl"
	}
	say("PROXY %s", service)
	if err := expect("200 Connect ha-nfc"); err != nil {
		return err
	}
	c.nfc = c.conn
	if !w.clear {
		c.nfc = tls.Client(c.conn, config)
	}
	c.in = bufio.NewReader(c.nfc)
	if w.tls1 != nil {
		w.tls1(c, t)
	}
	if err := c.handshake(); err != nil {
		return err
	}
	return c.open(w)
}

// oneRecord is a connection with TLS records of which a Read returns bytes of one record only. Package
// tls keeps what it reads beyond the record that it needs. Without this type, a close-notify that
// arrives together with the answer to PROXY would sometimes disappear in the first TLS session.
type oneRecord struct {
	net.Conn
	head []byte // the part of the header that was read
	left int    // bytes of the record, without its header, that were not read
}

func (o *oneRecord) Read(p []byte) (int, error) {
	if o.left > 0 {
		n, err := o.Conn.Read(p[:min(len(p), o.left)])
		o.left -= n
		return n, err
	}
	n, err := o.Conn.Read(p[:min(len(p), 5-len(o.head))])
	if o.head = append(o.head, p[:n]...); len(o.head) == 5 {
		o.left, o.head = int(binary.BigEndian.Uint16(o.head[3:])), o.head[:0]
	}
	return n, err
}

func readLine(r io.Reader) (string, error) {
	var line []byte
	for !bytes.HasSuffix(line, []byte("\r\n")) {
		var b [1]byte
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return "", err
		}
		if line = append(line, b[0]); len(line) > 1000 {
			return "", errors.New("endless line")
		}
	}
	return string(line[:len(line)-2]), nil
}

func (c *client) expect(kind uint32) ([]byte, error) {
	b := make([]byte, messageSize)
	if _, err := io.ReadFull(c.in, b); err != nil {
		return nil, err
	}
	if le.Uint32(b) != kind {
		return nil, fmt.Errorf("message %d in place of %d", le.Uint32(b), kind)
	}
	return b, nil
}

// tokenMessage returns message 43, with the token.
func tokenMessage() []byte {
	b := message(43, 4, 0)
	copy(b[4:], "abc")
	return b
}

func (c *client) handshake() error {
	if c.sha2 {
		c.nfc.Write(tokenMessage())
	}
	c.nfc.Write(message(33, 4, 0))
	c.nfc.Write(message(51, 4, 11))
	b, err := c.expect(36)
	if err != nil {
		return err
	}
	if le.Uint32(b[16:]) != 1 {
		return errors.New("too old")
	}
	if b, err = c.expect(51); err != nil {
		return err
	}
	if c.version = le.Uint32(b[4:]); c.version >= 3 {
		b := message(54, 4, 6)
		le.PutUint32(b[8:], 7)
		c.nfc.Write(append(b, "vddkcpnbdmode"...))
		c.nfc.Write(message(55, 4, 3))
	}
	c.nfc.Write(message(52, 4, 0))
	_, err = c.expect(52)
	return err
}

// answerError is an ERROR.
type answerError struct {
	code uint64
	text string
}

func (e *answerError) Error() string { return fmt.Sprintf("ERROR %d, %s", e.code, e.text) }

// send sends a request.
func (c *client) send(kind uint32, p []byte, extra string) {
	c.nfc.Write(append(newFrame(kind, c.op, p, []byte(extra)), 0)[:headSize+len(p)+len(extra)])
	c.op++
}

// receive reads a head and the payload. An ERROR is an error.
func (c *client) receive() (kind, op uint32, p []byte, err error) {
	head := make([]byte, headSize)
	if _, err := io.ReadFull(c.in, head); err != nil {
		return 0, 0, nil, err
	}
	if le.Uint32(head) != magic || le.Uint32(head[8:]) > 100 {
		return 0, 0, nil, fmt.Errorf("head % x", head)
	}
	kind, op = le.Uint32(head[4:]), le.Uint32(head[12:])
	p = make([]byte, le.Uint32(head[8:]))
	if _, err := io.ReadFull(c.in, p); err != nil {
		return 0, 0, nil, err
	}
	if kind != frameError {
		return kind, op, p, nil
	}
	n := le.Uint32(p[12:])
	if n > 1000 {
		return 0, 0, nil, errors.New("huge text")
	}
	text := make([]byte, n)
	_, err = io.ReadFull(c.in, text)
	return kind, op, nil, errors.Join(err, &answerError{le.Uint64(p), string(text)})
}

// call sends a request and reads its answer.
func (c *client) call(kind uint32, p []byte, extra string) ([]byte, error) {
	c.send(kind, p, extra)
	k, op, p, err := c.receive()
	if err == nil && (k != kind || op != c.op-1) {
		err = fmt.Errorf("an answer of type %d, opId %d", k, op)
	}
	return p, err
}

func numbers(list ...uint32) (p []byte) {
	for _, n := range list {
		p = le.AppendUint32(p, n)
	}
	return p
}

func (c *client) open(w way) error {
	if w.file == "" {
		w.file = diskFile
	}
	if _, err := c.call(2, numbers(0, w.buffer, w.count, 0), ""); err != nil {
		return err
	}
	if _, err := c.call(9, make([]byte, 12), ""); err != nil {
		return err
	}
	if _, err := c.call(22, numbers(1), ""); err != nil {
		return err
	}
	p := make([]byte, 60)
	le.PutUint32(p, uint32(len(w.file)))
	le.PutUint32(p[16:], 2)
	le.PutUint32(p[20:], 0x1e)
	p, err := c.call(4, p, w.file)
	if err != nil {
		return err
	}
	if le.Uint64(p) != 0 {
		return fmt.Errorf("status %d", le.Uint64(p))
	}
	c.handle, c.size = le.Uint64(p[8:]), int64(le.Uint64(p[28:]))
	return nil
}

// ddb returns a value of the disk database.
func (c *client) ddb(key string) (string, error) {
	p, err := c.call(11, append(le.AppendUint64(nil, c.handle), numbers(uint32(len(key)), 0)...), key)
	if err != nil {
		return "", err
	}
	text := make([]byte, min(le.Uint32(p[12:]), 1000))
	_, err = io.ReadFull(c.in, text)
	return string(text), err
}

// ask sends a read.
func (c *client) ask(compression uint32, offset, length int64) {
	p := le.AppendUint64(nil, c.handle)
	p = append(p, numbers(1, compression)...)
	p = le.AppendUint64(le.AppendUint64(p, uint64(offset)), uint64(length))
	c.send(7, append(p, numbers(uint32(length), uint32(length), 0)...), "")
}

// read asks for ranges of n bytes, all at once, and returns the content from the first one on.
func (c *client) read(compression uint32, from, to, n int64) ([]byte, error) {
	content, first, left := make([]byte, to-from), c.op, to-from
	for at := from; at < to; at += n {
		c.ask(compression, at, min(n, to-at))
	}
	for left > 0 {
		kind, op, p, err := c.receive()
		if err != nil {
			return nil, err
		}
		at := int64(op-first) * n
		if kind != 7 || at < 0 || at >= to-from || le.Uint64(p) != 0 || le.Uint64(p[16:]) != uint64(from+at) {
			return nil, fmt.Errorf("type %d, opId %d, % x", kind, op, p)
		}
		place, size, packed := int64(le.Uint32(p[28:])), int64(le.Uint32(p[32:])), int64(le.Uint32(p[36:]))
		length := min(n, to-from-at)
		if int64(le.Uint32(p[24:])) != length || size == 0 || place+size > length || packed > 4<<20 {
			return nil, fmt.Errorf("fragment % x", p)
		}
		data := make([]byte, packed)
		if _, err := io.ReadFull(c.in, data); err != nil {
			return nil, err
		}
		if err := decode(content[at+place:at+place+size], le.Uint32(p[12:]), data); err != nil {
			return nil, err
		}
		left -= size
	}
	if left < 0 {
		return nil, errors.New("fragments overlap")
	}
	return content, nil
}

// decode decodes the data of a fragment.
func decode(p []byte, kind uint32, data []byte) error {
	switch kind {
	case plain:
		if copy(p, data); len(data) != len(p) {
			return errors.New("wrong packed length")
		}
		return nil
	case withZlib:
		z, err := zlib.NewReader(bytes.NewReader(data))
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(z, p); err != nil {
			return err
		}
		if n, err := io.Copy(io.Discard, io.LimitReader(z, 1)); n != 0 || err != nil {
			return fmt.Errorf("after the end of zlib: %d bytes, %v", n, err)
		}
		return nil
	case withSkipZ:
		return decodeSkipZ(p, data)
	}
	return fmt.Errorf("compression %d", kind)
}

func decodeSkipZ(p, data []byte) error {
	if len(data) < 8 || int(le.Uint32(data)) != len(p) || le.Uint32(data[4:]) != 0 {
		return errors.New("wrong head of SkipZ")
	}
	end := 0
	for data = data[8:]; len(data) > 0; {
		if len(data) < 8 {
			return errors.New("short head of a run")
		}
		at, n := int(le.Uint32(data)), int(le.Uint32(data[4:]))
		if data = data[8:]; at < end || n > len(data) || n == 0 || at+n > len(p) {
			return fmt.Errorf("run of %d bytes at %d", n, at)
		}
		copy(p[at:], data[:n])
		data, end = data[n:], at+n
	}
	return nil
}

// close ends the session and the connection.
func (c *client) close() error {
	defer c.conn.Close()
	if err := c.finish(); err != nil {
		return err
	}
	_, err := c.nfc.Write(message(4, 4, 0))
	if t, ok := c.nfc.(*tls.Conn); ok {
		t.CloseWrite()
	}
	return err
}

// finish closes the file and the session.
func (c *client) finish() error {
	if _, err := c.call(5, le.AppendUint64(nil, c.handle), ""); err != nil {
		return err
	}
	_, err := c.call(3, make([]byte, 4), "")
	return err
}

// mustConnect connects a client that must succeed.
func mustConnect(t *testing.T, ticket Ticket, w way) *client {
	t.Helper()
	c, err := connect(ticket, w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.conn.Close() })
	return c
}
