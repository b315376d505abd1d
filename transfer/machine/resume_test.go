package machine_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// interrupted copies a VM until a signal arrives at the given read of a disk. The snapshot is kept. It
// returns the Spec of a run that continues.
func interrupted(t *testing.T, f *fakeVM, dir string, read int) machine.Spec {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	reads := 0
	f.reading = func() error {
		if ctx.Err() != nil {
			return context.Cause(ctx) // otherwise the copy may complete the disk
		}
		if reads++; reads == read {
			cancel(signalled{})
		}
		return nil
	}
	spec := f.spec(dir)
	spec.KeepSnapshot, spec.Parallel = true, 1
	if _, err := machine.Run(ctx, spec); report.Of(err).Exit != 143 || len(f.names()) != 1 {
		t.Fatalf("snapshots %v, error %v", f.names(), err)
	}
	f.reading, spec.KeepSnapshot, spec.Resume = nil, false, true
	return spec
}

// TestSnapshotGoneAfterFind removes the snapshot after the run that continues has found it, and
// changes the disks. Nothing of the earlier copy may be in the targets.
func TestSnapshotGoneAfterFind(t *testing.T) {
	for _, call := range []string{"describe", "find"} {
		t.Run(call, func(t *testing.T) {
			f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
			spec := interrupted(t, f, dir, 3)
			found := false
			f.before = func(now string) error {
				if f.mu.Lock(); found && now == call {
					f.remove(f.vm.Snapshots[0].Name)
					rand.Read(f.live[0])
					f.before = nil
				}
				found = found || now == "find"
				f.mu.Unlock()
				return nil
			}
			r, err := machine.Run(t.Context(), spec)
			if err != nil || f.made != 2 || len(r.Warnings) != 1 {
				t.Errorf("%d snapshots, report %+v, error %v", f.made, r, err)
			}
			f.check(dir)
		})
	}
}

// TestPlanKeepsFiles checks that Plan removes no file of an earlier run, even if Run would start over.
func TestPlanKeepsFiles(t *testing.T) {
	for _, stands := range []bool{false, true} {
		f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
		spec := interrupted(t, f, dir, 7)
		if !stands {
			f.remove(f.names()[0])
		}
		before := files(t, dir)
		if p, err := machine.Plan(t.Context(), spec); err != nil {
			t.Errorf("stands=%t: report %+v, error %v", stands, p.Report, err)
		}
		if after := files(t, dir); !slices.Equal(after, before) {
			t.Errorf("stands=%t: files %v, expected %v", stands, after, before)
		}
		if _, err := machine.Run(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		f.check(dir)
	}
}

// TestStateMissing continues a copy whose state file is missing. Its files belong to a copy about which
// nothing is known.
func TestStateMissing(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	spec := interrupted(t, f, dir, 7)
	os.Remove(filepath.Join(dir, "web01.vddkcp.json"))
	f.remove(f.names()[0])
	before := files(t, dir)
	_, planned := machine.Plan(t.Context(), spec)
	_, err := machine.Run(t.Context(), spec)
	for _, err := range []error{planned, err} {
		if report.Of(err).Exit != 2 || !strings.Contains(err.Error(), "web01-disk1.raw.partial") {
			t.Errorf("error %v", err)
		}
	}
	if after := files(t, dir); !slices.Equal(after, before) {
		t.Errorf("files %v, expected %v", after, before)
	}
	spec.Force = true
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
}

// TestWholeFileChanged changes a complete target, while another disk is not complete. The run that
// continues is refused, and the rest of the earlier copy stays of use.
func TestWholeFileChanged(t *testing.T) {
	f, dir := newFake(t, 64*kib, 300*kib), t.TempDir()
	spec := interrupted(t, f, dir, 3)
	whole := filepath.Join(dir, "web01-disk1.raw.partial")
	if err := errors.Join(os.Rename(whole, whole+"2"), os.WriteFile(whole, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 2 || len(f.names()) != 1 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
	if err := os.Rename(whole+"2", whole); err != nil {
		t.Fatal(err)
	}
	if r, err := machine.Run(t.Context(), spec); err != nil || f.made != 1 || r.Rounds[0].Disks[0].Status != report.StatusSkipped {
		t.Errorf("%d snapshots, error %v", f.made, err)
	}
	f.check(dir)
}

// TestStateNotWritten fails to store that a target is complete, and can store it a moment later. The
// target is then given its name as any other.
func TestStateNotWritten(t *testing.T) {
	f, dir := newFake(t, 64*kib), t.TempDir()
	states := filepath.Join(t.TempDir(), "states")
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Error(err)
		}
	}
	if err := os.Mkdir(states, 0o700); err != nil {
		t.Fatal(err)
	}
	spec := f.spec(dir)
	spec.State = func(*inventory.VM, []inventory.Disk, []string) (string, error) {
		return filepath.Join(states, "state.json"), nil
	}
	f.reading = func() error { move(states, states+"2"); return nil }
	spec.Begin = func(*inventory.Disk, string) (*progress.Counters, func(error)) {
		return nil, func(error) { move(states+"2", states) }
	}
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
}

// TestLeftByOneThatIsDone copies a VM again after a run that could not remove its snapshot.
func TestLeftByOneThatIsDone(t *testing.T) {
	for _, single := range []bool{false, true} {
		for _, resume := range []bool{false, true} {
			f, dir := newFake(t, 64*kib), t.TempDir()
			f.before = func(call string) error {
				if call == "remove" {
					return errServer
				}
				return nil
			}
			spec := f.spec(dir)
			spec.Single = single
			if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 5 {
				t.Fatal(err)
			}
			f.before = nil
			spec.Resume, spec.Force = resume, true
			if _, err := machine.Run(t.Context(), spec); err != nil {
				t.Errorf("single=%t resume=%t: %v", single, resume, err)
			}
			f.check(dir)
			if got := files(t, dir); single != (len(got) == 1) {
				t.Errorf("single=%t resume=%t: files %v", single, resume, got)
			}
		}
	}
}

// TestStateOfAnotherWithoutUUID continues the copy of another VM. Neither has an instance UUID.
func TestStateOfAnotherWithoutUUID(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	f.vm.InstanceUUID = ""
	spec := interrupted(t, f, dir, 3)
	f.vm.Moref = "vm-2"
	if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 2 || !strings.Contains(err.Error(), "another VM") {
		t.Errorf("error %v", err)
	}
	f.vm.Moref = "vm-1"
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Error(err)
	}
}

