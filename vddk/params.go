// Package vddk reads and writes VMware disks through VMware's VDDK library: disks of VMs on an
// ESXi host or vCenter, and local VMDK files. [FindLibrary] finds the library, and [Open] opens
// a disk, which is a source.Disk:
//
//	library, err := vddk.FindLibrary("")
//	params := vddk.Params{
//		File: "[datastore1] vm/vm.vmdk", Server: "vcenter.example.com", VM: "moref=vm-16",
//		User: "backup", Password: vddk.NewSecret(password), Snapshot: "snapshot-17",
//	}
//	if err := params.Validate(); err != nil { ... }
//	disk, err := vddk.Open(ctx, params, library, vddk.Options{})
//	defer disk.Close()
//
// The library sometimes crashes or hangs. It is therefore never loaded into this process:
// package worker loads it in separate worker processes. A [Disk] has one worker for each of its
// connections to the host. All disks of one command share a [Registry], which knows the logins
// that were refused. All disks on one host share a [Budget], which limits the memory on the
// host.
//
// The code uses these terms:
//
//   - A handle is one connection of a Disk.
//   - A session is a worker process in which the disk is open. A handle has one session. If that
//     is lost, because its process crashed or was killed, the handle gets a new one.
//   - A slot is memory that a worker shares with this process, for the data of one request.
package vddk

import (
	"context"
	"log/slog"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// Params name a disk and say how to reach it. The fields have the same meaning as the parameters
// of nbdkit's vddk plugin; docs/cli.md describes them.
type Params struct {
	// File is "[DATASTORE] DIR/DISK.vmdk", or the absolute path of a local disk.
	File string

	Server     string // host name or address of vCenter or an ESXi host; "" for a local disk
	User       string
	Password   Secret
	Cookie     Secret // a session cookie, which is used instead of logging in
	VM         string // "moref=ID", with the managed object reference of the VM
	Snapshot   string // managed object reference of a snapshot; "" if none is meant
	Thumbprint string // SHA-1 or SHA-256 of the server's certificate, with or without colons; "" if it must verify

	Port        uint32 // port of the server; 0 means 443
	NFCHostPort uint32 // NFC port of the ESXi host; 0 means 902
	Transports  string // transport modes in order of preference, such as "file:nbdssl:nbd"; "" lets the library choose
	Compression string // compression of nbdssl: one of Compressions, or ""
	Config      string // the user's configuration file for the library; "" for the library's usual places
	LibDir      string // folder of the library, for FindLibrary
	SingleLink  bool   // open only this link of the chain: ranges that it does not have are source.Inherited
	Unbuffered  bool   // pass the flag UNBUFFERED to the library

	NFCBuffers    NFCBuffers // buffers on the host; the zero value means 4 of 1 MiB
	PrepareAccess bool       // keep the VM from being migrated while the disk is open

	Budget *Budget // NFC memory of the host on which the disk is; nil means Options.Budget
}

// Remote reports whether the disk is on a server.
func (p *Params) Remote() bool { return p.Server != "" }

// oddSecret describes a likely typing error in the password or the cookie, without showing
// either. The text becomes part of the hint of a refused login. It is "" if nothing looks wrong.
func (p *Params) oddSecret() string {
	if odd := p.Cookie.Odd(); odd != "" {
		return "the cookie has " + odd
	}
	if odd := p.Password.Odd(); odd != "" {
		return "the password has " + odd
	}
	return ""
}

// Options say how a disk is opened and read. The zero value has usable defaults.
type Options struct {
	Connections int           // connections, each with a worker process; 0 means as many as raise the rate, at most 4
	RequestSize int           // bytes of one request, at most 2 MiB; 0 means 1 MiB
	Depth       int           // requests in flight on each connection; 0 means 4
	Timeout     time.Duration // limit of one read or write; opening may take five times as long. 0 means 2 minutes
	Writable    bool          // open the disk for writing, over one connection
	// Retry says how often a failed request is repeated and how often a lost worker process is
	// replaced. With its zero value, neither is done.
	Retry  source.RetryOptions
	Budget *Budget // NFC memory of the host, shared with other disks, unless Params.Budget is set; nil means no limit
	// Refresh returns the present parameters of a disk on a server. It is called before a lost
	// connection is opened again, and before every further connection is opened: in the meantime the
	// files of the disk may have new names, and the session may have a new cookie. If Refresh is nil,
	// the parameters of the first opening are used for all connections.
	//
	// If the server refuses the session cookie of the parameters, even at the first opening, Refresh
	// is called with the error of that login as the argument refused. In all other calls refused is
	// nil. Refresh may then return another cookie, or user and password, and must return these in
	// later calls, too. If it returns the same login, that login counts as refused for good. If the
	// server refuses a password, Refresh is not called, and the password is not tried again.
	//
	// Only these fields of the result are used: File, VM, Thumbprint, Budget, and those of the server
	// and of the login. If the Snapshot of the result is not that of the first opening, the disk ends
	// with an error that wraps source.ErrChanged. A disk of another size or UUID ends in the same
	// way.
	//
	// Refresh must return when ctx ends. It is not called concurrently for one disk. If its error is
	// permanent (source.IsPermanent), the disk ends with that error. After any other error the
	// connection is tried again, as after a failed opening.
	Refresh func(ctx context.Context, refused error) (Params, error)
	// Registry is shared by all disks of one command. If it is nil, the disk uses a new
	// Registry, which allows only one refused login.
	Registry *Registry
	Log      *slog.Logger      // nil if nothing is logged
	Warn     func(text string) // shows a warning to the user, and is called concurrently; may be nil
	Debug    map[string]bool   // topics to log at the debug level: those DebugKeys that are true
}

// Library is a VDDK library that FindLibrary found.
type Library struct {
	Path    string // path of libvixDiskLib.so.N, without symbolic links
	Root    string // root folder of the distribution, which the library wants to know
	Dir     string // folder of Path, which is added to the LD_LIBRARY_PATH of workers
	Version int    // N in the name libvixDiskLib.so.N
}
