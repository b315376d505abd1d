package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vddk"
)

// vddkFlags are the VDDK flags of every command that opens a source. They have the
// names of the parameters of nbdkit-vddk-plugin, see docs/cli.md.
type vddkFlags struct {
	serverFlags
	viaFlags
	VM            string     `name:"vm" help:"Managed object ID of the VM that has SRC, as moref=ID." placeholder:"moref=ID" group:"VDDK:"`
	Snapshot      string     `help:"Managed object ID of the snapshot to read." placeholder:"ID" group:"VDDK:"`
	NFCHostPort   portFlag   `name:"nfchostport" help:"Port of the ESXi host for the disk data (default 902)." env:"VDDKCP_NFCHOSTPORT" placeholder:"PORT" group:"VDDK:"`
	Transports    string     `help:"Transport modes to try, in order, separated by colons: file, san, hotadd, nbdssl, nbd." placeholder:"LIST" group:"VDDK:"`
	Compression   string     `help:"Compression of the data on the network, for the transport mode nbdssl: none, zlib, fastlz or skipz." enum:",none,zlib,fastlz,skipz" default:"" placeholder:"NAME" group:"VDDK:"`
	Config        string     `help:"Configuration file for the VDDK library." placeholder:"FILE" type:"path" group:"VDDK:"`
	LibDir        string     `name:"libdir" help:"The VDDK library: the folder of the distribution, its folder lib64, or the file of the library itself." env:"VDDKCP_LIBDIR" placeholder:"DIR" type:"path" group:"VDDK:"`
	Unbuffered    bool       `help:"Open the disk with the library's flag for unbuffered access." group:"VDDK:"`
	NFCBuffers    nfcBuffers `name:"nfc-buffers" help:"Size and number of the buffers that each connection reserves on the host (default 1MiBx4)." placeholder:"SIZExCOUNT" group:"VDDK:"`
	PrepareAccess bool       `help:"Prevent vCenter from migrating the VM during the copy." group:"VDDK:"`
	Debug         vddkDebug  `short:"D" help:"Turn a kind of debug messages on (=1) or off (=0): vddk.diskinfo, vddk.extents, vddk.datapath or vddk.stats (repeatable). The debug flags of nbdkit-vddk-plugin have the same names." placeholder:"vddk.KEY=0|1" group:"VDDK:"`
}

// retryFlags say how long failed reads over a network are repeated.
type retryFlags struct {
	Retries      retries  `help:"Maximum number of times that a failed read is repeated: a number, which may be 0, or unlimited (the default)." default:"unlimited" placeholder:"N" group:"Source:"`
	RetryTimeout patience `help:"Stop retrying after this time without any progress (default 15m)." default:"15m" placeholder:"TIME" group:"Source:"`
	Timeout      patience `help:"Time limit for a single read or write over a network (default 2m). Opening a disk may take five times as long." default:"2m" placeholder:"TIME" group:"Source:"`
}

// The type patience is a positive duration.
type patience time.Duration

func (p *patience) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil || d <= 0 {
		return fmt.Errorf("%q: want a duration such as 90s or 15m", text)
	}
	*p = patience(d)
	return nil
}

// The type retries is a number of retries; a negative number means no limit.
type retries int

func (r *retries) UnmarshalText(text []byte) error {
	if string(text) == "unlimited" {
		*r = -1
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 31)
	if err != nil {
		return fmt.Errorf("%q: want a number of retries, or unlimited", text)
	}
	*r = retries(n)
	return nil
}

// portFlag is a TCP port; 0 means the default port.
type portFlag uint32

func (p *portFlag) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("%q: want a port number from 1 to 65535", text)
	}
	*p = portFlag(n)
	return nil
}

// nfcBuffers is the value SIZExCOUNT of --nfc-buffers: the size and the number of the
// buffers that a connection reserves on the ESXi host.
type nfcBuffers vddk.NFCBuffers

func (b *nfcBuffers) UnmarshalText(text []byte) error {
	size, count, ok := strings.Cut(string(text), "x")
	if !ok {
		return fmt.Errorf("%q: want SIZExCOUNT, for example 1MiBx4", text)
	}
	n, err := bytesize.Parse(size)
	if err != nil {
		return err
	}
	c, err := strconv.ParseUint(count, 10, 16)
	if err != nil {
		return fmt.Errorf("%q: want SIZExCOUNT, for example 1MiBx4, but %q is not a number", text, count)
	}
	*b = nfcBuffers{Size: int64(n), Count: int(c)}
	return nil
}

