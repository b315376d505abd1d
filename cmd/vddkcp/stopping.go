package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// The type waiting is a function that says what a command waits for when it is stopped, such as "4
// reads", or "" for nothing. If ok is false, the stop needs no message.
type waiting func() (what string, ok bool)

// stopping prints a line when the first signal arrives, which says what the command still waits
// for.
type stopping struct {
	mu      sync.Mutex // guards the fields below
	out     io.Writer
	asJSON  bool
	waiting waiting // nil: the command waits for nothing that can be named
}

// The method over makes the line appear on out, such as a display of progress.
func (s *stopping) over(out io.Writer, asJSON bool, waiting waiting) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.out, s.asJSON, s.waiting = out, asJSON, waiting
}

// The method say prints the line. If the terminal, or the process that reads standard error, does
// not take the line, say returns after a short time, so that the command still stops.
func (s *stopping) say() {
	s.mu.Lock()
	out, asJSON, waiting := s.out, s.asJSON, s.waiting
	s.mu.Unlock()
	printed := make(chan struct{})
	go func() {
		defer close(printed)
		text := "stopping"
		if waiting != nil {
			what, ok := waiting()
			if !ok {
				return
			}
			if what != "" {
				text += ": waiting for " + what
			}
		}
		messages(out, asJSON).Info(text + " (again to end at once)")
	}()
	select {
	case <-printed:
	case <-time.After(100 * time.Millisecond):
	}
}

// readsOf returns a function that says how many reads of a display's copies a command waits for.
func readsOf(display interface{ Reads() (reads, copies int) }) waiting {
	return func() (string, bool) {
		reads, copies := display.Reads()
		switch {
		case reads == 0:
			return "", true
		case copies > 1:
			return fmt.Sprintf("%d reads of %d disks", reads, copies), true
		}
		return plural(reads, "read", "reads"), true
	}
}
