package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

type cleanupCommand struct {
	Pattern   string  `arg:"" optional:"" name:"PATTERN" help:"The VMs whose snapshots are listed, as for ls. Without PATTERN, these are all VMs."`
	Remove    bool    `help:"Remove the snapshots that are older than --older-than."`
	OlderThan atLeast `help:"Age from which snapshots are removed (default 24h). The run that made a younger snapshot may be alive." default:"24h" placeholder:"TIME"`
	JSON      bool    `name:"json" help:"Print JSON."`
	serverFlags
	diskFlags
}

// The type atLeast is a duration that is not negative.
type atLeast time.Duration

func (a *atLeast) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil || d < 0 {
		return fmt.Errorf("%q: want a duration such as 90m or 24h", text)
	}
	*a = atLeast(d)
	return nil
}

func (c *cleanupCommand) Run(ctx context.Context, logs *logFlags) error {
	err := c.withSession(ctx, logs, func(ctx context.Context, s *vsphere.Session, log *slog.Logger) error {
		marked, vms, err := s.Marked(ctx, c.Pattern)
		if err == nil && vms == 0 && c.Pattern != "" {
			err = &noMatchError{c.Pattern}
		}
		if err != nil {
			return err
		}
		return c.list(ctx, marked, log)
	})
	if err != nil {
		return fmt.Errorf("cleanup: %w", err)
	}
	return nil
}

// The method list removes the snapshots if the user wants that, and prints what was found and done.
// It prints even if the removal has failed or was stopped by a signal.
func (c *cleanupCommand) list(ctx context.Context, marked []vsphere.Marked, log *slog.Logger) error {
	all := []*ownSnapshot{}
	for _, m := range marked {
		all = append(all, newOwnSnapshot(m, time.Duration(c.OlderThan)))
	}
	var failed error
	if c.Remove {
		failed = removeOld(ctx, all, func(ctx context.Context, s *ownSnapshot) error { return s.remove(ctx, log) })
	}
	out := standardOutput(context.WithoutCancel(ctx))
	var err error
	if c.JSON {
		err = printJSON(out, struct {
			Snapshots []*ownSnapshot `json:"snapshots"`
		}{all})
	} else if len(all) > 0 {
		err = printOwnSnapshots(out, all, time.Duration(c.OlderThan))
	}
	logOwnSnapshots(log, all, c.Remove)
	return cmp.Or(failed, err)
}

// ownSnapshot is a snapshot that vddkcp has made, as cleanup prints it in JSON.
type ownSnapshot struct {
	VM      string         `json:"vm"`
	Path    string         `json:"path"` // of the VM
	VMMoref string         `json:"vm_moref"`
	Name    string         `json:"name"`
	Moref   string         `json:"moref"`
	Created time.Time      `json:"created"`
	Host    string         `json:"host"`    // where vddkcp ran
	Started time.Time      `json:"started"` // the run that made the snapshot
	Age     int64          `json:"age_seconds"`
	Status  snapshotStatus `json:"status"`
	Error   string         `json:"error,omitempty"`
	Hint    string         `json:"hint,omitempty"`

	vm     *vsphere.VM
	reason string // why it could not be removed, for the table
}

// snapshotStatus says what is done with a snapshot.
type snapshotStatus string

const (
	snapshotOld     snapshotStatus = "old"     // --remove removes it
	snapshotYoung   snapshotStatus = "young"   // its run may be alive
	snapshotRemoved snapshotStatus = "removed" // by this command
	snapshotFailed  snapshotStatus = "failed"  // it could not be removed
)

// newOwnSnapshot returns the description of a snapshot. A snapshot that the server made less than
// olderThan ago is young.
func newOwnSnapshot(m vsphere.Marked, olderThan time.Duration) *ownSnapshot {
	s := &ownSnapshot{
		VM: m.VM.Name(), Path: m.Path, VMMoref: m.VM.Moref(), Name: m.Name, Moref: m.Moref, Created: m.Created,
		Host: m.Mark.Host, Started: m.Mark.Started, Age: int64(m.Age / time.Second), Status: snapshotOld, vm: m.VM,
	}
	if m.Age < olderThan {
		s.Status = snapshotYoung
	}
	return s
}

