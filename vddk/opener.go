package vddk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// opener starts worker processes and opens the disk in them. Its methods are safe for concurrent
// use as soon as openFirst has returned.
type opener struct {
	life    *lifetime
	params  *Params // of the first opening
	o       *Options
	library Library
	config  *libraryConfig
	log     *logs
	explain *explainer
	report  *reporter
	policy  retry.Policy
	start   func(context.Context, worker.Config) (process, error)

	locator

	slots, spare int // slots of each worker, and how many of them are spare ones

	// samples has checksums of some data that was read. After the disk is opened again, the same
	// data is read and compared. This comparison proves nothing about a disk whose content may
	// change, and is not needed for a snapshot, which never changes. In both cases samples is nil.
	samples *source.Samples

	// The method openFirst sets these fields. Every other opening of the disk begins after
	// openFirst has returned.
	opened  *worker.Opened // the disk as the first opening found it
	queries bool           // the library can list allocated blocks
	buffers NFCBuffers     // what later connections ask the host for

	restarts atomic.Int64 // workers that were started in place of lost ones
	messy    atomic.Bool  // a worker was lost, and Cleanup has not succeeded since
	attached atomic.Bool  // a connection attached the disk to this machine (hotadd, san)
}

func newOpener(life *lifetime, p *Params, l Library, o *Options, config *libraryConfig, thumbprint string) *opener {
	op := &opener{
		life: life, params: p, o: o, library: l, config: config,
		log: newLogs(p, o.Log), report: newReporter(p, o), buffers: config.buffers,
		slots: 3 * o.Depth, spare: o.Depth,
	}
	op.locator.init(newDestination(*p, thumbprint, o))
	op.policy = o.Retry.Policy()
	op.policy.Permanent = func(err error) bool {
		return isRefusedLogin(err) || o.Retry.Permanent != nil && o.Retry.Permanent(err)
	}
	op.explain = &explainer{at: &op.at, log: op.log}
	if p.Snapshot == "" && !o.Writable && !o.Retry.Mutable {
		op.samples = new(source.Samples)
	}
	return op
}

// openRequest returns the parameters with which the library logs in and opens the disk.
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

// openFirst opens the disk for the first time. If the worker process crashes while it opens the
// disk, openFirst makes up to two more attempts. After any other failure it returns the error at
// once.
func (op *opener) openFirst(ctx context.Context) (*session, error) {
	policy := &op.policy
	for n := 1; ; n++ {
		s, err := op.open(ctx, n > 1, true)
		if err == nil {
			err = op.note(s)
		}
		// Only a crash is worth another attempt. If the library returns an error, the user
		// should see it at once. If the library hangs, the first attempt has taken enough time.
		var lost *lostError
		if err == nil || !errors.As(err, &lost) || lost.late || n > 2 || policy.Retries >= 0 && n > policy.Retries || op.life.ended() != nil {
			return s, err
		}
		wait := time.Duration(0)
		if n > 1 {
			wait = policy.Delay(n - 1)
		}
		op.restarts.Add(1)
		policy.Pause(ctx, err, wait, nil)
	}
}

// The method note records the properties of the disk after the first opening. If the size of the
// disk is impossible, note closes the session and returns an error.
func (op *opener) note(s *session) error {
	if s.opened.Capacity > 1<<63/sectorSize-1 {
		s.proc.Kill()
		s.proc.Release()
		return op.explain.openFailed(fmt.Errorf("%s: the library reports an impossible size of %d sectors", op.params.File, s.opened.Capacity))
	}
	opened := s.opened
	op.opened = &opened
	op.queries = s.proc.Has("VixDiskLib_QueryAllocatedBlocks") && s.proc.Has("VixDiskLib_FreeBlockList")
	op.explain.wasOpen.Store(true)
	return nil
}

// The method open starts a worker process and opens the disk in it. After the first opening, it
// first asks Options.Refresh where the disk is. The parameter replacing is true if the new worker
// replaces a lost one. The lost worker may have left something behind on the host, and the new
// worker first removes that.
func (op *opener) open(ctx context.Context, replacing, shrink bool) (s *session, err error) {
	at := op.at.Load()
	if op.opened != nil {
		if at, err = op.refresh(ctx, at, nil); err != nil {
			return nil, err
		}
	}
	err = op.withLogins(ctx, at, func(at *destination) (err error) {
		s, err = op.openAt(ctx, at, replacing, shrink)
		return err
	})
	return s, err
}

