// Package nfc reads the disks of ESXi hosts over NFC, the protocol that VMware's VDDK speaks to
// port 902 of a host. It needs no library of VMware. [Open] returns a source.Disk:
//
//	disk, err := nfc.Open(ctx, nfc.Params{Name: "web01 disk 1"}, tickets, nfc.Options{})
//	defer disk.Close()
//
// Every connection to a host needs a ticket of the server. The caller's [Tickets] asks for one;
// type vsphere.VM has a method for that. A disk has one connection. If it is lost, the disk is
// opened again with a new ticket, as Options.Retry says.
//
// VMware has not published the protocol. docs/formats.md describes what this package relies on, and
// docs/guide/nfc.md the versions of hosts that are known to work. The protocol's messages are in
// package nfc/wire. The code uses these terms:
//
//   - The authentication daemon, authd, listens on port 902. Its dialogue consists of lines of text.
//   - The handshake is the exchange of messages of 264 bytes that follows.
//   - A fragment is a part of the answer to a read. Fragments arrive in any order.
package nfc

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// DefaultPort is the port of a host's NFC service.
	DefaultPort = 902
	// DefaultDepth is the number of requests in flight if Options.Depth is 0.
	DefaultDepth = 16
	// MaxDepth is the largest Options.Depth. Nobody has seen a client with more requests in flight.
	MaxDepth = 32

	sectorSize = 512 // bytes
	// defaultBuffer is the size of the buffers of a session that the host chooses, in bytes.
	defaultBuffer = 64 << 10

	defaultTimeout = 2 * time.Minute
	// openTimeouts is the time limit for opening a connection, as a multiple of Options.Timeout.
	openTimeouts = 5
)

// Tickets asks a server for tickets.
type Tickets interface {
	// Ticket asks for a new ticket for reading the disk. It is called before each connection,
	// because a ticket is valid for one connection only. It also finds out the present name of the
	// disk's file, and whether the snapshot that the disk belongs to still exists: after a
	// migration the file has another name, and after the removal of a snapshot another file can
	// have the old name.
	//
	// If the error is permanent (source.IsPermanent), the disk is not opened again.
	Ticket(ctx context.Context) (Ticket, error)
}

// TicketsFunc is a function that implements Tickets.
type TicketsFunc func(ctx context.Context) (Ticket, error)

// Ticket implements Tickets.
func (f TicketsFunc) Ticket(ctx context.Context) (Ticket, error) { return f(ctx) }

// Secret is the text that proves a ticket. If it is printed, only stars appear; see
// [secret.Secret].
type Secret = secret.Secret

// NewSecret returns text as a Secret.
func NewSecret(text string) Secret { return secret.New(text) }

// Ticket permits one connection to the NFC service of a host. It is what the vSphere API calls a
// HostServiceTicket, together with the name of the file to open.
type Ticket struct {
	File        string // the disk's file as it is called now, such as "[datastore1] web01/web01.vmdk"
	Host        string // name or address of the host, as the giver knows it
	Port        int    // 0 means DefaultPort
	Service     string // "nfc" for a ticket from a host, "vpxa-nfc" for one from vCenter
	Session     Secret // proves to the host that the ticket is genuine
	SHA1        string // SHA-1 thumbprint of the host's certificate; "" if Certificate is set
	Certificate []byte // the host's certificate in PEM; nil if SHA1 is set
	Giver       string // the server that gave the ticket, for messages
}

// Params name a disk.
type Params struct {
	Name     string // for messages, such as "[datastore1] web01/web01.vmdk"
	Identity string // of the disk and its state, for source.Identified
	Frozen   bool   // the disk belongs to a snapshot, and therefore its content never changes
	Capacity int64  // size of the disk in the inventory of the server, in bytes; 0 if it is unknown
	UUID     string // of the disk in the inventory of the server; "" if it is unknown. A host that has another one causes a warning
}

// Options say how a disk is opened and read. The zero value has usable defaults.
type Options struct {
	Depth       int               // requests in flight, at most MaxDepth; 0 means DefaultDepth
	RequestSize int               // bytes of one request, at most 1 MiB; 0 means 1 MiB
	Timeout     time.Duration     // limit of one read; opening may take five times as long. 0 means 2 minutes
	Compression string            // one of Compressions; "" means "skipz"
	Buffers     nfcbudget.Buffers // memory on the host; the zero value means 4 of 1 MiB
	HostPort    int               // port to use instead of the ticket's; 0 means the ticket's port
	// Clear says that data is sent without encryption. The host's certificate is checked before
	// that, but nothing protects the data against changes on the way.
	Clear bool
	// Retry says how often a failed call is repeated, and a lost connection opened again.
	Retry source.RetryOptions
	// Budget returns the memory for connections of the host on which the disk is. It is called
	// before each connection. If Budget or its result is nil, there is no limit.
	Budget func(ctx context.Context) (*nfcbudget.Budget, error)
	// Hosts is shared by all disks of one command. If it is nil, the disk has a Hosts of its own.
	Hosts  *Hosts
	Quirks Quirks
	Trace  *Trace // records all messages; nil if none are recorded
	// Step is called when a step of opening a connection begins. It may be nil.
	Step func(s Step)
	Log  *slog.Logger      // nil if nothing is logged
	Warn func(text string) // shows a warning to the user, and is called concurrently; may be nil
}

// Compressions are the possible values of Options.Compression. With "skipz", the host leaves out
// zeros. With "zlib", it compresses the data, which helps on slow networks only.
var Compressions = []string{"skipz", "zlib", "none"}

// compressions has the number in the protocol for each value of Options.Compression.
var compressions = map[string]wire.Compression{"": wire.SkipZ, "skipz": wire.SkipZ, "zlib": wire.Zlib, "none": wire.Plain}

// normalised returns the options with defaults in place of fields that are not set.
func (o Options) normalised() (Options, error) {
	if _, ok := compressions[o.Compression]; !ok {
		return o, source.Permanent(fmt.Errorf("compression %q: want one of %q", o.Compression, Compressions))
	}
	if o.Depth <= 0 {
		o.Depth = DefaultDepth
	}
	o.Depth = min(o.Depth, MaxDepth)
	if o.Quirks.maxDepth > 0 {
		o.Depth = min(o.Depth, o.Quirks.maxDepth)
	}
	if o.RequestSize <= 0 {
		o.RequestSize = wire.MaxRead
	}
	o.RequestSize = max(min(o.RequestSize, wire.MaxRead)&^(sectorSize-1), sectorSize)
	if o.Quirks.maxRead > 0 {
		o.RequestSize = min(o.RequestSize, o.Quirks.maxRead)
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Buffers == (nfcbudget.Buffers{}) {
		o.Buffers = nfcbudget.Buffers{Size: 1 << 20, Count: 4}
	}
	if o.Hosts == nil {
		o.Hosts = NewHosts()
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	return o, nil
}
