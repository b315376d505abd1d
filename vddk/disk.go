package vddk

import (
	"context"
	"fmt"
	"iter"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/impatient"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	defaultRequest = 1 << 20
	defaultDepth   = 4
	defaultTimeout = 2 * time.Minute
	// maxDepth is the largest Options.Depth, the number of requests in flight on a connection. For
	// each of these requests, a worker process has three slots, pieces of shared memory: two that
	// Disk.Buffer returns as buffers, and a spare one.
	maxDepth = worker.MaxSlots / 3
)

var errIO error = syscall.EIO

// Disk is an open disk. Worker processes read and write it, each over a connection of its own.
// Lost workers are replaced, and failed calls are repeated as Options.Retry says. Therefore a
// Disk does not have to be wrapped by source.Retry, which repeats failed calls of other disks.
// All methods are safe for concurrent use.
//
// Disk implements these interfaces of package source: Disk, Allocator, Identified, Described,
// Counted and Ender. If Options.Writable is set, it also implements Writable.
type Disk struct {
	params         Params
	o              Options
	size           int64         // bytes
	opened         worker.Opened // what the library says about the disk
	libraryVersion string

	life       *lifetime
	log        *logs
	report     *reporter
	access     *access
	pool       *pool
	allocation *allocationQueries
	ranges     rangeLock   // of writes
	flushes    flush.Group // shares the flushes of concurrent calls
}

var _ interface {
	source.Disk
	source.Allocator
	source.Identified
	source.Described
	source.Counted
	source.Ender
	source.Writable
} = (*Disk)(nil)

// Open opens the disk that the parameters p name, with the library l. If the worker process crashes
// while it opens the disk, Open makes up to two more attempts. After any other failure it returns
// the error at once. Errors that would occur again with the same parameters are marked by
// source.Permanent.
//
// When ctx ends, all methods of the disk return the cause of ctx, and the workers are killed.
// Workers never outlive this process.
func Open(ctx context.Context, p Params, l Library, o Options) (*Disk, error) {
	thumbprint, err := libraryThumbprint(ctx, &p)
	if err != nil {
		return nil, err
	}
	return open(ctx, p, l, o, thumbprint, func(ctx context.Context, c worker.Config) (process, error) {
		return worker.Start(ctx, c)
	})
}

// The function open implements Open. The parameter thumbprint is the SHA-1 thumbprint that the
// library expects of the server's certificate. The parameter start is the function that starts a
// worker process; tests pass another function than worker.Start.
func open(ctx context.Context, p Params, l Library, o Options, thumbprint string,
	start func(context.Context, worker.Config) (process, error)) (*Disk, error) {
	config, err := impatient.Call(ctx, func() (*libraryConfig, error) { return readConfig(&p) })
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, source.Permanent(err)
	}
	d := &Disk{params: p, o: o.normalised(), life: newLifetime(ctx, p.File), libraryVersion: l.version()}
	op := newOpener(d.life, &d.params, l, &d.o, config, thumbprint)
	op.start = start
	d.log, d.report, d.access = op.log, op.report, &access{opener: op}
	d.life.background.Go(func() { d.log.run(d.life.ending) })
	err = d.access.prepare(ctx)
	if err == nil {
		d.pool, err = openPool(ctx, d.life, op)
	}
	if err != nil {
		d.finish()
		d.log.drain()
		return nil, err
	}
	d.opened = *op.opened
	d.size = int64(d.opened.Capacity) * sectorSize
	i := &d.opened
	d.report.debug("diskinfo", "disk", "capacity", d.size, "adapter", adapterType(i.Adapter), "links", i.Links, "uuid", i.UUID, "parent", i.Parent,
		"bios_geometry", i.BIOSGeometry, "geometry", i.Geometry, "logical_sector", i.LogicalSector, "physical_sector", i.PhysicalSector,
		"transport", i.Transport, "library", d.libraryVersion)
	d.allocation = newAllocationQueries(d.pool, d.size)
	return d, nil
}

// normalised returns the options with defaults in place of fields that are not set. It also limits
// the fields to values that a worker process accepts.
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
		// A disk that is opened for writing has only one connection. Until a flush, a second
		// connection might not see the data that the first one has sent.
		o.Connections = 1
	}
	return o
}

// Size returns the capacity of the disk in bytes.
func (d *Disk) Size() int64 { return d.size }

// Identity implements source.Identified. The identity is a text that consists of the server, the
// VM, the file, the UUID, the size and the snapshot of the disk. The result proof says what ensures
// that a disk with this identity always has the same content. It is "snapshot" if Params.Snapshot
// is set, because a snapshot never changes. Otherwise it is "none".
func (d *Disk) Identity(context.Context) (id, proof string, err error) {
	id = fmt.Sprintf("vddk:%s:%s:%s:%s:%d", d.params.Server, d.params.VM, d.params.File, d.opened.UUID, d.size)
	if d.params.SingleLink {
		id += "+single-link" // another content than that of the whole chain
	}
	if d.params.Snapshot == "" {
		return id, "none", nil
	}
	return id + ":" + d.params.Snapshot, "snapshot", nil
}

