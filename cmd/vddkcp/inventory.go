package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// The method withSession opens the log, connects to the server and logs in, and calls the
// function do. At the end it logs out. It is for commands that need a server and no disk.
func (f *serverFlags) withSession(ctx context.Context, logs *logFlags, do func(ctx context.Context, s *vsphere.Session, log *slog.Logger) error) error {
	return f.withLog(logs, new(outputs), func(log *slog.Logger) error {
		options, err := f.options(ctx, log)
		if err != nil {
			return err
		}
		s, err := vsphere.Connect(ctx, options)
		if err != nil {
			return err
		}
		err = do(ctx, s, log)
		if closed := s.Close(); closed != nil {
			log.Warn(closed.Error())
		}
		return err
	})
}

// The method withLog opens the log, calls the function do, and closes the log. The parameter
// outputs has the other files that the command writes.
func (f *serverFlags) withLog(logs *logFlags, outputs *outputs, do func(log *slog.Logger) error) (err error) {
	outputs.add("--log-file", logs.LogFile)
	f.protectSecrets(outputs)
	if err := outputs.check(); err != nil {
		return err
	}
	log, closeLog, err := logs.open(errorOutput, false)
	if err != nil {
		return usage.Wrap(err)
	}
	defer func() {
		if closed := closeLog(); closed != nil && err == nil {
			err = fmt.Errorf("log file: %w", closed)
		}
	}()
	return do(log)
}

// The method options returns how to reach the server and how to log in there.
func (f *serverFlags) options(ctx context.Context, log *slog.Logger) (vsphere.Options, error) {
	o, err := f.connection(ctx, func(message string) { log.Warn(message) })
	if err != nil {
		return o, err
	}
	f.logProvenance(log)
	o.UserAgent, o.Log = "vddkcp/"+programVersion(), log
	o.Retry.OnRetry = retry.LogTo(log, askedAgain)
	return o, nil
}

// listVMs returns the VMs that a pattern names. It returns a *noMatchError if there is none.
func listVMs(ctx context.Context, s *vsphere.Session, pattern string) ([]*inventory.VM, error) {
	vms, err := s.List(ctx, pattern)
	if err == nil && len(vms) == 0 && pattern != "" {
		err = &noMatchError{pattern}
	}
	return vms, err
}

// noMatchError means that no VM has a name that matches the pattern of the user.
type noMatchError struct{ pattern string }

func (e *noMatchError) Error() string { return fmt.Sprintf("no VM matches the pattern %q", e.pattern) }

// Hint tells the user what to do about the error.
func (*noMatchError) Hint() string {
	return "list all VMs with: vddkcp ls; a user sees only the VMs on which it has the privilege System.Read"
}
