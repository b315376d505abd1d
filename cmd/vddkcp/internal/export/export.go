// Package export serves disks over NBD. It does the work of the command "vddkcp export"
// after the command line was parsed. [Run] opens the disks, listens, and serves clients
// until a signal arrives. Depending on the options, Run also ends when the command that Run
// started ends, when the parent process of this process ends, or when the last client
// disconnects.
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
	// Sources are the disks that clients request by the name of an export. A single disk
	// with an empty name is served under every name, unless Pattern is set.
	Sources []Source
	// Pattern is a wildcard. Clients may request any disk that VDDK can open and whose
	// path matches Pattern. A client sends the path of the disk as the name of the
	// export. If Pattern is empty, clients can request only the Sources.
	Pattern string
	// Opener opens the disks. If its field Writable is true, clients may write to them.
	Opener *sourceopen.Opener
	// Format is the format of all sources. If it is "", the format of each source is
	// detected.
	Format string
	// Until the server starts, Opened is called each time a disk has been opened. If Opened
	// returns an error, Run fails. Opened may be nil.
	Opened func() error
	// Pin makes sure that a later export with the same file serves the same content. It may be
	// nil. It needs a single source whose field Eager is set, and clients that cannot write.
	Pin *Pin
	// Cow lets clients write without changing the disks. The data that they write goes to
	// the file CowFile or, if CowFile is empty, to a temporary file. CowFile can be set
	// only for a single disk. A later run with the same CowFile sees the data of earlier
	// runs. If CowOnRead is set, the blocks that clients have read from a disk are stored
	// in the same file.
	Cow, CowOnRead bool
	CowFile        string

	// Listen has addresses that CheckListen accepts. If Listen is empty, the server uses
	// the sockets that its parent process passed to it by socket activation. If the parent
	// passed no sockets, the server listens on a private socket if Command is set, and on
	// 127.0.0.1 and the default port of NBD if Command is empty.
	Listen []string
	// TLS is the mode of TLS: off, on or require. "" means on if TLSCertificates is set,
	// and off if it is not. TLSCertificates is the folder that contains the certificates.
	// If it is "", the server searches the folders in which nbdkit looks for certificates.
	TLS, TLSCertificates string
	TLSVerifyPeer        bool  // refuse clients without a valid certificate
	MaxConnections       int   // maximum number of clients at the same time, at least 1
	RateLimit            int64 // bytes per second, for the reads and for the writes of all clients together; 0: no limit

	// Command is run in a shell as soon as clients can connect. When it ends, Run ends. If
	// Command is empty, no command is run.
	Command        string
	ExitWithParent bool   // end when the parent process ends
	ExitLast       bool   // end when the last client disconnects
	PidFile        string // path of a file for the process ID, written as soon as clients can connect; "": none
	Stats          string // path of a file for statistics as JSON; "": none

	URIs io.Writer // receives the URIs of the server, one per line
	// Serving is called when the server exists. The function clients returns the number of its
	// clients, and may be called at any time. Serving may be nil.
	Serving func(clients func() int)
	// Ready is called as soon as clients can connect. The function clients is that of Serving. The
	// caller calls the result, the function done, when the server has ended. Ready may be nil.
	Ready func(clients func() int) (done func())

	Tables io.Writer // receives a table of statistics, if Log logs debug messages
	Log    *slog.Logger
}

// Source is a disk that is known before the server starts, unlike the disks that clients
// choose by Options.Pattern.
type Source struct {
	Name        string // name of the export
	Description string // text that clients can show
	Address     address.Address
	// If Eager is true, the disk is opened before the server starts, even if this requires
	// a login. If Eager is false, a disk on a server is opened when its first client
	// connects.
	Eager bool
}

// The constant grace is how long the server waits after a signal for requests in progress.
const grace = 5 * time.Second

