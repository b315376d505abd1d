package machine

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Open makes a snapshot of the VM and opens a disk of it for reading. The fields Only and Skip of
// spec must choose one disk. The snapshot is removed when the disk is closed, unless spec.Keep says
// that it stays. If it cannot be removed, the error of Close is an *inventory.LeftError.
//
// If spec.Continue names a snapshot, Open makes none, and uses that one. If Open then fails, the
// snapshot stays. A disk of another VM is refused before anything is changed.
//
// No state file is written: if the process is killed, vddkcp cleanup finds the snapshot.
func Open(ctx context.Context, spec Spec, opener *sourceopen.Opener) (source.Disk, error) {
	r := newRun(spec)
	spec.Targets = func(_ *inventory.VM, disks []inventory.Disk) ([]string, error) {
		return make([]string, len(disks)), nil
	}
	r.Targets = spec.Targets
	r.Phase(PhaseFind, -1)
	if err := r.find(ctx); err != nil {
		return nil, err
	}
	r.state = newState(r.Server, r.vm, r.disks, r.targets)
	if len(r.disks) != 1 {
		return nil, fmt.Errorf("vm %s: %d disks are chosen, expected one", r.Spec.Name, len(r.disks))
	}
	if err := r.Opener.Ready(); err != nil {
		return nil, err
	}
	if err := r.checkVM(); err != nil {
		return nil, err
	}
	if err := r.checkContinued(); err != nil {
		return nil, err
	}
	acquire, continued := r.acquire, SnapshotIn(spec.Continue) != ""
	if continued {
		acquire = r.acquireAgain
	}
	if err := acquire(ctx); err != nil {
		return nil, r.end(err)
	}
	d, err := r.openDisk(ctx, &r.disks[0], opener)
	if err != nil {
		r.release(ctx, continued) // the next process may be able to open the disk
		return nil, r.end(err)
	}
	return &snapshotDisk{Disk: d, run: r}, nil
}

// The method checkContinued returns an error if Spec.Continue is the identity of a disk that is not
// one of the VM. Without this check, the snapshot of the other VM would look as if somebody had
// removed it.
func (r *run) checkContinued() error {
	if r.Continue == "" || strings.HasPrefix(r.Continue, identityOf(r.Server, r.vm)) {
		return nil
	}
	return usage.New(fmt.Sprintf("an earlier process has opened the disk %s, which is not one of the VM %s", printable.Name(r.Continue), printable.Name(r.vm.Name)),
		"name the same disk as before, or start over")
}

// The method acquireAgain uses the snapshot that an earlier process has made and left. It never
// makes another one, which would have another content.
func (r *run) acquireAgain(ctx context.Context) error {
	name := SnapshotIn(r.Continue)
	snapshot, err := r.Snapshots.acquire(ctx, r.key(), func() (*inventory.Snapshot, error) {
		r.Phase(PhaseSnapshot, -1)
		s, err := r.Machine.Find(ctx, name)
		switch {
		case errors.Is(err, inventory.ErrSnapshotGone):
			return nil, usage.New(fmt.Sprintf("the snapshot %s is gone: somebody has removed it from the VM", printable.Name(name)),
				"the content that it kept cannot be read any more: start over from a new snapshot")
		case err == nil:
			r.Left(r.vm.Name, s.Name, true)
		}
		return s, err
	})
	if err != nil {
		return err
	}
	r.snapshot = snapshot
	r.state.Snapshot = snapshot.Name
	if snapshot.Name != name {
		r.release(ctx, false)
		return fmt.Errorf("this process reads the VM from the snapshot %s, not from %s", printable.Name(snapshot.Name), printable.Name(name))
	}
	return nil
}

// snapshotDisk is a disk of a snapshot that is removed when the disk is closed, unless Spec.Keep
// says that it stays.
type snapshotDisk struct {
	source.Disk
	run  *run
	once sync.Once
	err  error
}

// Unwrap implements source.Wrapper.
func (d *snapshotDisk) Unwrap() source.Disk { return d.Disk }

// Close closes the disk, and removes the snapshot or leaves it to a later process.
func (d *snapshotDisk) Close() error {
	d.once.Do(func() {
		d.err = d.Disk.Close()
		keep := d.run.Keep != nil && d.run.Keep()
		if d.run.release(context.Background(), keep) && keep {
			d.run.Log.Info("the snapshot stays for a later run", "vm", d.run.vm.Name, "snapshot", d.run.state.Snapshot)
		}
		if d.run.left != nil {
			d.err = errors.Join(d.err, d.run.left)
		}
	})
	return d.err
}

