package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/vddk"
)

// verifyCommand compares disks, see docs/cli.md.
type verifyCommand struct {
	Src string `arg:"" name:"SRC" help:"The disk to compare DST with, at any address that the command copy accepts, except standard input. With --digest, SRC is the disk to verify, and DST must be left out."`
	Dst string `arg:"" name:"DST" optional:"" help:"The disk to verify, at any address that SRC can have."`

	sourceFlags

	Format string      `help:"Format of DST: raw or vmdk. By default it is detected from the content." enum:",raw,vmdk" default:"" placeholder:"FORMAT" group:"Target:"`
	Strict bool        `help:"Also compare the allocation: DST must have holes exactly where SRC has them." group:"Target:"`
	Digest digestValue `help:"Verify a single disk by comparing it with this digest: 64 hexadecimal digits after the prefix \"blksum:\" (as nbdcopy --blkhash computes it) or \"sha256:\". Digits without a prefix are a blksum digest." placeholder:"VALUE" group:"Target:"`

	RequestSize bytesize.Size `help:"Number of bytes in each read (default 1MiB)." default:"1MiB" placeholder:"SIZE" group:"Speed:"`
	Connections connections   `help:"Number of connections to each server, or auto. For an NBD server, auto means 4 connections if the server allows several connections. For VDDK, it means up to 4 connections, as long as each new connection makes reading faster." default:"auto" placeholder:"N|auto" group:"Speed:"`
	Depth       int           `help:"Number of concurrent reads on each connection (default 4)." default:"4" placeholder:"N" group:"Speed:"`

	Progress string `help:"How to show progress: auto, bar, json or none." enum:"auto,bar,json,none" default:"auto" group:"Report:"`
}

// addresses are the parsed addresses of the disks. With --digest there is only a
// target, and source is nil.
type addresses struct{ source, target address.Address }

// The method all returns the addresses that there are.
func (a addresses) all() []address.Address {
	if a.source == nil {
		return []address.Address{a.target}
	}
	return []address.Address{a.source, a.target}
}

// digestValue is the value of --digest. Its text has the same form as a digest in the
// report of a copy: the algorithm, a colon and hexadecimal digits ("sha256:...").
type digestValue struct {
	algorithm digest.Algorithm
	hex       string // hexadecimal digits in lower case
}

func (d digestValue) String() string { return string(d.algorithm) + ":" + d.hex }

func (d *digestValue) UnmarshalText(text []byte) error {
	d.algorithm, d.hex = digest.Blksum, string(text)
	if name, value, ok := strings.Cut(d.hex, ":"); ok {
		var err error
		if d.algorithm, err = digest.Parse(name); err != nil {
			return err
		}
		d.hex = value
	}
	b, err := hex.DecodeString(d.hex)
	if err != nil || len(b) != 32 {
		return fmt.Errorf("%q is not a digest: want 64 hexadecimal digits", d.hex)
	}
	d.hex = strings.ToLower(d.hex)
	return nil
}

// Validate is called by kong after parsing. It checks combinations of flags.
func (c *verifyCommand) Validate() error {
	one := c.Digest != digestValue{}
	switch {
	case !one && c.Dst == "":
		return errors.New("only one disk is given, but a comparison needs two disks or a digest: want SRC and DST, or --digest VALUE and one disk")
	case one && c.Dst != "":
		return fmt.Errorf("--digest needs exactly one disk, but two are given: %s and %s", c.Src, c.Dst)
	case one && c.Strict:
		return errors.New("--strict compares the allocation of two disks and cannot be used with --digest")
	case one && c.SourceFormat != "":
		return errors.New("--source-format cannot be used with --digest: give the format of the disk with --format")
	}
	return validateRequests(c.RequestSize, c.Depth)
}

// differenceError reports a difference between disks. Its exit status is 3.
type differenceError struct{ line string }

func (e *differenceError) Error() string { return e.line }

// ExitStatus returns the exit status for the error. Package report calls this method.
func (*differenceError) ExitStatus() int { return exit.Difference }

