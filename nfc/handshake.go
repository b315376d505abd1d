package nfc

import (
	"errors"
	"fmt"
	"io"

	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// clientMajor and clientMinor are the version that this client announces. It is the version of
	// VDDK 8.
	clientMajor, clientMinor = 11, 0
	// namesVersion is the first version of hosts that understand the name of the client.
	namesVersion = 3
	// features are the optional features that this client announces, as VDDK does.
	features = 3

	// clientName is the name of this program for the host. Hosts show it in their logs.
	clientName = "vddkcp"
	// operation says what the client is going to do. Hosts know this word.
	operation = "nbdmode"
)

// errTooOld says that a host has no NFC service that can be used.
var errTooOld = errors.New("the host is too old: it does not answer reads in frames (ESXi 6.5 or later does)")

// errEndedByHost says that a host has ended the session.
var errEndedByHost = errors.New("the host ended the session")

// The method handshake exchanges the messages after which frames can be sent.
//
// Every message is sent in a write of its own, and thus in a TLS record of its own, because hosts
// read one message from each record and overlook what follows it.
func (d *dialogue) handshake() error {
	d.begin(StepHello)
	if d.token != "" {
		if err := d.write(wire.NewClientRandom(d.token), nil); err != nil {
			return err
		}
	}
	if err := d.write(wire.NewHello(), nil); err != nil {
		return err
	}
	major, minor := uint32(clientMajor), uint32(clientMinor)
	if d.quirks.major != 0 {
		major, minor = d.quirks.major, d.quirks.minor
	}
	version := wire.NewVersion(major, minor)
	// ESXi 7.0.3 answers the first message only after it has received the version.
	if !d.quirks.waitForHello {
		if err := d.write(version, nil); err != nil {
			return err
		}
	}
	answer, err := d.read(wire.HelloReply)
	if err != nil {
		return err
	}
	if !answer.HasFrames() {
		return d.fail(source.Permanent(errTooOld), "")
	}
	d.begin(StepVersion)
	if d.quirks.waitForHello {
		if err := d.write(version, nil); err != nil {
			return err
		}
	}
	if answer, err = d.read(wire.Version); err != nil {
		return err
	}
	d.major, d.minor = answer.ServerVersion()
	return d.startFrames()
}

// startFrames sends what the host wants to know about the client, and changes from messages to
// frames.
func (d *dialogue) startFrames() error {
	d.begin(StepFrames)
	if d.major >= namesVersion {
		names := []byte(clientName + operation)
		if err := d.write(wire.NewClientName(clientName, operation), names); err != nil {
			return err
		}
	}
	if err := d.write(wire.NewFeatures(features), nil); err != nil {
		return err
	}
	if err := d.write(wire.NewFrames(), nil); err != nil {
		return err
	}
	_, err := d.read(wire.Frames)
	return err
}

// The method write sends a message and the bytes that belong to it.
func (d *dialogue) write(m *wire.Message, extra []byte) error {
	d.trace.message(sent, d.step, m, extra)
	writes := [][]byte{append(m[:len(m):len(m)], extra...)}
	if d.quirks.splitNames && len(extra) > 0 {
		writes = [][]byte{m[:], extra}
	}
	for _, b := range writes {
		if _, err := d.nfc.Write(b); err != nil {
			return d.fail(&lostError{fmt.Errorf("cannot send message %d: %w", m.Type(), err)}, "")
		}
	}
	return nil
}

// The method read reads a message, which must have the given type.
func (d *dialogue) read(want wire.MessageType) (*wire.Message, error) {
	m := new(wire.Message)
	if n, err := io.ReadFull(d.nfc, m[:]); err != nil {
		found := fmt.Sprintf("%d bytes", n)
		if n > 0 {
			found += ", " + wire.Hex(m[:n])
		}
		return nil, d.fail(fmt.Errorf("expected message %s, found %s: %w", want, found, lost(err)), "")
	}
	d.trace.message(received, d.step, m, nil)
	switch m.Type() {
	case want:
		return m, nil
	case wire.SessionComplete:
		return nil, d.fail(errEndedByHost, "")
	case wire.NFCError:
		return nil, d.fail(d.readError(m), "")
	}
	return nil, d.fail(&wire.ProtocolError{Want: "message " + want.String(), Got: "message " + m.Type().String(), Bytes: m[:64]}, "")
}

// readError returns the error that a message of the type NFCError reports. It reads the text that
// follows the message.
func (d *dialogue) readError(m *wire.Message) error {
	kind, code, size, err := m.ServerError()
	if err != nil {
		return err
	}
	text := make([]byte, size)
	if _, err := io.ReadFull(d.nfc, text); err != nil {
		return fmt.Errorf("cannot read the text of an error of the host: %w", lost(err))
	}
	return fmt.Errorf("the host reports error %d of kind %d: %s", code, kind, printableText(d.hide(string(text))))
}
