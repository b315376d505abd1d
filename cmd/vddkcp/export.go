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
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/vddk"
)

// exportCommand serves disks over NBD, by docs/cli.md.
type exportCommand struct {
	Src string `arg:"" name:"SRC" optional:"" help:"The disk to serve, of every kind that copy reads but standard input. --export names others."`

	sourceFlags

	Listen      []string      `help:"Where to listen: tcp://HOST:PORT, unix:PATH, unix:- for a private socket, or systemd (repeatable; tcp://127.0.0.1:10809)." placeholder:"ADDR" sep:"none" group:"Export:"`
	Name        string        `help:"Export name of SRC; without one every name is SRC's." placeholder:"NAME" group:"Export:"`
	Description string        `help:"What clients are told about SRC." placeholder:"TEXT" group:"Export:"`
	Export      []namedSource `help:"One more disk, by its export name (repeatable)." placeholder:"NAME=SRC" sep:"none" group:"Export:"`
	Pattern     string        `name:"export-pattern" help:"Let clients name disks that VDDK opens, by their paths, as far as this wildcard matches; as the word export=PATTERN." placeholder:"PATTERN" group:"Export:"`
	Command     string        `name:"run" help:"Run CMD in a shell with $$uri, $$port, $$unixsocket, $$nbd and $$exportname, and end with it and its status." placeholder:"CMD" group:"Export:"`
	RW          bool          `name:"rw" help:"Let clients write: to raw files, block devices, NBD servers and through VDDK." group:"Export:"`
	Cow         cowFlag       `help:"Let clients write over disks that are only read: what they write goes to a temporary file, or to =FILE, which is continued." placeholder:"FILE" group:"Export:"`
	CowOnRead   bool          `help:"Keep there what is read once, too." group:"Export:"`

	TLS             string `name:"tls" help:"Whether connections are encrypted: off, on (as the client likes) or require." enum:",off,on,require" default:"" placeholder:"MODE" group:"Export:"`
	TLSCertificates string `name:"tls-certificates" help:"Folder with server-cert.pem, server-key.pem and ca-cert.pem." placeholder:"DIR" type:"path" group:"Export:"`
	TLSVerifyPeer   bool   `name:"tls-verify-peer" help:"Serve only clients with a certificate that ca-cert.pem has signed." group:"Export:"`

	RequestSize    bytesize.Size `help:"Most bytes of one call to VDDK (1MiB)." default:"1MiB" placeholder:"SIZE" group:"Speed:"`
	Depth          int           `help:"Calls in flight on each handle of VDDK (4)." default:"4" placeholder:"N" group:"Speed:"`
	Connections    connections   `help:"Connections to an NBD server or handles of a disk at once: a number, or auto." default:"auto" placeholder:"N|auto" group:"Speed:"`
	MaxConnections int           `help:"Most clients at once (4096)." default:"4096" placeholder:"N" group:"Export:"`
	ExitWithParent bool          `help:"End when the process that started this one ends." group:"Export:"`
	ExitLast       bool          `help:"End when the last client has left." group:"Export:"`
	PidFile        string        `help:"Write the process id here once clients can connect; removed at the end." placeholder:"FILE" type:"path" group:"Export:"`
	Stats          string        `help:"Write what clients did here at the end, as JSON." placeholder:"FILE" type:"path" group:"Export:"`
}

// namedSource is --export NAME=SRC.
type namedSource struct{ name, src string }

func (s *namedSource) UnmarshalText(text []byte) error {
	name, src, ok := strings.Cut(string(text), "=")
	if !ok || src == "" {
		return errors.New("want NAME=SRC")
	}
	*s = namedSource{name, src}
	return nil
}

// cowFlag is --cow, whose value is only what follows after =.
type cowFlag struct {
	on   bool
	file string // "" a temporary one
}

// IsBool makes kong take the flag without a value.
func (*cowFlag) IsBool() bool { return true }

// Decode implements kong.MapperValue.
func (f *cowFlag) Decode(ctx *kong.DecodeContext) error {
	f.on = true
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return nil
	}
	if f.file = fmt.Sprint(ctx.Scan.Pop().Value); f.file == "" {
		return errors.New("want the name of a file after =")
	}
	return nil
}

