package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
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
type namedSource struct {
	name, src string
	at        address.Address // src parsed; nil before addresses
}

func (s *namedSource) UnmarshalText(text []byte) error {
	name, src, ok := strings.Cut(string(text), "=")
	if !ok || src == "" {
		return errors.New("want NAME=SRC")
	}
	*s = namedSource{name: name, src: src}
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
	if err := checkListen(c.Listen); err != nil {
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
		all = append(all, namedSource{name: c.Name, src: c.Src})
	}
	return append(all, c.Export...)
}

// addresses returns the sources with their addresses parsed.
func (c *exportCommand) addresses() ([]namedSource, error) {
	all := c.sources()
	for i, s := range all {
		var err error
		if all[i].at, err = address.Parse(s.src, address.Disk); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// exportGrace is how long requests in work go on after a signal.
const exportGrace = 5 * time.Second

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
	err = c.run(ctx, sources, outputs, log)
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err == nil {
		return nil
	}
	var ended *commandStatus
	if errors.As(err, &ended) {
		if err.Error() != ended.Error() { // CMD has said what is its own
			fail(errorOutput, false, fmt.Errorf("export: %w", err))
		}
		return &reportedError{ended}
	}
	return fmt.Errorf("export: %w", err)
}

// outputs are the files that the command writes.
func (c *exportCommand) outputs(sources []namedSource, logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--stats", c.Stats)
	o.add("--pid-file", c.PidFile)
	o.add("--log-file", logs.LogFile)
	o.addOwn("--cow", c.Cow.file)
	for _, s := range sources {
		c.sourceFlags.protect(o, "a disk that is served", s.at)
	}
	if dir := c.TLSCertificates; dir != "" {
		for _, name := range []string{"server-cert.pem", "server-key.pem", "ca-cert.pem"} {
			o.protect("a file of --tls-certificates", filepath.Join(dir, name))
		}
	}
	return o
}

// run serves until a signal, the end of CMD, or the last client. A
// *commandStatus is the end of CMD.
func (c *exportCommand) run(ctx context.Context, sources []namedSource, outputs *outputs, log *slog.Logger) error {
	// First, so that no process that a disk is opened by gets the sockets.
	sockets, err := activatedSockets()
	if err != nil {
		return err
	}
	defer sockets.close()
	parent := os.Getppid()
	// Disks go on when ctx has ended, for requests in work.
	life, kill := context.WithCancelCause(context.WithoutCancel(ctx))
	defer kill(nil)
	opening := context.AfterFunc(ctx, func() { kill(context.Cause(ctx)) })
	exports, err := c.open(life, sources, outputs, log)
	if !opening() && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), exports.close())
	}
	if err != nil {
		return err
	}
	stats, err := openStats(c.Stats)
	if err == nil {
		err = c.serve(ctx, exports, sockets, parent, stats, kill, log)
	}
	return errors.Join(err, exports.close())
}

