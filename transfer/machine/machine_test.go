package machine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

const kib = 1 << 10

func TestRun(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib, 64*kib), t.TempDir()
	// The VM goes on writing while it is copied. The snapshot does not have the new data.
	frozen := [][]byte{bytes.Clone(f.live[0]), f.live[1], f.live[2]}
	f.reading = func() error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.live[0] = make([]byte, len(f.live[0]))
		return nil
	}
	r, err := machine.Run(t.Context(), f.spec(dir))
	if err != nil || r.Status != report.StatusOK || len(r.Rounds) != 1 || len(r.Rounds[0].Disks) != 3 || len(r.Files) != 3 {
		t.Fatalf("report %+v, error %v", r, err)
	}
	f.live = frozen
	f.check(dir)
	if got := files(t, dir); len(got) != 4 {
		t.Errorf("the folder has %v, expected the disks and the state file", got)
	}
	// A second run with Resume finds that nothing is to be done.
	spec := f.spec(dir)
	spec.Resume = true
	if r, err = machine.Run(t.Context(), spec); err != nil || len(r.Files) != 3 || f.made != 1 {
		t.Errorf("second run: report %+v, error %v", r, err)
	}
	os.Remove(filepath.Join(dir, "web01-disk2.raw"))
	if r, err = machine.Run(t.Context(), spec); report.Of(err).Exit != 2 {
		t.Errorf("run after a file was removed: report %+v, error %v", r, err)
	}
}

// TestEveryCallFails makes each call of a run fail once, in several ways, and checks what is left
// on the server. Then it continues the run.
func TestEveryCallFails(t *testing.T) {
	for _, keep := range []bool{false, true} {
		for _, lost := range []bool{false, true} {
			for _, ends := range []bool{false, true} {
				for n := 1; ; n++ {
					if !failCall(t, n, keep, lost, ends) {
						break
					}
				}
			}
		}
	}
}

// failCall makes the call with the given number fail. If ends is true, a signal arrives at the same
// time. It returns false if the run has fewer calls.
func failCall(t *testing.T, n int, keep, lost, ends bool) bool {
	reached := false
	t.Run(fmt.Sprintf("%d keep=%t lost=%t ends=%t", n, keep, lost, ends), func(t *testing.T) {
		f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
		ctx, cancel := context.WithCancelCause(t.Context())
		failed := ""
		f.before = func(call string) error {
			f.mu.Lock()
			defer f.mu.Unlock()
			if len(f.calls) != n {
				return nil
			}
			reached, failed = true, call
			if ends {
				cancel(signalled{})
			}
			if lost {
				return fmt.Errorf("%s: %w", call, errLost)
			}
			return errServer
		}
		spec := f.spec(dir)
		spec.KeepSnapshot, spec.Parallel = keep, 1
		r, err := machine.Run(ctx, spec)
		if !reached {
			if err != nil {
				t.Fatal(err)
			}
			return
		}
		end := report.Of(err)
		if end.Done() && failed != "remove" && !ends {
			t.Fatalf("call %s failed, but the run succeeded: %+v", failed, r)
		}
		if end.Exit == 0 {
			t.Errorf("call %s failed: exit 0", failed)
		}
		// The report lists exactly the snapshots that are on the server.
		if names := f.names(); !slices.Equal(names, r.Left) && !(lost && failed == "remove") {
			t.Errorf("call %s failed: the report says that %q are left, but %q are: %v", failed, r.Left, names, err)
		}
		f.before = nil
		spec.Resume = true
		if r, err = machine.Run(t.Context(), spec); err != nil {
			t.Fatalf("call %s failed, and the next run: %v (report %+v)", failed, err, r)
		}
		f.check(dir)
	})
	return reached && !t.Failed()
}

// signalled is the cause of a context that a signal ends.
type signalled struct{}

func (signalled) Error() string   { return "stopped by SIGTERM" }
func (signalled) ExitStatus() int { return 128 + int(syscall.SIGTERM) }

