package export

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/cow"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
)

// The function open opens the sources whose field Eager is set. It checks the other sources
// as far as this is possible without a login. For this check it opens local sources. If the
// function open fails, it closes all disks again. Even then its result e is not nil, and
// the caller may close e once more.
func open(ctx context.Context, o Options) (e *exports, err error) {
	e = &exports{life: ctx, Options: o}
	if err = e.openAll(ctx); err != nil {
		return e, errors.Join(err, e.close())
	}
	e.Opened = nil // the output files exist from now on, so they need no check
	return e, nil
}

func (e *exports) openAll(ctx context.Context) error {
	for _, s := range e.Sources {
		d := &exportedDisk{Export: server.Export{Name: s.Name, Description: s.Description}, src: s.Address}
		e.list = append(e.list, d)
		if !s.Eager && address.IsRemote(s.Address) {
			if err := e.check(ctx, s.Address); err != nil {
				return err
			}
			continue
		}
		disk, err := e.openDisk(ctx, s.Address)
		if err != nil {
			return err
		}
		if s.Eager {
			// The disk is open now. If clients cannot write to it or to Options.CowFile, it
			// stays open for all of them. If they can, the first client uses the open disk,
			// and the server closes the disk as soon as no client uses it. The next client
			// opens it again. This is necessary because only closing a disk clears the
			// error of a failed flush.
			d.first, d.keep = disk, !e.Opener.Writable && e.CowFile == ""
		} else if e.Cow && e.CowFile == "" {
			d.first, d.keep = disk, true
		} else if err := disk.Close(); err != nil {
			return err
		}
	}
	if e.Pattern != "" {
		// Invalid VDDK parameters are reported before the server starts. The real path
		// of a disk is not known yet, because a client will send it as the name of the
		// export. Therefore the parameters are checked with a path that is only an
		// example.
		path := "[any] any.vmdk"
		if strings.HasPrefix(e.Pattern, "/") {
			path = "/any.vmdk"
		}
		return e.check(ctx, address.ForVDDK(path))
	}
	return nil
}

// The type exports implements server.Exports for the disks of Options.
type exports struct {
	Options
	list []*exportedDisk
	life context.Context // context of the disks that stay open between clients

	mu     sync.Mutex
	byName map[string]*exportedDisk // open disks that clients chose by Pattern
}

type exportedDisk struct {
	server.Export
	src address.Address

	mu    sync.Mutex
	first source.Disk // a disk that is open even without clients; nil if there is none
	keep  bool        // first stays open for all clients; otherwise the first client takes it over
}

// The method close closes the disks that stay open between clients. The server closes all
// other disks.
func (e *exports) close() error {
	var all error
	for _, d := range slices.AppendSeq(slices.Clone(e.list), maps.Values(e.byName)) {
		d.mu.Lock()
		if d.first != nil {
			all = errors.Join(all, d.first.Close())
			d.first = nil
		}
		d.mu.Unlock()
	}
	return all
}

// uriName returns the name of the export that the URI of the server contains.
func (e *exports) uriName() string {
	if len(e.list) > 0 {
		return e.list[0].Name
	}
	return ""
}

// List implements server.Exports. It lists the disks of Options.Sources. It does not list
// the disks that clients may choose by Options.Pattern.
func (e *exports) List(context.Context) ([]server.Export, error) {
	var list []server.Export
	for _, d := range e.list {
		list = append(list, d.Export)
	}
	return list, nil
}

// Find implements server.Exports.
func (e *exports) Find(_ context.Context, name string) (server.Export, error) {
	if d := e.find(name); d != nil {
		return d.Export, nil
	}
	if e.Pattern != "" && mayName(e.Pattern, name) {
		return server.Export{Name: name}, nil
	}
	return server.Export{}, fmt.Errorf("%q: %w", name, server.ErrUnknownExport)
}

func (e *exports) find(name string) *exportedDisk {
	if len(e.list) == 1 && e.list[0].Name == "" && e.Pattern == "" {
		return e.list[0]
	}
	for _, d := range e.list {
		if d.Name == name {
			return d
		}
	}
	return nil
}

