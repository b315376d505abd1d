package vsphere

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// While something is waited for, the server is asked for its state again and again: at first after
// each Options.Poll, and after slowPoll times as long when it has lasted for longer. The server can
// also tell by itself, but then a session that ends meanwhile goes unnoticed.
const (
	fastPolls = 10
	slowPoll  = 5
	// graceTime is how long Snapshot waits for its task after its context has ended, in units of
	// Options.Poll. If the task takes longer, Remove waits for it.
	graceTime  = 30
	searchTime = 60 // times Options.Poll; how long a snapshot is looked for after a lost answer
	lockedTime = 60 // times Options.Poll; the pause before disks with a locked file are consolidated again
)

// poller waits between two looks at the state of something.
type poller struct {
	s     *Session
	polls int
}

// pause waits until the next look is due. It returns the cause if ctx ends before that.
func (p *poller) pause(ctx context.Context) error {
	d := p.s.Poll
	if p.polls++; p.polls > fastPolls {
		d *= slowPoll
	}
	return sleep(ctx, d)
}

// sleep waits for the given time. It returns the cause if ctx ends before that.
func sleep(ctx context.Context, d time.Duration) error {
	if !retry.Sleep(ctx, d, nil) {
		return context.Cause(ctx)
	}
	return nil
}

// withTaskTimeout returns a context that ends after Options.TaskTimeout.
func (s *Session) withTaskTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.TaskTimeout, &timeoutError{s.TaskTimeout})
}

// timeoutError says that Options.TaskTimeout has passed.
type timeoutError struct{ limit time.Duration }

func (e *timeoutError) Error() string {
	return fmt.Sprintf("the time limit for tasks of the server, %v, has passed", e.limit)
}

// Hint tells the user what to do about the error.
func (e *timeoutError) Hint() string {
	return "the server works on the task for longer than --task-timeout allows; wait until it has ended, or raise the limit"
}

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (e *timeoutError) ExitStatus() int { return exit.Resumable }

// Transient tells transfer/report that the same command may succeed later.
func (e *timeoutError) Transient() bool { return true }

// lingering returns a context that ends some time after ctx, with the same cause. It is for calls
// that should not be abandoned at once, because it would then be unknown what the server has done.
func lingering(ctx context.Context, grace time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() {
		if sleep(longer, grace) == nil {
			cancel(context.Cause(ctx))
		}
	})
	return longer, func() {
		stop()
		cancel(context.Canceled)
	}
}

// errTaskGone means that the server does not know a task any more: it was restarted, or the task
// has ended some time ago.
var errTaskGone = errors.New("the server has forgotten the task")

// await waits for the end of a task and returns its result. The parameter purpose says in messages
// what the task does, such as "make a snapshot". The function progress may be nil.
//
// If the task fails, the error is that of explain. It is errTaskGone if the server does not know
// the task. If ctx ends, the task still runs on the server, and the error says so.
func (s *Session) await(ctx context.Context, task types.ManagedObjectReference, purpose string, progress func(percent int)) (types.AnyType, error) {
	last := int32(-1)
	for p := (poller{s: s}); ; {
		info, err := s.taskInfo(ctx, task)
		if err != nil {
			if ctx.Err() != nil {
				err = stillRuns(purpose, err)
			}
			return nil, err
		}
		switch info.State {
		case types.TaskInfoStateSuccess:
			return info.Result, nil
		case types.TaskInfoStateError:
			return nil, explain("the task to "+purpose+" has failed", taskFault(info.Error))
		}
		if progress != nil && info.Progress > last {
			last = info.Progress
			progress(int(last))
		}
		if err := p.pause(ctx); err != nil {
			return nil, stillRuns(purpose, err)
		}
	}
}

func stillRuns(purpose string, err error) error {
	return fmt.Errorf("the task to %s still runs on the server: %w", purpose, err)
}

