package nfctest

import (
	"bytes"
	"encoding/binary"

	"github.com/vddkcp/vddkcp/internal/zero"
)

// messageSize is the number of bytes of a message of the handshake.
const messageSize = 264

// Types of messages.
const (
	msgComplete  = 4 // the end of the session
	msgError     = 20
	msgSetup     = 33
	msgAck       = 36
	msgToken     = 43
	msgVersion   = 51
	msgFrames    = 52
	msgClient    = 54
	msgAbilities = 55
)

var le = binary.LittleEndian

// message returns a message of a type with one number in it.
func message(kind uint32, at int, number uint32) []byte {
	b := make([]byte, messageSize)
	le.PutUint32(b[at:], number)
	le.PutUint32(b, kind)
	return b
}

// readMessage reads a message. If the message begins in the TLS record of the message before, the
// host does not see it until another record comes.
func (c *conn) readMessage() (kind uint32, b []byte, err error) {
	if c.in.shares() {
		c.violation("a message shares a TLS record with the one before")
		if err := c.in.fill(); err != nil {
			return 0, nil, err
		}
	}
	if b, err = c.in.take(messageSize); err != nil {
		return 0, nil, err
	}
	kind = le.Uint32(b)
	c.logf("> message %d", kind)
	return kind, b[4:], nil
}

// handshake exchanges the messages before the frames.
func (c *conn) handshake() error {
	t := c.h.traits
	expect := []uint32{msgSetup}
	if c.token != "" {
		expect = []uint32{msgToken, msgSetup}
	}
	if t.frames {
		expect = append(expect, msgVersion)
	}
	if t.version >= 3 {
		expect = append(expect, msgClient)
	}
	if t.frames {
		expect = append(expect, msgAbilities, msgFrames)
	}
	for _, want := range expect {
		kind, b, err := c.readMessage()
		if err != nil {
			return err
		}
		if kind == msgFrames && want == msgAbilities && t.version < 3 {
			want = msgFrames // message 55 is only known to be sent after 54
		}
		if kind != want {
			c.violation("message %d came in place of %d", kind, want)
			c.send(message(msgComplete, 4, 0))
			return errEnded
		}
		if need := c.lacks(kind); need != "" {
			c.logf("the client is refused: the host needs %s", need)
			return c.turnAway()
		}
		if err := c.onMessage(kind, b); err != nil {
			return err
		}
		if kind == msgFrames {
			return nil
		}
	}
	// The host is too old for message 51 and does not answer it.
	for {
		if _, err := c.in.take(1); err != nil {
			return err
		}
	}
}

// lacks returns which of Options.Needs the client does not meet, after a message of the given type;
// "": none.
func (c *conn) lacks(kind uint32) string {
	needs := c.h.options.Needs
	switch {
	case kind == msgToken && needs.PlainToken && c.token != "PlainText":
		return "the token PlainText"
	case kind == msgSetup && needs.WaitForAck && (len(c.in.pending) > 0 || c.wire.comes(grace)):
		return "message 51 after message 36"
	case kind == msgClient && needs.SplitNames && c.in.shares():
		return "the names in a record of their own"
	}
	return ""
}

// turnAway refuses a client that does not meet Options.Needs.
func (c *conn) turnAway() error {
	if c.h.options.Needs.Silent {
		select {
		case <-c.wire.gone:
		case <-c.h.closed:
		}
		return errEnded
	}
	c.send(message(msgComplete, 4, 0))
	return errEnded
}

// onMessage checks and answers a message whose type was expected.
func (c *conn) onMessage(kind uint32, b []byte) error {
	used := 0 // bytes that need not be zero
	switch kind {
	case msgToken:
		used = len(c.token)
		if !bytes.Equal(b[:used], []byte(c.token)) {
			c.violation("the token of message 43 is not that of THUMBPRINT_SHA2")
		}
	case msgVersion, msgClient:
		used = 8
	case msgAbilities:
		if used = 4; le.Uint32(b) != 3 {
			c.violation("message 55 says %d and not 3", le.Uint32(b))
		}
	}
	if !zero.Is(b[used:]) {
		c.violation("message %d has bytes that must be zero and are not", kind)
	}
	switch kind {
	case msgSetup:
		if !c.h.traits.holds36 {
			return c.sendAck()
		}
	case msgVersion:
		if c.h.traits.holds36 {
			if err := c.sendAck(); err != nil {
				return err
			}
		}
		return c.sendMessage(StepHandshake51, msgVersion, 4, c.h.traits.version)
	case msgClient:
		return c.readNames(le.Uint32(b), le.Uint32(b[4:]))
	case msgFrames:
		return c.sendMessage(StepHandshake52, msgFrames, 4, 0)
	}
	return nil
}

func (c *conn) sendAck() error {
	var knowsFrames uint32
	if c.h.traits.frames {
		knowsFrames = 1
	}
	return c.sendMessage(StepHandshake36, msgAck, 16, knowsFrames)
}

// readNames reads the two strings after message 54.
func (c *conn) readNames(name, operation uint32) error {
	if name == 0 || name > 256 || operation == 0 || operation > 256 {
		return c.wrong("message 54 announces names of %d and %d bytes", name, operation)
	}
	b, err := c.in.take(int(name + operation))
	if err != nil {
		return err
	}
	c.logf("> client %q, operation %q", b[:name], b[name:])
	if string(b[name:]) != "nbdmode" {
		return c.wrong("the operation is %q and not nbdmode", b[name:])
	}
	return nil
}

// sendMessage sends a message at a step, with one number in it.
func (c *conn) sendMessage(s Step, kind uint32, at int, number uint32) error {
	r := c.fault(s, Read{})
	b := message(kind, at, number)
	if r != nil {
		switch r.Kind {
		case Number:
			b = message(kind, at, uint32(r.Code))
		case WrongType:
			b = message(99, at, number)
		case EndOfSession, NFCError, HugeNFCError:
			b = inPlace(r)
		}
	}
	c.logf("< message %d", le.Uint32(b))
	return c.strike(r, c.out, b)
}

// inPlace returns the message that the kinds EndOfSession, NFCError and HugeNFCError are.
func inPlace(r *Rule) []byte {
	b := message(msgComplete, 4, 0)
	if r.Kind == EndOfSession {
		return b
	}
	b = message(msgError, 4, 1)
	le.PutUint32(b[8:], uint32(r.Code))
	le.PutUint32(b[12:], uint32(len(r.Text)+1))
	if r.Kind == HugeNFCError {
		le.PutUint32(b[12:], 0xffffffff)
	}
	return append(append(b, r.Text...), 0)
}

// send writes b as a whole.
func (c *conn) send(b []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, err := c.out.Write(b)
	return err
}