// Validate is kong's hook for what no single flag can check.
func (c *exportCommand) Validate() error {
	switch {
	case c.Src == "" && len(c.Export) == 0 && c.Pattern == "":
		return errors.New("no disk to serve: want SRC, --export NAME=SRC or export=PATTERN")
	case c.Src == "" && c.Name != "":
		return errors.New("--name is the name of SRC, and there is none: want --export NAME=SRC")
	case c.Src == "" && c.Description != "":
		return errors.New("--description is of SRC, and there is none")
	case c.RW && c.Cow.on:
		return errors.New("--rw writes to the disk and --cow beside it: want one of the two")
	case c.CowOnRead && !c.Cow.on:
		return errors.New("--cow-on-read keeps what is read in the file of --cow: want that with it")
	case c.Cow.file != "" && (len(c.sources()) != 1 || c.Pattern != ""):
		return fmt.Errorf("--cow=%s: a file is of one disk, and several are served: want --cow", c.Cow.file)
	case c.MaxConnections < 1:
		return fmt.Errorf("--max-connections: %d: want 1 or more", c.MaxConnections)
	case c.TLS == "off" && (c.TLSCertificates != "" || c.TLSVerifyPeer):
		return errors.New("--tls off has no use for --tls-certificates or --tls-verify-peer")
	case c.TLS == "" && c.TLSCertificates == "" && c.TLSVerifyPeer:
		return errors.New("--tls-verify-peer: want --tls require with it")
	}
	if err := export.CheckListen(c.Listen); err != nil {
		return err
	}
	names := map[string]bool{}
	for _, s := range c.sources() {
		if names[s.name] {
			return fmt.Errorf("two exports are called %q", s.name)
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

// validText says whether NBD can carry a text.
func validText(s string) error {
	switch {
	case len(s) > nbd.MaxString:
		return fmt.Errorf("%d bytes: want at most %d", len(s), nbd.MaxString)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q: want UTF-8", s)
	}
	return nil
}

// sources are SRC and those of --export.
func (c *exportCommand) sources() []namedSource {
	var all []namedSource
	if c.Src != "" {
		all = append(all, namedSource{c.Name, c.Src})
	}
	return append(all, c.Export...)
}

// addresses parses the addresses of the sources. Only SRC, which comes first, is
// opened before the server starts, whatever that takes.
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

// exportRefusals is how many refused logins a server makes for its clients, which
// come and go while an operator may mend the account. ESXi locks it after five.
const exportRefusals = 3

func (c *exportCommand) Run(ctx context.Context, logs *logFlags) error {
	sources, err := c.addresses()
	if err != nil {
		return fmt.Errorf("export: %w", err)
	}
	outputs := c.outputs(sources, logs)
	if err := outputs.check(); err != nil {
		return err
	}
	log, closeLog, err := logs.open(errorOutput, false)
	if err != nil {
		return &usageError{err: err}
	}
	err = export.Run(ctx, c.options(sources, outputs, log))
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err == nil {
		return nil
	}
	var ended *export.CommandStatus
	if errors.As(err, &ended) {
		if err.Error() != ended.Error() { // CMD has said what is its own
			fail(errorOutput, false, fmt.Errorf("export: %w", err))
		}
		return &reportedError{ended}
	}
	return fmt.Errorf("export: %w", err)
}

// outputs are the files that the command writes.
func (c *exportCommand) outputs(sources []export.Source, logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--stats", c.Stats)
	o.add("--pid-file", c.PidFile)
	o.add("--log-file", logs.LogFile)
	o.addOwn("--cow", c.Cow.file)
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

// options are what the command line says, for package export.
func (c *exportCommand) options(sources []export.Source, outputs *outputs, log *slog.Logger) export.Options {
	opener := c.opener()
	opener.Writable = c.RW
	warn := func(message string) { log.Warn(message) }
	v := &opener.VDDK.Options
	v.Registry = vddk.NewRegistry(exportRefusals)
	v.Connections, v.RequestSize, v.Depth, v.Log, v.Warn = int(c.Connections), int(c.RequestSize), c.Depth, log, warn
	opener.NBD.Connections, opener.NBD.Warn = int(c.Connections), warn
	opener.Retry.Mutable = true // clients want what the source holds now
	opener.Retry.OnRetry = func(err error, wait time.Duration) {
		log.Warn("trying again", "in", wait.Round(time.Millisecond), "error", err)
	}
	return export.Options{
		Sources: sources, Pattern: c.Pattern, Opener: opener, Format: c.SourceFormat,
		Opened: func() error { return outputs.checkOpened(opener) },
		Cow:    c.Cow.on, CowFile: c.Cow.file, CowOnRead: c.CowOnRead,
		Listen: c.Listen, TLS: c.TLS, TLSCertificates: c.TLSCertificates, TLSVerifyPeer: c.TLSVerifyPeer,
		MaxConnections: c.MaxConnections, Command: c.Command, ExitWithParent: c.ExitWithParent, ExitLast: c.ExitLast,
		PidFile: c.PidFile, Stats: c.Stats, URIs: textOutput, Tables: errorOutput, Log: log,
	}
}
