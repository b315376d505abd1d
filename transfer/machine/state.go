package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// step is how far a run has come, according to its state file.
type step string

// These are the steps, in their order.
const (
	stepNew      step = "new"      // nothing is on the server
	stepSnapshot step = "snapshot" // the snapshot may have been made
	stepCopy     step = "copy"     // the snapshot was made
	stepCopied   step = "copied"   // all targets are complete; the snapshot is not removed yet
	stepPublish  step = "publish"  // the snapshot is removed; some files do not have their names yet
	stepDone     step = "done"
)

var steps = []step{stepNew, stepSnapshot, stepCopy, stepCopied, stepPublish, stepDone}

// The method reached reports whether s is the given step or a later one.
func (s step) reached(other step) bool { return slices.Index(steps, s) >= slices.Index(steps, other) }

// state is the content of the state file: what a later run must know to continue this one, or to
// remove its snapshot. It has no secrets.
type state struct {
	Version  int     `json:"version"`
	VM       stateVM `json:"vm"`
	Step     step    `json:"state"`
	Snapshot string  `json:"snapshot"` // name of the snapshot that was made or may have been made; "": none
	// Session is the key of the session on the server, while the run is alive.
	Session string `json:"session,omitempty"`
	// Consolidated says that the disks did not need consolidation before the snapshot was made, or
	// that vddkcp may consolidate them nevertheless.
	Consolidated bool        `json:"consolidated"`
	Disks        []stateDisk `json:"disks"`
}

type stateVM struct {
	Name         string `json:"name"`
	Moref        string `json:"moref"`
	InstanceUUID string `json:"instance_uuid"`
	Server       string `json:"server"` // see Spec.Server
}

type stateDisk struct {
	Key    int32  `json:"key"`
	UUID   string `json:"uuid"`
	Label  string `json:"label"`
	Size   int64  `json:"size"`
	Target string `json:"target"`
	// Whole says that the target is complete and durable. Mark identifies its file and Seal changes
	// when the file is written, see job.Seal. Both are "" if the target is not a file.
	Whole bool   `json:"whole"`
	Mark  string `json:"mark"`
	Seal  string `json:"seal"`
}

// format says which versions of state files this package reads.
var format = fileversion.Format{
	Name: "state file", Oldest: 1, Newest: 1,
	Otherwise: "start over with --force; vddkcp cleanup then lists the snapshot of the earlier run, if there is one",
}

// newState returns the state of a run that has not begun to copy.
func newState(server string, vm *inventory.VM, disks []inventory.Disk, targets []string) *state {
	s := &state{Version: format.Newest, Step: stepNew, VM: stateVM{vm.Name, vm.Moref, vm.InstanceUUID, server}}
	for i, d := range disks {
		s.Disks = append(s.Disks, stateDisk{Key: d.Key, UUID: d.UUID, Label: d.Label, Size: d.Size, Target: absolute(targets[i])})
	}
	return s
}

// absolute returns the address of a target with an absolute path, because a later run may begin in
// another folder.
func absolute(target string) string {
	a, err := address.Parse(target, address.Target)
	if path, ok := a.(address.Path); err == nil && ok {
		if abs, err := filepath.Abs(string(path)); err == nil {
			return abs
		}
	}
	return target
}

// The method differs compares the state of an earlier run with that of this run. The result says
// what is different. It is "" if both copy the same disks of the same VM to the same targets.
func (s *state) differs(old *state) string {
	switch {
	case s.VM.Server != old.VM.Server:
		return fmt.Sprintf("it is about a VM of another server (%s, and not %s)", printable.Name(old.VM.Server), printable.Name(s.VM.Server))
	case s.VM.InstanceUUID == "" && old.VM.InstanceUUID == "" && s.VM.Moref != old.VM.Moref:
		return fmt.Sprintf("it is about another VM, %s (%s), and not about %s (%s)",
			printable.Name(old.VM.Name), printable.Name(old.VM.Moref), printable.Name(s.VM.Name), printable.Name(s.VM.Moref))
	case s.VM.InstanceUUID != old.VM.InstanceUUID:
		return fmt.Sprintf("it is about another VM, %s with the instance UUID %s, and not about %s with the instance UUID %s",
			printable.Name(old.VM.Name), printable.Name(old.VM.InstanceUUID), printable.Name(s.VM.Name), printable.Name(s.VM.InstanceUUID))
	case len(s.Disks) != len(old.Disks):
		return fmt.Sprintf("it has %d disks, and not %d", len(old.Disks), len(s.Disks))
	}
	for i, d := range s.Disks {
		o := old.Disks[i]
		switch {
		case d.Key != o.Key || d.UUID != o.UUID:
			return fmt.Sprintf("its disk %s is another one: it has the key %d and the UUID %s, and not the key %d and the UUID %s", printable.Name(o.Label), o.Key, printable.Name(o.UUID), d.Key, printable.Name(d.UUID))
		case d.Size != o.Size:
			return fmt.Sprintf("its disk %s had %d bytes, and now has %d bytes", printable.Name(o.Label), o.Size, d.Size)
		case d.Target != o.Target:
			return fmt.Sprintf("its disk %s goes to %s, and not to %s", printable.Name(o.Label), printable.Name(o.Target), printable.Name(d.Target))
		}
	}
	return ""
}