// TestSignal ends a run in its middle.
func TestSignal(t *testing.T) {
	for _, keep := range []bool{false, true} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
			ctx, cancel := context.WithCancelCause(t.Context())
			f.reading = func() error { cancel(signalled{}); return nil }
			spec := f.spec(dir)
			spec.KeepSnapshot = keep
			r, err := machine.Run(ctx, spec)
			if report.Of(err).Exit != 143 || r.Status != report.StatusInterrupted {
				t.Fatalf("report %+v, error %v", r, err)
			}
			if left := len(f.names()) > 0; left != keep || left != (len(r.Left) > 0) {
				t.Errorf("snapshots left: %v, report %+v", f.names(), r)
			}
			for _, name := range files(t, dir) {
				if strings.HasSuffix(name, ".raw") {
					t.Errorf("%s has its final name", name)
				}
			}
			f.reading = nil
			spec.Resume = true
			if _, err := machine.Run(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			f.check(dir)
			if want := map[bool]int{false: 2, true: 1}[keep]; f.made != want {
				t.Errorf("%d snapshots were made, expected %d", f.made, want)
			}
		})
	}
}

// TestChangedWhileCopied changes the VM while its disks are read.
func TestChangedWhileCopied(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*fakeVM)
		off    bool // the VM is off, and its disks are independent
		exit   int
		want   string
	}{
		{"the snapshot is removed", func(f *fakeVM) { f.vm.Snapshots = nil }, false, 1, "the snapshot is gone"},
		{"the datastore fills up", func(f *fakeVM) { f.vm.Stores = []inventory.Store{{Name: "ds", Free: 5}} }, false, 75, `the datastore ds has 5 B of free space`},
		{"the VM is powered on", func(f *fakeVM) { f.vm.Power = inventory.On }, true, 1, "powered on"},
		{"the VM is changed", func(f *fakeVM) { f.vm.ChangeVersion = "2" }, true, 1, "changed"},
	} {
		for _, interval := range []time.Duration{0, time.Millisecond} {
			t.Run(fmt.Sprint(c.name, interval), func(t *testing.T) {
				if c.exit == 75 && interval == 0 {
					t.Skip("only noticed while the disks are copied")
				}
				f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
				if c.off {
					f.vm.Power = inventory.Off
					for i := range f.vm.Disks {
						f.vm.Disks[i].Verdict = inventory.WhenOff
					}
				}
				changed := false
				described := make(chan struct{})
				f.before = func(call string) error {
					f.mu.Lock()
					defer f.mu.Unlock()
					if call == "describe" && changed {
						select {
						case <-described:
						default:
							close(described)
						}
					}
					return nil
				}
				f.reading = func() error {
					f.mu.Lock()
					if !changed {
						c.change(f)
						changed = true
					}
					f.mu.Unlock()
					if interval > 0 {
						<-described
					}
					return nil
				}
				spec := f.spec(dir)
				spec.MinFree, spec.KeepSnapshot = 10, c.exit == 75 // a snapshot that grows is never kept
				machine.SetInterval(&spec, interval)
				r, err := machine.Run(t.Context(), spec)
				if err == nil || !strings.Contains(err.Error(), c.want) || report.Of(err).Exit != c.exit {
					t.Fatalf("error %v (exit %d), expected %q and exit %d", err, report.Of(err).Exit, c.want, c.exit)
				}
				if len(f.names()) > 0 || len(r.Left) > 0 {
					t.Errorf("snapshots are left: %v", f.names())
				}
				f.reading, f.before, f.vm.Stores = nil, nil, nil
				if c.off {
					f.vm.Power = inventory.Off
				}
				spec.Resume = true
				if _, err := machine.Run(t.Context(), spec); err != nil {
					t.Fatal(err)
				}
				f.check(dir)
			})
		}
	}
}