func (c *verifyCommand) Run(ctx context.Context, logs *logFlags, notice *stopping) error {
	counters := new(progress.Counters)
	style, asJSON := logs.style(c.Progress)
	display := progress.NewDisplay(displayTo(style), c.Src, counters)
	notice.over(display, asJSON, readsOf(display))
	at, err := c.addresses()
	if err != nil {
		err = fmt.Errorf("verify: %w", err)
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	if err := c.choose(reads{requestSize: c.RequestSize, depth: c.Depth, connections: c.Connections}, at.all()...); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	outputs := new(outputs)
	outputs.add("--log-file", logs.LogFile)
	outputs.add("--nfc-trace", c.NFCTrace)
	c.sourceFlags.protect(outputs, "SRC", at.source)
	outputs.protectSource("DST", at.target)
	if err := outputs.check(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	log, closeLog, err := logs.open(display, asJSON)
	if err != nil {
		return usage.Wrap(err)
	}
	c.login.pause = pauseOf(display)
	err = shown(display, func() (err error) {
		if at.source == nil {
			err = c.sum(ctx, at.target, outputs, log, counters)
		} else {
			err = c.compare(ctx, at, outputs, log, counters)
		}
		if err == nil {
			display.End("") // the log says that the disks are identical
		}
		return err
	})
	var different *differenceError
	if errors.As(err, &different) {
		if _, failed := fmt.Fprintln(textOutput, different); failed != nil {
			err = failed
		}
	} else if err != nil {
		err = fmt.Errorf("verify: %w", err)
	}
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err == nil {
		return nil
	}
	// A difference was already printed on standard output. It is not printed again as an
	// error message, but it is reported as JSON.
	if asJSON || !errors.As(err, &different) {
		fail(errorOutput, asJSON, err)
	}
	return &reportedError{err}
}

func (c *verifyCommand) options(counters *progress.Counters) transfer.CompareOptions {
	return transfer.CompareOptions{
		RequestSize: int(c.RequestSize), Requests: c.nfcDepth(c.Depth), Counters: counters, Strict: c.Strict,
	}
}

// loggingOpener returns the Opener for the source and the target.
func (c *verifyCommand) loggingOpener(log *slog.Logger) *sourceopen.Opener {
	o := c.opener()
	o.VDDK.Options.Registry = vddk.NewRegistry(1)
	o.VDDK.Options.RequestSize, o.VDDK.Options.Depth = int(c.RequestSize), c.nfcDepth(c.Depth)
	o.VDDK.Options.Connections, o.NBD.Connections = int(c.Connections), int(c.Connections)
	o.VDDK.Options.Log, o.VDDK.Options.Warn = log, func(message string) { log.Warn(message) }
	o.NBD.Warn = o.VDDK.Options.Warn
	o.Retry.OnRetry = retry.LogTo(log, "reading is tried again")
	return o
}

// The method addresses parses SRC and DST. With --digest there is no source.
func (c *verifyCommand) addresses() (at addresses, err error) {
	target := c.Src
	if c.Digest == (digestValue{}) {
		if at.source, err = address.Parse(c.Src, address.Disk); err != nil {
			return at, fmt.Errorf("source: %w", err)
		}
		target = c.Dst
	}
	if target == (address.Null{}).String() {
		return at, usage.New(`target: a copy to "null:" stores nothing, and there is no data to verify`, "for a file of that name write ./null:")
	}
	if at.target, err = address.Parse(target, address.Disk); err != nil {
		return at, fmt.Errorf("target: %w", err)
	}
	return at, nil
}

func (c *verifyCommand) compare(ctx context.Context, at addresses, outputs *outputs, log *slog.Logger, counters *progress.Counters) error {
	opener := c.loggingOpener(log)
	src, err := opener.OpenAddress(ctx, at.source, c.SourceFormat)
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	defer src.Close()
	dst, err := openTarget(ctx, opener, at.target, c.Format)
	if err != nil {
		return err
	}
	defer dst.Close()
	if err := outputs.checkOpened(opener); err != nil {
		return err
	}
	warnOf(log, src, dst)
	o := c.options(counters)
	o.Requests = transfer.Requests(c.nfcDepth(c.Depth), src, dst)
	_, isExport := at.target.(address.NBD)
	o.TargetMayBeLonger = isExport || isDevice(c.Dst, dst)
	diff, err := transfer.Compare(ctx, src, dst, o)
	if err != nil {
		return err
	}
	if diff != nil {
		return &differenceError{diff.String()}
	}
	log.Info("identical", "bytes", src.Size())
	return nil
}

func (c *verifyCommand) sum(ctx context.Context, target address.Address, outputs *outputs, log *slog.Logger, counters *progress.Counters) error {
	opener := c.loggingOpener(log)
	d, err := openTarget(ctx, opener, target, c.Format)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := outputs.checkOpened(opener); err != nil {
		return err
	}
	warnOf(log, d)
	want := c.Digest
	o := c.options(counters)
	o.Requests = transfer.Requests(c.nfcDepth(c.Depth), d)
	got, err := transfer.Sum(ctx, d, want.algorithm, o)
	if err != nil {
		return fmt.Errorf("target: %w", err)
	}
	if got != want.hex {
		return &differenceError{fmt.Sprintf("digests differ: expected %s, target %s", want, digestValue{want.algorithm, got})}
	}
	log.Info("identical", "bytes", d.Size(), "digest", want)
	return nil
}

// openTarget opens the disk that was the target of a copy.
func openTarget(ctx context.Context, opener *sourceopen.Opener, a address.Address, format string) (source.Disk, error) {
	// Opening an empty source is refused as a probable mistake. An empty target is
	// opened as a raw disk, so that verify reports it as a difference.
	if fi, err := os.Stat(a.String()); err == nil && format == "" && fi.Mode().IsRegular() && fi.Size() == 0 {
		format = "raw"
	}
	d, err := opener.OpenAddress(ctx, a, format)
	if err != nil {
		return nil, fmt.Errorf("target: %w", err)
	}
	return d, nil
}

// isDevice reports whether the disk d, which was opened from the given path, is a block
// device that is read as a raw disk. Such a device may be larger than the disk that was
// copied to it.
func isDevice(path string, d source.Disk) bool {
	fi, err := os.Stat(path)
	if err != nil || fi.Mode()&os.ModeDevice == 0 {
		return false
	}
	described, ok := source.Ability[source.Described](d)
	return ok && described.Info().Format == "raw"
}
