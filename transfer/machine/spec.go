package machine

import (
	"cmp"
	"context"
	"log/slog"
	"time"

	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Spec says which disks of a machine are copied, and to where. The first group of fields is
// required. The zero value of every other field stands for a useful default.
type Spec struct {
	Machine Machine
	Opener  Opener
	Server  string // identifies the server: the instance UUID of a vCenter, or the name of a host
	Name    string // the VM as the user named it, for messages and reports
	// Targets returns the address of the target of each disk, in the order of the disks.
	Targets func(*inventory.VM, []inventory.Disk) ([]string, error)
	// Job returns the options of the copy of a disk, without its addresses. With Single, the
	// function Whole of the result is called when the target has its final name and the snapshot is
	// removed.
	Job func(d *inventory.Disk, target string) job.Spec
	// State returns the path of the state file of a copy of the given disks to the given targets.
	State func(vm *inventory.VM, disks []inventory.Disk, targets []string) (string, error)

	Only, Skip       []string          // numbers or labels of disks; none in Only: all disks
	Parallel         int               // disks that are copied at the same time; 0: 2
	Quiesce          inventory.Quiesce // of the guest, for the snapshot
	KeepSnapshot     bool              // keep the snapshot after a failure, so that a later run can continue
	Resume           bool              // continue what an earlier run left, according to the state file
	Force            bool              // replace existing files, and start over whatever the state file says
	ForceConsolidate bool              // go on if the disks of the VM needed consolidation before
	MinFree          int64             // bytes; stop if a datastore of the VM has less free space; 0: not checked
	NewFolder        bool              // the folder of the targets does not exist yet, so Plan cannot check them
	Single           bool              // the user named one disk and not a VM: remove the state file at the end, and name only the disk in errors
	Continue         string            // for Open: the identity of the disk that an earlier process has opened; its snapshot is used instead of a new one
	Keep             func() bool       // for Open: says, when the disk is closed, whether the snapshot stays; nil: it is removed
	Snapshots        *Snapshots        // shared by all runs of this process that may copy disks of the same VM; nil: no other run

	Log   *slog.Logger               // nil: nothing is logged
	Phase func(p Phase, percent int) // called when the run begins a phase, and with the progress of tasks of the server; -1: unknown
	// Begin is called when the copy of a disk begins. It returns the counters of the copy, and a
	// function that is called at its end, with its error. Begin is called concurrently. It may be
	// nil.
	Begin func(d *inventory.Disk, target string) (counters *progress.Counters, done func(error))
	// Left is called with true before a snapshot is made or used, and with false when it is gone. A
	// process that ends without removing the snapshot can tell the user its name.
	Left func(vm, snapshot string, stands bool)

	// Session returns the key of the session on the server. The state file has it while the run is
	// alive. If the run is killed, the next one calls EndSession with it. Both may be nil.
	Session    func() string
	EndSession func(ctx context.Context, key string) error

	interval time.Duration // between two looks at the VM while its disks are copied; 0: a minute
}

// Phase is what a run does at the moment.
type Phase string

// The values of Phase, in their order.
const (
	PhaseFind     Phase = "find"
	PhaseSnapshot Phase = "snapshot"
	PhaseCopy     Phase = "copy"
	PhaseRemove   Phase = "remove"
	PhasePublish  Phase = "publish"
)

// withDefaults returns s with the defaults for the fields that have the zero value.
func (s Spec) withDefaults() Spec {
	s.Parallel = cmp.Or(s.Parallel, 2)
	s.interval = cmp.Or(s.interval, killpoint.Watch(), time.Minute)
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if s.Phase == nil {
		s.Phase = func(Phase, int) {}
	}
	if s.Left == nil {
		s.Left = func(string, string, bool) {}
	}
	if s.Begin == nil {
		s.Begin = func(*inventory.Disk, string) (*progress.Counters, func(error)) { return nil, func(error) {} }
	}
	if s.Session == nil || s.EndSession == nil {
		s.Session, s.EndSession = func() string { return "" }, func(context.Context, string) error { return nil }
	}
	if s.Snapshots == nil {
		s.Snapshots = new(Snapshots)
	}
	return s
}
