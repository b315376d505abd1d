package client

import (
	"context"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// Disk is a source.Disk that reads an export. It is also source.Identified and
// source.Described. After a connection was lost, all calls fail. In this case a caller
// can open the disk again, or use source.Retry, which does that. A Disk is safe for
// concurrent use.
type Disk struct {
	server      *server
	size        int64 // size of the disk; a target's export may be larger
	borrowed    bool  // the server belongs to a target, which closes it
	uri         string
	queryFailed atomic.Bool // the last query for extents failed, and so did its retries

	mu      sync.Mutex
	known   allocation // cache of extents
	changes uint64     // number of calls of forget
}

// Open opens the export with the given URI for reading. When ctx ends, all calls of the
// disk fail. Errors contain the URI.
func Open(ctx context.Context, uri *nbd.URI, o Options) (*Disk, error) {
	s, err := dial(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	return &Disk{server: s, size: s.size, uri: uri.String()}, nil
}

// Size returns the size of the export in bytes, as the server reported it in the handshake.
func (d *Disk) Size() int64 { return d.size }

// Stats returns the number of connections.
func (d *Disk) Stats() source.Stats {
	n := len(d.server.conns)
	return source.Stats{Transport: "nbd", Connections: n, Most: n}
}

// Identity returns a text with the URI and the size of the export. Its second result,
// proof, says how a change of the content could be detected. It is "none", because
// NBD has no way to detect a change.
func (d *Disk) Identity(context.Context) (id, proof string, err error) {
	return "nbd:" + d.uri + ":" + strconv.FormatInt(d.size, 10), "none", nil
}

// Info describes the export as a raw disk, because the server does not report the format of
// the image.
func (d *Disk) Info() source.Info {
	return source.Info{
		Format:        "raw",
		LogicalSector: max(int64(d.server.sizes.Min), 512),
		ClusterSize:   int64(d.server.sizes.Preferred),
		Allocated:     d.size,
		Chain:         []string{d.server.life.Name},
	}
}

// ReadAt implements source.Disk. The data go from the socket directly into p. The
// client always reads whole blocks of the server's minimum block size. If p covers only
// a part of a block, the block is read into a buffer.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	s := d.server
	return s.life.ReadAt(p, off, d.size, func(p []byte) (int, error) {
		if err := s.read(p, off); err != nil {
			return 0, err
		}
		return len(p), nil
	})
}

// Close waits for calls in progress and disconnects. Later calls return an error that wraps
// os.ErrClosed.
func (d *Disk) Close() error {
	if d.borrowed {
		return nil
	}
	return d.server.close()
}