// vddkDebug holds the debug flags of nbdkit-vddk-plugin.
type vddkDebug map[string]bool

// Decode implements kong.MapperValue. kong calls it for each --debug.
func (d *vddkDebug) Decode(ctx *kong.DecodeContext) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("the value is missing: want vddk.KEY=0|1")
	}
	name, value, _ := strings.Cut(fmt.Sprint(token.Value), "=")
	key, ok := strings.CutPrefix(name, "vddk.")
	if !ok || !slices.Contains(vddk.DebugKeys, key) {
		return fmt.Errorf("%q: want vddk.KEY=0|1, where KEY is one of %s", name, strings.Join(vddk.DebugKeys, ", "))
	}
	if value != "0" && value != "1" {
		return fmt.Errorf("%s=%s: want 0 or 1", name, value)
	}
	if *d == nil {
		*d = vddkDebug{}
	}
	(*d)[key] = value == "1"
	return nil
}

// The method tuning returns parameters for a disk without those that name the server and the VM.
// They include the library and the NFC port of r, as the method library does.
func (f *vddkFlags) tuning(file string, singleLink bool, r *settled) vddk.Params {
	libDir, nfcHostPort := f.connects(r)
	return vddk.Params{
		File: file, NFCHostPort: nfcHostPort, Transports: f.Transports, Compression: f.Compression,
		Config: f.Config, LibDir: libDir, SingleLink: singleLink, Unbuffered: f.Unbuffered,
		NFCBuffers: vddk.NFCBuffers(f.NFCBuffers), PrepareAccess: f.PrepareAccess,
	}
}

// The method connects returns the library and the NFC port of r, as the method library does. No
// library is used if the disk is read over NFC.
func (f *vddkFlags) connects(r *settled) (libDir string, nfcHostPort uint32) {
	if f.chosen.nfc && r != nil {
		return "", f.nfcPort(r, f.NFCHostPort)
	}
	return f.library(r, f.LibDir, f.NFCHostPort)
}

// The method remote reports whether VDDK reads the disk with the given name from a server. The name
// says so, or one of the flags on the command line. Environment variables do not.
func (f *vddkFlags) remote(file string) bool {
	given := f.login.given
	return strings.HasPrefix(file, "[") || f.namesServer() ||
		given["vm"] && f.VM != "" || given["snapshot"] && f.Snapshot != "" || given["nfchostport"]
}

// The method remoteAddress reports whether the disk at the given address is on a server.
func (f *vddkFlags) remoteAddress(a address.Address) bool {
	if _, ok := a.(address.VM); ok {
		return true
	}
	file, ok := address.VDDKFile(a)
	return ok && f.remote(file)
}

// The method params returns the parameters with which VDDK opens a disk. The parameter file
// is the name of the disk for VDDK. All other parameters are checked before this method
// asks for secrets and reads them.
func (f *vddkFlags) params(ctx context.Context, file string, singleLink bool, warn func(string)) (vddk.Params, error) {
	var r *settled
	if f.remote(file) {
		var err error
		if r, err = f.resolve(); err != nil {
			return vddk.Params{}, err
		}
	}
	p := f.tuning(file, singleLink, r)
	p.VM, p.Snapshot = f.VM, f.Snapshot
	if r != nil {
		p.Server, p.Port, p.User, p.Thumbprint = r.server, r.port, r.user, r.thumbprint
		p.Password, p.Cookie = f.login.expected()
	}
	// The first call of Validate only needs to know which secrets will be given.
	err := p.Validate()
	if err == nil && p.Remote() {
		if p.Password, p.Cookie, err = f.login.readSecrets(ctx, warn); err != nil {
			return vddk.Params{}, err
		}
		err = p.Validate()
	}
	if err != nil && r != nil {
		err = r.explain(err)
	}
	if err != nil {
		return vddk.Params{}, err
	}
	f.login.warned.Do(func() {
		for _, name := range vddk.UnknownTransports(p.Transports) {
			warn(fmt.Sprintf("--transports: unknown transport mode %s", printable.Name(name)))
		}
	})
	return p, nil
}
