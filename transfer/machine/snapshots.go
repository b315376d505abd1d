package machine

import (
	"context"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
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
	quiet    int  // runs that read the VM without a snapshot and hold the lock together; guarded by Snapshots.mu
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

// The method acquireQuiet waits until the VM has no snapshot of a run of this process. It keeps such
// snapshots from being made until releaseQuiet is called, because they change the VM. Several runs can
// have called acquireQuiet at the same time.
func (s *Snapshots) acquireQuiet(ctx context.Context, key string) error {
	v := s.of(key)
	for !s.joinQuiet(v) {
		if !retry.Sleep(ctx, time.Second, nil) {
			return context.Cause(ctx)
		}
	}
	return nil
}

// The method joinQuiet counts another run that reads the VM without a snapshot. It returns false if that
// is not possible now.
func (s *Snapshots) joinQuiet(v *sharedSnapshot) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.quiet == 0 {
		select {
		case <-v.lock:
		default:
			return false
		}
		if v.users > 0 {
			v.lock <- struct{}{}
			return false
		}
	}
	v.quiet++
	return true
}

// The method releaseQuiet undoes one call of acquireQuiet.
func (s *Snapshots) releaseQuiet(key string) {
	v := s.of(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.quiet--; v.quiet == 0 {
		v.lock <- struct{}{}
	}
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
