package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/export"
	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vddk"
)

// exportCommand serves disks over NBD, see docs/cli.md.
type exportCommand struct {
	Src string `arg:"" name:"SRC" optional:"" help:"The disk to serve, at any address that the command copy accepts, except standard input. Use --export for more disks."`

	sourceFlags

	Listen      []string      `help:"Address to listen on: tcp://HOST:PORT, unix:PATH, \"unix:-\" for a private socket, or \"systemd\" for sockets from systemd (repeatable; default tcp://127.0.0.1:10809)." placeholder:"ADDR" sep:"none" group:"Export:"`
	Name        string        `help:"Export name of SRC. By default SRC answers to every name." placeholder:"NAME" group:"Export:"`
	Description string        `help:"Description of SRC, which clients can show." placeholder:"TEXT" group:"Export:"`
	Export      []namedSource `help:"Another disk to serve, with its export name (repeatable)." placeholder:"NAME=SRC" sep:"none" group:"Export:"`
	Pattern     string        `name:"export-pattern" help:"Let clients request any disk that VDDK can open and whose path matches this wildcard. A client sends the path of the disk as the export name. The nbdkit parameter export=PATTERN means the same." placeholder:"PATTERN" group:"Export:"`
	Command     string        `name:"run" help:"Run CMD in a shell with the variables $$uri, $$port, $$unixsocket, $$nbd and $$exportname, stop when CMD ends, and return its exit status." placeholder:"CMD" group:"Export:"`
	RW          bool          `name:"rw" help:"Let clients write to the disks. Each disk must be a raw file, a block device, an NBD export or a disk that VDDK opens." group:"Export:"`
	Cow         cowFlag       `help:"Let clients write without changing the disks. Writes go to a temporary file or, with --cow=FILE, to FILE. A later run with the same FILE continues with these writes." placeholder:"FILE" group:"Export:"`
	CowOnRead   bool          `help:"With --cow: also store each block that a client reads from SRC in the file that receives the writes. Later reads of the block read this file." group:"Export:"`

	Pin string `help:"Write to FILE which disk is served, and in which state. A later export with the same FILE serves only the same disk in the same state, so that clients can continue. The snapshot of a SRC vm:... is kept for that later export, unless FILE is removed before the export ends." placeholder:"FILE" type:"path" group:"Export:"`

	TLS             string `name:"tls" help:"Encryption of connections with TLS: off, on (clients may use TLS) or require (clients must use TLS)." enum:",off,on,require" default:"" placeholder:"MODE" group:"Export:"`
	TLSCertificates string `name:"tls-certificates" help:"Folder with the files server-cert.pem, server-key.pem and ca-cert.pem." placeholder:"DIR" type:"path" group:"Export:"`
	TLSVerifyPeer   bool   `name:"tls-verify-peer" help:"Refuse clients without a certificate that is signed by an authority in ca-cert.pem." group:"Export:"`

	RequestSize    bytesize.Size `help:"Maximum number of bytes of one read or write with VDDK (default 1MiB)." default:"1MiB" placeholder:"SIZE" group:"Speed:"`
	Depth          int           `help:"Number of concurrent reads and writes on each VDDK handle (default 4)." default:"4" placeholder:"N" group:"Speed:"`
	Connections    connections   `help:"Number of connections for each disk, or auto. For a disk on an NBD server, these are NBD connections. For a disk that VDDK opens, these are VDDK handles." default:"auto" placeholder:"N|auto" group:"Speed:"`
	RateLimit      rate          `help:"Maximum number of bytes per second for the reads of all clients together, and for their writes. Requests without data are not limited." placeholder:"BYTES/s" group:"Speed:"`
	MaxConnections int           `help:"Maximum number of clients at the same time (default 4096)." default:"4096" placeholder:"N" group:"Export:"`
	ExitWithParent bool          `help:"Stop when the parent process ends." group:"Export:"`
	ExitLast       bool          `help:"Stop when the last client disconnects." group:"Export:"`
	PidFile        string        `help:"Write the process ID to FILE as soon as clients can connect, and remove FILE at the end." placeholder:"FILE" type:"path" group:"Export:"`
	Stats          string        `help:"Write statistics of the clients' requests to FILE at the end, as JSON." placeholder:"FILE" type:"path" group:"Export:"`
}

// namedSource is the value NAME=SRC of --export.
type namedSource struct{ name, src string }

func (s *namedSource) UnmarshalText(text []byte) error {
	name, src, ok := strings.Cut(string(text), "=")
	if !ok || src == "" {
		return fmt.Errorf("%q: want a value of the form NAME=SRC", text)
	}
	*s = namedSource{name, src}
	return nil
}

// cowFlag is the value of --cow. The value is optional. It must follow the flag after an
// equals sign: --cow=FILE.
type cowFlag struct {
	on   bool
	file string // "" means a temporary file
}