// The method openAt opens the disk at the destination at.
//
// If the host has no memory for the buffers of the connection, openAt tries again with smaller
// buffers, but only if shrink is true. If the first opening needs smaller buffers, all later
// openings begin with these.
func (op *opener) openAt(ctx context.Context, at *destination, replacing, shrink bool) (*session, error) {
	buffers := op.buffers
	for {
		s, err := op.openWith(ctx, at, buffers, replacing)
		if e := asError(err); e == nil || !e.noMemory() || !shrink {
			return s, err
		}
		smaller, ok := buffers.Halved()
		if !ok {
			return nil, err
		}
		op.report.debug("", "the host has no memory for the NFC buffers; trying smaller ones", "size", smaller.Size, "count", smaller.Count, "error", err)
		buffers = smaller
		if !replacing {
			op.buffers = smaller
		}
	}
}

// openWith makes one attempt to open the disk, over a connection with the given buffers. First
// it waits until the Registry allows the login.
func (op *opener) openWith(ctx context.Context, at *destination, buffers NFCBuffers, replacing bool) (s *session, err error) {
	loginEnded, err := op.o.Registry.login(ctx, &at.params)
	if err != nil {
		if ended := op.life.ended(); ended != nil {
			return nil, ended
		}
		return nil, op.explain.openFailed(err)
	}
	defer func() { loginEnded(err) }()
	timeout := 5 * op.o.Timeout
	late := fmt.Errorf("the disk was not opened: no answer within %v", timeout)
	limited, cancel := context.WithTimeoutCause(ctx, timeout, late)
	defer cancel()
	mark := op.log.mark()
	fail := func(operation string, err error) error {
		if ended := op.life.ended(); ended != nil {
			return ended
		}
		if limited.Err() != nil {
			return &lostError{op.explain.rangeOf(operation, 0, 0), context.Cause(limited), true}
		}
		return op.explain.explain(operation, 0, 0, mark, err)
	}

	p, err := op.startWorker(limited, buffers, op.slots, op.o.RequestSize)
	if err != nil {
		return nil, fail("start", err)
	}
	// A call below may hang in the library. At the time limit, or when ctx ends, the worker is
	// killed, which also ends the call.
	stop := context.AfterFunc(limited, p.Kill)
	defer stop()
	defer func() {
		if err == nil {
			return
		}
		// If the opening fails in a later step, closing the worker undoes the earlier steps on
		// the host.
		if !isLost(err) {
			p.Close(limited)
		}
		p.Kill()
		p.Release()
	}()
	if at.params.Remote() {
		op.report.debug("", "logging in", "server", at.params.Server, "login", at.login())
		if replacing {
			if err := op.cleanUp(limited, p, at, mark); err != nil {
				return nil, fail("open", err)
			}
		}
	}
	opened, err := p.Open(limited, at.request)
	if err != nil {
		return nil, fail("open", err)
	}
	if op.o.Writable && !p.Has("VixDiskLib_Flush") {
		return nil, op.explain.openFailed(fmt.Errorf("%s: VDDK %d has no VixDiskLib_Flush: writing needs VDDK 6.0 or later", op.params.File, op.library.Version))
	}
	if err := op.same(at, opened); err != nil {
		return nil, err
	}
	s = newSession(p, opened, op.slots-op.spare, op.spare)
	s.at = at
	if err := op.compare(limited, s); err != nil {
		if limited.Err() != nil {
			err = fail("open", err)
		}
		return nil, err
	}
	if !stop() {
		return nil, fail("open", &lostError{op.explain.rangeOf("open", 0, 0), late, true})
	}
	return s, nil
}

// startWorker starts a worker process. Its connection will have the given buffers. The process
// has the given number of slots of shared memory, of slotSize bytes each.
func (op *opener) startWorker(ctx context.Context, buffers NFCBuffers, slots, slotSize int) (process, error) {
	file, err := newConfigFile(op.config.file(buffers))
	if err != nil {
		return nil, startError(err)
	}
	defer file.Close()
	end := func(int64) {}
	if op.report.stats != nil {
		end = op.report.stats.begin("InitEx")
	}
	p, err := op.start(ctx, worker.Config{
		Library: op.library.Path, Root: op.library.Root, Dir: op.library.Dir, Version: op.library.Version,
		ConfigFile: file.path, Slots: slots, SlotSize: slotSize,
		Log: func(level worker.Level, line string) {
			op.log.add(level == worker.Warning || level == worker.Panic, line)
		},
	})
	end(0)
	if err != nil || op.report.stats == nil {
		return p, err
	}
	return &measured{p, op.report.stats}, nil
}

