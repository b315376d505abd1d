package nfc

import (
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nfc/wire"
)

// Trace records what is sent and received on connections to hosts, one line for each line of text,
// message and frame. Data of disks is recorded as its length and its checksum (CRC-32C). No secrets
// are recorded. docs/guide/nfc.md describes the lines. Its methods are safe for concurrent use.
type Trace struct {
	mu    sync.Mutex
	w     io.Writer
	err   error
	conns int
	now   func() time.Time
}

// NewTrace returns a Trace that writes to w. After an error of w, it writes nothing more.
func NewTrace(w io.Writer) *Trace { return &Trace{w: w, now: time.Now} }

// Err returns the first error of writing the trace.
func (t *Trace) Err() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

func (t *Trace) write(line string) {
	if t.err == nil {
		_, t.err = io.WriteString(t.w, line)
	}
}

// connection returns the trace of a new connection. All methods of a nil *connTrace do nothing.
func (t *Trace) connection(address string, q Quirks) *connTrace {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	t.conns++
	c := &connTrace{trace: t, n: t.conns}
	t.mu.Unlock()
	c.note(StepConnect, "host "+printable.Name(address)+" quirks "+printable.Name(q.String()))
	return c
}

// connTrace is the part of a trace that belongs to one connection.
type connTrace struct {
	trace *Trace
	n     int // of the connection, from 1
}

const (
	sent     = '>'
	received = '<'
	noted    = '-'
)

func (c *connTrace) line(direction rune, step Step, text string) {
	if c == nil {
		return
	}
	t := c.trace
	t.mu.Lock()
	defer t.mu.Unlock()
	t.write(fmt.Sprintf("%s %d %c [%s] %s\n", t.now().UTC().Format("2006-01-02T15:04:05.000000Z"), c.n, direction, step, text))
}

// The method note records an event that is neither sent nor received.
func (c *connTrace) note(step Step, text string) { c.line(noted, step, text) }

// The method text records a line of the dialogue with authd.
func (c *connTrace) text(direction rune, step Step, line string) {
	if c != nil {
		c.line(direction, step, "line "+printable.Name(line))
	}
}

// The method message records a message of the handshake and the bytes that follow it. Its token is
// left out.
func (c *connTrace) message(direction rune, step Step, m *wire.Message, extra []byte) {
	if c == nil {
		return
	}
	b := strings.TrimRight(string(m[:]), "\x00")
	if m.Type() == wire.ClientRandom {
		b = b[:1]
	}
	text := fmt.Sprintf("message %s hex=%x", m.Fields(), b)
	if len(extra) > 0 {
		text += fmt.Sprintf(" extra=%x", extra)
	}
	c.line(direction, step, text)
}

// The method frame records a frame other than the answer to a read.
func (c *connTrace) frame(direction rune, step Step, h wire.Header, payload, extra []byte) {
	if c == nil {
		return
	}
	fields := wire.AnswerFields
	if direction == sent {
		fields = wire.RequestFields
	}
	text := fmt.Sprintf("frame %s: %s payload=%x", h, fields(h.Type, payload), payload)
	if len(extra) > 0 {
		text += " extra=" + printable.Name(string(extra))
	}
	c.line(direction, step, text)
}

// The method fragment records a fragment of the answer to a read. The bytes that follow it are
// recorded as their length and checksum.
func (c *connTrace) fragment(h wire.Header, payload []byte, f wire.Fragment, data []byte) {
	if c == nil {
		return
	}
	sum := crc32.Checksum(data, castagnoli)
	c.line(received, StepRead, fmt.Sprintf("frame %s: %s payload=%x data=%d crc32c=%08x", h, f.Fields(), payload, len(data), sum))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
