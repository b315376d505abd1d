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

// export is a disk that is open for its clients, of which there is at least
// one. What it can do is found out once.
type export struct {
	Export
	users int // under Server.mu

	mu     sync.Mutex // opens and closes
	opened bool
	facts
}

// facts are what the clients of an export share. They don't change while it is
// open.
type facts struct {
	disk     source.Disk
	size     int64
	writable source.Writable // nil: read-only
	files    source.InFile   // may be nil
	extents  *extents
	sizes    nbd.BlockSizes
	chain    bool // there are backing files
	calls    calls
	noNowait *atomic.Bool // whether bytes of a file are in memory can't be asked
}

// acquire returns the export that a client calls name, which release gives
// back.
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

// forget counts one user less. The caller holds s.mu.
func (s *Server) forget(e *export) {
	if e.users--; e.users == 0 {
		delete(s.open, e.Name)
	}
}

// release gives up an export. The last one closes the disk; who comes meanwhile
// waits for that, so that a disk is never open twice.
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
		s.o.Log.Error("closing the disk: what clients wrote and did not flush may be lost", "export", e.Name, "error", err)
		s.closeErr.CompareAndSwap(nil, new(fmt.Errorf("close export %q: %w", e.Name, err)))
	} else if err != nil {
		s.o.Log.Warn("closing the disk", "export", e.Name, "error", err)
	}
	e.extents.clear()
	e.opened, e.facts = false, facts{}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forget(e)
}

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
			f.sizes.Preferred = uint32(n) // the only way to tell clients the sector size
		}
	}
	return f
}

// flags are what clients may do. Several connections always see the same,
// since there is one disk.
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

// Opened is an export whose disk is open already.
type Opened struct {
	Export
	Disk source.Disk
}

// Fixed are exports whose disks are open before the server begins and after it
// ends: the server does not close them. A single one without a name is taken
// whatever name a client asks for.
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

// kept is a disk that someone else closes.
type kept struct{ source.Disk }

func (k kept) Unwrap() source.Disk { return k.Disk }
func (kept) Close() error          { return nil }
