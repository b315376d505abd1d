package wire

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// MaxLine is the maximum length of a line that a host may send, in bytes, without the CR LF at its
// end.
const MaxLine = 2048

// A Banner is the first line that a host sends.
type Banner struct {
	Text        string // the whole line
	Version     string // the version of the daemon, such as "1.10", or "" if the line has none
	TLSRequired bool   // the client must start TLS next
	NFCSSL      bool   // the host can encrypt NFC with TLS
	SHA256      bool   // the host understands THUMBPRINT_SHA2
}

// ParseBanner decodes the first line of a host. The line has no CR LF at its end.
func ParseBanner(line string) (Banner, error) {
	r, err := ParseReply(line)
	if err != nil {
		return Banner{}, err
	}
	if r.Code != 220 {
		return Banner{}, violation(nil, `a line that begins with "220 "`, quote(line))
	}
	b := Banner{
		Text:        line,
		TLSRequired: strings.Contains(line, "SSL Required"),
		NFCSSL:      strings.Contains(line, "NFCSSL supported"),
		SHA256:      strings.Contains(line, "SHA256 supported"),
	}
	if _, after, ok := strings.Cut(line, "Version "); ok {
		end := strings.IndexFunc(after, func(c rune) bool { return c != '.' && (c < '0' || c > '9') })
		if end >= 0 {
			after = after[:end]
		}
		b.Version = strings.Trim(after, ".")
	}
	return b, nil
}

// A Reply is the answer of a host to a line of the client.
type Reply struct {
	Code int    // such as 200, which stands for success
	Text string // without spaces at its ends
}

// ParseReply decodes a line such as "200 Connect ha-nfcssl": three digits, a space, and a text. The
// space and the text may be missing. The line has no CR LF at its end.
func ParseReply(line string) (Reply, error) {
	if len(line) > MaxLine {
		return Reply{}, violation(nil, fmt.Sprintf("a line of at most %d bytes", MaxLine), fmt.Sprintf("%d bytes that begin with %s", len(line), quote(line)))
	}
	code, text, _ := strings.Cut(line, " ")
	n, err := strconv.ParseUint(code, 10, 16)
	if err != nil || len(code) != 3 || n < 100 || strings.ContainsAny(line, "\r\n") {
		return Reply{}, violation(nil, "a line with a code of three digits and a text", quote(line))
	}
	return Reply{Code: int(n), Text: strings.TrimSpace(text)}, nil
}

// ParseSHA256 decodes the text of the answer to THUMBPRINT_SHA2: 32 bytes in hexadecimal, separated
// by colons.
func ParseSHA256(text string) (sum [32]byte, err error) {
	wrong := violation(nil, `a SHA-256 hash, 32 bytes such as "AA:BB:CC"`, quote(text))
	if len(text) != 3*len(sum)-1 {
		return sum, wrong
	}
	for i := range sum {
		if i > 0 && text[3*i-1] != ':' {
			return [32]byte{}, wrong
		}
		if _, err := hex.Decode(sum[i:i+1], []byte(text[3*i:3*i+2])); err != nil {
			return [32]byte{}, wrong
		}
	}
	return sum, nil
}

// The function quote returns the first bytes of a line in quotes.
func quote(line string) string {
	const most = 120
	if len(line) > most {
		return strconv.Quote(line[:most]) + "..."
	}
	return strconv.Quote(line)
}
