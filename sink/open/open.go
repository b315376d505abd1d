// Package open turns the address of a target into a sink.Disk. It is the one
// place that knows all writers.
package open

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// UsageError is an address or an option that makes no sense whatever the state
// of the machine.
type UsageError struct{ message, hint string }

func (e *UsageError) Error() string { return e.message }

// Hint tells what to do; it may be empty.
func (e *UsageError) Hint() string { return e.hint }

func usage(format string, args ...any) error {
	return &UsageError{message: fmt.Sprintf(format, args...)}
}

// Options say how to write a target. The zero value creates what the address
// names, and replaces nothing. The fields are explained at raw.Options.
type Options struct {
	sink.Options
	Format        string // "raw", "qcow2" or "vmdk"; "" goes by the name
	Compress      string // METHOD or METHOD:LEVEL; "" is the format's default
	Force         bool
	DropPartial   bool
	Preallocation raw.Preallocation
	TargetIsZero  bool
	DropCache     bool
	Need          int64 // bytes
	Source        func(os.FileInfo) (path string, ok bool)
	Warn          func(message string)
	Stdout        *os.File       // what "-" means; nil: os.Stdout
	NBD           client.Options // its Warn is not looked at

	// Of qcow2, explained at qcow2.Options.
	ClusterSize                int64 // bytes
	BackingName, BackingFormat string
}

// ofImages names an option that is there and does not go with raw disks.
func (o Options) ofImages() string {
	switch {
	case o.Compress != "" && o.Compress != "none":
		return "--compress " + o.Compress
	case o.ClusterSize != 0:
		return "--cluster-size"
	case o.BackingName != "":
		return "--backing"
	}
	return ""
}

func (o Options) raw() raw.Options {
	return raw.Options{
		Options: o.Options, Force: o.Force, DropPartial: o.DropPartial, Preallocation: o.Preallocation, TargetIsZero: o.TargetIsZero,
		DropCache: o.DropCache, Need: o.Need, Source: o.Source, Warn: o.Warn,
	}
}

// Target is a target that can be written, as far as is known without making
// anything.
type Target struct {
	Address string
	Format  string // "raw", "qcow2" or "vmdk"
	Kind    string // "file", "block device", "NBD export", "stream" or "null"
	Zeroed  bool   // what is not written will read as zeros, see sink.Zeroed
	// CloneUnit is sink.Cloner's; nil where the target can share no blocks.
	CloneUnit func(*os.File) int64
	create    func(context.Context) (sink.Disk, error)
	check     func(context.Context) error // nil: Plan has looked at everything
}

// Place is where a target is written, as far as its address tells.
type Place struct {
	Kind    string // as Target's; "" where the address tells of no target
	Partial string // of a file: its path until it is published
}

// Path is where a file is once it is published.
func (p Place) Path() string { return strings.TrimSuffix(p.Partial, ".partial") }

// PlaceOf looks at an address without asking what Plan asks.
func PlaceOf(address string) Place {
	switch {
	case address == "null:":
		return Place{Kind: "null"}
	case address == "-":
		return Place{Kind: "stream"}
	case nbd.IsURI(address):
		return Place{Kind: "NBD export"}
	}
	if info, err := os.Stat(address); err == nil {
		switch info.Mode().Type() {
		case fs.ModeDevice:
			return Place{Kind: "block device"}
		case fs.ModeNamedPipe, fs.ModeDevice | fs.ModeCharDevice:
			return Place{Kind: "stream"}
		}
	}
	partial, err := raw.Partial(address)
	if err != nil {
		return Place{} // Plan says why
	}
	return Place{"file", partial}
}

// datastorePath is "[DATASTORE] DIR/DISK.vmdk".
var datastorePath = regexp.MustCompile(`(?s)^\[.+\] .`)

// FormatOf is the format that a target is written in: the one that is given, or
// what the name of a file says.
func FormatOf(address, format string) string {
	if format != "" {
		return format
	}
	switch ext := strings.ToLower(filepath.Ext(address)); ext {
	case ".qcow2", ".vmdk":
		switch PlaceOf(address).Kind {
		case "file", "": // what is no target at all is no other one
			return ext[1:]
		}
	}
	return "raw"
}

// String says what the target is: "raw file", "vmdk stream".
func (t *Target) String() string { return t.Format + " " + t.Kind }

// Create makes the target, or opens it.
func (t *Target) Create(ctx context.Context) (sink.Disk, error) { return t.create(ctx) }

