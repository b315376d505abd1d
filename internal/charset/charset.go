// Package charset finds the encodings of one byte per character that image
// descriptors and appliances name, such as ISO-8859-1 and windows-1252.
package charset

import (
	"fmt"
	"strings"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/charmap"
)

// aliases are names of encodings that package charmap does not have, in the form that
// normalize returns.
var aliases = map[string]string{
	"latin1": "iso88591", "l1": "iso88591", "latin2": "iso88592", "l2": "iso88592", "latin9": "iso885915",
	"cp1250": "windows1250", "cp1251": "windows1251", "cp1252": "windows1252",
	"ibm437": "ibmcodepage437", "cp437": "ibmcodepage437", "ibm850": "ibmcodepage850", "cp850": "ibmcodepage850",
}

// Get returns the encoding with the given name. Case and punctuation of the name do not
// matter.
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

// normalize returns the letters and digits of name in lower case.
func normalize(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, strings.ToLower(name))
}