// TestStateWithForeignSnapshot continues from a state file whose snapshot vddkcp cannot have made.
func TestStateWithForeignSnapshot(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	spec := interrupted(t, f, dir, 3)
	path := filepath.Join(dir, "web01.vddkcp.json")
	text, err := os.ReadFile(path)
	changed := strings.ReplaceAll(string(text), f.names()[0], "x")
	if err = errors.Join(err, os.WriteFile(path, []byte(changed), 0o600)); err != nil {
		t.Fatal(err)
	}
	f.vm.Snapshots[0].Name = "x"
	if _, err := machine.Run(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "no name of a snapshot of vddkcp") || len(f.names()) != 1 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
}

// TestKeepOld replaces files and keeps them under other names.
func TestKeepOld(t *testing.T) {
	for _, taken := range []string{"", "remove"} {
		f, dir := newFake(t, 64*kib), t.TempDir()
		target := filepath.Join(dir, "web01-disk1.raw")
		write := func() {
			if err := os.WriteFile(target, []byte("old"), 0o600); err != nil {
				t.Error(err)
			}
		}
		f.before = func(call string) error {
			if call == taken {
				write()
			}
			return nil
		}
		if taken == "" {
			write()
		}
		spec := f.spec(dir)
		spec.Single = true
		spec.Job = func(*inventory.Disk, string) job.Spec { return job.Spec{KeepOld: true} }
		if _, err := machine.Run(t.Context(), spec); err != nil {
			t.Fatal(err)
		}
		f.check(dir)
		if old, err := os.ReadFile(target + ".old"); err != nil || string(old) != "old" {
			t.Errorf("the old file has %q, error %v", old, err)
		}
	}
}

// TestToldBeforeStateIsRemoved checks that the caller knows of the complete target before the state
// file is gone.
func TestToldBeforeStateIsRemoved(t *testing.T) {
	f, dir := newFake(t, 64*kib), t.TempDir()
	spec := f.spec(dir)
	spec.Single = true
	marks := 0
	spec.Job = func(*inventory.Disk, string) job.Spec {
		return job.Spec{Whole: func(mark string) {
			marks++
			if got := files(t, dir); !slices.Contains(got, "web01.vddkcp.json") || len(f.names()) > 0 || mark != fileid.MarkOf(filepath.Join(dir, "web01-disk1.raw")) {
				t.Errorf("files %v, snapshots %v, mark %q", got, f.names(), mark)
			}
		}}
	}
	if _, err := machine.Run(t.Context(), spec); err != nil || marks != 1 {
		t.Errorf("%d calls, error %v", marks, err)
	}
}