// serve serves what is open. Kill ends the disks that were opened before there
// was a server.
func (c *exportCommand) serve(ctx context.Context, exports *exports, sockets *sockets, parent int, stats *statsFile, kill context.CancelCauseFunc, log *slog.Logger) error {
	// A signal, the parent's end or a failure end CMD, or what is served where
	// there is none.
	ending, end := context.WithCancel(ctx)
	defer end()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	options := server.Options{
		Writable: c.RW || c.Cow.on, MaxConnections: c.MaxConnections, Grace: exportGrace, Kill: kill, Stats: &stats.Stats, Log: log,
	}
	if c.ExitLast {
		options.Left = func(others int) {
			if others == 0 {
				log.Debug("the last client has left")
				stop()
			}
		}
	}
	var err error
	if options.TLSMode, options.TLS, err = c.certificates(log); err != nil {
		return err
	}
	s, err := server.New(exports, options)
	if err != nil {
		return err
	}
	// On a disk that hangs a connection has up to three calls of its own, each with
	// a thread, and the runtime ends a program with more than this.
	debug.SetMaxThreads(max(10_000, 2_000+3*c.MaxConnections))
	if err := sockets.listen(ctx, c.Listen, c.Command != ""); err != nil {
		return err
	}
	if c.PidFile != "" {
		remove, err := writePidFile(c.PidFile)
		if err != nil {
			return err
		}
		defer remove()
	}
	name := exports.uriName()
	uris := sockets.uris(options.TLSMode == server.TLSRequire, name)
	for _, uri := range uris {
		log.Debug("listening", "uri", uri)
		if c.Command == "" && !sockets.activated {
			if _, err := fmt.Fprintln(textOutput, uri); err != nil {
				return err
			}
		}
	}

	var all sync.WaitGroup
	if c.ExitWithParent {
		all.Go(func() {
			if parentEnded(serving, parent) {
				log.Debug("the parent process has ended")
				end()
			}
		})
	}
	var served, ran error
	all.Go(func() {
		defer stop()
		if served = sockets.serve(serving, s); served != nil {
			end()
		}
	})
	if c.Command == "" {
		defer context.AfterFunc(ending, stop)()
	} else {
		all.Go(func() {
			defer stop()
			ran = runShell(ending, sockets.script(uris[0], name)+c.Command)
		})
	}
	all.Wait()
	return errors.Join(served, ran, stats.write(log))
}

// writePidFile puts the process id into a new file at path, which a symbolic
// link there is replaced by. Remove removes it, unless another process has
// replaced it meanwhile.
func writePidFile(path string) (remove func(), err error) {
	if err := durable.Write(path, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("process id: %w", err)
	}
	if _, ok := durable.Descriptor(path); ok {
		return func() {}, nil
	}
	ours, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("process id: %w", err)
	}
	return func() {
		if now, err := os.Lstat(path); err == nil && now.Mode().IsRegular() && os.SameFile(now, ours) {
			os.Remove(path) // a leftover file harms nobody
		}
	}, nil
}

// certificates reads what TLS needs, where it is asked for.
func (c *exportCommand) certificates(log *slog.Logger) (server.TLSMode, *tls.Config, error) {
	mode := map[string]server.TLSMode{"off": server.TLSOff, "on": server.TLSOn, "require": server.TLSRequire}[c.TLS]
	if c.TLS == "" && c.TLSCertificates != "" {
		mode = server.TLSOn // as nbdkit
	}
	if mode == server.TLSOff {
		return mode, nil, nil
	}
	dir := c.TLSCertificates
	if dir == "" {
		if dir = certificateFolder(); dir == "" {
			return 0, nil, &usageError{err: fmt.Errorf("--tls %s: no certificates", c.TLS), hint: "--tls-certificates DIR, with server-cert.pem and server-key.pem"}
		}
	}
	config, err := server.LoadTLS(dir, c.TLSVerifyPeer)
	if err != nil {
		return 0, nil, &usageError{err: err, hint: hint(err)}
	}
	if nbd.NamesNoHost(config.Certificates[0].Leaf) {
		log.Warn("the server's certificate has no subjectAltName: clients that verify it will refuse it", "certificates", dir)
	}
	if mode == server.TLSOn {
		log.Debug("clients may come without TLS, or be made to: --tls require serves none of them")
	}
	return mode, config, nil
}

// certificateFolder is where nbdkit looks for certificates.
func certificateFolder() string {
	folders := []string{"/etc/pki/nbdkit"}
	if home := os.Getenv("HOME"); os.Geteuid() != 0 && home != "" {
		folders = []string{filepath.Join(home, ".pki/nbdkit"), filepath.Join(home, ".config/pki/nbdkit")}
	}
	for _, dir := range folders {
		if _, err := os.Stat(filepath.Join(dir, "server-cert.pem")); err == nil {
			return dir
		}
	}
	return ""
}
