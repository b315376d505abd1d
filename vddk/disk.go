package vddk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/impatient"
	"github.com/vddkcp/vddkcp/internal/pacing"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	defaultRequest = 1 << 20
	defaultDepth   = 4
	defaultTimeout = 2 * time.Minute
	// maxAuto is to how many connections the disk grows by itself.
	maxAuto = 4
	// maxDepth leaves each request a second buffer, which waits to be written.
	maxDepth = worker.MaxSlots / 3
)

var errIO error = syscall.EIO

// Disk is a disk that VDDK opened. Worker processes, a connection each, read it
// and are replaced when they are lost; calls that fail are repeated as
// Options.Retry says, so that no source.Retry is needed around it.
//
// Beside source.Disk it is an Allocator, Identified, Described, Counted, and,
// where Options.Writable says so, Writable.
type Disk struct {
	ctx     context.Context
	started time.Time
	params  Params
	library Library
	o       Options
	request worker.OpenRequest
	config  *libraryConfig
	log     *logs
	pace    *pacing.Pace
	start   func(context.Context, worker.Config) (process, error)
	size    int64

	nBuffers, nSpare int // slots of each worker

	lastSuccess       atomic.Int64 // when a request succeeded last, in ns since started
	retries, restarts atomic.Int64
	anyRead           atomic.Bool

	sampled bool // no snapshot proves that the content is the same
	samples source.Samples

	// A handle that wrote must not be asked for allocation: the first write
	// waits for queries in progress.
	querying sync.RWMutex
	wrote    atomic.Bool // set with querying held

	flushes flush.Group // its lock is taken before mu

	// ending ends when the sessions are to end: in Close after the calls in
	// progress, and with ctx.
	ending context.Context
	end    context.CancelFunc
	closed chan struct{} // Close was called

	calls      sync.WaitGroup // for Close to wait; added to under mu, before Close
	background sync.WaitGroup // handles and openings, likewise

	mu       sync.Mutex
	changed  sync.Cond // a session came or went, a slot was freed, or it is all over
	handles  []*handle
	slots    map[*byte]slotRef // buffers, by their first byte
	first    *worker.Opened
	buffers  NFCBuffers // of connections to come
	dead     error      // what no reopening helps against
	lastLoss error
	tuner    *pacing.Tuner // nil: the number of connections is given
	growing  bool
	most     int   // connections at once
	messy    bool  // a worker was lost, and no Cleanup was called since
	closeErr error // of workers

	transport   string // mode of the connection that was opened last
	wasAttached bool   // a connection made the disk one of this machine

	written, flushed int64 // writes that ended; how many of them the last Flush covered
	flushErr         error

	allocation allocationQueries
	ranges     rangeLock

	prepared bool        // the disk is counted by Registry.prepare; not guarded
	closing  atomic.Bool // and is no more

	warnedGrowth, warnedQuery sync.Once
}

// Open opens a disk with a library. The first opening is not repeated, unless a
// worker is lost in it, and then twice at most. Errors that come again are
// marked by source.Permanent.
//
// When ctx ends, all calls return its cause and the workers are killed. Workers
// never outlive this process.
func Open(ctx context.Context, p Params, l Library, o Options) (*Disk, error) {
	thumbprint, err := libraryThumbprint(ctx, &p)
	if err != nil {
		return nil, err
	}
	return open(ctx, p, l, o, thumbprint, func(ctx context.Context, c worker.Config) (process, error) {
		return worker.Start(ctx, c)
	})
}

func open(ctx context.Context, p Params, l Library, o Options, thumbprint string,
	start func(context.Context, worker.Config) (process, error)) (*Disk, error) {
	config, err := impatient.Call(ctx, func() (*libraryConfig, error) { return readConfig(&p) })
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, source.Permanent(err)
	}
	d := &Disk{
		ctx: ctx, started: time.Now(), params: p, library: l, o: o.normalised(), config: config, start: start,
		buffers: config.buffers, closed: make(chan struct{}), slots: make(map[*byte]slotRef),
	}
	d.request = openRequest(&p, thumbprint, o.Writable)
	d.sampled = p.Snapshot == "" && !d.o.Writable && !d.o.Retry.Mutable
	d.pace = pacing.NewPace(d.o.RequestSize, d.o.Depth)
	d.nSpare = d.o.Depth
	d.nBuffers = 2 * d.o.Depth
	d.changed.L = &d.mu
	d.ending, d.end = context.WithCancel(ctx)
	d.log = newLogs(&p, o.Log)
	// The lines of the last moments are written by drain.
	d.background.Go(func() { d.log.run(d.ending) })
	err = d.prepareAccess(ctx)
	if err == nil {
		err = d.openFirst(ctx)
	}
	if err != nil {
		d.end()
		d.background.Wait()
		d.tidy()
		d.log.drain()
		return nil, err
	}
	// A context that ends must wake who waits.
	context.AfterFunc(d.ending, d.wake)
	d.describe()
	return d, nil
}

