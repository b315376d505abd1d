package vddk

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// prepareAccess has the VM prepared for access, once for all disks of the command.
// That it fails is no failure of the disk; the error is the cause of ctx.
func (d *Disk) prepareAccess(ctx context.Context) error {
	if !d.params.PrepareAccess || !d.params.Remote() {
		return nil
	}
	err := d.o.Registry.prepare(ctx, &d.params, func() (maybe bool) {
		// Before the call: whoever ends the access of a process that was killed
		// needs its identity.
		if d.o.Log != nil {
			d.o.Log.Info("vddk: preparing the VM for access: it can't be migrated until EndAccess is called", "server", d.params.Server, "vm", d.params.VM, "identity", d.o.Registry.identity)
		}
		err := d.callForVM(ctx, "prepare the access of", func(ctx context.Context, p process) error {
			err := p.PrepareAccess(ctx, d.identified())
			// Only the server's answer says that nothing was done. What a lost
			// worker, or one that was waited for in vain, has done nobody knows.
			maybe = !errors.As(err, new(*worker.Error))
			return err
		})
		if err != nil {
			d.warn(fmt.Sprintf("%s: the server did not prepare the VM for access%s: %v", d.params.File, whyNotPrepared(err), err))
		}
		return maybe
	})
	d.prepared = err == nil
	return err
}

// endAccess undoes PrepareForAccess for all disks of the command. It may be called
// when the disk has been closed, and its report is written.
func (d *Disk) endAccess() {
	err := d.callForVM(d.ctx, "end the access of", func(ctx context.Context, p process) error { return p.EndAccess(ctx, d.identified()) })
	if err != nil {
		text := fmt.Sprintf("%s: EndAccess failed, and the VM may not be migrated until it is called for %q: %v", d.params.File, d.o.Registry.identity, err)
		if d.closing.Load() && d.o.Log != nil {
			d.o.Log.Warn(text)
		} else {
			d.warn(text)
		}
	}
}

// identified is the request with the identity of PrepareForAccess.
func (d *Disk) identified() worker.OpenRequest {
	r := d.request
	r.Identity = d.o.Registry.identity
	return r
}

var alreadyDisabled = regexp.MustCompile(`(?i)already ?disabled`)

// whyNotPrepared explains an error of PrepareForAccess in a half sentence, or is
// empty.
func whyNotPrepared(err error) string {
	e := asError(err)
	switch {
	case e == nil:
		return ""
	case slices.ContainsFunc(append([]string{e.Text}, e.Last...), alreadyDisabled.MatchString):
		return ": another program keeps it from being migrated, or did and was killed"
	case e.code() == worker.CodeNotSupported:
		return " (ESXi hosts and old libraries don't)"
	}
	return ""
}

// tidyTimeout bounds each call that is made for the VM when the disk is closed.
const tidyTimeout = 30 * time.Second

// tidy undoes what was done to the VM: disks that lost workers added to this
// machine, which keep the snapshot from being removed, and PrepareForAccess, which
// keeps the VM from being migrated. So it is done after the context's end too.
func (d *Disk) tidy() {
	d.mu.Lock()
	messy := d.messy && d.wasAttached
	d.messy = false
	d.mu.Unlock()
	if messy {
		err := d.callForVM(d.ctx, "clean up after", func(ctx context.Context, p process) error {
			_, _, err := p.Cleanup(ctx, d.request)
			return err
		})
		if err != nil {
			d.warn(fmt.Sprintf("%s: disks that lost workers added to this machine may still be there, and keep the snapshot from being removed: %v", d.params.File, err))
		}
	}
	if d.prepared {
		d.prepared = false
		d.o.Registry.release(&d.params, d.endAccess)
		d.closing.Store(true)
	}
}

// callForVM makes a call to the server in a worker of its own; op names it in
// errors. It ends within tidyTimeout, and the end of ctx does not stop it.
func (d *Disk) callForVM(ctx context.Context, op string, call func(context.Context, process) error) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(5*d.o.Timeout, tidyTimeout))
	defer cancel()
	ended, err := d.o.Registry.login(ctx, &d.params)
	if err != nil {
		return err
	}
	mark := d.log.mark()
	p, err := d.startWorker(ctx, d.config.buffers, 1, 4096)
	if err != nil {
		ended(err)
		return err
	}
	defer p.Release()
	defer p.Kill()
	err = call(ctx, p)
	if err != nil {
		err = d.explain(op, 0, 0, mark, err)
		ended(err)
	} else {
		ended(errNoLogin)
	}
	return errors.Join(err, p.Close(ctx))
}