// Info returns the properties of the disk that the library reports, such as its UUID and
// geometry.
func (d *Disk) Info() source.Info {
	o := &d.opened
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

// adapterType returns the adapter type as VMDK descriptors name it, such as "lsilogic". The
// parameter n is the number that the library uses for it. If the number is unknown, the result is
// "".
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

// The method version returns the version of the library. This is the text after ".so." in the name
// of the library's file, such as "8.0.1" for libvixDiskLib.so.8.0.1. If the name does not contain
// ".so.", the result is only the major version, such as "8".
func (l Library) version() string {
	if _, version, ok := strings.Cut(filepath.Base(l.Path), ".so."); ok {
		return version
	}
	return fmt.Sprint(l.Version)
}

// Stats returns statistics of the disk: the transport mode, the number of connections, retries
// and restarted workers, and others. It may be called after Close, too.
func (d *Disk) Stats() source.Stats {
	s := source.Stats{Library: d.libraryVersion, ExtentsSource: d.allocation.source()}
	d.pool.fillStats(&s)
	return s
}

// LastWarnings returns the last 20 warnings that the library logged, the newest at the end. The
// program vddkcp shows them when a copy fails.
func (d *Disk) LastWarnings() []string { return d.log.lastWarnings() }

// Ended implements source.Ender. It returns nil as long as the disk can be used. If the disk was
// lost and cannot be opened again, it returns the reason; all calls fail then.
func (d *Disk) Ended() error { return d.pool.died() }

// ReadAt implements source.Disk. The library reads directly into p if p is a whole buffer that
// Disk.Buffer returned, and off and len(p) are multiples of 512. In all other cases the library
// reads into memory of a worker process, and ReadAt copies the data from there to p.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s: negative offset %d", d.params.File, off)
	}
	if err := d.pool.begin(); err != nil {
		return 0, err
	}
	defer d.life.End()
	p, atEnd := life.Clip(p, off, d.size)
	if err := d.pool.carryOut(request{p: p, off: off, n: int64(len(p))}); err != nil {
		return 0, err
	}
	return len(p), atEnd
}

// Buffer implements source.Allocator: it returns n bytes for ReadAt to read into. If n is at most
// Options.RequestSize, the buffer is memory that is shared with a worker process, and the library
// can read directly into it. Buffer waits until such memory is free, or ctx ends. A larger buffer
// is ordinary memory. The buffer stays valid, even after Close, until the caller calls the returned
// function.
func (d *Disk) Buffer(ctx context.Context, n int) (b []byte, free func(), err error) {
	if n <= 0 || n > d.o.RequestSize {
		return make([]byte, max(n, 0)), func() {}, nil
	}
	return d.pool.buffer(ctx, n)
}

// Extents implements source.Disk. It asks the library which blocks are allocated, in windows of 32
// GiB, and keeps the results. While the caller uses the extents of one window, the next window is
// already queried. Ranges that are not allocated are zeros or, with Params.SingleLink,
// source.Inherited. The library can only be asked about whole chunks of 64 KiB. A smaller rest at
// the end of the disk is reported as Data.
//
// If the query for a window fails, the user is warned once, and up to 1 GiB of the window is
// reported as Data. Then the rest of the window is queried again. During a pause after the failure
// nothing is queried, and all ranges are reported as Data. After the first write the whole disk is
// reported as Data.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	if !life.InDisk(off, length, d.size) {
		return func(yield func(source.Extent, error) bool) {
			yield(source.Extent{}, fmt.Errorf("%s: cannot list the extents of bytes %d to %d, because the disk has %d bytes", d.params.File, off, off+length, d.size))
		}
	}
	return d.allocation.extents(ctx, off, length)
}

// Close waits for calls in progress, closes the disk in all worker processes and waits until
// they have ended. If the disk was closed before, the error wraps os.ErrClosed. Errors of the
// library while it closes the disk are returned only for a writable disk. Buffers stay valid.
func (d *Disk) Close() error {
	d.life.startClosing()
	d.pool.wake() // calls must not wait for workers any more
	return d.life.Close(func() error {
		d.finish()
		s := d.Stats()
		d.report.debug("stats", "closed", "transport", s.Transport, "connections", s.Connections, "retries", s.Retries, "restarts", s.Restarts, "extents", s.ExtentsSource)
		if stats := d.report.stats; stats != nil {
			d.report.table("VDDK function stats (-D vddk.stats=1):", stats.table())
		}
		d.log.drain()
		if d.o.Writable {
			return d.pool.closeErr
		}
		return nil // what was read is not affected by an error of closing
	})
}

// The method finish ends the worker processes. Then it detaches disks that lost workers left
// attached, and ends the access for which the VM was prepared.
func (d *Disk) finish() {
	d.life.end()
	d.life.background.Wait()
	d.access.tidy()
}

// libraryThumbprint checks the certificate of the server and returns its SHA-1 thumbprint. The
// library checks that thumbprint when it connects.
func libraryThumbprint(ctx context.Context, p *Params) (string, error) {
	if !p.Remote() {
		return "", nil
	}
	return certificate.CheckThumbprint(ctx, p.Server, p.Port, p.Thumbprint)
}
