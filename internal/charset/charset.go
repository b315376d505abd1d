// Package charset finds encodings that use one byte for each character, such as ISO-8859-1 and
// windows-1252. VMDK descriptors and the OVF files of appliances name such encodings.
package charset

import (
	"fmt"
	"strings"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/charmap"
)

// The keys of the map aliases are names of encodings that package charmap does not know. The values
// are the names under which it knows them. All names have the form that the function normalize
// returns.
var aliases = map[string]string{
	"latin1": "iso88591", "l1": "iso88591", "latin2": "iso88592", "l2": "iso88592", "latin9": "iso885915",
	"cp1250": "windows1250", "cp1251": "windows1251", "cp1252": "windows1252",
	"ibm437": "ibmcodepage437", "cp437": "ibmcodepage437", "ibm850": "ibmcodepage850", "cp850": "ibmcodepage850",
}

// Get returns the encoding with the given name. Upper case, lower case and punctuation in the
// name do not matter. ok is false if the name is unknown.
func Get(name string) (e encoding.Encoding, ok bool) {
	name = normalize(name)
	if full, ok := aliases[name]; ok {
		name = full
	}
	for _, e := range charmap.All {
		if s, ok := e.(fmt.Stringer); ok && normalize(s.String()) == name {
			return e, true
		}
	}
	return nil, false
}

// The function normalize returns the given name in lower case and without all characters except
// ASCII letters and digits.
func normalize(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(name))
}