// normalised returns o with its defaults in place.
func (o Options) normalised() Options {
	if o.RequestSize <= 0 {
		o.RequestSize = defaultRequest
	}
	o.RequestSize = max(min(o.RequestSize, worker.MaxSlotSize)&^4095, 4096)
	if o.Depth <= 0 {
		o.Depth = defaultDepth
	}
	o.Depth = min(o.Depth, maxDepth)
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	if o.Registry == nil {
		o.Registry = NewRegistry(1)
	}
	if o.Writable {
		// What one connection has written another may not see before a flush.
		o.Connections = 1
	}
	return o
}

// openFirst opens the first connection, and the others where their number is
// given.
func (d *Disk) openFirst(ctx context.Context) error {
	connections := max(d.o.Connections, 1)
	free, err := d.acquire(ctx, connections)
	if err != nil {
		return err
	}
	share := split(connections, free)
	h := newHandle(d, share)
	var s *session
	for n := 1; ; n++ {
		if s, err = d.openSession(ctx, n > 1, true); err == nil {
			break
		}
		// A library that fails says so to the user at once, and one that hangs
		// took long enough; one that crashed may have been unlucky.
		var lost *lostError
		if !errors.As(err, &lost) || lost.late || n > 2 || d.o.Retry.Retries >= 0 && n > d.o.Retry.Retries || d.ended() != nil {
			free()
			return err
		}
		wait := time.Duration(0)
		if n > 1 {
			wait = d.o.Retry.Delay(n - 1)
		}
		if d.o.Retry.OnRetry != nil {
			d.o.Retry.OnRetry(err, wait)
		}
		d.restarts.Add(1)
		sleep(ctx, nil, wait)
	}
	if s.opened.Capacity > 1<<63/sectorSize-1 {
		s.proc.Kill()
		s.proc.Release()
		free()
		return d.failed(fmt.Errorf("%s: the library says it has %d sectors", d.params.File, s.opened.Capacity))
	}
	if !nfc(s.opened.Transport) {
		free() // nothing is reserved on the host
		h.free = func() {}
	}
	d.size = int64(s.opened.Capacity) * sectorSize
	d.allocation.init(d.size, s.proc.Has("VixDiskLib_QueryAllocatedBlocks") && s.proc.Has("VixDiskLib_FreeBlockList"))
	d.mu.Lock()
	defer d.mu.Unlock()
	first := s.opened
	d.first = &first
	d.usesLocked(first.Transport)
	h.session = s
	d.handles = []*handle{h}
	d.most = 1
	d.addSlotsLocked(h, s)
	d.background.Add(1)
	go d.run(h, s)
	switch {
	case d.o.Connections > 1 && attached(first.Transport):
		d.debug("", "one connection is used: more of this transport mode would share one device", "transport", first.Transport)
	case d.o.Connections > 1:
		d.growing = true
		d.background.Go(func() {
			defer d.grown()
			for rest := connections - 1; rest > 0; rest-- {
				if !d.addHandle(share) { // it has given its share back
					for range rest - 1 {
						share()
					}
					break
				}
			}
		})
	case d.o.Connections <= 0 && nfc(first.Transport):
		d.tuner = pacing.NewTuner(maxAuto)
	}
	return nil
}

// nfc says whether a transport mode goes through the host's NFC service, whose
// connections and memory are limited, and where more of them may be faster.
func nfc(transport string) bool { return transport == "nbd" || transport == "nbdssl" }

// attached says whether disks in a transport mode are made disks of this
// machine.
func attached(transport string) bool { return transport == "hotadd" || transport == "san" }

// split returns what each of n connections is to call when it has ended: the last
// one frees what they have together.
func split(n int, free func()) (share func()) {
	var left atomic.Int64
	left.Store(int64(n))
	return func() {
		if left.Add(-1) == 0 {
			free()
		}
	}
}

// acquire waits for the budget of n connections.
func (d *Disk) acquire(ctx context.Context, n int) (free func(), err error) {
	if d.o.Budget == nil || !d.params.Remote() {
		return func() {}, nil
	}
	return d.o.Budget.Acquire(ctx, d.o.Budget.Of(n, d.config.buffers.Bytes()))
}

// describe tells what is to be known of the disk at the beginning.
func (d *Disk) describe() {
	o := d.first
	d.debug("diskinfo", "disk", "capacity", d.size, "adapter", adapterType(o.Adapter), "links", o.Links, "uuid", o.UUID, "parent", o.Parent,
		"bios_geometry", o.BIOSGeometry, "geometry", o.Geometry, "logical_sector", o.LogicalSector, "physical_sector", o.PhysicalSector,
		"transport", o.Transport, "library", d.libraryVersion())
	if d.allocation.missing && d.allocation.chunks > 0 {
		d.warnOnce(&d.warnedQuery, d.params.File+": the library can't tell which blocks are allocated, so that all of them are read: it has no VixDiskLib_QueryAllocatedBlocks, which came with VDDK 6.7")
	}
}

// Size is the capacity in bytes.
func (d *Disk) Size() int64 { return d.size }

