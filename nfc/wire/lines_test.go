package wire

import (
	"strings"
	"testing"
)

const realBanner = "220 VMware Authentication Daemon Version 1.10: SSL Required, ServerDaemonProtocol:SOAP, MKSDisplayProtocol:VNC , VMXARGS supported, NFCSSL supported/t, SHA256 supported"

func TestBanner(t *testing.T) {
	tests := []struct {
		name, line string
		want       Banner // without Text
		problem    string
	}{
		{name: "8.0", line: realBanner, want: Banner{Version: "1.10", TLSRequired: true, NFCSSL: true, SHA256: true}},
		{name: "without SHA-256", line: strings.TrimSuffix(realBanner, ", SHA256 supported"), want: Banner{Version: "1.10", TLSRequired: true, NFCSSL: true}},
		{name: "without NFCSSL", line: "220 VMware Authentication Daemon Version 1.10: SSL Required, SHA256 supported", want: Banner{Version: "1.10", TLSRequired: true, SHA256: true}},
		{name: "without TLS", line: "220 VMware Authentication Daemon Version 1.0, NFCSSL supported", want: Banner{Version: "1.0", NFCSSL: true}},
		{name: "version at the end", line: "220 Version 2.", want: Banner{Version: "2"}},
		{name: "version without a number", line: "220 Version x", want: Banner{}},
		{name: "nothing known", line: "220 hello", want: Banner{}},
		{name: "tab", line: "220 a\tb", want: Banner{}},
		{name: "code alone", line: "220", want: Banner{}},
		{name: "empty", line: "", problem: `expected a line with a code of three digits and a text, found ""`},
		{name: "other code", line: "530 Please login", problem: `expected a line that begins with "220 ", found "530 Please login"`},
		{name: "more lines", line: "220-hello", problem: `found "220-hello"`},
		{name: "longer code", line: "2200 hello", problem: `found "2200 hello"`},
		{name: "TLS", line: "\x16\x03\x01", problem: `found "\x16\x03\x01"`},
		{name: "line end", line: "220 hello\r", problem: `found "220 hello\r"`},
		{name: "longest", line: "220 " + strings.Repeat("x", MaxLine-4), want: Banner{}},
		{name: "too long", line: "220 " + strings.Repeat("x", MaxLine-3), problem: "expected a line of at most 2048 bytes, found 2049 bytes that begin with"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := ParseBanner(test.line)
			checkError(t, err, test.problem)
			if test.problem == "" {
				test.want.Text = test.line
			}
			if got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestReply(t *testing.T) {
	tests := []struct {
		line    string
		want    Reply
		problem string
	}{
		{line: "200 Connect ha-nfcssl", want: Reply{200, "Connect ha-nfcssl"}},
		{line: "530 Please login with USER and PASS", want: Reply{530, "Please login with USER and PASS"}},
		{line: "501  Invalid arguments ", want: Reply{501, "Invalid arguments"}},
		{line: "100", want: Reply{100, ""}},
		{line: "999 ", want: Reply{999, ""}},
		{line: "099 x", problem: `found "099 x"`},
		{line: "20 x", problem: `found "20 x"`},
		{line: "+20 x", problem: `found "+20 x"`},
		{line: "200\tx", problem: `found "200\tx"`},
		{line: " 200 x", problem: `found " 200 x"`},
		{line: "200 a\n200 b", problem: `found "200 a\n200 b"`},
		{line: "hello", problem: `expected a line with a code of three digits and a text, found "hello"`},
	}
	for _, test := range tests {
		got, err := ParseReply(test.line)
		checkError(t, err, test.problem)
		if got != test.want {
			t.Errorf("%q: got %+v, want %+v", test.line, got, test.want)
		}
	}
}

const sampleSum = "00:01:02:03:04:05:06:07:08:09:0A:0B:0C:0D:0E:0F:F0:F1:F2:F3:F4:F5:F6:F7:F8:F9:FA:FB:FC:FD:FE:FF"

func TestSHA256(t *testing.T) {
	for _, text := range []string{sampleSum, strings.ToLower(sampleSum)} {
		sum, err := ParseSHA256(text)
		checkError(t, err, "")
		for i, got := range sum {
			want := byte(i)
			if i >= 16 {
				want += 0xf0 - 16
			}
			if got != want {
				t.Errorf("%s: byte %d: got %#x, want %#x", text, i, got, want)
			}
		}
	}
	for _, text := range []string{
		"", sampleSum[:94], sampleSum + ":", sampleSum + ":00", " " + sampleSum[1:],
		strings.ReplaceAll(sampleSum, ":", " "), strings.ReplaceAll(sampleSum, ":", ""),
		strings.Replace(sampleSum, "FF", "FG", 1), strings.Replace(sampleSum, "00:", "0:0", 1),
	} {
		sum, err := ParseSHA256(text)
		checkError(t, err, `expected a SHA-256 hash`)
		if sum != [32]byte{} {
			t.Errorf("%q: got %x, want zeros", text, sum)
		}
	}
}
