package vddk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// openRequest returns what the library is told of the disk.
func openRequest(p *Params, thumbprint string, writable bool) worker.OpenRequest {
	r := worker.OpenRequest{
		Path: p.File, ReadOnly: !writable,
		Server: p.Server, Port: p.Port, NFCPort: p.NFCHostPort, VMXSpec: p.VM, Thumbprint: thumbprint,
		User: p.User, Password: p.Password.Reveal(), Cookie: p.Cookie.Reveal(),
		Snapshot: p.Snapshot, Transports: p.Transports,
	}
	if !writable {
		r.Flags |= worker.FlagReadOnly
	}
	if p.Unbuffered {
		r.Flags |= worker.FlagUnbuffered
	}
	if p.SingleLink {
		r.Flags |= worker.FlagSingleLink
	}
	switch p.Compression {
	case "zlib":
		r.Flags |= worker.FlagZlib
	case "fastlz":
		r.Flags |= worker.FlagFastLZ
	case "skipz":
		r.Flags |= worker.FlagSkipZ
	}
	return r
}

// openSession starts a worker and opens the disk in it. Replacing says that a
// worker was lost before, which may have left things on the host. With shrink
// the connection gets smaller buffers where the host lacks memory; those of the
// first one all later ones get.
func (d *Disk) openSession(ctx context.Context, replacing, shrink bool) (*session, error) {
	d.mu.Lock()
	buffers := d.buffers
	d.mu.Unlock()
	for {
		s, err := d.openWith(ctx, buffers, replacing)
		var e *Error
		if !errors.As(err, &e) || !e.noMemory() || !shrink {
			return s, err
		}
		smaller, ok := buffers.Halved()
		if !ok {
			return nil, err
		}
		d.debug("", "the host has no memory for the NFC buffers; trying smaller ones", "size", smaller.Size, "count", smaller.Count, "error", err)
		buffers = smaller
		if !replacing {
			d.mu.Lock()
			d.buffers = smaller
			d.mu.Unlock()
		}
	}
}

// openWith opens the disk with a connection of such buffers, when its login is due.
func (d *Disk) openWith(ctx context.Context, buffers NFCBuffers, replacing bool) (s *session, err error) {
	ended, err := d.o.Registry.login(ctx, &d.params)
	if err != nil {
		if stopped := d.ended(); stopped != nil {
			return nil, stopped
		}
		return nil, d.failed(err)
	}
	defer func() { ended(err) }()
	timeout := 5 * d.o.Timeout
	late := fmt.Errorf("no answer within %v", timeout)
	limited, cancel := context.WithTimeoutCause(ctx, timeout, late)
	defer cancel()
	mark := d.log.mark()
	fail := func(op string, err error) error {
		if stopped := d.ended(); stopped != nil {
			return stopped
		}
		if limited.Err() != nil {
			return &lostError{d.rangeOf(op, 0, 0), context.Cause(limited), true}
		}
		return d.explain(op, 0, 0, mark, err)
	}

	p, err := d.startWorker(limited, buffers, d.nBuffers+d.nSpare, d.o.RequestSize)
	if err != nil {
		return nil, fail("start", err)
	}
	stop := context.AfterFunc(limited, p.Kill) // also when it hangs in a call below
	defer stop()
	defer func() {
		if err == nil {
			return
		}
		// Closing undoes what was done on the host before the error.
		if !isLost(err) {
			p.Close(limited)
		}
		p.Kill()
		p.Release()
	}()
	if replacing && d.params.Remote() {
		if err := d.cleanUp(limited, p, mark); err != nil {
			return nil, fail("open", err)
		}
	}
	opened, err := p.Open(limited, d.request)
	if err != nil {
		return nil, fail("open", err)
	}
	if d.o.Writable && !p.Has("VixDiskLib_Flush") {
		return nil, d.failed(fmt.Errorf("%s: VDDK %d has no VixDiskLib_Flush: writing needs VDDK 6.0 or later", d.params.File, d.library.Version))
	}
	if err := d.same(opened); err != nil {
		return nil, err
	}
	s = newSession(p, opened, d.nBuffers, d.nSpare, min(d.o.Timeout, d.o.Retry.Patience()))
	if err := d.compare(limited, s); err != nil {
		if limited.Err() != nil {
			err = fail("open", err)
		}
		return nil, err
	}
	if !stop() {
		return nil, fail("open", &lostError{d.rangeOf("open", 0, 0), late, true})
	}
	return s, nil
}