// The method openDisk opens a disk of the snapshot, or a disk of the VM if there is no snapshot.
func (r *run) openDisk(ctx context.Context, d *inventory.Disk, o *sourceopen.Opener) (source.Disk, error) {
	frozen := d
	var s *inventory.Snapshot
	if r.snapshot != nil {
		if in := r.snapshot.Disk(d); in != nil {
			frozen, s = in, r.snapshot
		}
	}
	opened, err := r.Opener.Open(ctx, s, frozen, o)
	if err != nil {
		return nil, err
	}
	if size := opened.Size(); size != frozen.Size {
		return nil, errors.Join(fmt.Errorf("%s was opened as a disk of %d bytes, but the server says that it has %d bytes", frozen.File, size, frozen.Size), opened.Close())
	}
	id := &identifiedDisk{Disk: opened, id: Identity(r.Server, r.vm, frozen, nil), proof: "none"}
	if o != nil && o.SingleLink {
		id.id += "+single-link" // another content than that of the whole chain
	}
	if s != nil {
		id.id, id.proof = inSnapshot(id.id, s), "snapshot"
	}
	return id, nil
}

// Identity returns the identity of a disk of a VM, or of a snapshot of the VM if s is not nil. The
// parameter server is Spec.Server.
func Identity(server string, vm *inventory.VM, d *inventory.Disk, s *inventory.Snapshot) string {
	id := identityOf(server, vm) + fmt.Sprintf("%s:%d:%d", d.UUID, d.Key, d.Size)
	if s != nil {
		id = inSnapshot(id, s)
	}
	return id
}

// inSnapshot returns the identity of a disk of a snapshot. The parameter id is that of the disk
// without the snapshot.
func inSnapshot(id string, s *inventory.Snapshot) string { return id + ":" + s.Name }

// identityOf returns the beginning of the identities of all disks of a VM.
func identityOf(server string, vm *inventory.VM) string {
	return fmt.Sprintf("vsphere:%s:%s:", server, vm.InstanceUUID)
}

// SnapshotIn returns the name of the snapshot of vddkcp that an identity has, or "" if it has none.
func SnapshotIn(identity string) string {
	name := identity[strings.LastIndexByte(identity, ':')+1:]
	if !strings.HasPrefix(identity, "vsphere:") || !inventory.OurName(name) {
		return ""
	}
	return name
}

// identifiedDisk gives a disk an identity that does not depend on the names of its files, because
// the files of a VM can be moved while it is copied.
type identifiedDisk struct {
	source.Disk
	id, proof string
}

// Unwrap implements source.Wrapper.
func (d *identifiedDisk) Unwrap() source.Disk { return d.Disk }

// Identity implements source.Identified.
func (d *identifiedDisk) Identity(context.Context) (id, proof string, err error) {
	return d.id, d.proof, nil
}

// Planned is the result of Plan.
type Planned struct {
	Report  *Report
	VM      *inventory.VM
	Disks   []inventory.Disk // that would be copied
	Targets []string         // the address of the target of each disk
	State   string           // path of the state file
}

// Plan checks whether Run would begin to copy. It changes nothing on the server, and writes
// nothing. After an error, the result has the facts that Plan found before the error. The result is
// never nil.
func Plan(ctx context.Context, spec Spec) (*Planned, error) {
	r := newRun(spec)
	p := &Planned{Report: r.report}
	err := r.plan(ctx, p)
	if end := r.report.EndWith(err); end.Done() {
		r.report.Status = report.StatusSkipped
	}
	p.VM, p.Disks, p.Targets = r.vm, r.disks, r.targets
	return p, err
}

func (r *run) plan(ctx context.Context, p *Planned) (err error) {
	if err := r.find(ctx); err != nil {
		return err
	}
	if p.State, err = r.State(r.vm, r.disks, r.targets); err != nil {
		return err
	}
	r.state = newState(r.Server, r.vm, r.disks, r.targets)
	earlier, err := loadState(p.State)
	if err = r.mayForget(err); err != nil {
		return err
	}
	r.store = &store{path: p.State}
	if err := r.useEarlier(ctx, earlier); err != nil {
		return err
	}
	if r.state.Step.reached(stepCopied) {
		return nil
	}
	if err := r.Opener.Ready(); err != nil {
		return err
	}
	if err := r.checkVM(); err != nil {
		return err
	}
	if r.needsSnapshot() {
		if err := r.ours(r.vm, r.state.Snapshot); err != nil && r.old == "" {
			return err
		}
	}
	if r.NewFolder {
		return nil
	}
	return r.checkTargets(ctx)
}