// IsBool tells kong that the flag may be given without a value.
func (*cowFlag) IsBool() bool { return true }

// Decode implements kong.MapperValue.
func (f *cowFlag) Decode(ctx *kong.DecodeContext) error {
	f.on = true
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return nil
	}
	if f.file = fmt.Sprint(ctx.Scan.Pop().Value); f.file == "" {
		return errors.New("the value is empty: want the path of a file after --cow=")
	}
	return nil
}

// Validate is called by kong after parsing. It checks combinations of flags.
func (c *exportCommand) Validate() error {
	switch {
	case c.Src == "" && len(c.Export) == 0 && c.Pattern == "":
		return errors.New("no disk to serve is given: want SRC, --export NAME=SRC or --export-pattern PATTERN")
	case c.Src == "" && c.Name != "":
		return errors.New("--name needs SRC, because it names the export of SRC: to name another disk, use --export NAME=SRC")
	case c.Src == "" && c.Description != "":
		return errors.New("--description needs SRC, because it describes SRC")
	case c.RW && c.Cow.on:
		return errors.New("--rw and --cow exclude each other: --rw writes to the disk itself, and --cow writes to another file")
	case c.CowOnRead && !c.Cow.on:
		return errors.New("--cow-on-read needs --cow")
	case c.Cow.file != "" && (len(c.sources()) != 1 || c.Pattern != ""):
		return fmt.Errorf("--cow=%s: a file holds the changes of a single disk, but several disks can be requested: use --cow without a file", c.Cow.file)
	case c.Pin != "" && (c.Src == "" || len(c.Export) > 0 || c.Pattern != ""):
		return fmt.Errorf("--pin=%s: a file stands for a single disk: want SRC, and neither --export nor --export-pattern", c.Pin)
	case c.Pin != "" && (c.RW || c.Cow.on):
		return fmt.Errorf("--pin=%s excludes --rw and --cow, because the content that clients write is not that of SRC", c.Pin)
	case c.MaxConnections < 1:
		return fmt.Errorf("--max-connections: %d: want 1 or more clients", c.MaxConnections)
	case c.TLS == "off" && (c.TLSCertificates != "" || c.TLSVerifyPeer):
		return errors.New("--tls off cannot be used with --tls-certificates or --tls-verify-peer")
	case c.TLS == "" && c.TLSCertificates == "" && c.TLSVerifyPeer:
		return errors.New("--tls-verify-peer needs --tls require, because clients without TLS have no certificate")
	}
	if err := export.CheckListen(c.Listen); err != nil {
		return err
	}
	names := map[string]bool{}
	for _, s := range c.sources() {
		if names[s.name] {
			return fmt.Errorf("two exports have the name %q", s.name)
		}
		names[s.name] = true
		if err := validText(s.name); err != nil {
			return fmt.Errorf("export name: %w", err)
		}
	}
	if err := validateRequests(c.RequestSize, c.Depth); err != nil {
		return err
	}
	if err := validText(c.Description); err != nil {
		return fmt.Errorf("--description: %w", err)
	}
	return nil
}

// validText returns an error if a text cannot be sent over NBD.
func validText(s string) error {
	switch {
	case len(s) > nbd.MaxString:
		return fmt.Errorf("the text has %d bytes, but NBD allows at most %d bytes for a name or a description", len(s), nbd.MaxString)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not valid UTF-8", s)
	}
	return nil
}

// The method sources returns SRC and the disks of --export.
func (c *exportCommand) sources() []namedSource {
	var all []namedSource
	if c.Src != "" {
		all = append(all, namedSource{c.Name, c.Src})
	}
	return append(all, c.Export...)
}

// The method addresses parses the addresses of the sources, SRC first. SRC is opened before
// the server starts, even if it is a remote disk. A remote disk of --export is opened when
// its first client connects.
func (c *exportCommand) addresses() ([]export.Source, error) {
	var all []export.Source
	for _, s := range c.sources() {
		a, err := address.Parse(s.src, address.Disk)
		if err != nil {
			return nil, err
		}
		all = append(all, export.Source{Name: s.name, Address: a})
	}
	if c.Src != "" {
		all[0].Description, all[0].Eager = c.Description, true
	}
	return all, nil
}

// exportRefusals is the number of refused logins on an ESXi host or vCenter after which
// vddkcp export stops trying to log in. More than one try is allowed, because an
// administrator may correct the account while the server runs. ESXi locks an account after
// five refused logins.
const exportRefusals = 3

