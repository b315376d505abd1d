package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/vddk"
)

// sourceFlags are the flags of every command that opens a source. docs/cli.md describes
// them.
type sourceFlags struct {
	SourceFormat string   `help:"Format of SRC: raw, vmdk or qcow2. By default it is detected from the content." enum:",raw,vmdk,qcow2" default:"" placeholder:"FORMAT" group:"Source:"`
	AllowPath    []string `help:"Another folder with files that the image SRC may refer to (repeatable; \"/\" allows all files). Files in the folder of SRC are always allowed." placeholder:"DIR" sep:"none" group:"Source:"`
	SingleLink   bool     `help:"Read SRC without its parent images. Ranges that are stored only in a parent are reported as missing, not as zeros." group:"Source:"`

	retryFlags
	vddkFlags
	servers *servers       `kong:"-"`
	step    func(nfc.Step) `kong:"-"` // is called when a step of opening a disk over NFC begins; may be nil
}

// AfterApply is called by kong after parsing. It keeps the sessions of the command, for the
// disks of VMs. It hides the method of serverFlags, which it calls.
func (f *sourceFlags) AfterApply(environment *secretEnvironment, servers *servers, parsed *kong.Context) error {
	f.servers = servers
	return f.serverFlags.AfterApply(environment, parsed)
}

// The method opener returns an Opener with the options that the flags set. Before the
// caller opens a disk, it sets Log and Warn in the field VDDK.Options of the Opener, and
// the options that tune a copy. If the caller opens several disks, it also sets
// VDDK.Options.Registry. To open a disk, it passes the value of --source-format to the
// method Open of the Opener.
func (f *sourceFlags) opener() *sourceopen.Opener {
	o := &sourceopen.Opener{
		AllowPath: f.AllowPath, SingleLink: f.SingleLink,
		NBD:   client.Options{Timeout: time.Duration(f.Timeout)},
		Retry: source.RetryOptions{Retries: int(f.Retries), Timeout: time.Duration(f.RetryTimeout)},
		VDDK:  &sourceopen.VDDK{Options: vddk.Options{Timeout: time.Duration(f.Timeout), Debug: f.Debug}},
	}
	o.VM = func(ctx context.Context, a address.VM) (source.Disk, error) {
		return f.openVM(ctx, a, o, false, "", nil)
	}
	if f.chosen.nfc {
		o.Datastore = func(ctx context.Context, a address.Datastore) (source.Disk, error) { return f.openDatastore(ctx, a, o) }
	}
	o.VDDK.Params = func(ctx context.Context, file string) (vddk.Params, error) {
		warn := o.VDDK.Options.Warn
		if warn == nil {
			warn = func(string) {}
		}
		p, err := f.params(ctx, file, f.SingleLink, warn)
		if log := o.VDDK.Options.Log; err == nil && log != nil {
			f.logProvenance(log)
			f.chosen.log(f.servers, log)
		}
		return p, err
	}
	return o
}

// The method protect protects the files of a source from being overwritten by outputs. The
// parameter role is what messages call the source, such as "SRC".
func (f *sourceFlags) protect(o *outputs, role string, a address.Address) {
	o.protectSource(role, a)
	f.protectSecretFlags(o)
	if f.remoteAddress(a) {
		f.protectProfile(o)
	}
}

// The method open opens the log and the source of a command that only reads metadata. The
// result done is a function that closes both.
func (f *sourceFlags) open(ctx context.Context, src address.Address, logs *logFlags) (d source.Disk, done func(), err error) {
	outputs := new(outputs)
	outputs.add("--log-file", logs.LogFile)
	outputs.add("--nfc-trace", f.NFCTrace)
	f.protect(outputs, "SRC", src)
	if err := outputs.check(); err != nil {
		return nil, nil, err
	}
	log, closeLog, err := logs.open(errorOutput, false)
	if err != nil {
		return nil, nil, usage.Wrap(err)
	}
	opener := f.opener()
	opener.VDDK.Options.Log, opener.VDDK.Options.Warn = log, func(message string) { log.Warn(message) }
	opener.NBD.Warn = opener.VDDK.Options.Warn
	opener.Retry.OnRetry = retry.LogTo(log, "reading is tried again")
	if d, err = opener.OpenAddress(ctx, src, f.SourceFormat); err != nil {
		closeLog()
		return nil, nil, err
	}
	if err := outputs.checkOpened(opener); err != nil {
		d.Close()
		closeLog()
		return nil, nil, err
	}
	warnOf(log, d)
	if i, ok := source.Ability[source.Described](d); ok {
		info := i.Info()
		if what := sourceopen.FormatByName(src); info.Format == "raw" && f.SourceFormat == "" && what != "" {
			log.Warn(fmt.Sprintf("%s has the name of %s but is none: it is read as a raw disk (confirm with --source-format raw)", src, what))
		}
		log.Debug("source", "format", info.Format, "subformat", info.Subformat, "size", d.Size(), "chain", strings.Join(info.Chain, " <- "))
	}
	return d, func() {
		d.Close()
		closeLog()
	}, nil
}

// warnOf logs the warnings that the given disks have collected.
func warnOf(log *slog.Logger, disks ...source.Disk) {
	for _, d := range disks {
		if w, ok := source.Ability[sourceopen.Warned](d); ok {
			for _, message := range w.Warnings() {
				log.Warn(message)
			}
		}
	}
}
