// Package vddk reads and writes VMware disks through VMware's VDDK library,
// which only worker processes load (see vddk/worker): on an ESXi host or
// vCenter, or local VMDK files as the library sees them.
package vddk

import (
	"log/slog"
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

// oddSecret says of the password or the cookie what a refused login may come from,
// or "". It does not show the secret.
func (p *Params) oddSecret() string {
	if odd := p.Cookie.Odd(); odd != "" {
		return "the cookie has " + odd
	}
	if odd := p.Password.Odd(); odd != "" {
		return "the password has " + odd
	}
	return ""
}

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