// The method restart makes s the state of a run that has copied nothing.
func (s *state) restart() {
	s.Step, s.Snapshot, s.Consolidated = stepNew, "", false
	for i := range s.Disks {
		d := &s.Disks[i]
		d.Whole, d.Mark, d.Seal = false, "", ""
	}
}

// check returns an error if the content of a state file is impossible.
func (s *state) check() error {
	if err := format.Check(int64(s.Version)); err != nil {
		return err
	}
	if !slices.Contains(steps, s.Step) {
		return fmt.Errorf("it has the unknown state %q", s.Step)
	}
	if s.Snapshot != "" && !inventory.OurName(s.Snapshot) {
		return fmt.Errorf("it has the snapshot %q, which is no name of a snapshot of vddkcp", s.Snapshot)
	}
	for i, d := range s.Disks {
		if d.Target == "" || d.Size < 0 {
			return fmt.Errorf("disk %d has the target %q and %d bytes", i+1, d.Target, d.Size)
		}
		if s.Step.reached(stepCopied) && !d.Whole {
			return fmt.Errorf("disk %d is not complete, but the state is %q", i+1, s.Step)
		}
	}
	return nil
}

// store is the state file of a run, locked against other runs.
type store struct {
	path string
	lock *os.File
}

// inUseError says that another run has locked the state file.
type inUseError struct{ path, by string }

func (e *inUseError) Error() string {
	return fmt.Sprintf("another run copies this VM to the same targets: the state file %s is in use by %s", e.path, e.by)
}

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*inUseError) ExitStatus() int { return exit.Resumable }

// Hint tells the user what to do about the error.
func (*inUseError) Hint() string { return "wait for the end of that run" }

// openStore locks the state file and reads it. The state is nil if there is no file. If the file
// has an unknown version, openStore returns a store and a *fileversion.Error.
func openStore(path string) (*store, *state, error) {
	lock, err := durable.Lock(path + ".lock")
	if locked := (*durable.LockedError)(nil); errors.As(err, &locked) {
		return nil, nil, &inUseError{path, locked.By}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("state file %s: %w", path, err)
	}
	st := &store{path, lock}
	s, err := loadState(path)
	if errors.As(err, new(*fileversion.Error)) {
		return st, nil, err
	}
	if err != nil {
		st.close()
		return nil, nil, err
	}
	return st, s, nil
}

// loadState reads a state file. It returns nil if there is no such file. The error wraps a
// *fileversion.Error if the file has an unknown version.
func loadState(path string) (*state, error) {
	text, err := durable.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state file: %w", err)
	}
	if err := format.CheckJSON(text); err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	s := new(state)
	if err = json.Unmarshal(text, s); err == nil {
		err = s.check()
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w; expected the complete state file of an earlier run: remove the file to start over", path, err)
	}
	return s, nil
}

// The method save writes the state, durably. It does nothing if st is nil.
func (st *store) save(s *state) error {
	if st == nil {
		return nil
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = durable.ReplaceBy(st.temporary(), st.path, append(text, '\n'), durable.Private)
	}
	if err != nil {
		return fmt.Errorf("state file %s cannot be written: %w", st.path, err)
	}
	return nil
}

// The method temporary returns the path of the file that becomes the state file. Only the run that
// has locked the state file uses it.
func (st *store) temporary() string { return st.path + ".new" }

// Tidy removes the state file at path and the files beside it if the run that they belong to was
// killed after all its targets got their names. It does nothing if another run uses them.
func Tidy(path string) {
	st, s, err := openStore(path)
	if st == nil {
		return
	}
	defer st.close()
	if err != nil {
		return
	}
	if s != nil && s.Step.reached(stepPublish) && s.Snapshot == "" {
		st.remove()
	}
}

// The method remove removes the state file.
func (st *store) remove() error {
	err := os.Remove(st.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// The method close releases the lock. It removes a temporary file that a killed run has left.
func (st *store) close() {
	os.Remove(st.temporary())
	os.Remove(st.lock.Name())
	st.lock.Close()
}