// Run serves disks until ctx ends or Options.Command ends. If Options.ExitWithParent is
// set, Run also ends when the parent process ends. If Options.ExitLast is set, Run also
// ends when the last client disconnects. The error is a *[CommandStatus] if Options.Command
// ended with a status other than 0, and a *usage.Error for invalid options.
//
// When ctx ends, Run sends a signal to Options.Command. If the cause of ctx has a method
// Signal() syscall.Signal, Run sends the signal that this method returns. If the cause has
// no such method, Run sends SIGTERM.
func Run(ctx context.Context, o Options) error {
	// Opening a disk may start other processes. They would inherit the sockets of socket
	// activation unless this process has taken them over. Therefore the sockets are taken
	// over before any disk is opened.
	sockets, err := activatedSockets()
	if err != nil {
		return err
	}
	defer sockets.close(o.Log)
	parent := os.Getppid()
	// Disks stay open after the end of ctx, so that requests in progress can complete.
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
	if o.Pin != nil {
		if err := o.Pin.check(life, exports.list[0].first, o.Log); err != nil {
			return errors.Join(err, exports.close())
		}
	}
	stats, err := openStats(o.Stats)
	if err == nil {
		err = o.serve(ctx, exports, sockets, parent, stats, kill)
	}
	return errors.Join(err, exports.close())
}

// The method serve serves the opened exports. Some disks were opened before the server was
// created. The function kill aborts the calls to these disks that are in progress.
func (o *Options) serve(ctx context.Context, exports *exports, sockets *sockets, parent int, stats *statsFile, kill context.CancelCauseFunc) error {
	log := o.Log
	// The context ending ends when a signal arrives, when the server fails, or when the parent
	// process ends while ExitWithParent is set. Its end stops the command of --run or the server.
	ending, end := context.WithCancel(ctx)
	defer end()
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	options := server.Options{
		Writable: o.Opener.Writable || o.Cow, MaxConnections: o.MaxConnections, RateLimit: o.RateLimit, Grace: grace, Kill: kill, Stats: &stats.Stats, Log: log,
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
	if o.Serving != nil {
		o.Serving(s.Clients)
	}
	allowThreads(o.MaxConnections)
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
	if err := o.announce(uris, o.Command == "" && !sockets.activated); err != nil {
		return err
	}
	if o.Ready != nil {
		defer o.Ready(s.Clients)()
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

// allowThreads raises the limit for threads if many connections are allowed. The Go runtime ends a
// program that has more than 10,000 threads. Each connection can have up to three calls to a disk
// in progress. If the disk does not answer, each of these calls occupies a thread.
func allowThreads(connections int) { debug.SetMaxThreads(max(10_000, 2_000+3*connections)) }

// The method announce logs the URIs of the server, and prints them if the parameter print is true.
func (o *Options) announce(uris []string, print bool) error {
	for _, uri := range uris {
		o.Log.Debug("listening", "uri", uri)
		if print {
			if _, err := fmt.Fprintln(o.URIs, uri); err != nil {
				return err
			}
		}
	}
	return nil
}

// writePidFile writes the process ID to a new file at the given path. The new file replaces
// an older file or a symbolic link. The returned function remove removes the new file,
// unless another process has replaced it meanwhile.
func writePidFile(path string) (remove func(), err error) {
	if err := durable.Write(path, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("cannot write the process ID: %w", err)
	}
	if _, ok := durable.Descriptor(path); ok {
		return func() {}, nil
	}
	ours, err := os.Lstat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot write the process ID: %w", err)
	}
	return func() {
		if now, err := os.Lstat(path); err == nil && now.Mode().IsRegular() && os.SameFile(now, ours) {
			os.Remove(path) // errors are ignored, because a leftover file does no harm
		}
	}, nil
}

// The method certificates returns the mode of TLS and the configuration of TLS. If TLS is
// used, the configuration contains the certificates.
func (o *Options) certificates() (server.TLSMode, *tls.Config, error) {
	mode := map[string]server.TLSMode{"off": server.TLSOff, "on": server.TLSOn, "require": server.TLSRequire}[o.TLS]
	if o.TLS == "" && o.TLSCertificates != "" {
		mode = server.TLSOn // nbdkit does the same
	}
	if mode == server.TLSOff {
		return mode, nil, nil
	}
	dir := o.TLSCertificates
	if dir == "" {
		if dir = certificateFolder(); dir == "" {
			return 0, nil, usage.New(fmt.Sprintf("--tls %s: no folder with certificates was found", o.TLS), "name a folder with the files server-cert.pem and server-key.pem: --tls-certificates DIR")
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
		o.Log.Debug("clients may connect without TLS, and an attacker on the network can make them do so: --tls require refuses such connections")
	}
	return mode, config, nil
}

// certificateFolder returns the folder in which nbdkit would find certificates. It returns
// "" if nbdkit would find none.
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
