package server

import (
	"context"
	"encoding/binary"
	"strings"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// maxStatus is the maximum number of extents in one reply to BLOCK_STATUS.
	maxStatus = 4096
	// maxContexts is the number of metadata contexts that the server implements.
	maxContexts = 2
)

// blockStatus starts to answer a request BLOCK_STATUS. The reply has one chunk for
// each metadata context that the client has chosen, with at most maxStatus extents. If
// blockStatus returns an error, the connection ends.
func (o *op) blockStatus() error {
	c := o.c
	limit := maxStatus
	if o.Flags&nbd.FlagReqOne != 0 {
		limit = 1
	}
	b, err := c.allocate(limit * 8 * len(c.contexts))
	if err != nil {
		o.abandon(err)
		return err
	}
	limit = min(limit, len(b.b)/8/len(c.contexts))
	perContext := limit * 8
	o.first.buf = b
	go func() {
		var lists [maxContexts][]byte
		err := o.recoverPanic(func() (err error) {
			for i, m := range c.contexts {
				room := b.b[i*perContext : i*perContext : (i+1)*perContext]
				if lists[i], err = m.status(c.ctx, c.export.extents, room, int64(o.Off), o.end(), limit); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			o.fail(err)
			o.sendEnd(&o.first)
			return
		}
		for i, m := range c.contexts {
			r := &o.first
			if i < len(c.contexts)-1 {
				r = &reply{op: o}
			} else {
				r.last = true
			}
			r.body = lists[i]
			o.setStatus(r, m.id, len(r.body), r.last)
			c.out.send(r)
		}
	}()
	return nil
}

// metaContext is a metadata context: a property of the extents of a disk that clients
// query with BLOCK_STATUS.
type metaContext struct {
	name string
	id   uint32                     // identifies the context in replies
	flag func(source.Extent) uint32 // returns the value of the property
}

// The method status appends the descriptors of the extents in [off, end) to b. A
// descriptor consists of a length and a value. Adjacent extents with the same value
// get a common descriptor. The parameter limit is the maximum number of descriptors.
func (m *metaContext) status(ctx context.Context, x *extents, b []byte, off, end int64, limit int) ([]byte, error) {
	length, flags := uint32(0), uint32(0)
	n := 0
	for off < end {
		e, err := x.extentAt(ctx, off)
		if err != nil {
			return nil, err
		}
		e.Len = min(e.Len, end-off)
		if f := m.flag(e); length == 0 || f != flags {
			if length > 0 {
				b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, length), flags)
				if n++; n == limit {
					return b, nil
				}
			}
			length, flags = 0, f
		}
		length += uint32(e.Len)
		off = e.End()
	}
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, length), flags), nil
}

// The method matches reports whether one of a client's queries selects the metadata
// context m. The parameter list is true for the option LIST_META_CONTEXT. In that case
// a query such as "base:" selects a whole namespace, and a client without queries
// selects all contexts.
func (m *metaContext) matches(queries []string, list bool) bool {
	namespace, _, _ := strings.Cut(m.name, ":")
	for _, q := range queries {
		if q == m.name || list && q == namespace+":" {
			return true
		}
	}
	return list && len(queries) == 0
}

// The method contexts returns the metadata contexts that the server offers for the
// open disk.
func (f *facts) contexts() []metaContext {
	all := []metaContext{{name: nbd.BaseAllocation, flag: allocation}}
	if f.chain {
		all = append(all, metaContext{name: allocationDepth, flag: depth})
	}
	return all
}

// The function allocation returns the flags of the extent e in the metadata context
// base:allocation.
func allocation(e source.Extent) uint32 {
	switch e.Kind {
	case source.Zero:
		return nbd.StateHole | nbd.StateZero
	case source.Inherited:
		return nbd.StateHole // the extent may read as anything
	}
	return 0
}

// The function depth returns the value of the extent e in the metadata context
// qemu:allocation-depth. It is 0 if no image of the chain holds the extent, 1 if the
// exported image itself holds it, 2 if the backing file of this image does, and so on.
func depth(e source.Extent) uint32 {
	if e.Absent {
		return 0
	}
	return uint32(e.Depth) + 1
}
