package wire

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for want, got := range map[string]fmt.Stringer{
		"SESSION_COMPLETE (4)":    SessionComplete,
		"NFC_ERROR (20)":          NFCError,
		"HELLO (33)":              Hello,
		"HELLO_REPLY (36)":        HelloReply,
		"CLIENT_RANDOM (43)":      ClientRandom,
		"VERSION (51)":            Version,
		"FRAMES (52)":             Frames,
		"CLIENT_NAME (54)":        ClientName,
		"FEATURES (55)":           Features,
		"unknown message type 53": MessageType(53),
		"ERROR (1)":               Error,
		"OPEN_SESSION (2)":        OpenSession,
		"CLOSE_SESSION (3)":       CloseSession,
		"OPEN_FILE (4)":           OpenFile,
		"CLOSE_FILE (5)":          CloseFile,
		"IO (7)":                  IO,
		"SET_SOCK_OPTS (9)":       SetSockOpts,
		"DDB_GET (11)":            DDBGet,
		"SET_RES_POOL (22)":       SetResPool,
		"unknown frame type 6":    FrameType(6),
		"none":                    Plain,
		"zlib":                    Zlib,
		"fastlz":                  FastLZ,
		"skipz":                   SkipZ,
		"unknown compression 4":   Compression(4),
	} {
		if got.String() != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestHex(t *testing.T) {
	b := bytes.Repeat([]byte{0xab}, 65)
	for _, test := range []struct {
		n    int
		want string
	}{
		{0, ""}, {1, "ab"}, {2, "ab ab"},
		{64, strings.Repeat("ab ", 63) + "ab"}, {65, strings.Repeat("ab ", 63) + "ab..."},
	} {
		if got := Hex(b[:test.n]); got != test.want {
			t.Errorf("%d bytes: got %q, want %q", test.n, got, test.want)
		}
	}
	e := violation(b, "one thing", "another")
	b[0] = 1
	if want := "expected one thing, found another (bytes " + strings.Repeat("ab ", 63) + "ab)"; e.Error() != want {
		t.Errorf("got %q, want %q", e, want)
	}
	if e := (&ProtocolError{Want: "a", Got: "b"}); e.Error() != "expected a, found b" {
		t.Errorf("got %q", e)
	}
}

// counting returns n bytes: 1, 2, 3 and so on.
func counting(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i + 1)
	}
	return b
}

func TestPayloadFields(t *testing.T) {
	tests := []struct{ name, got, want string }{
		{"open session", RequestFields(OpenSession, NewOpenSession(65536, 4).Payload), "buffer bytes 65536, buffer count 4"},
		{"open file", RequestFields(OpenFile, NewOpenFile("[a] b", ReadDisk).Payload), "path length 5, kind 2, flags 0x1e"},
		{"ddb get", RequestFields(DDBGet, NewDDBGet(255, "uuid").Payload), "handle 0xff, key length 4"},
		{"close file", RequestFields(CloseFile, NewCloseFile(255, true).Payload), "handle 0xff"},
		{"resource pool", RequestFields(SetResPool, NewResPool().Payload), "pool 1"},
		{"socket options", RequestFields(SetSockOpts, NewSockOpts().Payload), ""},
		{"read", RequestFields(IO, Read{Handle: 1 << 63, Off: 1 << 40, Len: 4096, Compression: SkipZ}.Append(nil, 0)[HeaderSize:]),
			"handle 0x8000000000000000, direction 1, compression 3, offset 1099511627776, length 4096, length again 4096, length again 4096"},
		{"answer to open file", AnswerFields(OpenFile, counting(60)), "status 578437695752307201, handle 0x100f0e0d0c0b0a09, kind 336794129, flags 0x18171615, " +
			"capacity 2603962535218454045, sector size 673654309, cylinders 741026345, heads 808398381, sectors 875770417, unknown bytes @24: 191a1b1c @52: 35363738 @56: 393a3b3c"},
		{"fragment", AnswerFields(IO, counting(44)), "status 578437695752307201, direction 202050057, compression 269422093, offset 1735880461161533969, " +
			"length 471538201, fragment at 538910237, fragment length 606282273, bytes that follow 673654309, unknown bytes @40: 292a2b2c"},
		{"error", AnswerFields(Error, counting(16)), "code 578437695752307201, text length 269422093, unknown bytes @8: 090a0b0c"},
		{"answer to socket options", AnswerFields(SetSockOpts, counting(12)), "send buffer 67305985, receive buffer 134678021, flag 202050057"},
		{"answer to ddb get", AnswerFields(DDBGet, counting(16)), "text length 269422093, unknown bytes @0: 01020304 @4: 05060708 @8: 090a0b0c"},
		{"unknown type", AnswerFields(99, counting(6)), "unknown bytes @0: 01020304 @4: 0506"},
		{"cut off", AnswerFields(Error, counting(13)), "code 578437695752307201, unknown bytes @8: 090a0b0c @12: 0d"},
		{"long", AnswerFields(99, bytes.Repeat([]byte{1}, 68)), "unknown bytes" + longList()},
		{"empty", AnswerFields(99, nil), ""},
		{"header", Header{Type: IO, Size: 44, OpID: 7}.String(), "IO (7), opId 7, payload of 44 bytes"},
	}
	for _, test := range tests {
		if test.got != test.want {
			t.Errorf("%s: got\n%s\nwant\n%s", test.name, test.got, test.want)
		}
	}
}

func longList() (list string) {
	for at := 0; at < 64; at += 4 {
		list += fmt.Sprintf(" @%d: 01010101", at)
	}
	return list + " ..."
}

func TestMessageFields(t *testing.T) {
	message := func(digits string) *Message {
		m := new(Message)
		copy(m[:], unhex(t, digits))
		return m
	}
	last := NewHello()
	last[263] = 0xff
	token := NewClientRandom("secret")
	token[100] = 'x'
	full := NewClientRandom("s")
	for i := 4; i < len(full); i++ {
		full[i] = 's'
	}
	tests := []struct {
		m    *Message
		want string
	}{
		{message("24000000 00000000 00000000 00000000 01000000"), "HELLO_REPLY (36), frames 1"},
		{message("24000000 05000000 00000000 00000000 00000000 00010000"), "HELLO_REPLY (36), frames 0, unknown bytes @4: 05000000 @20: 00010000"},
		{message("14000000 01000000 02000000 03000000"), "NFC_ERROR (20), kind 1, code 2, text length 3"},
		{message("63000000 01"), "unknown message type 99, unknown bytes @4: 01000000"},
		{last, "HELLO (33), unknown bytes @260: 000000ff"},
		{token, "CLIENT_RANDOM (43), token of 6 bytes, 1 unknown bytes"},
		{full, "CLIENT_RANDOM (43), token of 260 bytes"},
	}
	for _, test := range tests {
		if got := test.m.Fields(); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}