// TestQuiesceContinued continues a copy with --quiesce whose snapshot is not quiesced.
func TestQuiesceContinued(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	spec := interrupted(t, f, dir, 3)
	spec.Quiesce = inventory.MustQuiesce
	if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 2 || len(f.names()) != 1 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
	spec.Force = true
	if r, err := machine.Run(t.Context(), spec); err != nil || !r.Quiesced || f.made != 2 {
		t.Errorf("report %+v, error %v", r, err)
	}
	f.check(dir)
}

// TestQuiesceShared copies two disks of a VM at the same time, of which one is to be quiesced.
func TestQuiesceShared(t *testing.T) {
	f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
	shared := new(machine.Snapshots)
	specs := [2]machine.Spec{f.ofDisk(0, dir, shared), f.ofDisk(1, dir, shared)}
	specs[1].Quiesce = inventory.MustQuiesce
	f.whileRead(func() {
		if _, err := machine.Run(t.Context(), specs[1]); report.Of(err).Exit != 75 || len(f.names()) != 1 {
			t.Errorf("snapshots %v, error %v", f.names(), err)
		}
	})
	if _, err := machine.Run(t.Context(), specs[0]); err != nil {
		t.Fatal(err)
	}
	if r, err := machine.Run(t.Context(), specs[1]); err != nil || !r.Quiesced {
		t.Errorf("report %+v, error %v", r, err)
	}
	f.check(dir)
}

// TestContinuedWithOtherOption continues a copy with an option with which it cannot be continued. The
// run that continues without it goes on.
func TestContinuedWithOtherOption(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	spec := interrupted(t, f, dir, 3)
	right := spec.Job
	spec.Job = func(d *inventory.Disk, target string) job.Spec {
		s := right(d, target)
		s.Digest = digest.SHA256
		return s
	}
	r, err := machine.Run(t.Context(), spec)
	if report.Of(err).Exit != 2 || len(f.names()) != 1 || !slices.Equal(r.Left, f.names()) {
		t.Errorf("snapshots %v, report %+v, error %v", f.names(), r, err)
	}
	spec.Job = right
	if r, err := machine.Run(t.Context(), spec); err != nil || f.made != 1 || r.Rounds[0].Disks[0].ResumedFrom == 0 {
		t.Errorf("%d snapshots, report %+v, error %v", f.made, r, err)
	}
	f.check(dir)
}

// TestSnapshotGoneWhileRead loses the snapshot, and the connection at the same time.
func TestSnapshotGoneWhileRead(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	reads := 0
	f.reading = func() error {
		if reads++; reads < 3 {
			return nil
		}
		return errors.Join(inventory.ErrSnapshotGone, errServer)
	}
	spec := f.spec(dir)
	spec.Parallel = 1
	if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 1 {
		t.Errorf("exit %d, error %v", report.Of(err).Exit, err)
	}
}

// TestCopiedWhileOthersCopy continues a run that a kill has stopped when its disk was copied. Another
// disk is just copied from the same snapshot, which therefore stays.
func TestCopiedWhileOthersCopy(t *testing.T) {
	f, dir := newFake(t, 64*kib, 300*kib), t.TempDir()
	states := [2]string{filepath.Join(dir, "0.json"), filepath.Join(dir, "1.json")}
	shared := new(machine.Snapshots)
	spec := func(n int) machine.Spec {
		s := f.ofDisk(n, dir, shared)
		s.Resume = true
		return s
	}
	copied := []byte(nil)
	f.before = func(call string) error {
		if call == "remove" { // the state says that the disk is copied; nothing later is stored after a kill
			copied, _ = os.ReadFile(states[0])
			return errServer
		}
		return nil
	}
	if _, err := machine.Run(t.Context(), spec(0)); report.Of(err).Exit != 5 {
		t.Fatal(err)
	}
	f.before = nil
	name := f.names()[0]
	other := strings.NewReplacer("2000", "2001", "6000-0", "6000-1", "Hard disk 1", "Hard disk 2", fmt.Sprint(64*kib), fmt.Sprint(300*kib),
		"web01-disk1", "web01-disk2", `"state": "copied"`, `"state": "snapshot"`, `"whole": true`, `"whole": false`).Replace(string(copied))
	if err := errors.Join(os.WriteFile(states[0], copied, 0o600), os.WriteFile(states[1], []byte(other), 0o600)); err != nil {
		t.Fatal(err)
	}
	f.whileRead(func() {
		if _, err := machine.Run(t.Context(), spec(0)); err != nil || !slices.Equal(f.names(), []string{name}) {
			t.Errorf("snapshots %v, error %v", f.names(), err)
		}
	})
	if _, err := machine.Run(t.Context(), spec(1)); err != nil || f.made != 1 {
		t.Errorf("%d snapshots, error %v", f.made, err)
	}
	f.check(dir)
}

