package machine_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// fakeVM is a machine.Machine and machine.Opener in memory.
type fakeVM struct {
	t  *testing.T
	mu sync.Mutex
	vm inventory.VM
	// live is the content of the disks, and frozen has a copy of it for each snapshot.
	live     [][]byte
	frozen   map[string][][]byte
	quiesced map[string]bool // by the name of the snapshot
	made     int             // snapshots so far
	open     int             // disks that are open
	calls    []string
	// consolidated has the snapshots before which the disks did not need consolidation, as the
	// method WasConsolidated has recorded them.
	consolidated []string
	// before is called at the beginning of each call, with its name. If the result is an error, the
	// call fails with it. If the error wraps errLost, the call is executed nevertheless.
	before func(call string) error
	// reading is called by each read of a disk.
	reading func() error
}

var (
	errLost   = errors.New("the answer was lost")
	errServer = &transientError{"the server is lost"}
)

type transientError struct{ text string }

func (e *transientError) Error() string   { return e.text }
func (e *transientError) Transient() bool { return true }

func newFake(t *testing.T, sizes ...int) *fakeVM {
	f := &fakeVM{t: t, frozen: map[string][][]byte{}, quiesced: map[string]bool{}, vm: inventory.VM{
		Name: "web01", Path: "/DC0/vm/web01", Moref: "vm-1", InstanceUUID: "5000-1", Power: inventory.On,
		Details: inventory.Details{Stores: []inventory.Store{{Name: "ds", Type: "VMFS", Free: 1 << 40}}, ChangeVersion: "1"},
	}}
	random := rand.New(rand.NewPCG(1, 2))
	for i, size := range sizes {
		content := make([]byte, size)
		for j := range content {
			content[j] = byte(random.Uint32())
		}
		f.live = append(f.live, content)
		f.vm.Disks = append(f.vm.Disks, inventory.Disk{
			N: i + 1, Key: int32(2000 + i), UUID: fmt.Sprintf("6000-%d", i), Label: fmt.Sprintf("Hard disk %d", i+1), Size: int64(size),
			Mode: "persistent", Backing: inventory.Flat, File: fmt.Sprintf("[ds] web01/web01_%d.vmdk", i), Verdict: inventory.Running,
		})
	}
	return f
}

// The method call records a call. The caller must return the first error. The second result says
// that the call is executed although it fails.
func (f *fakeVM) call(name string) (err error, executed bool) {
	f.calls = append(f.calls, name)
	if f.before == nil {
		return nil, false
	}
	f.mu.Unlock()
	err = f.before(name)
	f.mu.Lock()
	return err, errors.Is(err, errLost)
}

func (f *fakeVM) Describe(context.Context) (*inventory.VM, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err, _ := f.call("describe"); err != nil {
		return nil, err
	}
	vm := f.vm
	vm.Disks, vm.Snapshots = slices.Clone(vm.Disks), slices.Clone(vm.Snapshots)
	return &vm, nil
}

func (f *fakeVM) Snapshot(_ context.Context, r inventory.Request) (*inventory.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	err, executed := f.call("snapshot")
	if err != nil && !executed {
		return nil, err
	}
	if _, ok := f.frozen[r.Name]; !ok {
		f.made++
		mark := r.Mark
		f.vm.Snapshots = append(f.vm.Snapshots, inventory.Node{Name: r.Name, Moref: fmt.Sprintf("snapshot-%d", f.made), Ours: true, Mark: &mark})
		var copied [][]byte
		for _, content := range f.live {
			copied = append(copied, bytes.Clone(content))
		}
		f.frozen[r.Name], f.quiesced[r.Name] = copied, r.Quiesce == inventory.MustQuiesce
	}
	if err != nil {
		return nil, err
	}
	return f.snapshot(r.Name)
}

func (f *fakeVM) snapshot(name string) (*inventory.Snapshot, error) {
	for _, n := range f.vm.Snapshots {
		if n.Name != name {
			continue
		}
		s := &inventory.Snapshot{Name: name, Moref: n.Moref, Quiesced: f.quiesced[name]}
		for _, d := range f.vm.Disks {
			if d.Verdict == inventory.Running {
				s.Disks = append(s.Disks, d)
			}
		}
		return s, nil
	}
	return nil, inventory.ErrSnapshotGone
}

func (f *fakeVM) Find(_ context.Context, name string) (*inventory.Snapshot, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err, _ := f.call("find"); err != nil {
		return nil, err
	}
	return f.snapshot(name)
}

