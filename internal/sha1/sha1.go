// Package sha1 wraps crypto/sha1. It returns an error where crypto/sha1 panics, which
// is in a program that runs with GODEBUG=fips140=only. vddkcp uses SHA-1 only where a
// foreign format or library demands it: in the manifests of appliances, and in the
// thumbprints of VDDK.
package sha1

import (
	"crypto/fips140"
	"crypto/sha1"
	"hash"
)

// Size is the size of a sum in bytes.
const Size = sha1.Size

// NotAllowedError says that SHA-1 is not allowed in this process.
type NotAllowedError struct{}

func (*NotAllowedError) Error() string { return "SHA-1 is not allowed with GODEBUG=fips140=only" }

// Hint returns what the user can do about the error.
func (*NotAllowedError) Hint() string {
	return "run vddkcp with GODEBUG=fips140=on, which uses validated cryptography and allows SHA-1, or without GODEBUG"
}

// Allowed returns a *NotAllowedError if SHA-1 is not allowed.
func Allowed() error {
	if fips140.Enforced() {
		return new(NotAllowedError)
	}
	return nil
}

// New returns a hash that computes SHA-1, or a *NotAllowedError.
func New() (hash.Hash, error) {
	if err := Allowed(); err != nil {
		return nil, err
	}
	return sha1.New(), nil
}

// Sum returns the SHA-1 of data, or a *NotAllowedError.
func Sum(data []byte) ([Size]byte, error) {
	if err := Allowed(); err != nil {
		return [Size]byte{}, err
	}
	return sha1.Sum(data), nil
}