// TestWithoutSnapshotBesideOthers copies two disks of a VM at the same time, of which one is in no
// snapshot. The snapshot of the other one changes the VM.
func TestWithoutSnapshotBesideOthers(t *testing.T) {
	f, dir := newFake(t, 300*kib, 300*kib, 64*kib), t.TempDir()
	f.vm.Power = inventory.Off
	f.vm.Disks[1].Verdict, f.vm.Disks[2].Verdict = inventory.WhenOff, inventory.WhenOff
	f.before = func(call string) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		if call == "snapshot" || call == "remove" {
			f.vm.ChangeVersion += "1"
		}
		return nil
	}
	shared, errs := new(machine.Snapshots), make(chan error)
	for n := range 3 {
		spec := f.ofDisk(n, dir, shared)
		go func() {
			_, err := machine.Run(t.Context(), spec)
			errs <- err
		}()
	}
	if err := errors.Join(<-errs, <-errs, <-errs); err != nil {
		t.Error(err)
	}
	f.check(dir)
}

// TestStartsOverTwice continues a run that started over and was interrupted before it came to the second
// disk, of which a part from the run before is still there.
func TestStartsOverTwice(t *testing.T) {
	f, dir := newFake(t, 300*kib, 300*kib), t.TempDir()
	spec := interrupted(t, f, dir, 8) // in the second disk
	spec.Force, spec.Resume, spec.KeepSnapshot = true, false, true
	ctx, cancel := context.WithCancelCause(t.Context())
	reads := 0
	f.reading = func() error {
		if reads++; reads == 2 {
			cancel(signalled{})
		}
		return nil
	}
	if _, err := machine.Run(ctx, spec); report.Of(err).Exit != 143 {
		t.Fatal(err)
	}
	f.reading = nil
	spec.Force, spec.Resume = false, true
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
}

// TestFullDatastore checks that the snapshot of an earlier run does not stay while a datastore is
// nearly full, and that the disks are consolidated after it.
func TestFullDatastore(t *testing.T) {
	for _, when := range []string{"continued", "started over"} {
		t.Run(when, func(t *testing.T) {
			f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
			fill := func(free int64) { f.vm.Stores = []inventory.Store{{Name: "ds", Type: "VMFS", Free: free}} }
			spec := interrupted(t, f, dir, 3)
			earlier := f.names()
			fill(1)
			spec.MinFree, spec.KeepSnapshot, spec.Resume = 2, true, when != "started over"
			spec.Force = !spec.Resume
			if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 75 || len(f.names()) != 0 || !strings.Contains(err.Error(), "--min-free") {
				t.Errorf("snapshots %v, error %v", f.names(), err)
			}
			if !slices.Equal(f.consolidated, earlier) {
				t.Errorf("the snapshots %q are removed, and the disks are to be consolidated after those of %q", earlier, f.consolidated)
			}
			fill(2)
			if _, err := machine.Run(t.Context(), spec); err != nil {
				t.Error(err)
			}
			f.check(dir)
		})
	}
}

// TestLeftIsTold checks that Left names each snapshot before it is removed, also one that an earlier run
// has made, and that it says when the snapshot is gone.
func TestLeftIsTold(t *testing.T) {
	for _, resume := range []bool{false, true} {
		f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
		spec := interrupted(t, f, dir, 3)
		standing := ""
		spec.Left = func(_, snapshot string, stands bool) {
			if standing = ""; stands {
				standing = snapshot
			}
		}
		f.before = func(call string) error {
			if names := f.names(); call == "remove" && (len(names) != 1 || names[0] != standing) {
				t.Errorf("resume=%t: Left was called with %q before %q is removed", resume, standing, names)
			}
			return nil
		}
		spec.Resume, spec.Force = resume, true
		if _, err := machine.Run(t.Context(), spec); err != nil || standing != "" {
			t.Errorf("resume=%t: Left was called with %q, error %v", resume, standing, err)
		}
	}
}
