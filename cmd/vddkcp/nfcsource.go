package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// The method openNFC opens a disk over NFC.
func (f *frozenDisk) openNFC(ctx context.Context, o *sourceopen.Opener) (source.Disk, error) {
	options, err := f.flags.nfcOptions(o)
	if err != nil {
		return nil, err
	}
	options.Budget = f.hostBudget
	f.flags.chosen.log(f.servers, options.Log)
	for _, message := range f.flags.nfcWarnings() {
		options.Warn(message)
	}
	return nfc.Open(ctx, nfc.Params{
		Name: f.disk.File, Identity: f.identity(), Frozen: f.snapshot != nil, Capacity: f.disk.Size, UUID: f.disk.UUID,
	}, nfc.TicketsFunc(f.ticket), options)
}

// The method identity returns what identifies the disk. It does not depend on the names of files,
// because the files of a VM can be moved.
func (f *frozenDisk) identity() string {
	id := fmt.Sprintf("nfc:%s:%s:%s:%d:%d", f.server(), f.vm.Moref(), f.disk.UUID, f.disk.Key, f.disk.Size)
	if f.snapshot != nil {
		id += ":" + f.snapshot.Moref
	}
	return id
}

// The method ticket asks the server for a ticket, after it has found out the present name of the
// disk's file. It implements nfc.Tickets.
func (f *frozenDisk) ticket(ctx context.Context) (nfc.Ticket, error) {
	now, err := f.present(ctx)
	if err != nil {
		return nfc.Ticket{}, permanentIfGone(err)
	}
	t, err := f.vm.Ticket(ctx)
	if err != nil {
		return nfc.Ticket{}, permanentIfGone(err)
	}
	t.File = now.File
	return t, nil
}

// permanentIfGone marks an error as permanent if it says that the snapshot or the VM is gone.
func permanentIfGone(err error) error {
	if errors.Is(err, inventory.ErrSnapshotGone) || errors.Is(err, inventory.ErrVMGone) {
		return retry.Permanent(err)
	}
	return err
}

// The method hostBudget returns the limits for memory and connections of the host of the disk.
func (f *frozenDisk) hostBudget(ctx context.Context) (*nfcbudget.Budget, error) {
	if f.budget != nil {
		return f.budget, nil
	}
	vm, err := f.vm.Describe(ctx)
	if err != nil {
		return nil, permanentIfGone(err)
	}
	return f.servers.budget("host " + vm.Host), nil
}

// The method nfcOptions returns the options for reading a disk over NFC. They are the options for
// VDDK of an Opener, and those of the flags.
func (f *sourceFlags) nfcOptions(o *sourceopen.Opener) (nfc.Options, error) {
	r, err := f.resolve()
	if err != nil {
		return nfc.Options{}, err
	}
	trace, err := f.servers.nfcTrace(f.NFCTrace)
	if err != nil {
		return nfc.Options{}, err
	}
	v := &o.VDDK.Options
	options := nfc.Options{
		Depth: v.Depth, RequestSize: v.RequestSize, Timeout: v.Timeout, Compression: f.Compression,
		Buffers: nfcbudget.Buffers(f.NFCBuffers), HostPort: int(f.nfcPort(r, f.NFCHostPort)), Clear: f.clear(),
		Retry: o.Retry, Hosts: f.servers.nfcHosts(), Quirks: f.chosen.quirks, Trace: trace, Step: f.step, Log: v.Log, Warn: v.Warn,
	}
	if options.Warn == nil {
		options.Warn = func(string) {}
	}
	return options, nil
}

// The method nfcWarnings returns what the user should know before a disk is read.
func (f *sourceFlags) nfcWarnings() (messages []string) {
	if f.clear() {
		messages = append(messages, "--transports nbd: the data of the disk is sent without encryption, and nothing protects it against changes on the way")
	}
	if q := f.chosen.quirks.String(); q != "" {
		messages = append(messages, "VDDKCP_NFC changes the protocol: "+printable.Name(q))
	}
	return messages
}