// TestRefused checks the VMs and targets that are refused before anything is made.
func TestRefused(t *testing.T) {
	ours := inventory.Node{Name: "vddkcp-0123456789abcdef", Moref: "snapshot-9", Ours: true, Mark: &inventory.Mark{Host: "proxy2", Started: time.Unix(0, 0)}}
	for _, c := range []struct {
		name   string
		change func(*fakeVM, *machine.Spec, string)
		exit   int
		want   string
	}{
		{"question", func(f *fakeVM, _ *machine.Spec, _ string) { f.vm.Question = "no space: retry?" }, 75, "no space: retry?"},
		{"consolidation", func(f *fakeVM, _ *machine.Spec, _ string) { f.vm.ConsolidationNeeded = true }, 2, "consolidation"},
		{"another run", func(f *fakeVM, _ *machine.Spec, _ string) { f.vm.Snapshots = []inventory.Node{ours} }, 75, "proxy2"},
		{"full datastore", func(f *fakeVM, s *machine.Spec, _ string) { s.MinFree = 2 << 40 }, 75, "--min-free"},
		{"physical RDM", func(f *fakeVM, _ *machine.Spec, _ string) {
			f.vm.Disks[1].Verdict, f.vm.Disks[1].Reason = inventory.Never, "a LUN of the array"
		}, 2, "a LUN of the array"},
		{"independent disk", func(f *fakeVM, _ *machine.Spec, _ string) {
			f.vm.Disks[1].Verdict, f.vm.Disks[1].Reason = inventory.WhenOff, "independent"
		}, 2, "independent"},
		{"existing file", func(_ *fakeVM, _ *machine.Spec, dir string) {
			os.WriteFile(filepath.Join(dir, "web01-disk2.raw"), []byte("x"), 0o600)
		}, 1, "web01-disk2.raw"},
		{"two runs", func(f *fakeVM, s *machine.Spec, dir string) {
			lock, err := os.Create(filepath.Join(dir, "web01.vddkcp.json.lock"))
			if err == nil {
				err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX)
			}
			if err != nil {
				f.t.Fatal(err)
			}
			f.t.Cleanup(func() { lock.Close() })
		}, 75, "in use by"},
		{"damaged state file", func(_ *fakeVM, _ *machine.Spec, dir string) {
			os.WriteFile(filepath.Join(dir, "web01.vddkcp.json"), []byte(`{"version":1,"state":"copied","disks":[{"target":"x"}]}`), 0o600)
		}, 1, "disk 1 is not complete"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
			spec := f.spec(dir)
			c.change(f, &spec, dir)
			before := f.names()
			_, planned := machine.Plan(t.Context(), spec)
			_, err := machine.Run(t.Context(), spec)
			for which, err := range map[string]error{"Run": err, "Plan": planned} {
				if c.name == "two runs" && which == "Plan" {
					continue
				}
				if err == nil || !strings.Contains(err.Error(), c.want) || report.Of(err).Exit != c.exit {
					t.Errorf("%s: error %v (exit %d), expected %q and exit %d", which, err, report.Of(err).Exit, c.want, c.exit)
				}
			}
			if !slices.Equal(f.names(), before) || f.made > 0 {
				t.Errorf("snapshots %v", f.names())
			}
		})
	}
}