// The method named returns the exported disk with the given name: a disk of
// Options.Sources, or a disk that the method remember has recorded. If there is no such
// disk, it returns a new one and does not record it. For a new disk, the caller has already
// checked that Options.Pattern allows the name.
func (e *exports) named(name string) *exportedDisk {
	if d := e.find(name); d != nil {
		return d
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if d := e.byName[name]; d != nil {
		return d
	}
	return &exportedDisk{Export: server.Export{Name: name}, src: address.ForVDDK(name)}
}

// The method remember records a disk that a client has chosen by a path which
// Options.Pattern allows. Later clients that choose the same path then get the same disk.
// It is called only for disks that stay open: if all disks were recorded, clients could
// fill the memory with names. For a disk of Options.Sources, it does nothing.
func (e *exports) remember(d *exportedDisk) {
	if e.find(d.Name) != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.byName == nil {
		e.byName = map[string]*exportedDisk{}
	}
	e.byName[d.Name] = d
}

// Open implements server.Exports. If the writes of clients go to a temporary file, all
// clients of a disk use the same file, and see the data that earlier clients have written.
func (e *exports) Open(ctx context.Context, name string) (source.Disk, error) {
	d := e.named(name)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.first == nil && e.Cow && e.CowFile == "" {
		disk, err := e.openDisk(e.life, d.src)
		if err != nil {
			return nil, err
		}
		d.first, d.keep = disk, true
		e.remember(d)
	}
	if first := d.first; first != nil {
		if d.keep {
			return keptOpen{first}, nil
		}
		d.first = nil
		return first, nil
	}
	return e.openDisk(ctx, d.src)
}

// openSource opens a source. If a disk on a server can no longer be read, because the
// server was unavailable for longer than --retry-timeout or refused the disk, the next
// request opens the disk again.
func (e *exports) openSource(ctx context.Context, src address.Address) (source.Disk, error) {
	open := func(ctx context.Context) (source.Disk, error) { return e.Opener.OpenAddress(ctx, src, e.Format) }
	if _, vm := src.(address.VM); vm || !address.IsRemote(src) {
		// A disk of a VM is opened again below its snapshot. Opening it here again would make
		// another snapshot, with other content.
		return open(ctx)
	}
	// The disk itself repeats failed requests within --retries and --retry-timeout.
	// source.Retry only opens the disk again for later requests.
	return source.Retry(ctx, open, source.RetryOptions{Revive: true, Timeout: math.MaxInt64 / 2, OnRetry: func(err error, wait time.Duration) {
		e.Log.Warn("opening the source again", "source", src, "in", wait.Round(time.Millisecond), "error", err)
	}})
}

// openDisk opens a source. If the option Cow is set, openDisk puts a layer over the
// disk: a file that receives the writes of clients.
func (e *exports) openDisk(ctx context.Context, src address.Address) (source.Disk, error) {
	disk, err := e.openSource(ctx, src)
	if err != nil {
		return nil, err
	}
	if e.Opened != nil {
		if err := e.Opened(); err != nil {
			disk.Close()
			return nil, err
		}
	}
	if w, ok := source.Ability[sourceopen.Warned](disk); ok {
		for _, message := range w.Warnings() {
			e.Log.Warn(message)
		}
	}
	if _, ok := source.Ability[source.Writable](disk); e.Opener.Writable && !ok {
		disk.Close()
		return nil, usage.Errorf("%s cannot be written: --rw works with raw files, block devices, NBD exports that are not read-only, and disks that VDDK opens", src)
	}
	e.Log.Debug("opened", "source", src, "size", disk.Size())
	if !e.Cow {
		return disk, nil
	}
	layer, err := cow.New(ctx, disk, cow.Options{File: e.CowFile, OnRead: e.CowOnRead, Log: e.Log})
	if err != nil {
		disk.Close()
		return nil, err
	}
	return layer, nil
}

// The method check checks an address without connecting to a server, and asks for the
// secrets that a connection needs.
func (e *exports) check(ctx context.Context, src address.Address) error {
	file, ok := address.VDDKFile(src)
	if !ok {
		return nil
	}
	_, err := e.Opener.VDDK.Params(ctx, file)
	return err
}

// keptOpen is a disk that clients cannot close, because it stays open for other
// clients.
type keptOpen struct{ source.Disk }

func (k keptOpen) Unwrap() source.Disk { return k.Disk }
func (keptOpen) Close() error          { return nil }