func (f *fakeVM) Remove(_ context.Context, name string, _ func(int)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err, executed := f.call("remove")
	if err != nil && !executed {
		return &inventory.LeftError{VM: f.vm.Name, Snapshot: name, Err: err}
	}
	if f.open > 0 {
		f.t.Errorf("a snapshot is removed while %d of its disks are open", f.open)
	}
	f.remove(name)
	if err != nil {
		return &inventory.LeftError{VM: f.vm.Name, Snapshot: name, Err: err}
	}
	return nil
}

func (f *fakeVM) WasConsolidated(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.consolidated = append(f.consolidated, name)
}

func (f *fakeVM) remove(name string) {
	f.vm.Snapshots = slices.DeleteFunc(f.vm.Snapshots, func(n inventory.Node) bool { return n.Name == name })
	delete(f.frozen, name)
}

// names returns the names of the snapshots of the VM.
func (f *fakeVM) names() (names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, n := range f.vm.Snapshots {
		names = append(names, n.Name)
	}
	return names
}

func (f *fakeVM) Ready() error { return nil }

func (f *fakeVM) Open(ctx context.Context, s *inventory.Snapshot, d *inventory.Disk, _ *open.Opener) (source.Disk, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err, _ := f.call("open"); err != nil {
		return nil, err
	}
	content := f.live[d.N-1]
	if s != nil {
		frozen, ok := f.frozen[s.Name]
		if !ok {
			return nil, errors.New("no such snapshot")
		}
		content = frozen[d.N-1]
	}
	f.open++
	return &fakeDisk{Memory: &sourcetest.Memory{Context: ctx, Bytes: content, OnRead: f.onRead}, vm: f}, nil
}

type fakeDisk struct {
	*sourcetest.Memory
	vm     *fakeVM
	closed bool
}

func (f *fakeVM) onRead(int64, int) error {
	if f.reading == nil {
		return nil
	}
	return f.reading()
}

func (d *fakeDisk) Close() error {
	d.vm.mu.Lock()
	defer d.vm.mu.Unlock()
	if !d.closed {
		d.closed = true
		d.vm.open--
	}
	return d.Memory.Close()
}

// spec returns the Spec of a copy of all disks to a folder.
func (f *fakeVM) spec(dir string) machine.Spec {
	return machine.Spec{
		Machine: f, Opener: f, Server: "vc-uuid", Name: "web01",
		Targets: func(_ *inventory.VM, disks []inventory.Disk) (targets []string, err error) {
			for _, d := range disks {
				targets = append(targets, filepath.Join(dir, fmt.Sprintf("web01-disk%d.raw", d.N)))
			}
			return targets, nil
		},
		State: func(*inventory.VM, []inventory.Disk, []string) (string, error) {
			return filepath.Join(dir, "web01.vddkcp.json"), nil
		},
		Job: func(*inventory.Disk, string) job.Spec { return job.Spec{RequestSize: 64 << 10, Depth: 1} },
	}
}

// ofDisk returns the Spec of a copy of one disk by a run that shares its snapshot with others. The
// disk is given by its index.
func (f *fakeVM) ofDisk(n int, dir string, shared *machine.Snapshots) machine.Spec {
	s := f.spec(dir)
	s.Only, s.Single, s.Snapshots = []string{fmt.Sprint(n + 1)}, true, shared
	s.State = func(*inventory.VM, []inventory.Disk, []string) (string, error) {
		return filepath.Join(dir, fmt.Sprint(n, ".json")), nil
	}
	return s
}

// whileRead calls a function during the first read of a disk. The function may copy disks itself.
func (f *fakeVM) whileRead(do func()) {
	var begun atomic.Bool
	f.reading = func() error {
		if begun.CompareAndSwap(false, true) {
			do()
		}
		return nil
	}
}

// check checks that all disks have been copied to the folder, and nothing else is there.
func (f *fakeVM) check(dir string) {
	f.t.Helper()
	for i, content := range f.live {
		got, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("web01-disk%d.raw", i+1)))
		if err != nil {
			f.t.Error(err)
		} else if !bytes.Equal(got, content) {
			f.t.Errorf("disk %d differs from its copy", i+1)
		}
	}
	if names := f.names(); len(names) > 0 {
		f.t.Errorf("snapshots are left: %v", names)
	}
	for _, e := range files(f.t, dir) {
		if strings.Contains(e, ".partial") || strings.HasSuffix(e, ".lock") {
			f.t.Errorf("%s is left", e)
		}
	}
}

// files returns the names of the files in a folder.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
