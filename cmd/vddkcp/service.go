package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/notify"
)

// statusInterval is how often the service manager gets a new status text.
const statusInterval = 10 * time.Second

// The type service tells systemd, or another service manager, what a command does.
type service struct {
	send     func(messages ...string) error // nil: there is no service manager
	watchdog time.Duration                  // within which it expects notify.Alive; 0: it does not
	err      error                          // of the environment variables; logged when the command has a log
}

// newService returns the service for the manager that started vddkcp. It removes the environment
// variables that name the manager, so that hooks and other children do not inherit them.
func newService() *service {
	n, err := notify.FromEnvironment()
	if n == nil {
		return &service{err: err}
	}
	return &service{n.Send, n.Watchdog(), err}
}

// The method begin tells the service manager that the command has started, and then every 10 s what
// it does. The function status returns a text for this. The caller calls the result, the function
// done, before the command ends.
//
// The watchdog of systemd is fed after each call of status, and only then. The function status
// therefore takes the locks that the work of the command needs, and does nothing else that may
// wait. If the work is deadlocked, the function status does not return, and systemd ends the
// process.
func (s *service) begin(ctx context.Context, log *slog.Logger, status func() string) (done func()) {
	if s.err != nil {
		log.Warn("the service manager is not told what vddkcp does", "error", s.err)
	}
	if s.send == nil {
		return func() {}
	}
	interval := statusInterval
	if half := s.watchdog / 2; half > 0 {
		interval = min(interval, half)
	}
	var once sync.Once
	send := func(messages ...string) (sent bool) {
		err := s.send(messages...)
		if err != nil {
			once.Do(func() { log.Warn("the service manager cannot be told what vddkcp does", "error", err) })
		}
		return err == nil
	}
	ready := send(notify.Ready)
	ending := make(chan struct{})
	var all sync.WaitGroup
	all.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		stopping := ctx.Done()
		for {
			text := notify.Status(status())
			if !ready {
				// A service manager that was busy must still learn that the command has started. It
				// would end the process otherwise.
				ready = send(notify.Ready)
			}
			send(text, notify.Alive)
			select {
			case <-tick.C:
			case <-stopping:
				send(notify.Stopping)
				stopping = nil
			case <-ending:
				return
			}
		}
	})
	return func() {
		close(ending)
		all.Wait()
		send(notify.Stopping)
	}
}