func (c *exportCommand) Run(ctx context.Context, logs *logFlags, notice *stopping, service *service) error {
	sources, err := c.addresses()
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	if err := c.chooseWay(sources); err != nil {
		return err
	}
	outputs := c.outputs(sources, logs)
	if err := outputs.check(); err != nil {
		return err
	}
	log, closeLog, err := logs.open(errorOutput, false)
	if err != nil {
		return usage.Wrap(err)
	}
	options := c.options(sources, outputs, log)
	options.Serving = func(clients func() int) {
		notice.over(errorOutput, logs.asJSON(), func() (string, bool) {
			n := clients()
			return plural(n, "client", "clients"), n > 0 // a signal is the normal way to end an export
		})
	}
	options.Ready = func(clients func() int) (done func()) {
		return service.begin(ctx, log, func() string {
			return fmt.Sprintf("serving %s to %s", plural(len(sources), "disk", "disks"), plural(clients(), "client", "clients"))
		})
	}
	if logs.asJSON() {
		options.Tables = &logLines{log: log}
	}
	err = c.serve(ctx, options)
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err == nil {
		return nil
	}
	var ended *export.CommandStatus
	if errors.As(err, &ended) {
		if err.Error() != ended.Error() { // CMD has reported its own errors
			fail(errorOutput, logs.asJSON(), fmt.Errorf("export: %w", err))
		}
		return &reportedError{ended}
	}
	return fmt.Errorf("export: %w", err)
}

// The method serve serves the disks until a signal arrives.
func (c *exportCommand) serve(ctx context.Context, options export.Options) error {
	if c.Pin == "" {
		return export.Run(ctx, options)
	}
	pin, err := export.OpenPin(c.Pin)
	if err != nil {
		return err
	}
	options.Pin = pin
	options.Opener.VM = func(ctx context.Context, a address.VM) (source.Disk, error) {
		// A snapshot of the earlier export stays for a later one. A new snapshot stays only if the
		// file names it: otherwise no later export would use it.
		earlier := machine.SnapshotIn(pin.Earlier()) != ""
		return c.openVM(ctx, a, options.Opener, true, pin.Earlier(), func() bool { return pin.Exists() && (earlier || pin.Agrees()) })
	}
	return errors.Join(export.Run(ctx, options), pin.Close())
}

// The method chooseWay decides how the disks are read that are on a server.
func (c *exportCommand) chooseWay(sources []export.Source) error {
	var all []address.Address
	for _, s := range sources {
		all = append(all, s.Address)
	}
	if c.Pattern != "" {
		all = append(all, address.ForVDDK(c.Pattern))
	}
	return c.choose(reads{requestSize: c.RequestSize, depth: c.Depth, connections: c.Connections, writable: c.RW}, all...)
}

// The method outputs returns the files that the command writes.
func (c *exportCommand) outputs(sources []export.Source, logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--stats", c.Stats)
	o.add("--pid-file", c.PidFile)
	o.add("--log-file", logs.LogFile)
	o.add("--nfc-trace", c.NFCTrace)
	o.addOwn("--cow", c.Cow.file)
	o.addOwn("--pin", c.Pin)
	for _, s := range sources {
		c.sourceFlags.protect(o, "a disk that is served", s.Address)
	}
	if dir := c.TLSCertificates; dir != "" {
		for _, name := range []string{"server-cert.pem", "server-key.pem", "ca-cert.pem"} {
			o.protect("a file of --tls-certificates", filepath.Join(dir, name))
		}
	}
	return o
}

// The method options converts the flags of the command to options of package export.
func (c *exportCommand) options(sources []export.Source, outputs *outputs, log *slog.Logger) export.Options {
	opener := c.opener()
	opener.Writable = c.RW
	opener.VM = func(ctx context.Context, a address.VM) (source.Disk, error) {
		return c.openVM(ctx, a, opener, true, "", nil)
	}
	warn := func(message string) { log.Warn(message) }
	v := &opener.VDDK.Options
	v.Registry = vddk.NewRegistry(exportRefusals)
	v.Connections, v.RequestSize, v.Depth, v.Log, v.Warn = int(c.Connections), int(c.RequestSize), c.nfcDepth(c.Depth), log, warn
	opener.NBD.Connections, opener.NBD.Warn = int(c.Connections), warn
	opener.Retry.Mutable = true // clients need the current content of the source
	opener.Retry.OnRetry = func(err error, wait time.Duration) {
		log.Warn("trying again", "in", wait.Round(time.Millisecond), "error", err)
	}
	return export.Options{
		Sources: sources, Pattern: c.Pattern, Opener: opener, Format: c.SourceFormat,
		Opened: func() error { return outputs.checkOpened(opener) },
		Cow:    c.Cow.on, CowFile: c.Cow.file, CowOnRead: c.CowOnRead,
		Listen: c.Listen, TLS: c.TLS, TLSCertificates: c.TLSCertificates, TLSVerifyPeer: c.TLSVerifyPeer,
		MaxConnections: c.MaxConnections, RateLimit: int64(c.RateLimit), Command: c.Command, ExitWithParent: c.ExitWithParent, ExitLast: c.ExitLast,
		PidFile: c.PidFile, Stats: c.Stats, URIs: textOutput, Tables: errorOutput, Log: log,
	}
}
