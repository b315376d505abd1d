package vddk

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// The type access makes the calls of the library that concern the whole VM and not only one disk:
// PrepareForAccess when the disk is opened, and EndAccess and Cleanup when it is closed.
// PrepareForAccess keeps the VM from being migrated until EndAccess is called.
type access struct {
	*opener
	prepared bool        // Registry.prepare has counted the disk
	closed   atomic.Bool // the report of the disk may have been written already
}

// The method prepare calls PrepareForAccess if Params.PrepareAccess asks for it and no other disk
// of this command has already done so for the same VM. If the server refuses the call, prepare only
// warns the user. prepare returns an error only if ctx ends. The error is then the cause of ctx.
func (a *access) prepare(ctx context.Context) error {
	if !a.params.PrepareAccess || !a.params.Remote() {
		return nil
	}
	err := a.o.Registry.prepare(ctx, a.params, func() (maybe bool) {
		// The identity names this command to the server. It is logged before the call is made,
		// because the user needs it to call EndAccess if this process is killed.
		if a.o.Log != nil {
			a.o.Log.Info("vddk: preparing the VM for access: it cannot be migrated until EndAccess is called", "server", a.params.Server, "vm", a.params.VM, "identity", a.o.Registry.identity)
		}
		err := a.call("prepare the access of", func(ctx context.Context, p process, r worker.OpenRequest) error {
			err := p.PrepareAccess(ctx, a.identified(r))
			// If the server returned an error, the VM is not prepared. If the worker process
			// crashed or did not answer in time, the VM may be prepared.
			maybe = !errors.As(err, new(*worker.Error))
			return err
		})
		if err != nil {
			a.report.warn(fmt.Sprintf("%s: the server did not prepare the VM for access%s: %v", a.params.File, whyNotPrepared(err), err))
		}
		return maybe
	})
	a.prepared = err == nil
	return err
}

// The method end calls EndAccess, once for all disks of the VM. The Registry counts the open disks
// of the VM, and calls end when the last of them is closed. If EndAccess fails, end adds a warning
// to the report of this disk. If that report may have been written already, end logs the warning
// instead.
func (a *access) end() {
	err := a.call("end the access of", func(ctx context.Context, p process, r worker.OpenRequest) error {
		return p.EndAccess(ctx, a.identified(r))
	})
	if err != nil {
		text := fmt.Sprintf("%s: EndAccess failed, and the VM may not be migrated until it is called for %q: %v", a.params.File, a.o.Registry.identity, err)
		if a.closed.Load() && a.o.Log != nil {
			a.o.Log.Warn(text)
		} else {
			a.report.warn(text)
		}
	}
}

// identified returns the login request r with the identity of this command, which PrepareForAccess
// and EndAccess need.
func (a *access) identified(r worker.OpenRequest) worker.OpenRequest {
	r.Identity = a.o.Registry.identity
	return r
}

// tidyTimeout is the time limit of each call to the server in access.call.
const tidyTimeout = 30 * time.Second

// The method tidy undoes what was done to the VM. It is called when no worker process has the disk
// open any more. A worker process that crashed or was killed may have left disks attached to this
// machine, which prevents the removal of the snapshot. tidy first detaches these disks. Then it
// ends the access for which the VM was prepared, so that the VM can be migrated again. tidy works
// even if the context of the disk has ended.
func (a *access) tidy() {
	if a.messy.Swap(false) && a.attached.Load() {
		err := a.call("clean up after", func(ctx context.Context, p process, r worker.OpenRequest) error {
			_, _, err := p.Cleanup(ctx, r)
			return err
		})
		if err != nil {
			a.report.warn(fmt.Sprintf("%s: disks that a crashed or killed worker process attached to this machine may still be attached, which prevents the removal of the snapshot: %v", a.params.File, err))
		}
	}
	if a.prepared {
		a.prepared = false
		a.o.Registry.release(a.params, a.end)
		a.closed.Store(true)
	}
}

// The method call starts a worker process, in which the function callServer makes one call to the
// server, with the given login request. The parameter operation names that call in errors. The call
// may take up to tidyTimeout. It continues even if the context of the disk ends. If the server
// refuses a session cookie, the call is made again with another login from Options.Refresh.
func (a *access) call(operation string, callServer func(context.Context, process, worker.OpenRequest) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(a.life.Context), min(5*a.o.Timeout, tidyTimeout))
	defer cancel()
	return a.withLogins(ctx, a.at.Load(), func(at *destination) error {
		return a.callAt(ctx, at, operation, callServer)
	})
}

// The method callAt makes one attempt of the method call, with the login of the destination at.
func (a *access) callAt(ctx context.Context, at *destination, operation string, callServer func(context.Context, process, worker.OpenRequest) error) error {
	loginEnded, err := a.o.Registry.login(ctx, &at.params)
	if err != nil {
		return err
	}
	mark := a.log.mark()
	p, err := a.startWorker(ctx, a.config.buffers, 1, 4096)
	if err != nil {
		loginEnded(err)
		return err
	}
	defer p.Release()
	defer p.Kill()
	err = callServer(ctx, p, at.request)
	if err != nil {
		err = a.explain.explain(operation, 0, 0, mark, err)
		loginEnded(err)
	} else {
		loginEnded(errNoLogin)
	}
	return errors.Join(err, p.Close(ctx))
}

var alreadyDisabled = regexp.MustCompile(`(?i)already ?disabled`)

// whyNotPrepared explains an error of PrepareForAccess in a few words. The caller appends them to
// the sentence "the server did not prepare the VM for access". The result is "" if the reason is
// not known.
func whyNotPrepared(err error) string {
	e := asError(err)
	switch {
	case e == nil:
		return ""
	case slices.ContainsFunc(e.lines(), alreadyDisabled.MatchString):
		return ": another program prevents the migration of the VM, or was killed before it allowed the migration again"
	case e.code() == worker.CodeNotSupported:
		return " (ESXi hosts and old libraries do not support the call)"
	}
	return ""
}