// TestStateOfAnother checks that the state file of another copy is refused.
func TestStateOfAnother(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*fakeVM, *machine.Spec)
	}{
		{"instance UUID", func(f *fakeVM, _ *machine.Spec) { f.vm.InstanceUUID = "other" }},
		{"server", func(_ *fakeVM, s *machine.Spec) { s.Server = "other" }},
		{"disks", func(_ *fakeVM, s *machine.Spec) { s.Skip = []string{"2"} }},
		{"UUID of a disk", func(f *fakeVM, _ *machine.Spec) { f.vm.Disks[0].UUID = "other" }},
		{"key of a disk", func(f *fakeVM, _ *machine.Spec) { f.vm.Disks[1].Key = 7 }},
		{"target", func(_ *fakeVM, s *machine.Spec) {
			targets := s.Targets
			s.Targets = func(vm *inventory.VM, disks []inventory.Disk) ([]string, error) {
				list, err := targets(vm, disks)
				list[0] += ".img"
				return list, err
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
			ctx, cancel := context.WithCancelCause(t.Context())
			f.reading = func() error { cancel(signalled{}); return nil }
			spec := f.spec(dir)
			spec.KeepSnapshot = true
			if _, err := machine.Run(ctx, spec); report.Of(err).Exit != 143 {
				t.Fatal(err)
			}
			f.reading = nil
			state, _ := os.ReadFile(filepath.Join(dir, "web01.vddkcp.json"))
			c.change(f, &spec)
			for _, resume := range []bool{false, true} {
				spec.Resume = resume
				if _, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 2 || !strings.Contains(err.Error(), "state file") {
					t.Errorf("resume=%t: error %v", resume, err)
				}
			}
			if now, _ := os.ReadFile(filepath.Join(dir, "web01.vddkcp.json")); !bytes.Equal(now, state) {
				t.Error("the state file has changed")
			}
		})
	}
}

// TestRunsAfterKill leaves the state of a killed run and runs again without Resume.
func TestRunsAfterKill(t *testing.T) {
	f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
	f.before = func(call string) error {
		if call == "remove" || call == "open" {
			return errServer
		}
		return nil
	}
	spec := f.spec(dir)
	r, err := machine.Run(t.Context(), spec)
	if report.Of(err).Exit != 75 || len(r.Left) != 1 {
		t.Fatalf("report %+v, error %v", r, err)
	}
	left := r.Left[0]
	f.before = nil
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
	if i := slices.Index(f.calls, "remove"); f.made != 2 || i < 0 {
		t.Errorf("%d snapshots were made; calls %v; left %s", f.made, f.calls, left)
	}
}

// TestDiskAdded checks that a disk that is added while the snapshot is made is not left out.
func TestDiskAdded(t *testing.T) {
	f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
	all := f.vm.Disks
	f.vm.Disks = all[:1]
	f.before = func(call string) error {
		if call == "snapshot" {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.vm.Disks = all
		}
		return nil
	}
	if _, err := machine.Run(t.Context(), f.spec(dir)); err == nil || !strings.Contains(err.Error(), "which was added") || len(f.names()) > 0 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
	f.before = nil
	if _, err := machine.Run(t.Context(), f.spec(dir)); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
}

// TestLeft checks a run that copies everything, but cannot remove its snapshot.
func TestLeft(t *testing.T) {
	f, dir := newFake(t, 64*kib), t.TempDir()
	f.before = func(call string) error {
		if call == "remove" {
			return errServer
		}
		return nil
	}
	r, err := machine.Run(t.Context(), f.spec(dir))
	end := report.Of(err)
	if end.Exit != 5 || !end.Done() || !slices.Equal(r.Left, f.names()) || r.Exit != 5 || r.Status != report.StatusOK {
		t.Errorf("report %+v, error %v", r, err)
	}
	f.before = nil
	spec := f.spec(dir)
	spec.Resume = true
	if r, err := machine.Run(t.Context(), spec); err != nil || len(r.Left) > 0 {
		t.Errorf("report %+v, error %v", r, err)
	}
	f.check(dir)
}

