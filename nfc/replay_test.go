package nfc_test

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

var record = flag.Bool("record", false, "record testdata/esxi8.trace anew")

const replayed = "testdata/esxi8.trace"

// replayContent is the disk of the recorded connection.
func replayContent() []byte { return pattern(1<<20+512, 110) }

// readRecorded reads a disk as it is read in the recorded connection.
func readRecorded(t *testing.T, tickets nfc.Tickets, trace *nfc.Trace) {
	t.Helper()
	content := replayContent()
	d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: true, Capacity: int64(len(content))}, tickets,
		nfc.Options{Compression: "none", RequestSize: 256 << 10, Trace: trace})
	if err != nil {
		t.Fatal(err)
	}
	readAll(t, d, content, 700<<10)
	p := make([]byte, 1000)
	if _, err := d.ReadAt(p, 777); err != nil || !bytes.Equal(p, content[777:1777]) {
		t.Errorf("%v", err)
	}
	if i, _ := source.Ability[source.Described](d); i.Info().UUID != "60 00 C2 9e 01" || i.Info().AdapterType != "lsilogic" {
		t.Errorf("%+v", i.Info())
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

// TestReplay plays a recorded connection: the client must send what it has sent then, and gets the
// answers that it got then. Tokens may differ. The data of the disk are not in the trace, but their
// checksums are.
func TestReplay(t *testing.T) {
	if *record {
		h, ts := newHost(t, replayContent(), nfctest.Options{Shuffle: true, Seed: 3, Fragment: 100 << 10})
		noLeaks(t, h)
		written := new(syncbuffer.Buffer)
		readRecorded(t, ts, nfc.NewTrace(written))
		if err := os.WriteFile(replayed, []byte(written.String()), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(replayed)
	if err != nil {
		t.Fatal(err)
	}
	player := &player{content: replayContent()}
	for i, line := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n") {
		e, err := parseEntry(line)
		if err != nil {
			t.Fatalf("%s:%d: %v", replayed, i+1, err)
		}
		e.line = i + 1
		player.entries = append(player.entries, e)
	}
	played := make(chan error, 10) // a client whose connection fails tries other forms of the handshake
	s := newScript(t, func(s *script, conn net.Conn) error {
		err := player.play(s, conn)
		played <- err
		return err
	})
	readRecorded(t, s, nil)
	if err := <-played; err != nil {
		t.Error(err)
	}
}

// An entry is a line of a trace.
type entry struct {
	line      int
	direction string // ">", "<" or "-"
	step      string
	what      string // "line", "message", "frame", or a note
	text      string // of a line
	raw       []byte // of a message or payload
	frame     uint32 // type of a frame
	op        uint32
	extra     []byte
	data      int // bytes of data that follow
	sum       string
}

var (
	entryForm   = regexp.MustCompile(`^\S+ \d+ ([-<>]) \[([^]]+)\] (.*)$`)
	messageForm = regexp.MustCompile(`^.*? hex=([0-9a-f]*)(?: extra=([0-9a-f]*))?$`)
	frameForm   = regexp.MustCompile(`^.*?\((\d+)\), opId (\d+), payload of (\d+) bytes: .*?payload=([0-9a-f]*)(?: extra=(.*)| data=(\d+) crc32c=([0-9a-f]{8}))?$`)
)

// parseEntry parses a line of a trace.
func parseEntry(line string) (e entry, err error) {
	m := entryForm.FindStringSubmatch(line)
	if m == nil {
		return e, fmt.Errorf("no line of a trace: %q", line)
	}
	e.direction, e.step = m[1], m[2]
	e.what, e.text, _ = strings.Cut(m[3], " ")
	if e.direction == "-" {
		return e, nil
	}
	switch e.what {
	case "line":
		e.text, err = unquote(e.text)
	case "message":
		if m = messageForm.FindStringSubmatch(e.text); m == nil {
			return e, fmt.Errorf("no message: %q", e.text)
		}
		if e.raw, err = hex.DecodeString(m[1]); err == nil {
			e.extra, err = hex.DecodeString(m[2])
		}
		e.raw = append(e.raw, make([]byte, 264-len(e.raw))...)
	case "frame":
		if m = frameForm.FindStringSubmatch(e.text); m == nil {
			return e, fmt.Errorf("no frame: %q", e.text)
		}
		number := func(s string) int { n, _ := strconv.Atoi(s); return n }
		e.frame, e.op, e.data, e.sum = uint32(number(m[1])), uint32(number(m[2])), number(m[6]), m[7]
		if e.raw, err = hex.DecodeString(m[4]); err == nil && len(e.raw) != number(m[3]) {
			err = fmt.Errorf("a payload of %d bytes, want %s", len(e.raw), m[3])
		}
		var text string
		if err == nil {
			text, err = unquote(m[5])
		}
		e.extra = []byte(text)
	default:
		err = fmt.Errorf("a line about %q", e.what)
	}
	return e, err
}

// unquote undoes printable.Name.
func unquote(s string) (string, error) {
	if strings.HasPrefix(s, `"`) {
		return strconv.Unquote(s)
	}
	return s, nil
}

// A player plays the host of a recorded connection.
type player struct {
	entries []entry
	content []byte

	conn  net.Conn      // the socket, or TLS over it
	lines *bufio.Reader // of conn, in the dialogue in lines
}

func (p *player) play(s *script, socket net.Conn) error {
	p.conn = socket
	for _, e := range p.entries {
		if err := p.entry(s, socket, e); err != nil {
			return fmt.Errorf("%s:%d: %w", replayed, e.line, err)
		}
	}
	var b [1]byte
	if n, err := p.conn.Read(b[:]); err != io.EOF {
		return fmt.Errorf("after the end: %d bytes, %v", n, err)
	}
	return nil
}

func (p *player) entry(s *script, socket net.Conn, e entry) error {
	switch {
	case e.direction == "-" && e.what == "TLS": // a session was opened
		t := s.tls(socket)
		p.conn, p.lines = t, bufio.NewReader(t)
		return t.Handshake()
	case e.direction == "-":
		return nil
	case e.direction == "<":
		return p.answer(s, e)
	case e.what == "line":
		got, err := p.lines.ReadString('\n')
		got = strings.TrimSuffix(got, "\r\n")
		if before, hidden := strings.CutSuffix(e.text, "***"); err == nil && got != e.text && !(hidden && strings.HasPrefix(got, before) && len(got) > len(before)) {
			err = fmt.Errorf("the client has sent the line %q, and then %q", got, e.text)
		}
		return err
	case e.what == "message":
		got := make([]byte, 264+len(e.extra))
		if _, err := io.ReadFull(p.conn, got); err != nil {
			return err
		}
		want := append(bytes.Clone(e.raw), e.extra...)
		if e.raw[0] == 43 { // the token is not recorded
			got, want = got[:4], want[:4]
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("the client has sent the message % x, and then % x", got, want)
		}
		return nil
	}
	got, err := readFrame(p.conn)
	if err == nil && (got.kind != e.frame || got.op != e.op || !bytes.Equal(got.payload, e.raw) || !bytes.Equal(got.extra, e.extra)) {
		err = fmt.Errorf("the client has sent the frame %+v, and then %s", got, e.text)
	}
	return err
}

// The method answer sends what the host has sent then.
func (p *player) answer(s *script, e entry) error {
	var b []byte
	switch {
	case e.what == "line" && e.step == "thumbprint":
		b = []byte(s.sha256() + "\r\n") // the certificate is another one
	case e.what == "line":
		b = []byte(e.text + "\r\n")
	case e.what == "message":
		b = append(e.raw, e.extra...)
	default:
		f := frame{kind: e.frame, op: e.op, payload: e.raw, extra: e.extra}
		if e.data > 0 {
			u32 := func(at int) int {
				return int(e.raw[at]) | int(e.raw[at+1])<<8 | int(e.raw[at+2])<<16 | int(e.raw[at+3])<<24
			}
			from := u32(16) + u32(28) // offset of the request and place in it
			f.extra = p.content[from : from+e.data]
			sum := fmt.Sprintf("%08x", crc32.Checksum(f.extra, crc32.MakeTable(crc32.Castagnoli)))
			if sum != e.sum {
				return fmt.Errorf("the checksum of %d bytes at %d is %s, and was %s", e.data, from, sum, e.sum)
			}
		}
		b = f.bytes()
	}
	_, err := p.conn.Write(b)
	return err
}
