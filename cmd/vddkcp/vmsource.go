package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vddk"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// vmSource opens the disks of a VM through VDDK or over NFC. It implements machine.Opener.
type vmSource struct {
	servers *servers
	session *vsphere.Session
	vm      *vsphere.VM
	flags   *sourceFlags
	revive  bool // open a disk again that was lost, however late

	byPassword atomic.Bool // the server has refused the cookie of the session to VDDK
}

// findVM logs in and finds a VM. The parameter name is one of the forms that name a VM on the
// command line.
func (f *sourceFlags) findVM(ctx context.Context, name string, o sessionOptions) (*vmSource, error) {
	switch {
	case f.VM != "":
		return nil, usage.Errorf("--vm: the VM is named already, %s: leave this flag out", printable.Name(name))
	case f.Snapshot != "":
		return nil, usage.Errorf("--snapshot: vddkcp makes a snapshot of the VM %s itself: leave this flag out", printable.Name(name))
	}
	if r, err := f.resolve(); err == nil {
		f.connects(r)
	}
	if o.log != nil {
		f.logProvenance(o.log)
	}
	session, err := f.servers.session(ctx, &f.serverFlags, o)
	if err != nil {
		return nil, err
	}
	vm, err := f.servers.find(ctx, session, name)
	if err != nil {
		return nil, err
	}
	return &vmSource{servers: f.servers, session: session, vm: vm, flags: f}, nil
}

// The method sessionOptions returns the options of a session with the given log.
func (f *sourceFlags) sessionOptions(log *slog.Logger) sessionOptions {
	return sessionOptions{
		timeout: time.Duration(f.Timeout), log: log, warn: func(message string) { log.Warn(message) },
		retry: source.RetryOptions{Retries: int(f.Retries), Timeout: time.Duration(f.RetryTimeout), OnRetry: retry.LogTo(log, askedAgain)},
	}
}

// The method spec returns the Spec for copying or opening disks of the VM.
func (v *vmSource) spec(name string, log *slog.Logger) machine.Spec {
	return machine.Spec{
		Machine: v.vm, Opener: v, Server: v.server(), Name: name, Session: v.session.Key, EndSession: v.session.EndSession,
		Snapshots: &v.servers.snapshots, Left: v.servers.stands, Log: log,
	}
}

// The method server returns what identifies the server in state files and identities.
func (v *vmSource) server() string {
	return cmp.Or(v.session.About().InstanceUUID, v.session.Server)
}

// Open implements machine.Opener.
func (v *vmSource) Open(ctx context.Context, s *inventory.Snapshot, d *inventory.Disk, o *sourceopen.Opener) (source.Disk, error) {
	// The caller may open several disks with the same Opener at the same time.
	o = &sourceopen.Opener{Retry: o.Retry, SingleLink: o.SingleLink, VDDK: &sourceopen.VDDK{Options: o.VDDK.Options}}
	options := &o.VDDK.Options
	if options.Registry == nil {
		options.Registry = v.servers.logins()
	}
	disk := &frozenDisk{vmSource: v, snapshot: s, disk: d, budget: options.Budget}
	options.Refresh = disk.refresh
	// The files may have been moved since the snapshot was made, which may be hours ago.
	o.VDDK.Params = func(ctx context.Context, _ string) (vddk.Params, error) { return disk.refresh(ctx, nil) }
	open := func(ctx context.Context) (source.Disk, error) {
		if v.flags.chosen.nfc {
			return disk.openNFC(ctx, o)
		}
		v.flags.chosen.log(v.servers, options.Log)
		return o.OpenAddress(ctx, address.ForVDDK(d.File), "raw")
	}
	if !v.revive {
		return open(ctx)
	}
	return source.Retry(ctx, open, source.RetryOptions{Revive: true, Timeout: math.MaxInt64 / 2, OnRetry: o.Retry.OnRetry})
}

// Ready implements machine.Opener. It looks for the library of VDDK, but does not load it.
func (v *vmSource) Ready() error {
	if v.flags.chosen.nfc {
		return nil
	}
	r, err := v.flags.resolve()
	if err != nil {
		return err
	}
	libDir, _ := v.flags.connects(r)
	if _, err = vddk.FindLibrary(libDir); err != nil {
		return fmt.Errorf("vddk: %w", orOverNFC(err))
	}
	return nil
}

// frozenDisk knows how a disk of a VM is reached.
type frozenDisk struct {
	*vmSource
	snapshot *inventory.Snapshot // nil: the VM is powered off
	foreign  bool                // snapshot was not made by vddkcp, and its name may not be unique
	disk     *inventory.Disk     // as it was when it was opened first
	before   *inventory.VM       // as it was then, if it must not change while the disk is read; else nil
	budget   *vddk.Budget        // of the host that a job file names; nil: of the host on which the VM is registered
}

// The method params returns the parameters with which VDDK opens the disk, which is now the disk
// now: with the cookie of the session, so that VDDK does not log in itself, unless the server has
// refused the cookie.
func (f *frozenDisk) params(ctx context.Context, now *inventory.Disk) (vddk.Params, error) {
	r, err := f.flags.resolve()
	if err != nil {
		return vddk.Params{}, err
	}
	p := f.flags.tuning(now.File, f.flags.SingleLink, r)
	p.Server, p.Port, p.Thumbprint = f.session.Server, f.session.Port, f.session.Thumbprint
	p.User = cmp.Or(f.session.User, "vddkcp")
	p.VM = "moref=" + f.vm.Moref()
	if f.snapshot != nil {
		p.Snapshot = f.snapshot.Moref
	}
	if p.Budget, err = f.hostBudget(ctx); err != nil {
		return p, err
	}
	if f.byPassword.Load() {
		p.Password = f.session.Password
		return p, nil
	}
	p.Cookie, err = f.session.Cookie(ctx)
	return p, err
}

