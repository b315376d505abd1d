package main

import (
	"sync"
	"syscall"
)

// spawned are the process groups of commands that run, which must not outlive a
// vddkcp that ends at once.
type spawned struct {
	mu     sync.Mutex // guards what follows, and is held while a group begins
	groups map[int]bool
}

// spawn is batch.Options.Spawn.
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

// kill ends all that run, and keeps others from beginning: the program is about
// to end.
func (s *spawned) kill() {
	s.mu.Lock()
	for group := range s.groups {
		_ = syscall.Kill(-group, syscall.SIGKILL) // it may have ended
	}
}
