package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// unhex decodes hexadecimal digits. Spaces and line ends between them are ignored.
func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func checkBytes(t *testing.T, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("got\n% x\nwant\n% x", got, want)
	}
}

// checkError checks that an error is a ProtocolError whose text contains want. If want is "", there
// must be no error.
func checkError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" {
		if err != nil {
			t.Errorf("got %v, want no error", err)
		}
		return
	}
	var e *ProtocolError
	if !errors.As(err, &e) || !strings.Contains(e.Error(), want) {
		t.Errorf("got %v, want a ProtocolError with %q", err, want)
	}
	if e != nil && (len(e.Bytes) > maxHex || e.Want == "" || e.Got == "") {
		t.Errorf("want %q, got %q, %d bytes", e.Want, e.Got, len(e.Bytes))
	}
}

func TestRequests(t *testing.T) {
	header := "7ada00a1 "
	tests := []struct {
		name string
		got  []byte
		want string
	}{
		{"open session", NewOpenSession(0x100000, 4).Append(nil, 0), header + `02000000 10000000 00000000
			00000000 00001000 04000000 00000000`},
		{"open session with defaults", NewOpenSession(0, 0).Append(nil, 0), header + `02000000 10000000 00000000
			00000000 00000000 00000000 00000000`},
		{"socket options", NewSockOpts().Append(nil, 1), header + `09000000 0c000000 01000000
			00000000 00000000 00000000`},
		{"resource pool", NewResPool().Append(nil, 2), header + `16000000 04000000 02000000
			01000000`},
		{"open file", NewOpenFile("[ds] a/b.vmdk", ReadDisk).Append(nil, 3), header + `04000000 3c000000 03000000
			0d000000 00000000 00000000 00000000 02000000 1e000000 00000000 00000000
			00000000 00000000 00000000 00000000 00000000 00000000 00000000
			5b64735d20612f622e766d646b`},
		{"ddb get", NewDDBGet(0xfedcba9876543210, "uuid").Append(nil, 4), header + `0b000000 10000000 04000000
			1032547698badcfe 04000000 00000000
			75756964`},
		{"read", Read{Handle: 0xfedcba9876543210, Off: 0x1122334455667788, Len: 0x100000, Compression: SkipZ}.Append(nil, 5), header + `07000000 2c000000 05000000
			1032547698badcfe 01000000 03000000 8877665544332211 0000100000000000
			00001000 00001000 00000000`},
		{"close file", NewCloseFile(0xfedcba9876543210, false).Append(nil, 6), header + `05000000 08000000 06000000
			1032547698badcfe`},
		{"close file, long", NewCloseFile(0xfedcba9876543210, true).Append(nil, 6), header + `05000000 10000000 06000000
			1032547698badcfe 00000000 00000000`},
		{"close session", NewCloseSession(false).Append(nil, 0xffffffff), header + `03000000 04000000 ffffffff
			00000000`},
		{"close session, long", NewCloseSession(true).Append(nil, 7), header + `03000000 10000000 07000000
			00000000 00000000 00000000 00000000`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { checkBytes(t, test.got, unhex(t, test.want)) })
	}
	checkBytes(t, NewResPool().Append([]byte{0xee}, 2), unhex(t, "ee "+header+"16000000 04000000 02000000 01000000"))
	checkBytes(t, Read{}.Append([]byte{0xee}, 0)[:9], unhex(t, "ee "+header+"07000000"))
}

func TestMessages(t *testing.T) {
	tests := []struct {
		name string
		m    *Message
		want string // without the zeros at the end
		text string
	}{
		{"client random", NewClientRandom("secret"), "2b000000 736563726574", "CLIENT_RANDOM (43), token of 6 bytes"},
		{"hello", NewHello(), "21000000", "HELLO (33)"},
		{"version", NewVersion(11, 1), "33000000 0b000000 01000000", "VERSION (51), major 11, minor 1"},
		{"client name", NewClientName("vddk", "nbdmode"), "36000000 04000000 07000000", "CLIENT_NAME (54), name length 4, operation length 7"},
		{"features", NewFeatures(3), "37000000 03000000", "FEATURES (55), bits 0x3"},
		{"frames", NewFrames(), "34000000", "FRAMES (52)"},
		{"session complete", NewSessionComplete(), "04000000", "SESSION_COMPLETE (4)"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			want := make([]byte, 264)
			copy(want, unhex(t, test.want))
			checkBytes(t, test.m[:], want)
			if got := test.m.Fields(); got != test.text {
				t.Errorf("got %q, want %q", got, test.text)
			}
		})
	}
}

func TestSkipZ(t *testing.T) {
	dst := bytes.Repeat([]byte{0xee}, 16)
	err := DecodeSkipZ(dst, unhex(t, `10000000 00000000
		02000000 03000000 010203
		05000000 01000000 04
		0e000000 02000000 0506`))
	checkError(t, err, "")
	checkBytes(t, dst, unhex(t, "0000 010203 04 00000000 00000000 0506"))
	checkError(t, DecodeSkipZ(dst, unhex(t, "10000000 00000000")), "")
	checkBytes(t, dst, make([]byte, 16))
}
