package vddk

import (
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/secret"
)

// Secret is a password or a cookie. If it is printed, only stars appear; see [secret.Secret].
type Secret = secret.Secret

// NewSecret returns text as a Secret.
func NewSecret(text string) Secret { return secret.New(text) }

// NFCBuffers are the size and the number of the buffers that an ESXi host reserves for each
// connection of an NFC transport mode; see [nfcbudget.Buffers].
type NFCBuffers = nfcbudget.Buffers

// Budget limits the memory that all connections to one ESXi host together use for NFC on that host;
// see [nfcbudget.Budget].
type Budget = nfcbudget.Budget

// NewHostBudget returns the Budget of a host. bytes is the NFC memory of the host, and
// connections the number of connections that it allows, at least 1.
func NewHostBudget(bytes int64, connections int) *Budget {
	return nfcbudget.NewHost(bytes, connections)
}
