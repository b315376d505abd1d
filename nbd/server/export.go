package server

import (
	"context"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// An export is an open disk with at least one client.
type export struct {
	Export
	users int // connections that use the export, guarded by Server.mu

	mu     sync.Mutex // held while the disk is opened or closed
	opened bool
	facts
}

// The struct facts holds the properties of an open disk, and the state that all clients
// of the disk share. The fields themselves do not change while the disk is open: for
// the shared state, they only hold pointers and a channel.
type facts struct {
	disk     source.Disk
	size     int64
	writable source.Writable // nil: read-only
	files    source.InFile   // finds the data in files; may be nil
	extents  *extents
	sizes    nbd.BlockSizes
	chain    bool // the image has backing files
	calls    calls
	noNowait *atomic.Bool // the file system does not support preadv2 with RWF_NOWAIT
}

// acquire returns the export for a name that a client sent, and opens its disk if no
// other client uses the export. The caller must call release when its client no longer
// uses the export.
func (s *Server) acquire(ctx context.Context, name string) (*export, error) {
	found, err := s.exports.Find(ctx, name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	e := s.open[found.Name]
	if e == nil {
		e = &export{Export: found}
		s.open[found.Name] = e
	}
	e.users++
	s.mu.Unlock()

	e.mu.Lock()
	defer e.mu.Unlock()
	if e.opened {
		return e, nil
	}
	disk, err := s.exports.Open(s.disksCtx, found.Name)
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forget(e)
		return nil, err
	}
	e.facts = s.inspect(disk)
	e.opened = true
	return e, nil
}

// The method forget records that a client no longer uses an export whose disk is not
// open. If no client uses the export any more, forget removes it from s.open. The
// caller holds s.mu.
func (s *Server) forget(e *export) {
	if e.users--; e.users == 0 {
		delete(s.open, e.Name)
	}
}

// The method release ends the use of an export that acquire returned. If no other
// client uses the export, release closes its disk. If another client chooses the export
// while the disk is being closed, that client waits until the disk is closed, so that a
// disk is never open twice.
func (s *Server) release(e *export) {
	e.mu.Lock()
	defer e.mu.Unlock()
	s.mu.Lock()
	last := e.users == 1
	if !last {
		e.users--
	}
	s.mu.Unlock()
	if !last {
		return
	}
	if err := e.disk.Close(); err != nil && e.writable != nil {
		s.o.Log.Error("cannot close the disk: data that clients wrote and did not flush may be lost", "export", e.Name, "error", err)
		s.closeErr.CompareAndSwap(nil, new(fmt.Errorf("close export %q: %w", e.Name, err)))
	} else if err != nil {
		s.o.Log.Warn("cannot close the disk", "export", e.Name, "error", err)
	}
	e.extents.clear()
	e.opened, e.facts = false, facts{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(e)
}

// inspect finds out what a disk supports and which lengths of requests it prefers.
func (s *Server) inspect(disk source.Disk) facts {
	f := facts{disk: disk, size: disk.Size(), extents: newExtents(disk, &s.cacheBytes), noNowait: new(atomic.Bool), calls: make(calls, maxExportCalls)}
	if s.o.Writable {
		f.writable, _ = source.Ability[source.Writable](disk)
	}
	f.files, _ = source.Ability[source.InFile](disk)
	f.sizes = nbd.BlockSizes{Min: 1, Preferred: 4096, Max: nbd.MaxPayload}
	if d, ok := source.Ability[source.Described](disk); ok {
		info := d.Info()
		f.chain = len(info.Chain) > 1
		if n := info.ClusterSize; n > 4096 && bits.OnesCount64(uint64(n)) == 1 {
			f.sizes.Preferred = uint32(min(n, nbd.MaxPayload))
		}
		if n := info.GuestSector; n > 512 && n <= nbd.MaxPayload && bits.OnesCount64(uint64(n)) == 1 {
			f.sizes.Preferred = uint32(n) // NBD has no other way to advertise the sector size
		}
	}
	return f
}

// The method flags returns the transmission flags of the export. CanMultiConn is always
// among them, because all connections use the same disk and therefore see each other's
// writes.
func (f *facts) flags(structured bool) nbd.TransmissionFlags {
	flags := nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.CanMultiConn | nbd.SendCache
	if structured {
		flags |= nbd.SendDF
	}
	if f.writable == nil {
		return flags | nbd.ReadOnly
	}
	return flags | nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero
}

// Opened is an export whose disk is already open.
type Opened struct {
	Export
	Disk source.Disk
}

// Fixed is a list of exports whose disks are already open, and stay open when the server
// ends. If it has a single export without a name, clients get that export, whatever name
// they send.
type Fixed []Opened

// List implements Exports.
func (f Fixed) List(context.Context) ([]Export, error) {
	list := make([]Export, len(f))
	for i, o := range f {
		list[i] = o.Export
	}
	return list, nil
}

// Find implements Exports.
func (f Fixed) Find(_ context.Context, name string) (Export, error) {
	if len(f) == 1 && f[0].Name == "" {
		return f[0].Export, nil
	}
	for _, o := range f {
		if o.Name == name {
			return o.Export, nil
		}
	}
	return Export{}, fmt.Errorf("%q: %w", name, ErrUnknownExport)
}

// Open implements Exports.
func (f Fixed) Open(_ context.Context, name string) (source.Disk, error) {
	for _, o := range f {
		if o.Name == name {
			return kept{o.Disk}, nil
		}
	}
	return nil, fmt.Errorf("%q: %w", name, ErrUnknownExport)
}

// The type kept is a disk whose Close does nothing. The disk must stay open, because it
// was not opened by the server.
type kept struct{ source.Disk }

func (k kept) Unwrap() source.Disk { return k.Disk }
func (kept) Close() error          { return nil }