// The method remove removes the snapshot, and logs how far the removal is.
func (s *ownSnapshot) remove(ctx context.Context, log *slog.Logger) error {
	removing := fmt.Sprintf("removing the snapshot %s of the VM %s", printable.Name(s.Name), printable.Name(s.VM))
	log.Info(removing)
	const step = 10 // percent
	next := step
	return s.vm.RemoveMoref(ctx, s.Moref, func(percent int) {
		if percent >= next {
			log.Info(fmt.Sprintf("%s: %d%%", removing, percent))
			next = percent - percent%step + step
		}
	})
}

// removeOld removes the old snapshots by the given function, and sets their status. If ctx ends,
// removeOld returns its cause. It returns a *notRemovedError if snapshots could not be removed.
func removeOld(ctx context.Context, all []*ownSnapshot, remove func(context.Context, *ownSnapshot) error) error {
	var failed []error
	for _, s := range all {
		if s.Status != snapshotOld {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		err := remove(ctx, s)
		if err == nil {
			s.Status = snapshotRemoved
			continue
		}
		s.fail(err)
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		failed = append(failed, err)
	}
	if failed != nil {
		return &notRemovedError{failed}
	}
	return nil
}

// The method fail records why the snapshot, or the files of it, could not be removed.
func (s *ownSnapshot) fail(err error) {
	s.Status, s.Error, s.Hint = snapshotFailed, err.Error(), hinted.Of(err)
	s.reason = s.Error
	var left *inventory.LeftError
	if errors.As(err, &left) && !left.Files {
		s.reason = fmt.Sprintf("not removed: %v", left.Err) // the table has the names already
	}
}

// notRemovedError contains the errors of all snapshots that could not be removed. It does not wrap
// them, because the exit status of cleanup does not depend on them.
type notRemovedError struct{ all []error }

func (e *notRemovedError) Error() string { return strings.Join(e.Lines(), "\n") }

// Lines returns the lines of the message, one for each snapshot.
func (e *notRemovedError) Lines() []string {
	var lines []string
	for _, err := range e.all {
		lines = append(lines, err.Error())
	}
	return lines
}

// Hint tells the user what to do about the error.
func (e *notRemovedError) Hint() string { return hinted.Of(errors.Join(e.all...)) }

// printOwnSnapshots prints the snapshots as a table for people.
func printOwnSnapshots(out io.Writer, all []*ownSnapshot, olderThan time.Duration) error {
	morefs := map[string]string{} // moref of a VM by its name; "" if several VMs have the name
	for _, s := range all {
		if moref, ok := morefs[s.VM]; ok && moref != s.VMMoref {
			morefs[s.VM] = ""
		} else {
			morefs[s.VM] = s.VMMoref
		}
	}
	table := newTable(out, "VM", "SNAPSHOT", "AGE", "MADE ON", "STARTED", "STATUS")
	for _, s := range all {
		name := s.VM
		if morefs[s.VM] == "" {
			name = cmp.Or(s.Path, s.VMMoref)
		}
		status := string(s.Status)
		switch s.Status {
		case snapshotYoung:
			status = fmt.Sprintf("younger than %s: its run may be alive", shortDuration(olderThan))
		case snapshotFailed:
			status = s.reason
		}
		table.line(name, s.Name, shortDuration(time.Duration(s.Age)*time.Second), s.Host, s.Started.UTC().Format(time.DateTime)+" UTC", status)
	}
	return table.flush()
}

// logOwnSnapshots logs what was found and what was done with it.
func logOwnSnapshots(log *slog.Logger, all []*ownSnapshot, remove bool) {
	count := map[snapshotStatus]int{}
	for _, s := range all {
		count[s.Status]++
	}
	if len(all) == 0 {
		log.Info("no snapshot of vddkcp was found")
		return
	}
	if n := count[snapshotYoung]; n > 0 {
		log.Info(plural(n, "snapshot is", "snapshots are") + " kept, because runs that are alive may need them: see --older-than")
	}
	if n := count[snapshotOld]; n > 0 && !remove {
		log.Info("to remove " + plural(n, "old snapshot", "old snapshots") + ", add --remove")
	}
	if n := count[snapshotRemoved]; n > 0 {
		log.Info(plural(n, "snapshot was removed", "snapshots were removed"))
	}
}

// shortDuration returns a duration for people: its two largest units that are not zero.
func shortDuration(d time.Duration) string {
	d = d.Truncate(time.Second)
	if d == 0 {
		return "0s"
	}
	var parts []string
	for _, unit := range []struct {
		size time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / unit.size; n > 0 {
			parts = append(parts, fmt.Sprintf("%d%s", n, unit.name))
			d %= unit.size
		}
	}
	return strings.Join(parts[:min(2, len(parts))], " ")
}
