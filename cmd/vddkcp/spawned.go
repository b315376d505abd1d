package main

import (
	"sync"
	"syscall"
)

// The type spawned holds the process groups of commands that were started. They are killed
// if a second signal ends vddkcp at once.
type spawned struct {
	mu     sync.Mutex // guards groups; it is locked while a group is started
	groups map[int]bool
}

// The method spawn implements batch.Options.Spawn: it starts a process group and records
// it. The returned function removes the record.
func (s *spawned) spawn(start func() (group int, err error)) (gone func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	group, err := start()
	if err != nil {
		return nil, err
	}
	if s.groups == nil {
		s.groups = map[int]bool{}
	}
	s.groups[group] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.groups, group)
	}, nil
}

// The method kill kills all recorded groups. It keeps the mutex locked so that no other
// group can start before the program ends.
func (s *spawned) kill() {
	s.mu.Lock()
	for group := range s.groups {
		_ = syscall.Kill(-group, syscall.SIGKILL) // it may have ended
	}
}