// Check looks at what Plan leaves to Create: at an NBD export, without opening it.
// It returns errors.ErrUnsupported where that can't be done.
func (t *Target) Check(ctx context.Context) error {
	if t.check == nil {
		return nil
	}
	return t.check(ctx)
}

// Create is Plan and Target.Create in one.
func Create(ctx context.Context, address string, size int64, o Options) (sink.Disk, error) {
	t, err := Plan(ctx, address, size, o)
	if err != nil {
		return nil, err
	}
	return t.Create(ctx)
}

// Plan finds out what address means for a disk of size bytes, which may be
// sink.UnknownSize: all that is written raw is a sink.Sizer but NBD exports. It is a file, an
// existing block device, FIFO or character device, an NBD URI, "-" for standard
// output, or "null:". It refuses what can be refused before anything is read, made or
// changed: an address or format that is not written, a target that exists, is
// too small, is in use, or is the source, and too little space. Options.Warn is
// called during Plan only, but of an NBD server: that is asked once, by Create,
// since some serve no second client.
func Plan(ctx context.Context, address string, size int64, o Options) (*Target, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if size < 0 && size != sink.UnknownSize {
		return nil, fmt.Errorf("%s: a disk of %d bytes", address, size)
	}
	switch o.Format {
	case "", "raw", "qcow2", "vmdk":
	default:
		return nil, usage("format %q: want raw, qcow2 or vmdk", o.Format)
	}
	if err := CheckAddress(address); err != nil {
		return nil, err
	}
	switch FormatOf(address, o.Format) {
	case "vmdk":
		return planVMDK(address, size, o)
	case "qcow2":
		return planQcow2(address, size, o)
	}
	if option := o.ofImages(); option != "" {
		return nil, usage("%s: %s is not for raw disks", address, option)
	}
	return planRaw(address, size, o)
}

// CheckAddress returns a *UsageError for an address that Plan takes in no format,
// as far as the address tells: it looks for no file and asks no server.
func CheckAddress(addr string) error {
	switch {
	case addr == "":
		return usage("the target is empty: want a path, - or null:")
	case datastorePath.MatchString(addr), strings.HasPrefix(addr, "vddk:"):
		return usage("%s: disks of VMware's are read, not written (a file of that name is ./%[1]s)", addr)
	case nbd.IsURI(addr):
		return nil
	}
	if foreign := (*address.Error)(nil); errors.As(address.Check(addr, address.Target), &foreign) {
		return &UsageError{foreign.Error(), foreign.Hint()}
	}
	return nil
}

func planRaw(address string, size int64, o Options) (*Target, error) {
	if address == "null:" {
		return &Target{Address: address, Format: "raw", Kind: "null", Zeroed: true, create: func(ctx context.Context) (sink.Disk, error) {
			return raw.Null(ctx, size), nil
		}}, nil
	}
	if address == "-" {
		return planStdout(size, o)
	}
	if nbd.IsURI(address) {
		return planNBD(address, size, o)
	}
	// What can't be looked at is left to the check of files, which says why.
	if info, err := os.Stat(address); err == nil {
		switch info.Mode().Type() {
		case fs.ModeDevice:
			return planDevice(address, size, o)
		case fs.ModeNamedPipe, fs.ModeDevice | fs.ModeCharDevice:
			return planStream(address, info, size, o)
		}
	}
	return planFile(address, size, o)
}

func planFile(address string, size int64, o Options) (*Target, error) {
	if o.Format == "" {
		switch ext := strings.ToLower(filepath.Ext(address)); ext {
		case ".qcow", ".qed", ".vdi", ".vhd", ".vhdx", ".ova", ".ovf":
			return nil, usage("%s: format %s is not written; name the target otherwise, or say --format", address, ext[1:])
		}
	}
	if err := raw.CheckFile(address, size, o.raw()); err != nil {
		return nil, err
	}
	t := &Target{Address: address, Format: "raw", Kind: "file", Zeroed: o.Preallocation != raw.PreallocateFull, create: func(ctx context.Context) (sink.Disk, error) {
		o.Warn = nil
		return raw.CreateFile(ctx, address, size, o.raw())
	}}
	if o.Preallocation == raw.PreallocateOff || o.Preallocation == "" {
		t.CloneUnit = func(f *os.File) int64 { return raw.CloneUnit(address, f) }
	}
	return t, nil
}