// taskInfo returns the state of a task. The error is errTaskGone if the server does not know the
// task.
func (s *Session) taskInfo(ctx context.Context, task types.ManagedObjectReference) (types.TaskInfo, error) {
	content, err := s.retrieve(ctx, objectSpecs(task), taskProperties)
	if err != nil {
		return types.TaskInfo{}, err
	}
	for _, object := range content {
		if info, ok := properties(object)["info"].(types.TaskInfo); ok {
			return info, nil
		}
	}
	return types.TaskInfo{}, errTaskGone
}

var taskProperties = []types.PropertySpec{{Type: "Task", PathSet: []string{"info"}}}

// snapshotState is what decides whether snapshots of a VM can be made, found and removed.
type snapshotState struct {
	nodes              []snapshotNode   // the whole tree, parents before children
	tasks              []types.TaskInfo // tasks of the VM that have not ended
	needsConsolidation bool
}

// snapshotNode is a snapshot in the tree of a VM.
type snapshotNode struct {
	inventory.Node
	quiesced bool
}

// find returns the newest snapshot with the given name, or nil.
func (st *snapshotState) find(name string) *snapshotNode {
	var found *snapshotNode
	for i := range st.nodes {
		if n := &st.nodes[i]; n.Name == name && (found == nil || !n.Created.Before(found.Created)) {
			found = n
		}
	}
	return found
}

// creating returns the task, if there is one, that makes a snapshot of the VM. The server does not
// tell the name of the snapshot.
func (st *snapshotState) creating() *types.TaskInfo {
	for i := range st.tasks {
		if t := &st.tasks[i]; strings.HasPrefix(t.DescriptionId, "VirtualMachine.createSnapshot") {
			return t
		}
	}
	return nil
}

// snapshotState asks the server for the snapshots and the tasks of the VM. If the VM is not there
// any more, the error is inventory.ErrVMGone.
func (v *VM) snapshotState(ctx context.Context) (*snapshotState, error) {
	object := types.ObjectSpec{Obj: v.reference(), SelectSet: []types.BaseSelectionSpec{
		&types.TraversalSpec{Type: "VirtualMachine", Path: "recentTask"},
	}}
	content, err := v.session.retrieve(ctx, []types.ObjectSpec{object}, append(taskProperties,
		types.PropertySpec{Type: "VirtualMachine", PathSet: []string{"snapshot", "runtime.consolidationNeeded"}}))
	if err != nil {
		return nil, err
	}
	var st *snapshotState
	var tasks []types.TaskInfo
	for _, object := range content {
		values := properties(object)
		if info, ok := values["info"].(types.TaskInfo); ok && (info.State == types.TaskInfoStateQueued || info.State == types.TaskInfoStateRunning) {
			tasks = append(tasks, info)
		}
		if object.Obj == v.reference() {
			st = &snapshotState{needsConsolidation: property[bool](values, "runtime.consolidationNeeded")}
			if info, ok := values["snapshot"].(types.VirtualMachineSnapshotInfo); ok {
				eachSnapshot(info.RootSnapshotList, "", func(n inventory.Node, tree *types.VirtualMachineSnapshotTree) {
					st.nodes = append(st.nodes, snapshotNode{n, tree.Quiesced})
				})
			}
		}
	}
	if st == nil {
		return nil, inventory.ErrVMGone
	}
	st.tasks = tasks
	return st, nil
}

// awaitOthers waits for the end of the tasks of a VM that another program may have started. Their
// results do not matter.
func (v *VM) awaitOthers(ctx context.Context, tasks []types.TaskInfo) error {
	for i := range tasks {
		name := tasks[i].DescriptionId
		v.session.Log.Info("waiting for another task of the VM", "vm", v.name, "task", name)
		if _, err := v.session.await(ctx, tasks[i].Task, "do "+printable.Name(name), nil); err != nil && ctx.Err() != nil {
			return err
		}
	}
	return nil
}

// isTemporary reports whether a call or a task that has failed with err may succeed later.
func isTemporary(err error) bool {
	t := (interface{ Transient() bool })(nil)
	return !retry.IsMarked(err) && errors.As(err, &t) && t.Transient()
}

// isTaskInProgress reports whether err says that the VM is busy with another task.
func isTaskInProgress(err error) bool { return fault.Is(err, &types.TaskInProgress{}) }
