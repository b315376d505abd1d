package server

import (
	"context"
	"encoding/binary"
	"strings"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// maxStatus is how many extents one answer has at most.
	maxStatus = 4096
	// contexts is how many metadata contexts there are.
	maxContexts = 2
)

// blockStatus answers with the allocation, of at most maxStatus extents.
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

// metaContext is a metadata context that a client has chosen.
type metaContext struct {
	name string
	id   uint32
	flag func(source.Extent) uint32
}

// status appends the extents of [off, end) and their flags to b, merged, at most
// limit of them.
func (m *metaContext) status(ctx context.Context, x *extents, b []byte, off, end int64, limit int) ([]byte, error) {
	length, flags := uint32(0), uint32(0)
	n := 0
	for off < end {
		e, err := x.at(ctx, off)
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

// asked reports whether one of the queries means the context. A whole namespace
// is meant where contexts are listed, and all of them by no query at all.
func (m *metaContext) matches(queries []string, list bool) bool {
	namespace, _, _ := strings.Cut(m.name, ":")
	for _, q := range queries {
		if q == m.name || list && q == namespace+":" {
			return true
		}
	}
	return list && len(queries) == 0
}

// contexts are the metadata contexts that the export has.
func (f *facts) contexts() []metaContext {
	all := []metaContext{{name: nbd.BaseAllocation, flag: allocation}}
	if f.chain {
		all = append(all, metaContext{name: allocationDepth, flag: depth})
	}
	return all
}

// allocation returns the flags of base:allocation.
func allocation(e source.Extent) uint32 {
	switch e.Kind {
	case source.Zero:
		return nbd.StateHole | nbd.StateZero
	case source.Inherited:
		return nbd.StateHole // what it reads as is not known
	}
	return 0
}

// depth returns the value of qemu:allocation-depth: 0 where no image has the
// extent, 1 for the first image, 2 for its backing file, and so on.
func depth(e source.Extent) uint32 {
	if e.Absent {
		return 0
	}
	return uint32(e.Depth) + 1
}
