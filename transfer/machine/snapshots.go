package machine

import (
	"context"
	"sync"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Snapshots lets all runs of one process that read disks of the same VM share one snapshot of it.
// The first run makes the snapshot, and the last one removes it. The zero value is ready for use. It
// is safe for concurrent use.
type Snapshots struct {
	mu  sync.Mutex
	vms map[string]*sharedSnapshot
}

// sharedSnapshot is the snapshot of one VM.
type sharedSnapshot struct {
	lock     chan struct{} // a mutex that is held while the snapshot is made or removed: has one element while it is unlocked
	users    int
	keep     bool // a user wants the snapshot to stay
	snapshot *inventory.Snapshot
}

// The method of returns the entry of a VM.
func (s *Snapshots) of(key string) *sharedSnapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.vms == nil {
		s.vms = map[string]*sharedSnapshot{}
	}
	v := s.vms[key]
	if v == nil {
		v = &sharedSnapshot{lock: make(chan struct{}, 1)}
		v.lock <- struct{}{}
		s.vms[key] = v
	}
	return v
}

// The method acquire returns the snapshot of the VM with the given key. If no run uses one, acquire
// calls the function create, which makes it. Every successful call of acquire is followed by one
// call of release.
func (s *Snapshots) acquire(ctx context.Context, key string, create func() (*inventory.Snapshot, error)) (*inventory.Snapshot, error) {
	v := s.of(key)
	select {
	case <-v.lock:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { v.lock <- struct{}{} }()
	if v.users == 0 {
		snapshot, err := create()
		if err != nil {
			return nil, err
		}
		v.snapshot, v.keep = snapshot, false
	}
	v.users++
	return v.snapshot, nil
}

// The method unlessUsed calls the function remove, which removes the snapshot that an earlier process
// has made, if no run of this process uses a snapshot of the VM. The last of these runs removes it.
func (s *Snapshots) unlessUsed(ctx context.Context, key string, remove func()) {
	v := s.of(key)
	select {
	case <-v.lock:
	case <-ctx.Done():
		return
	}
	defer func() { v.lock <- struct{}{} }()
	if v.users == 0 {
		remove()
	}
}

// The method release undoes one call of acquire. If no other run uses the snapshot, and no run has
// called release with keep, release calls the function remove.
func (s *Snapshots) release(key string, keep bool, remove func()) {
	v := s.of(key)
	<-v.lock
	defer func() { v.lock <- struct{}{} }()
	v.keep = v.keep || keep
	if v.users--; v.users == 0 && !v.keep {
		remove()
	}
}