// The method openDatastore opens a disk over NFC that is named by its file in a datastore. The flag
// --vm names its VM, which the server needs to know for a ticket.
func (f *sourceFlags) openDatastore(ctx context.Context, a address.Datastore, o *sourceopen.Opener) (source.Disk, error) {
	if _, err := o.VDDK.Params(ctx, a.String()); err != nil {
		if f.VM == "" {
			err = alsoHint(err, "name the VM of the disk with --vm moref=ID, or name the disk as vm:NAME#N instead of its file")
		}
		return nil, err
	}
	log := o.VDDK.Options.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	session, err := f.servers.session(ctx, &f.serverFlags, f.sessionOptions(log))
	if err != nil {
		return nil, err
	}
	vm, err := f.servers.find(ctx, session, f.VM)
	if err != nil {
		return nil, err
	}
	v := &vmSource{servers: f.servers, session: session, vm: vm, flags: f}
	disk, power, err := v.diskOfFile(ctx, a.String())
	if err != nil {
		return nil, permanentIfGone(err)
	}
	disk.budget = o.VDDK.Options.Budget
	d, err := disk.openNFC(ctx, o)
	if err != nil && disk.snapshot == nil && power != inventory.Off {
		named := address.VM{Name: vm.Name(), Disk: fmt.Sprint(disk.disk.N)}
		err = alsoHint(err, fmt.Sprintf("the VM is not powered off: name a snapshot with --snapshot, or read %s, for which vddkcp makes one", named))
	}
	return d, err
}

// alsoHint returns err with a hint before the one that it has.
func alsoHint(err error, hint string) error {
	if more := hinted.Of(err); more != "" {
		hint += "; " + more
	}
	return hinted.Error(err, hint)
}

// The method diskOfFile returns the disk of the VM, or of the snapshot of --snapshot, that has the
// given file now. It also returns the power state of the VM.
func (v *vmSource) diskOfFile(ctx context.Context, file string) (*frozenDisk, inventory.Power, error) {
	vm, err := v.vm.Describe(ctx)
	if err != nil {
		return nil, "", err
	}
	d := withFile(vm.Disks, file)
	if v.flags.Snapshot == "" {
		if d == nil {
			return nil, "", notOfVM(file, vm, nil)
		}
		return &frozenDisk{vmSource: v, disk: d, before: vm}, vm.Power, nil
	}
	s, err := v.vm.FindMoref(ctx, v.flags.Snapshot)
	if err != nil {
		if errors.Is(err, inventory.ErrSnapshotGone) {
			err = fmt.Errorf("%w: %w", source.ErrGone, err)
		}
		return nil, "", err
	}
	if in := withFile(s.Disks, file); in != nil {
		d = in
	} else if d != nil {
		d = s.Disk(d)
	}
	if d == nil {
		return nil, "", notOfVM(file, vm, s)
	}
	return &frozenDisk{vmSource: v, snapshot: s, foreign: true, disk: d}, vm.Power, nil
}

func withFile(disks []inventory.Disk, file string) *inventory.Disk {
	for i := range disks {
		if disks[i].File == file {
			return &disks[i]
		}
	}
	return nil
}

// notOfVM returns the error for a file that no disk of the VM has, or no disk of its snapshot if s is
// not nil.
func notOfVM(file string, vm *inventory.VM, s *inventory.Snapshot) error {
	what, disks := "the VM "+printable.Name(vm.Name), vm.Disks
	if s != nil {
		what, disks = "the snapshot "+printable.Name(cmp.Or(s.Name, s.Moref))+" of "+what, s.Disks
	}
	list := "no disks"
	for i := range disks {
		if i == 0 {
			list = printable.Name(disks[i].File)
		} else {
			list += ", " + printable.Name(disks[i].File)
		}
	}
	return retry.Permanent(hinted.Error(fmt.Errorf("no disk of %s has the file %s", what, printable.Name(file)), "the files of the disks are: "+list))
}
