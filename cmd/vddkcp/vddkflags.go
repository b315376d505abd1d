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

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk"
)

// vddkFlags are the flags of every command that opens a source about VDDK, with
// the names of nbdkit's plugin, by docs/cli.md.
type vddkFlags struct {
	Server        string      `help:"The ESXi host or vCenter that has SRC: its name or address." placeholder:"HOST" group:"VDDK:"`
	User          string      `help:"Who logs in there." placeholder:"NAME" group:"VDDK:"`
	Password      secretFlag  `help:"The password: - to be asked for it, +FILE for the first line of a file, -FD for that of a file descriptor, or, for others to see, the password itself. Default: VDDKCP_PASSWORD." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	Cookie        secretFlag  `help:"The cookie of a session, instead of a login, in the forms of --password. Default: VDDKCP_COOKIE." placeholder:"-|+FILE|-FD|VALUE" group:"VDDK:"`
	VM            string      `name:"vm" help:"The VM that has SRC: its managed object, moref=ID." placeholder:"moref=ID" group:"VDDK:"`
	Snapshot      string      `help:"The snapshot to read: its managed object." placeholder:"ID" group:"VDDK:"`
	Thumbprint    string      `help:"SHA-1 or SHA-256 thumbprint of the server's certificate, which must verify without it." placeholder:"HEX" group:"VDDK:"`
	Port          portFlag    `help:"Port of the server (443)." placeholder:"PORT" group:"VDDK:"`
	NFCHostPort   portFlag    `name:"nfchostport" help:"Port of the ESXi host for the data (902)." placeholder:"PORT" group:"VDDK:"`
	Transports    string      `help:"Transport modes to try, in order, separated by colons: file, san, hotadd, nbdssl, nbd." placeholder:"LIST" group:"VDDK:"`
	Compression   string      `help:"Compression on the way (nbdssl): none, zlib, fastlz or skipz." enum:",none,zlib,fastlz,skipz" default:"" placeholder:"NAME" group:"VDDK:"`
	Config        string      `help:"Configuration file of the library." placeholder:"FILE" type:"path" group:"VDDK:"`
	LibDir        string      `name:"libdir" help:"Where the library is: the folder of VDDK, its lib64, or the library itself." placeholder:"DIR" type:"path" group:"VDDK:"`
	Unbuffered    bool        `help:"Ask the library not to buffer." group:"VDDK:"`
	NFCBuffers    nfcBuffers  `name:"nfc-buffers" help:"What each connection reserves on the host (1MiBx4)." placeholder:"SIZExCOUNT" group:"VDDK:"`
	PrepareAccess bool        `help:"Keep the VM from being migrated meanwhile (vCenter)." group:"VDDK:"`
	Debug         vddkDebug   `short:"D" help:"Debug messages, as nbdkit's: vddk.diskinfo, .extents, .datapath or .stats, =1 or =0 (repeatable)." placeholder:"vddk.KEY=0|1" group:"VDDK:"`
	secrets       vddkSecrets `kong:"-"`
}

// vddkSecrets are read once, however many disks are opened.
type vddkSecrets struct {
	environment      *secretEnvironment
	password, cookie vddk.Secret
	read             bool
	pause            func() (resume func()) // takes the display off the terminal; nil: there is none
}

// retryFlags say how patient reading over a network is.
type retryFlags struct {
	Retries      retries  `help:"How often a read that fails is tried again (unlimited); 0 for never." default:"unlimited" placeholder:"N" group:"Source:"`
	RetryTimeout patience `help:"So long without any progress ends the retries (15m)." default:"15m" placeholder:"TIME" group:"Source:"`
	Timeout      patience `help:"How long a read or write over a network may take (2m); opening may take five times that." default:"2m" placeholder:"TIME" group:"Source:"`
}

// patience is a length of time, more than none.
type patience time.Duration

func (p *patience) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil || d <= 0 {
		return fmt.Errorf("%q: want a duration such as 90s or 15m", text)
	}
	*p = patience(d)
	return nil
}

// retries is how often something is tried again; negative: without limit.
type retries int

func (r *retries) UnmarshalText(text []byte) error {
	if string(text) == "unlimited" {
		*r = -1
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 31)
	if err != nil {
		return fmt.Errorf("%q: want a number, or unlimited", text)
	}
	*r = retries(n)
	return nil
}

// portFlag is a TCP port; 0 is the default.
type portFlag uint32

func (p *portFlag) UnmarshalText(text []byte) error {
	n, err := strconv.ParseUint(string(text), 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("%q: want a port, 1 to 65535", text)
	}
	*p = portFlag(n)
	return nil
}

// nfcBuffers is SIZExCOUNT.
type nfcBuffers vddk.NFCBuffers

func (b *nfcBuffers) UnmarshalText(text []byte) error {
	size, count, ok := strings.Cut(string(text), "x")
	if !ok {
		return fmt.Errorf("%q: want SIZExCOUNT, as 1MiBx4", text)
	}
	n, err := bytesize.Parse(size)
	if err != nil {
		return err
	}
	c, err := strconv.ParseUint(count, 10, 16)
	if err != nil {
		return fmt.Errorf("%q: want SIZExCOUNT, as 1MiBx4, and %q is no number", text, count)
	}
	*b = nfcBuffers{Size: int64(n), Count: int(c)}
	return nil
}

// vddkDebug are nbdkit's debug flags of the plugin.
type vddkDebug map[string]bool

// Decode implements kong.MapperValue, once for each flag.
func (d *vddkDebug) Decode(ctx *kong.DecodeContext) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("want vddk.KEY=0|1")
	}
	name, value, _ := strings.Cut(fmt.Sprint(token.Value), "=")
	key, ok := strings.CutPrefix(name, "vddk.")
	if !ok || !slices.Contains(vddk.DebugKeys, key) {
		return fmt.Errorf("%q: want vddk.KEY=0|1, KEY one of %s", name, strings.Join(vddk.DebugKeys, ", "))
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

// AfterApply is kong's hook: what the environment has serves where no flag is.
func (f *vddkFlags) AfterApply(environment *secretEnvironment) error {
	f.secrets.environment = environment
	return nil
}

// params are the parameters of the disk at file. The secrets are asked for and
// read once all else is known to be in order.
func (f *vddkFlags) params(ctx context.Context, file string, singleLink bool, warn func(string)) (vddk.Params, error) {
	p := vddk.Params{
		File: file, Server: withoutBrackets(f.Server), User: f.User, VM: f.VM, Snapshot: f.Snapshot, Thumbprint: f.Thumbprint,
		Port: uint32(f.Port), NFCHostPort: uint32(f.NFCHostPort), Transports: f.Transports, Compression: f.Compression,
		Config: f.Config, LibDir: f.LibDir, SingleLink: singleLink, Unbuffered: f.Unbuffered,
		NFCBuffers: vddk.NFCBuffers(f.NFCBuffers), PrepareAccess: f.PrepareAccess,
	}
	if f.secrets.read {
		p.Password, p.Cookie = f.secrets.password, f.secrets.cookie
		return p, p.Validate()
	}
	environment := f.secrets.environment
	if environment == nil {
		environment = new(secretEnvironment)
	}
	// Stands for what is not read yet.
	stand := func(flag secretFlag, other vddk.Secret) vddk.Secret {
		if flag.form != notGiven {
			return vddk.NewSecret("")
		}
		return other
	}
	p.Password, p.Cookie = stand(f.Password, environment.password), stand(f.Cookie, environment.cookie)
	if err := p.Validate(); err != nil {
		return vddk.Params{}, err
	}
	if p.Remote() {
		if err := f.readSecrets(ctx, &p, warn); err != nil {
			return vddk.Params{}, err
		}
		if err := p.Validate(); err != nil {
			return vddk.Params{}, err
		}
	}
	for _, name := range vddk.UnknownTransports(p.Transports) {
		warn(fmt.Sprintf("--transports: %s is none that VDDK is known to have", printable.Name(name)))
	}
	f.secrets.password, f.secrets.cookie, f.secrets.read = p.Password, p.Cookie, true
	return p, nil
}

// withoutBrackets is the address in "[::1]".
func withoutBrackets(server string) string {
	if address, ok := strings.CutPrefix(server, "["); ok {
		return strings.TrimSuffix(address, "]")
	}
	return server
}

func (f *vddkFlags) readSecrets(ctx context.Context, p *vddk.Params, warn func(string)) error {
	for _, s := range []struct {
		name string
		flag secretFlag
		into *vddk.Secret
	}{
		{"password", f.Password, &p.Password}, {"cookie", f.Cookie, &p.Cookie},
	} {
		if s.flag.form == notGiven {
			continue
		}
		if s.flag.form == inPlain {
			warn(fmt.Sprintf("--%s on the command line can be seen by others on this host: want -, +FILE or VDDKCP_%s", s.name, strings.ToUpper(s.name)))
		}
		secret, err := s.flag.read(ctx, f.secrets.pause, fmt.Sprintf("%s of %s at %s", s.name, printable.Name(p.User), printable.Name(p.Server)))
		if grace.Original(ctx).Err() != nil {
			return err
		}
		if err != nil {
			return &usageError{err: fmt.Errorf("--%s: %w", s.name, err), hint: report.Of(err).Hint}
		}
		*s.into = secret
	}
	return nil
}
