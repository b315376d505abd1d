package vddk

import (
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/secret"
)

// Secret is a password or a cookie. It prints as stars; see [secret.Secret].
type Secret = secret.Secret

// NewSecret returns text as a secret.
func NewSecret(text string) Secret { return secret.New(text) }

// NFCBuffers are the buffers that an ESXi host reserves for each connection of an
// NFC transport; see [nfcbudget.Buffers].
type NFCBuffers = nfcbudget.Buffers

// Budget limits the NFC memory that all connections to one ESXi host use together;
// see [nfcbudget.Budget].
type Budget = nfcbudget.Budget

// NewHostBudget returns the budget of a host that has the given number of bytes of NFC memory
// and allows the given number of connections, which must be at least 1.
func NewHostBudget(bytes int64, connections int) *Budget {
	return nfcbudget.NewHost(bytes, connections)
}
