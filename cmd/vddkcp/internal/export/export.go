// Package export serves disks over NBD: it is what the command "vddkcp export" does
// once its command line is understood. [Run] opens the disks, listens, and serves
// until a signal, the end of a command that it started, or the last client.
package export

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
)

// Options say which disks are served, to which clients, and until when.
type Options struct {
	// Sources are the disks with names. A single one with an empty name answers to
	// every name, unless there is a Pattern.
	Sources []Source
	// Pattern lets clients name disks that VDDK opens by their paths, as far as
	// this wildcard matches; "" for no such disks.
	Pattern string
	// Opener opens the disks. Its Writable lets clients write to them.
	Opener *sourceopen.Opener
	// Format is the format of all sources, as for Opener.Open; "" probes them.
	Format string
	// Opened is called after each disk that is opened before the server starts. An
	// error ends Run. It may be nil.
	Opened func() error
	// Cow lets clients write over disks that are only read: what they write goes to
	// a temporary file or, for a single disk, to CowFile, which is continued.
	// CowOnRead keeps there what is read, too.
	Cow, CowOnRead bool
	CowFile        string

	// Listen are addresses as CheckListen takes them. Empty means a private socket
	// with Command, else 127.0.0.1 and NBD's port, and nothing with sockets from
	// socket activation.
	Listen []string
	// TLS is the mode of TLS: off, on or require; "" is on with TLSCertificates,
	// else off. TLSCertificates is a folder; "" looks where nbdkit does.
	TLS, TLSCertificates string
	TLSVerifyPeer        bool // clients need a certificate
	MaxConnections       int  // clients at once, at least 1

	// Command is run in a shell once clients can connect; when it ends, Run ends. ""
	// runs none.
	Command        string
	ExitWithParent bool   // Run ends when the process that started this one ends
	ExitLast       bool   // Run ends when the last client leaves
	PidFile        string // gets the process id once clients can connect; "": none
	Stats          string // path of a file for what clients did, as JSON; "": none

	URIs   io.Writer // gets the URIs on which the server listens, a line each
	Tables io.Writer // gets a table of what clients did, when Log logs debug messages
	Log    *slog.Logger
}

// Source is a disk that is served from the beginning.
type Source struct {
	Name        string // of the export
	Description string // for clients
	Address     address.Address
	// Eager opens the disk before the server starts, even if that takes a login.
	// Otherwise a disk on a server is opened for its first client.
	Eager bool
}

// grace is how long requests in work go on after a signal.
const grace = 5 * time.Second

// Run serves disks until ctx ends, Options.Command ends, or the last client leaves.
// The error is a *[CommandStatus] if Options.Command ended with a status other than
// 0, and a *usage.Error for options that cannot work.
//
// The cause of ctx may have a method Signal, which returns the signal that ends
// Options.Command; SIGTERM does otherwise.
func Run(ctx context.Context, o Options) error {
	// First, so that no process that a disk is opened by gets the sockets.
	sockets, err := activatedSockets()
	if err != nil {
		return err
	}
	defer sockets.close(o.Log)
	parent := os.Getppid()
	// Disks go on when ctx has ended, for requests in work.
	life, kill := context.WithCancelCause(context.WithoutCancel(ctx))
	defer kill(nil)
	opening := context.AfterFunc(ctx, func() { kill(context.Cause(ctx)) })
	exports, err := open(life, o)
	if !opening() && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), exports.close())
	}
	if err != nil {
		return err
	}
	stats, err := openStats(o.Stats)
	if err == nil {
		err = o.serve(ctx, exports, sockets, parent, stats, kill)
	}
	return errors.Join(err, exports.close())
}

// serve serves what is open. Kill ends the disks that were opened before there
// was a server.
func (o *Options) serve(ctx context.Context, exports *exports, sockets *sockets, parent int, stats *statsFile, kill context.CancelCauseFunc) error {
	log := o.Log
	// A signal, the parent's end or a failure end CMD, or what is served where
	// there is none.
	ending, end := context.WithCancel(ctx)
	defer end()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	options := server.Options{
		Writable: o.Opener.Writable || o.Cow, MaxConnections: o.MaxConnections, Grace: grace, Kill: kill, Stats: &stats.Stats, Log: log,
	}
	if o.ExitLast {
		options.Left = func(others int) {
			if others == 0 {
				log.Debug("the last client has left")
				stop()
			}
		}
	}
	var err error
	if options.TLSMode, options.TLS, err = o.certificates(); err != nil {
		return err
	}
	s, err := server.New(exports, options)
	if err != nil {
		return err
	}
	// On a disk that hangs a connection has up to three calls of its own, each with
	// a thread, and the runtime ends a program with more than this.
	debug.SetMaxThreads(max(10_000, 2_000+3*o.MaxConnections))
	if err := sockets.listen(ctx, o.Listen, o.Command != ""); err != nil {
		return err
	}
	if o.PidFile != "" {
		remove, err := writePidFile(o.PidFile)
		if err != nil {
			return err
		}
		defer remove()
	}
	name := exports.uriName()
	uris := sockets.uris(options.TLSMode == server.TLSRequire, name)
	for _, uri := range uris {
		log.Debug("listening", "uri", uri)
		if o.Command == "" && !sockets.activated {
			if _, err := fmt.Fprintln(o.URIs, uri); err != nil {
				return err
			}
		}
	}

	var all sync.WaitGroup
	if o.ExitWithParent {
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
	if o.Command == "" {
		defer context.AfterFunc(ending, stop)()
	} else {
		all.Go(func() {
			defer stop()
			ran = runShell(ending, sockets.script(uris[0], name)+o.Command)
		})
	}
	all.Wait()
	return errors.Join(served, ran, stats.write(o.Tables, log))
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
func (o *Options) certificates() (server.TLSMode, *tls.Config, error) {
	mode := map[string]server.TLSMode{"off": server.TLSOff, "on": server.TLSOn, "require": server.TLSRequire}[o.TLS]
	if o.TLS == "" && o.TLSCertificates != "" {
		mode = server.TLSOn // as nbdkit
	}
	if mode == server.TLSOff {
		return mode, nil, nil
	}
	dir := o.TLSCertificates
	if dir == "" {
		if dir = certificateFolder(); dir == "" {
			return 0, nil, usage.New(fmt.Sprintf("--tls %s: no certificates", o.TLS), "--tls-certificates DIR, with server-cert.pem and server-key.pem")
		}
	}
	config, err := server.LoadTLS(dir, o.TLSVerifyPeer)
	if err != nil {
		return 0, nil, usage.Wrap(err)
	}
	if nbd.NamesNoHost(config.Certificates[0].Leaf) {
		o.Log.Warn("the server's certificate has no subjectAltName: clients that verify it will refuse it", "certificates", dir)
	}
	if mode == server.TLSOn {
		o.Log.Debug("clients may come without TLS, or be made to: --tls require serves none of them")
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
