package nfctest

import (
	"io"
	"time"
)

// Options say how a host behaves. The zero value is a host of ESXi 8 that holds no disk.
type Options struct {
	Profile Profile
	// Open opens the disk in a file such as "[ds1] web01/web01.vmdk", unless AddDisk has added
	// the file. If the error wraps fs.ErrNotExist, the client gets the ERROR of a missing file,
	// and for other errors it gets ERROR 11. If Open is nil, the host only has the disks of AddDisk.
	Open func(file string) (*Disk, error)

	Service string // of the tickets: "nfc" ("" too), or "vpxa-nfc" as through vCenter
	PEM     bool   // tickets have the certificate in place of its SHA-1, as in vSphere 9
	MaxTLS  uint16 // the highest version of TLS, such as tls.VersionTLS12; 0: TLS 1.3
	NoSSL   bool   // the host only talks NFC in clear, and its greeting says so
	Needs   Needs  // forms of the handshake without which the host refuses a client

	// Memory limits the bytes of the NFC buffers of all sessions; 0: no limit. If no memory is
	// left, OPEN_SESSION is refused with ERROR 5, "Failed to allocate the requested N bytes".
	Memory int64
	// Connections limits the number of open connections; 0: no limit. Another connection is
	// closed at once. A connection whose session has been closed does not count.
	Connections int

	// Latency delays each answer: it is sent this long after the request came, and does not
	// delay other answers.
	Latency  time.Duration
	Fragment int   // the longest data of a fragment in bytes; 0: the buffer of the session
	Piece    int   // the most bytes of a write of NFC, and of a TLS record therefore; 0: no limit
	Shuffle  bool  // fragments and answers are sent in random order
	Seed     int64 // of the random order

	RecordReads     bool      // Stats has all reads
	AllowViolations bool      // New does not fail the test because of violations
	Log             io.Writer // gets a line for each event; may be nil
}

// Needs are forms of the handshake that a host insists on. A client in another form is no violation:
// the host refuses it with message 4, or does not answer it.
type Needs struct {
	PlainToken bool // the token is PlainText
	SplitNames bool // the names after message 54 come in another TLS record than the message
	WaitForAck bool // message 51 comes after message 36 was sent
	NoSHA2     bool // THUMBPRINT_SHA2 is refused although the greeting announces it
	Silent     bool // the host does not answer in place of refusing
}

// Profile is a version of ESXi.
type Profile int

// The profiles.
const (
	ESXi8          Profile = iota // sends message 36 at once; version 11
	ESXi703                       // sends message 36 after message 51 has come; answers 1 MiB of a read at most; version 9
	ESXi70NoSHA256                // has neither THUMBPRINT_SHA2 nor message 43; version 7
	ESXi67                        // has neither of them, and no message 54; version 2
	ESXi60                        // is too old for message 51 and frames
)

// traits are the differences between profiles.
type traits struct {
	name    string
	sha256  bool   // knows THUMBPRINT_SHA2 and message 43
	holds36 bool   // sends 36 after 51 has come
	frames  bool   // knows 51 and frames
	version uint32 // in message 51
	maxRead int64  // longest part of a read that is answered; 0: no limit
}

var profiles = map[Profile]traits{
	ESXi8:          {name: "ESXi 8", sha256: true, frames: true, version: 11},
	ESXi703:        {name: "ESXi 7.0.3", sha256: true, holds36: true, frames: true, version: 9, maxRead: maxRead},
	ESXi70NoSHA256: {name: "ESXi 7.0", frames: true, version: 7, maxRead: maxRead},
	ESXi67:         {name: "ESXi 6.7", frames: true, version: 2, maxRead: maxRead},
	ESXi60:         {name: "ESXi 6.0"},
}

func (p Profile) String() string { return profiles[p].name }

// Disk is a disk that clients can open.
type Disk struct {
	Content io.ReaderAt
	Size    int64             // in bytes; the capacity is the next multiple of 512
	DDB     map[string]string // keys without "ddb.", such as "uuid" and "adapterType"
	InUse   bool              // the file belongs to a running VM: opening it is refused with ERROR 11
	Close   func() error      // is called when a client has closed the disk or its connection ended; may be nil
}

// Ticket is a ticket for one connection.
type Ticket struct {
	Host        string
	Port        int
	Service     string
	Session     string // the secret
	SHA1        string // of the certificate, as "AA:BB:..."; "" with Options.PEM
	Certificate []byte // PEM; nil without Options.PEM
}

// Stats are numbers about a host.
type Stats struct {
	Connections     int   // connections that were accepted
	Open            int   // connections that are open now
	MostOpen        int   // most connections that were open at the same time
	Tickets         int   // tickets given
	UnusedTickets   int   // tickets that no connection has used
	Memory          int64 // bytes of the buffers of all sessions now
	MostMemory      int64
	Sent            int64 // bytes written to sockets, TLS included
	Requests        int64 // frames that came
	InFlight        int   // most requests of one connection without a complete answer
	CloseHandshakes int   // connections whose client sent CLOSE_SESSION
	Ends            int   // connections whose client sent message 4 after that
	Reads           []Read
}

// Read is a read request.
type Read struct {
	Connection     int // 1: the first one of the host
	Offset, Length int64
	Compression    uint32 // that was asked for
}