func planDevice(address string, size int64, o Options) (*Target, error) {
	if err := raw.CheckDevice(address, size, o.raw()); err != nil {
		return nil, err
	}
	return &Target{Address: address, Format: "raw", Kind: "block device", Zeroed: o.TargetIsZero && o.State == nil, create: func(ctx context.Context) (sink.Disk, error) {
		o.Warn = nil // Plan has said it
		return raw.OpenDevice(ctx, address, size, o.raw())
	}}, nil
}

func planNBD(address string, size int64, o Options) (*Target, error) {
	if _, err := nbd.ParseURI(address); err != nil {
		return nil, usage("%v", err)
	}
	if size == sink.UnknownSize {
		return nil, usage("%s: an NBD server takes no stream whose size is not known: say --size", address)
	}
	options := client.SinkOptions{
		Options: o.Options, Client: o.NBD, TargetIsZero: o.TargetIsZero,
		NoHole: o.Preallocation == raw.PreallocateFalloc || o.Preallocation == raw.PreallocateFull,
	}
	options.Client.Warn = o.Warn
	check := func(ctx context.Context) error { return client.Check(ctx, address, size, o.NBD) }
	return &Target{Address: address, Format: "raw", Kind: "NBD export", Zeroed: o.TargetIsZero && o.State == nil, check: check, create: func(ctx context.Context) (sink.Disk, error) {
		return client.Create(ctx, address, size, options)
	}}, nil
}

func planStdout(size int64, o Options) (*Target, error) {
	const name = "standard output"
	stdout := o.Stdout
	if stdout == nil {
		stdout = os.Stdout
	}
	info, err := stdout.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := checkStream(name, info, o); err != nil {
		return nil, err
	}
	if wasClosed(stdout, info) {
		return nil, errClosedStdout
	}
	return &Target{Address: "-", Format: "raw", Kind: "stream", create: func(ctx context.Context) (sink.Disk, error) {
		// The disk closes its file, and the process keeps its standard output.
		fd, err := dup(stdout)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return stream(ctx, os.NewFile(uintptr(fd), name), name, size)
	}}, nil
}

// errClosedStdout is the error of a process that was started without standard
// output: nobody would get the disk.
var errClosedStdout = &closedError{}

type closedError struct{}

func (*closedError) Error() string {
	return "standard output is closed, or is /dev/null opened for reading and writing: the disk would be lost"
}

func (*closedError) Hint() string { return "to only read the source, write null: for DST" }

// wasClosed reports whether the process was started with f closed: the Go runtime
// then opens /dev/null for reading and writing in its place. Shells open /dev/null
// for writing only.
func wasClosed(f *os.File, info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(uint64(st.Rdev)) != 1 || unix.Minor(uint64(st.Rdev)) != 3 {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

func dup(f *os.File) (fd int, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if controlErr := c.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) }); controlErr != nil {
		return 0, controlErr
	}
	return fd, err
}

func planStream(address string, info os.FileInfo, size int64, o Options) (*Target, error) {
	if err := checkStream(address, info, o); err != nil {
		return nil, err
	}
	if err := unix.Faccessat(unix.AT_FDCWD, address, unix.W_OK, unix.AT_EACCESS); err != nil {
		return nil, fmt.Errorf("write to %s: %w", address, err)
	}
	return &Target{Address: address, Format: "raw", Kind: "stream", create: func(ctx context.Context) (sink.Disk, error) {
		w, err := openStream(ctx, address)
		if err != nil {
			return nil, err
		}
		return stream(ctx, w, address, size)
	}}, nil
}

func checkStream(name string, info os.FileInfo, o Options) error {
	if o.State != nil {
		return usage("%s is a stream, which can't be resumed", name)
	}
	if o.Source != nil {
		if path, ok := o.Source(info); ok {
			return fmt.Errorf("%s is a file of the source: the same as %s", name, path)
		}
	}
	return nil
}

// openStream opens a FIFO or character device; a FIFO waits for its reader, as
// long as ctx lives.
func openStream(ctx context.Context, address string) (*os.File, error) {
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		w, err := os.OpenFile(address, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err == nil || !errors.Is(err, unix.ENXIO) {
			return w, err
		}
		if info, statErr := os.Stat(address); statErr != nil || info.Mode().Type() != fs.ModeNamedPipe {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-retry.C:
		}
	}
}

// stream closes w where it fails.
func stream(ctx context.Context, w *os.File, name string, size int64) (sink.Disk, error) {
	d, err := raw.Stream(ctx, w, name, size)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return d, nil
}