// startError marks err as a temporary failure to start a worker process, such as a lack of file
// descriptors or memory. If a file does not exist, the failure is not temporary, and err is
// returned as it is.
func startError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &worker.StartError{Err: err}
}

// cleanUp removes what lost worker processes left on the host. Its errors are only logged,
// except one: if the server refused the login, cleanUp returns the error, because opening the
// disk would fail in the same way.
func (op *opener) cleanUp(ctx context.Context, p process, at *destination, mark int64) error {
	cleaned, remaining, err := p.Cleanup(ctx, at.request)
	if err == nil {
		op.messy.Store(false)
	}
	op.report.debug("", "cleaned up after a lost worker", "cleaned", cleaned, "remaining", remaining, "error", err)
	if e := asError(op.explain.explain("open", 0, 0, mark, err)); err != nil && e != nil && e.refusedByLog() {
		return err
	}
	return nil
}

// The method same checks that a disk that was opened again is the same disk as at the first
// opening. The parameter opened has the present properties of the disk. If the size or the UUID is
// not that of the first opening, same returns an error.
func (op *opener) same(at *destination, opened worker.Opened) error {
	first := op.opened
	if first == nil || first.Capacity == opened.Capacity && first.UUID == opened.UUID {
		return nil
	}
	if opened.Capacity == 0 {
		// No disk has 0 sectors. A size of 0 is a failure of the library, and does not prove that
		// another disk was opened.
		return fmt.Errorf("%s: after the disk was opened again, the library says that the disk has no sectors", at.params.File)
	}
	return source.Changed(fmt.Errorf("%s: opening the disk again opened another disk: before, the disk had %d bytes and the UUID %q, now it has %d bytes and the UUID %q", at.params.File,
		first.Capacity*sectorSize, first.UUID, opened.Capacity*sectorSize, opened.UUID))
}

// The method compare returns an error if the content of the disk has changed. samples has checksums
// of data that was read before. compare reads this data again in the new session s, and compares
// it.
func (op *opener) compare(ctx context.Context, s *session) error {
	if op.samples == nil {
		return nil
	}
	slot, timeout := s.spare[0], min(op.o.Timeout, op.policy.Patience())
	err := op.samples.Check(func(p []byte, off int64) (goOn bool, err error) {
		for len(p) > 0 {
			n := min(len(p), op.o.RequestSize)
			mark := op.log.mark()
			if err := s.read(ctx, timeout, slot, uint64(off/sectorSize), n/sectorSize); err != nil {
				if err = op.explain.explain("read", off, int64(n), mark, err); isLost(err) {
					s.proc.Kill()
					return false, s.gone(op.explain.rangeOf("read", off, int64(n)))
				}
				return ctx.Err() == nil, err
			}
			copy(p, s.proc.Slot(slot)[:n])
			p, off = p[n:], off+int64(n)
		}
		return true, nil
	})
	if errors.Is(err, source.ErrChanged) {
		return source.Changed(fmt.Errorf("%s: after the disk was opened again: %w", op.params.File, err))
	}
	return err
}

// The function split divides a reservation of memory into n shares. The returned function is called
// n times, once for each share. Its last call frees the whole reservation, by calling free.
func split(n int, free func()) (share func()) {
	var left atomic.Int64
	left.Store(int64(n))
	return func() {
		if left.Add(-1) == 0 {
			free()
		}
	}
}

// The method reserve waits until the Budget of the host has memory for n connections at the
// destination at, or ctx ends. The returned function frees this memory.
func (op *opener) reserve(ctx context.Context, at *destination, n int) (free func(), err error) {
	if at.budget == nil || !at.params.Remote() {
		return func() {}, nil
	}
	return at.budget.Acquire(ctx, at.budget.Of(n, op.buffers.Bytes()))
}

// tryReserve reserves memory for one connection at the destination at, if the Budget of the host
// has enough memory at this moment. It does not wait for memory.
func (op *opener) tryReserve(at *destination) (free func(), ok bool) {
	if at.budget == nil || !at.params.Remote() {
		return func() {}, true
	}
	return at.budget.TryAcquire(at.budget.Of(1, op.buffers.Bytes()))
}
