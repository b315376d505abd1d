package nfc

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/nfc/wire"
)

// Quirks change details of the protocol that are uncertain. They are for people who find out why a
// host refuses a connection, and are no settings for daily use. The zero value changes nothing.
//
// Quirks can make a connection fail, but never change the meaning of what a host has sent.
type Quirks struct {
	list []string // the given elements, such as "ack=wait"

	token        string // "", "random", "plaintext" or "none"
	waitForHello bool   // send message 51 only after the answer to message 33
	major, minor uint32 // version of the client; 0: the default
	splitNames   bool   // send the names that belong to message 54 in a write of their own
	zeroSession  bool   // leave the choice of the buffers to the host
	longClose    bool   // send the longer forms of CLOSE_FILE and CLOSE_SESSION
	noSHA2       bool   // do not ask for the SHA-256 thumbprint
	maxRead      int    // bytes; 0: no limit
	maxDepth     int    // requests; 0: no limit
}

// A quirkKey is a key that ParseQuirks accepts, with the values that it may have. A key without values
// has a number.
type quirkKey struct {
	key    string
	values []string
}

var quirkKeys = []quirkKey{
	{"token", []string{"random", "plaintext", "none"}},
	{"ack", []string{"early", "wait"}},
	{"version", nil},
	{"names", []string{"1", "2"}},
	{"session", []string{"sizes", "zeros"}},
	{"close", []string{"short", "long"}},
	{"sha2", []string{"on", "off"}},
	{"maxread", nil},
	{"maxdepth", nil},
}

// ParseQuirks parses a list such as "token=plaintext,ack=wait". docs/guide/nfc.md lists the keys.
func ParseQuirks(text string) (Quirks, error) {
	var q Quirks
	if text == "" {
		return q, nil
	}
	seen := map[string]bool{}
	for element := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(element, "=")
		i := slices.IndexFunc(quirkKeys, func(k quirkKey) bool { return k.key == key })
		switch {
		case !ok || i < 0:
			return Quirks{}, fmt.Errorf("%q: want KEY=VALUE, where KEY is one of %s", element, strings.Join(keyNames(), ", "))
		case seen[key]:
			return Quirks{}, fmt.Errorf("%q: the key %s is given twice", text, key)
		case quirkKeys[i].values != nil && !slices.Contains(quirkKeys[i].values, value):
			return Quirks{}, fmt.Errorf("%q: want one of %s", element, strings.Join(quirkKeys[i].values, ", "))
		}
		if err := q.set(key, value); err != nil {
			return Quirks{}, err
		}
		seen[key] = true
		q.list = append(q.list, element)
	}
	return q, nil
}

func keyNames() (names []string) {
	for _, k := range quirkKeys {
		names = append(names, k.key)
	}
	return names
}

// The method set sets one key. The values of keys that are no numbers have been checked.
func (q *Quirks) set(key, value string) error {
	switch key {
	case "token":
		q.token = value
	case "ack":
		q.waitForHello = value == "wait"
	case "version":
		major, minor, ok := strings.Cut(value, ".")
		a, err1 := strconv.ParseUint(major, 10, 31)
		b, err2 := strconv.ParseUint(minor, 10, 31)
		if !ok || err1 != nil || err2 != nil || a == 0 {
			return fmt.Errorf("%q: want a version such as 11.0", "version="+value)
		}
		q.major, q.minor = uint32(a), uint32(b)
	case "names":
		q.splitNames = value == "2"
	case "session":
		q.zeroSession = value == "zeros"
	case "close":
		q.longClose = value == "long"
	case "sha2":
		q.noSHA2 = value == "off"
	case "maxread":
		n, err := bytesize.Parse(value)
		if err != nil || n < sectorSize || n > wire.MaxRead || n%sectorSize != 0 {
			return fmt.Errorf("%q: want a multiple of 512 bytes, at most 1MiB", "maxread="+value)
		}
		q.maxRead = int(n)
	case "maxdepth":
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil || n < 1 || n > MaxDepth {
			return fmt.Errorf("%q: want a number from 1 to %d", "maxdepth="+value, MaxDepth)
		}
		q.maxDepth = int(n)
	}
	return nil
}

// String returns the list in the form that ParseQuirks accepts. It is "" for the zero value.
func (q Quirks) String() string { return strings.Join(q.list, ",") }

// The method with returns q with those elements of a variant added whose keys q does not have.
func (q Quirks) with(variant string) Quirks {
	var elements []string
	for element := range strings.SplitSeq(variant, ",") {
		key, _, _ := strings.Cut(element, "=")
		if key != "" && !slices.ContainsFunc(q.list, func(s string) bool { return strings.HasPrefix(s, key+"=") }) {
			elements = append(elements, element)
		}
	}
	merged, err := ParseQuirks(strings.Join(append(elements, q.list...), ","))
	if err != nil {
		panic(err) // both lists have been parsed before
	}
	return merged
}

// variants are the forms of the handshake that are tried one after the other on a host of which
// nothing is known. Each is for a difference between what two clients were seen to send.
var variants = []string{
	"",
	"token=plaintext,names=2,ack=wait",
	"sha2=off",
}