// Identity is the snapshot's and the disk's where one was named, which never
// changes. Else nothing proves that the content is still the same.
func (d *Disk) Identity(context.Context) (id, proof string, err error) {
	id = fmt.Sprintf("vddk:%s:%s:%s:%s:%d", d.params.Server, d.params.VM, d.params.File, d.first.UUID, d.size)
	if d.params.Snapshot == "" {
		return id, "none", nil
	}
	return id + ":" + d.params.Snapshot, "snapshot", nil
}

// Info tells what the library does.
func (d *Disk) Info() source.Info {
	o := d.first
	geometry := o.Geometry
	if geometry == [3]uint32{} {
		geometry = o.BIOSGeometry
	}
	return source.Info{
		Format: "vddk", Subformat: o.Transport, AdapterType: adapterType(o.Adapter), UUID: o.UUID,
		LogicalSector: max(int64(o.LogicalSector), sectorSize),
		GuestSector:   int64(o.LogicalSector), GuestPhysical: int64(o.PhysicalSector),
		Geometry: [3]int64{int64(geometry[0]), int64(geometry[1]), int64(geometry[2])},
		Chain:    []string{d.params.File},
	}
}

func adapterType(n int) string {
	switch n {
	case 1:
		return "ide"
	case 2:
		return "buslogic"
	case 3:
		return "lsilogic"
	}
	return ""
}

// Stats tells how the disk has been read so far; also after Close.
func (d *Disk) Stats() source.Stats {
	extents := d.allocation.source()
	d.mu.Lock()
	defer d.mu.Unlock()
	connections, most := d.most, max(d.most, d.o.Connections)
	if d.tuner != nil {
		connections, most = d.tuner.Settled(), maxAuto
	}
	return source.Stats{
		Transport: d.transport, Library: d.libraryVersion(), Connections: connections, Most: most,
		Retries: d.retries.Load(), Restarts: d.restarts.Load(), ExtentsSource: extents,
	}
}

// libraryVersion is as much of it as the library's file is named by.
func (d *Disk) libraryVersion() string {
	if _, version, ok := strings.Cut(filepath.Base(d.library.Path), ".so."); ok {
		return version
	}
	return fmt.Sprint(d.library.Version)
}

// LastWarnings returns the last 20 warnings of the library, the newest last: for
// the message when a copy fails.
func (d *Disk) LastWarnings() []string { return d.log.lastWarnings() }

// begin makes Close wait until the calls' Done.
func (d *Disk) begin() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.endedNow(); err != nil {
		return err
	}
	d.calls.Add(1)
	return nil
}

// Ended implements source.Ender.
func (d *Disk) Ended() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dead
}

// endedNow returns why no call can be made any more. The caller holds mu.
func (d *Disk) endedNow() error {
	if err := d.ended(); err != nil {
		return err
	}
	return d.dead
}

// stuckNow returns why a call in progress can't go on; wait says that it would
// have to wait for a worker, which a disk that is being closed gets no more. The
// caller holds mu.
func (d *Disk) stuckNow(wait bool) error {
	switch {
	case d.ctx.Err() != nil:
		return context.Cause(d.ctx)
	case d.dead != nil:
		return d.dead
	case wait:
		return d.ended()
	}
	return nil
}

// ended returns the cause of the context's end, or that the disk was closed.
func (d *Disk) ended() error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	select {
	case <-d.closed:
		return fmt.Errorf("%s: %w", d.params.File, os.ErrClosed)
	default:
		return nil
	}
}

// wake wakes all who wait.
func (d *Disk) wake() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.changed.Broadcast()
	for _, h := range d.handles {
		h.turn.Broadcast()
	}
}

// Close waits for calls in progress and for the workers, which close the disk.
// Buffers stay valid.
func (d *Disk) Close() error {
	d.mu.Lock()
	select {
	case <-d.closed:
		d.mu.Unlock()
		return os.ErrClosed
	default:
	}
	close(d.closed)
	d.mu.Unlock()
	d.wake()
	d.calls.Wait()
	d.end()
	d.background.Wait()
	d.tidy()
	s := d.Stats()
	d.debug("stats", "closed", "transport", s.Transport, "connections", s.Connections, "retries", s.Retries, "restarts", s.Restarts, "extents", s.ExtentsSource)
	d.log.drain()
	if d.o.Writable {
		return d.closeErr
	}
	return nil // what was read was read
}

// inDisk says whether a range lies in the disk.
func (d *Disk) inDisk(off, n int64) bool { return off >= 0 && n >= 0 && off <= d.size-n }

// ReadAt implements source.Disk. Where p is a buffer of Buffer's, from its
// first byte on, and off and len(p) are multiples of 512, the library reads into
// it; all else goes through memory of a worker.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%s: read at negative offset %d", d.params.File, off)
	}
	if err := d.begin(); err != nil {
		return 0, err
	}
	defer d.calls.Done()
	if off >= d.size {
		return 0, io.EOF
	}
	var atEnd error
	if int64(len(p)) > d.size-off {
		p, atEnd = p[:d.size-off], io.EOF
	}
	if err := d.read(p, off); err != nil {
		return 0, err
	}
	return len(p), atEnd
}