// TestHeldFileChanged changes a complete target before it gets its name.
func TestHeldFileChanged(t *testing.T) {
	for _, change := range []struct {
		name string
		do   func(path string) error
	}{
		{"written", func(path string) error { return os.WriteFile(path, []byte("x"), 0o600) }},
		{"removed", os.Remove},
		{"replaced", func(path string) error {
			text, err := os.ReadFile(path)
			return errors.Join(err, os.WriteFile(path+"2", text, 0o600), os.Rename(path+"2", path))
		}},
	} {
		t.Run(change.name, func(t *testing.T) {
			f, dir := newFake(t, 64*kib), t.TempDir()
			ctx, cancel := context.WithCancelCause(t.Context())
			f.before = func(call string) error {
				if call == "remove" {
					cancel(signalled{})
				}
				return nil
			}
			spec := f.spec(dir)
			if _, err := machine.Run(ctx, spec); report.Of(err).Exit != 143 {
				t.Fatal(err)
			}
			if err := change.do(filepath.Join(dir, "web01-disk1.raw.partial")); err != nil {
				t.Fatal(err)
			}
			f.before = nil
			spec.Resume = true
			if r, err := machine.Run(t.Context(), spec); report.Of(err).Exit != 2 {
				t.Errorf("report %+v, error %v (exit %d)", r, err, report.Of(err).Exit)
			}
			if _, err := os.Stat(filepath.Join(dir, "web01-disk1.raw")); err == nil {
				t.Error("the file has its final name")
			}
			spec.Force = true
			if _, err := machine.Run(t.Context(), spec); err != nil {
				t.Fatal(err)
			}
			f.check(dir)
		})
	}
}

// TestTargetTaken checks that no file gets its name if another one cannot.
func TestTargetTaken(t *testing.T) {
	f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
	taken := filepath.Join(dir, "web01-disk2.raw")
	f.before = func(call string) error {
		if call == "remove" {
			return os.WriteFile(taken, []byte("x"), 0o600)
		}
		return nil
	}
	_, err := machine.Run(t.Context(), f.spec(dir))
	if report.Of(err).Exit != 75 {
		t.Errorf("error %v (exit %d)", err, report.Of(err).Exit)
	}
	if _, err := os.Stat(filepath.Join(dir, "web01-disk1.raw")); err == nil {
		t.Error("the file of disk 1 has its final name, although that of disk 2 has not")
	}
	os.Remove(taken)
	spec := f.spec(dir)
	spec.Resume = true
	if _, err := machine.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
}

// TestForce continues an earlier run although files with the final names exist, and replaces them.
func TestForce(t *testing.T) {
	f, dir := newFake(t, 300*kib, 200*kib), t.TempDir()
	ctx, cancel := context.WithCancelCause(t.Context())
	f.reading = func() error { cancel(signalled{}); return nil }
	spec := f.spec(dir)
	spec.KeepSnapshot = true
	if _, err := machine.Run(ctx, spec); report.Of(err).Exit != 143 {
		t.Fatal(err)
	}
	f.reading = nil
	if err := os.WriteFile(filepath.Join(dir, "web01-disk2.raw"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec.Resume, spec.Force = true, true
	if _, err := machine.Run(t.Context(), spec); err != nil || f.made != 1 {
		t.Fatalf("%d snapshots, error %v", f.made, err)
	}
	f.check(dir)
}

// TestShared checks that runs that copy disks of the same VM share a snapshot.
func TestShared(t *testing.T) {
	f, dir := newFake(t, 64*kib, 64*kib), t.TempDir()
	shared := new(machine.Snapshots)
	both := make(chan struct{})
	reads := 0
	f.reading = func() error { // each disk has one read
		f.mu.Lock()
		if reads++; reads == 2 {
			close(both)
		}
		f.mu.Unlock()
		<-both
		return nil
	}
	errs := make(chan error)
	for n := range 2 {
		spec := f.ofDisk(n, dir, shared)
		go func() {
			_, err := machine.Run(t.Context(), spec)
			errs <- err
		}()
	}
	if err := errors.Join(<-errs, <-errs); err != nil {
		t.Fatal(err)
	}
	f.check(dir)
	if f.made != 1 {
		t.Errorf("%d snapshots were made, expected 1", f.made)
	}
	if got := files(t, dir); len(got) != 2 {
		t.Errorf("the folder has %v, expected the two disks", got)
	}
}