// The method refresh returns the parameters for opening the disk again, because its files may have
// been moved, and the session may be a new one. The parameter refused is nil, or the error with
// which the server has refused the cookie of the session. In that case VDDK logs in by itself, if
// there is a password.
func (f *frozenDisk) refresh(ctx context.Context, refused error) (vddk.Params, error) {
	now, err := f.present(ctx)
	if err != nil {
		return vddk.Params{}, permanentIfGone(err)
	}
	switch {
	case refused == nil:
	case f.session.Password.IsSet():
		f.byPassword.Store(true)
	default:
		return vddk.Params{}, retry.Permanent(hinted.Error(refused, "the server does not let VDDK use the session of the cookie: pass --user and --password"))
	}
	return f.params(ctx, now)
}

// The method present returns the disk as the server describes it now.
func (f *frozenDisk) present(ctx context.Context) (*inventory.Disk, error) {
	var disks []inventory.Disk
	if f.snapshot != nil {
		s, err := f.presentSnapshot(ctx)
		if err != nil {
			return nil, err
		}
		disks = s.Disks
	} else {
		vm, err := f.vm.Describe(ctx)
		if err == nil {
			err = f.changed(vm)
		}
		if err != nil {
			return nil, err
		}
		disks = vm.Disks
	}
	for i := range disks {
		if inventory.SameDisk(&disks[i], f.disk) {
			return &disks[i], nil
		}
	}
	return nil, retry.Permanent(fmt.Errorf("the VM does not have the disk %s any more", printable.Name(f.disk.Label)))
}

// The method changed returns an error if the VM was changed since its disk was opened by the name
// of its file and without a snapshot. A VM that was powered on and off again has another content
// than before.
func (f *frozenDisk) changed(vm *inventory.VM) error {
	switch {
	case f.before == nil:
		return nil
	case vm.Power != f.before.Power:
		return source.Changed(fmt.Errorf("the VM is %s now, and was %s before, and no snapshot keeps the content of the disk", vm.Power, f.before.Power))
	case vm.ChangeVersion != f.before.ChangeVersion:
		return source.Changed(errors.New("the VM was changed meanwhile, and no snapshot keeps the content of the disk"))
	}
	return nil
}

func (f *frozenDisk) presentSnapshot(ctx context.Context) (*inventory.Snapshot, error) {
	if f.foreign {
		return f.vm.FindMoref(ctx, f.snapshot.Moref)
	}
	s, err := f.vm.Find(ctx, f.snapshot.Name)
	if err == nil && s.Moref != f.snapshot.Moref {
		err = inventory.ErrSnapshotGone
	}
	return s, err
}

// The method openVM opens a disk of a VM for a command that only reads it. It makes a snapshot,
// which is removed when the disk is closed. The parameters earlier and keep are the fields Continue
// and Keep of machine.Spec.
func (f *sourceFlags) openVM(ctx context.Context, a address.VM, o *sourceopen.Opener, revive bool, earlier string, keep func() bool) (source.Disk, error) {
	log := o.VDDK.Options.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	v, err := f.findVM(ctx, a.Name, f.sessionOptions(log))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	v.revive = revive
	spec := v.spec(a.Name, log)
	spec.Single, spec.Continue, spec.Keep = true, earlier, keep
	if spec.Only, err = v.oneDisk(ctx, a); err != nil {
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	d, err := machine.Open(ctx, spec, o)
	if err != nil {
		f.servers.closed(err)
		return nil, fmt.Errorf("%s: %w", a, err)
	}
	return &vmDisk{d, f.servers}, nil
}

// The method oneDisk returns the disk that an address of a VM names. An address that names no
// disk means the only disk of the VM.
func (v *vmSource) oneDisk(ctx context.Context, a address.VM) (only []string, err error) {
	if a.Disk != "" {
		return []string{a.Disk}, nil
	}
	vm, err := v.vm.Describe(ctx)
	if err != nil {
		return nil, err
	}
	d, err := inventory.FindDisk(vm, "")
	if err != nil {
		return nil, err
	}
	return []string{strconv.Itoa(d.N)}, nil // the VM may get another disk at any time
}

// vmDisk tells servers whether its snapshot was removed when it was closed.
type vmDisk struct {
	source.Disk
	servers *servers
}

// Unwrap implements source.Wrapper.
func (d *vmDisk) Unwrap() source.Disk { return d.Disk }

// Close closes the disk. If its snapshot cannot be removed, that is no error of the disk: vddkcp
// then ends with an exit status of its own.
func (d *vmDisk) Close() error {
	err := d.Disk.Close()
	d.servers.closed(err)
	return withoutLeft(err)
}

// withoutLeft returns err without the errors that say that a snapshot is left on the server.
func withoutLeft(err error) error {
	switch e := err.(type) {
	case *inventory.LeftError:
		return nil
	case interface{ Unwrap() []error }:
		var others []error
		for _, inner := range e.Unwrap() {
			others = append(others, withoutLeft(inner))
		}
		return errors.Join(others...)
	}
	return err
}