// startWorker starts a worker with a connection of such buffers, and so many slots
// of slotSize bytes.
func (d *Disk) startWorker(ctx context.Context, buffers NFCBuffers, slots, slotSize int) (process, error) {
	file, err := newConfigFile(d.config.file(buffers))
	if err != nil {
		return nil, startError(err)
	}
	defer file.Close()
	return d.start(ctx, worker.Config{
		Library: d.library.Path, Root: d.library.Root, Dir: d.library.Dir, Version: d.library.Version,
		ConfigFile: file.path, Slots: slots, SlotSize: slotSize,
		Log: func(level worker.Level, line string) {
			d.log.add(level == worker.Warning || level == worker.Panic, line)
		},
	})
}

// startError makes a lack of descriptors or memory known as one that may pass.
func startError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &worker.StartError{Err: err}
}

// cleanUp removes what lost workers left on the host. Only a refused login is an
// error, because then the disk need not be asked for.
func (d *Disk) cleanUp(ctx context.Context, p process, mark int64) error {
	cleaned, remaining, err := p.Cleanup(ctx, d.request)
	if err == nil {
		d.mu.Lock()
		d.messy = false
		d.mu.Unlock()
	}
	d.debug("", "cleaned up after a lost worker", "cleaned", cleaned, "remaining", remaining, "error", err)
	if e := asError(d.explain("open", 0, 0, mark, err)); err != nil && e != nil && e.refusedByLog() {
		return err
	}
	return nil
}

// compare returns an error unless the disk of a session that was just opened holds
// what was read before.
func (d *Disk) compare(ctx context.Context, s *session) error {
	slot, timeout := s.spare[0], min(d.o.Timeout, d.o.Retry.Patience())
	err := d.samples.Check(func(p []byte, off int64) (goOn bool, err error) {
		for len(p) > 0 {
			n := min(len(p), d.o.RequestSize)
			mark := d.log.mark()
			if err := s.read(ctx, timeout, slot, uint64(off/sectorSize), n/sectorSize); err != nil {
				if err = d.explain("read", off, int64(n), mark, err); isLost(err) {
					s.proc.Kill()
					return false, s.gone(d.rangeOf("read", off, int64(n)))
				}
				return ctx.Err() == nil, err
			}
			copy(p, s.proc.Slot(slot)[:n])
			p, off = p[n:], off+int64(n)
		}
		return true, nil
	})
	if errors.Is(err, source.ErrChanged) {
		return source.Changed(fmt.Errorf("%s, opened again: %w", d.params.File, err))
	}
	return err
}

// same returns an error unless what was opened is the disk that was opened
// first.
func (d *Disk) same(o worker.Opened) error {
	d.mu.Lock()
	first := d.first
	d.mu.Unlock()
	if first == nil || first.Capacity == o.Capacity && first.UUID == o.UUID {
		return nil
	}
	if o.Capacity == 0 { // what no disk has is no proof that this is another one
		return fmt.Errorf("%s, opened again: the library says that it has no sectors", d.params.File)
	}
	return source.Changed(fmt.Errorf("%s, opened again: it is another disk: it had %d bytes (uuid %q) and has %d (uuid %q)", d.params.File,
		first.Capacity*sectorSize, first.UUID, o.Capacity*sectorSize, o.UUID))
}

// failed marks an error of opening the disk as permanent, unless the disk was open
// before: then nothing is.
func (d *Disk) failed(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.first == nil {
		return source.Permanent(err)
	}
	return err
}
