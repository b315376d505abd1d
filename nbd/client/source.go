package client

import (
	"context"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// Disk is an export that is read. Beside source.Disk it is Identified and
// Described. When a connection is lost its calls fail; source.Retry, around
// Open, opens it again.
type Disk struct {
	server      *server
	size        int64 // what of the export is the disk
	borrowed    bool  // the server is a sink's
	uri         string
	queryFailed atomic.Bool // the last query of the allocation failed, with all retries

	mu      sync.Mutex
	known   allocation
	changes uint64 // counts writes
}

// Open opens the export that uri names for reading. Errors name the server.
func Open(ctx context.Context, uri *nbd.URI, o Options) (*Disk, error) {
	s, err := dial(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	return &Disk{server: s, size: s.size, uri: uri.String()}, nil
}

// Size is the size in bytes that the server told at the beginning.
func (d *Disk) Size() int64 { return d.size }

// Stats tells how many connections are used.
func (d *Disk) Stats() source.Stats {
	n := len(d.server.conns)
	return source.Stats{Transport: "nbd", Connections: n, Most: n}
}

// Identity proves nothing: the protocol has no identity of an export.
func (d *Disk) Identity(context.Context) (id, proof string, err error) {
	return "nbd:" + d.uri + ":" + strconv.FormatInt(d.size, 10), "none", nil
}

// Info describes the export: an unknown image, seen as a raw disk.
func (d *Disk) Info() source.Info {
	return source.Info{
		Format:        "raw",
		LogicalSector: max(int64(d.server.sizes.Min), 512),
		ClusterSize:   int64(d.server.sizes.Preferred),
		Allocated:     d.size,
		Chain:         []string{d.server.life.Name},
	}
}

// ReadAt implements source.Disk. What begins or ends inside a block of the
// server's is read by way of a buffer of that block; the rest goes from the
// socket into p.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	s := d.server
	return s.life.ReadAt(p, off, d.size, func(p []byte) (int, error) {
		if err := s.read(p, off); err != nil {
			return 0, err
		}
		return len(p), nil
	})
}

// Close waits for calls in progress. Later calls return an error that wraps
// os.ErrClosed.
func (d *Disk) Close() error {
	if d.borrowed {
		return nil
	}
	return d.server.close()
}
