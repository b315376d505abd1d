// Package vddk reads and writes VMware disks through VMware's VDDK library,
// which only worker processes load (see vddk/worker): on an ESXi host or
// vCenter, or local VMDK files as the library sees them.
package vddk

import (
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// Params name a disk and the way to it. They are those of nbdkit's vddk plugin
// and of docs/cli.md.
type Params struct {
	// File is "[DATASTORE] DIR/DISK.vmdk", or, of a local disk, a path.
	File string

	Server     string // host name or address; "": a local disk
	User       string
	Password   Secret
	Cookie     Secret // of a session, instead of a login
	VM         string // "moref=ID"
	Snapshot   string // its managed object reference; "": none
	Thumbprint string // as the user gave it: SHA-1 or SHA-256, with or without colons; "": the certificate must verify

	Port        uint32 // of the server; 0: the library's default, 443
	NFCHostPort uint32 // of the ESXi host; 0: the library's default, 902
	Transports  string // "file:nbdssl:nbd" and so on; "": the library chooses
	Compression string // of nbdssl: "", "none", "zlib", "fastlz" or "skipz"
	Config      string // the user's configuration file of the library; "": the places of Open
	LibDir      string // where the library is; "": the places of FindLibrary
	SingleLink  bool   // open this link of the chain alone: its holes are Inherited
	Unbuffered  bool

	NFCBuffers    NFCBuffers // the zero value: 1 MiB x 4
	PrepareAccess bool       // keep the VM from being migrated while it is open
}

// Remote says whether the disk lies on a server.
func (p *Params) Remote() bool { return p.Server != "" }

// NFCBuffers are what each connection of an NFC transport reserves on the host.
type NFCBuffers struct {
	Size  int64 // bytes, a multiple of 64 KiB
	Count int
}

// Bytes is what they take together.
func (b NFCBuffers) Bytes() int64 { return b.Size * int64(b.Count) }

// Secret is a password or a cookie. It prints as stars, however it is printed;
// Reveal is the only way to what it holds. The zero value is no secret at all,
// which differs from an empty one.
type Secret struct {
	text string
	set  bool
}

// NewSecret returns text as a secret.
func NewSecret(text string) Secret { return Secret{text, true} }

// IsSet says whether there is one, which may be empty.
func (s Secret) IsSet() bool { return s.set }

// Reveal returns what the secret holds.
func (s Secret) Reveal() string { return s.text }

// odd says what no password ends in on purpose, or "".
func (s Secret) odd() string {
	switch text := s.text; {
	case strings.HasPrefix(text, "\ufeff"), strings.HasSuffix(text, "\ufeff"), strings.HasPrefix(text, "\xff\xfe"), strings.HasPrefix(text, "\xfe\xff"):
		return "a byte order mark at one of its ends"
	case strings.HasSuffix(text, "\n"), strings.HasSuffix(text, "\r"):
		return "a newline at its end"
	case text != strings.TrimSpace(text):
		return "a blank at one of its ends"
	}
	return ""
}

// oddSecret says of the password or the cookie what a refused login may come from,
// or "". It does not show the secret.
func (p *Params) oddSecret() string {
	if odd := p.Cookie.odd(); odd != "" {
		return "the cookie has " + odd
	}
	if odd := p.Password.odd(); odd != "" {
		return "the password has " + odd
	}
	return ""
}

func (s Secret) String() string {
	if !s.set {
		return ""
	}
	return "***"
}

// GoString implements fmt.GoStringer.
func (s Secret) GoString() string { return s.String() }

// Format implements fmt.Formatter, for every verb.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Options tune how a disk is opened and read. The zero value is the default.
type Options struct {
	Connections int           // worker processes, each with a handle; 0: as many as measurably help, at most 4
	RequestSize int           // bytes of one call to the library; 0: 1 MiB, at most 2 MiB
	Depth       int           // calls in flight on each handle; 0: 4
	Timeout     time.Duration // of one read or write; opening has five times that. 0: 2 minutes
	Writable    bool          // open for writing: source.Writable
	// Retry says how often a failed read is repeated and a lost worker
	// replaced. Its zero value repeats nothing.
	Retry  source.RetryOptions
	Budget *Budget // of the host's NFC memory; nil: not counted
	// Registry is what the disks of one command share; nil: the disk has its own,
	// which allows one refused login.
	Registry *Registry
	Log      *slog.Logger      // nil: nothing is logged
	Warn     func(text string) // for the user and the report, called concurrently; nil: not
	Debug    map[string]bool   // of -D vddk.KEY: "diskinfo", "extents", "datapath", "stats"
}

// Library is a VDDK library that was found.
type Library struct {
	Path    string // of libvixDiskLib.so.N, symbolic links resolved
	Root    string // of the distribution: what InitEx wants as libDir
	Dir     string // the folder of Path, which the worker's LD_LIBRARY_PATH holds
	Version int    // N
}
