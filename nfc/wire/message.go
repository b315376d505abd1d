package wire

import (
	"bytes"
	"fmt"
)

// MessageSize is the size of a message before the frames, in bytes.
const MessageSize = 264

// A Message is one of the messages that are exchanged before the frames. It begins with its type;
// bytes that its type does not use are zero. Each message must be sent in one write, because a host
// takes only one message out of a TLS record.
type Message [MessageSize]byte

// MessageType says what a message means.
type MessageType uint32

const (
	SessionComplete MessageType = 4  // ends the session; in place of an answer it refuses
	NFCError        MessageType = 20 // an error of the host; a text follows
	Hello           MessageType = 33 // the first message of a client to all hosts
	HelloReply      MessageType = 36 // the answer to Hello
	ClientRandom    MessageType = 43 // repeats the token of THUMBPRINT_SHA2
	Version         MessageType = 51 // version of the client or host
	Frames          MessageType = 52 // frames follow
	ClientName      MessageType = 54 // name and operation of the client follow
	Features        MessageType = 55 // abilities of the client
)

var messageNames = map[MessageType]string{
	SessionComplete: "SESSION_COMPLETE",
	NFCError:        "NFC_ERROR",
	Hello:           "HELLO",
	HelloReply:      "HELLO_REPLY",
	ClientRandom:    "CLIENT_RANDOM",
	Version:         "VERSION",
	Frames:          "FRAMES",
	ClientName:      "CLIENT_NAME",
	Features:        "FEATURES",
}

// String returns the name and the number of the type.
func (t MessageType) String() string {
	if name := messageNames[t]; name != "" {
		return fmt.Sprintf("%s (%d)", name, uint32(t))
	}
	return fmt.Sprintf("unknown message type %d", uint32(t))
}

// Type returns the type of the message.
func (m *Message) Type() MessageType { return MessageType(u32(m[:], 0)) }

const (
	tokenAt  = 4
	maxToken = 64
)

// NewClientRandom returns the message that repeats the token of THUMBPRINT_SHA2, of 1 to 64 bytes.
// It panics if the token has another length.
func NewClientRandom(token string) *Message {
	if token == "" || len(token) > maxToken {
		panic(fmt.Sprintf("wire: the token has %d bytes, expected 1 to %d", len(token), maxToken))
	}
	m := newMessage(ClientRandom)
	copy(m[tokenAt:], token)
	return m
}

// NewHello returns the message with which every session begins, except for ClientRandom.
func NewHello() *Message { return newMessage(Hello) }

// NewVersion returns the message with the version of the protocol that the client speaks.
func NewVersion(major, minor uint32) *Message { return newMessage(Version, major, minor) }

// NewClientName returns the message that announces the name of the client and its operation. It
// contains only their lengths. The caller sends the two strings after the message, without a
// separator.
func NewClientName(name, operation string) *Message {
	return newMessage(ClientName, uint32(len(name)), uint32(len(operation)))
}

// NewFeatures returns the message with the abilities of the client.
func NewFeatures(bits uint32) *Message { return newMessage(Features, bits) }

// NewFrames returns the message that asks the host to go over to frames. The host answers with the
// same message.
func NewFrames() *Message { return newMessage(Frames) }

// NewSessionComplete returns the message that ends the session, after the last frame.
func NewSessionComplete() *Message { return newMessage(SessionComplete) }

func newMessage(t MessageType, values ...uint32) *Message {
	m := new(Message)
	put32(m[:], 0, uint32(t))
	for i, v := range values {
		put32(m[:], 4+4*i, v)
	}
	return m
}

// HasFrames reports whether a HelloReply says that the host understands versions and frames.
func (m *Message) HasFrames() bool { return u32(m[:], 16) == 1 }

// ServerVersion returns the version of the protocol in a message of the type Version.
func (m *Message) ServerVersion() (major, minor uint32) { return u32(m[:], 4), u32(m[:], 8) }

// ServerError returns the numbers in a message of the type NFCError. A text of textSize bytes
// follows the message. The error is a *ProtocolError if the text would be longer than MaxText.
func (m *Message) ServerError() (kind, code uint32, textSize int, err error) {
	textSize, err = checkText(m[:16], "an error text", u32(m[:], 12))
	return u32(m[:], 4), u32(m[:], 8), textSize, err
}

var messageFields = map[MessageType][]field{
	NFCError:   {{name: "kind", at: 4}, {name: "code", at: 8}, {name: "text length", at: 12}},
	HelloReply: {{name: "frames", at: 16}},
	Version:    {{name: "major", at: 4}, {name: "minor", at: 8}},
	ClientName: {{name: "name length", at: 4}, {name: "operation length", at: 8}},
	Features:   {{name: "bits", at: 4, hex: true}},
}

// Fields returns the type and all other fields of the message in words, and the bytes without a
// known meaning that are not zero. It never shows bytes of a ClientRandom, which contains a token.
func (m *Message) Fields() string {
	t := m.Type()
	if t == ClientRandom {
		length := bytes.IndexByte(m[tokenAt:], 0)
		if length < 0 {
			length = MessageSize - tokenAt
		}
		text := fmt.Sprintf("%v, token of %d bytes", t, length)
		if rest := bytes.Trim(m[tokenAt+length:], "\x00"); len(rest) > 0 {
			text += fmt.Sprintf(", %d unknown bytes", len(rest))
		}
		return text
	}
	text := t.String()
	if rest := describe(m[:], 4, messageFields[t]); rest != "" {
		text += ", " + rest
	}
	return text
}
