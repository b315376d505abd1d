// Package sha1 wraps crypto/sha1. If a program runs with GODEBUG=fips140=only, crypto/sha1
// panics; this package returns an error instead. vddkcp uses SHA-1 only if a foreign format or
// library demands it: in the manifests of appliances, and for the certificate thumbprints that
// VDDK needs.
package sha1

import (
	"crypto/fips140"
	"crypto/sha1"
	"hash"
)

// Size is the number of bytes of a SHA-1 sum.
const Size = sha1.Size

// NotAllowedError says that SHA-1 is not allowed in this process, because of
// GODEBUG=fips140=only.
type NotAllowedError struct{}

func (*NotAllowedError) Error() string { return "SHA-1 is not allowed with GODEBUG=fips140=only" }

// Hint tells the user what to do about the error.
func (*NotAllowedError) Hint() string {
	return "run vddkcp with GODEBUG=fips140=on, which uses validated cryptography and allows SHA-1, or without GODEBUG"
}

// Allowed returns nil if SHA-1 is allowed in this process. Otherwise it returns a
// *NotAllowedError.
func Allowed() error {
	if fips140.Enforced() {
		return new(NotAllowedError)
	}
	return nil
}

// New returns a hash that computes SHA-1. If SHA-1 is not allowed, it returns a
// *NotAllowedError.
func New() (hash.Hash, error) {
	if err := Allowed(); err != nil {
		return nil, err
	}
	return sha1.New(), nil
}

// Sum returns the SHA-1 sum of data. If SHA-1 is not allowed, it returns a *NotAllowedError.
func Sum(data []byte) ([Size]byte, error) {
	if err := Allowed(); err != nil {
		return [Size]byte{}, err
	}
	return sha1.Sum(data), nil
}
