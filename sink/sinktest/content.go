package sinktest

import (
	"context"
	"fmt"
	"io"
	"iter"
	"slices"

	"github.com/vddkcp/vddkcp/source"
)

// span is a range of bytes [from, to).
type span struct{ from, to int64 }

func (s span) overlaps(o span) bool { return s.from < o.to && o.from < s.to }

// addSpan adds the span s to a sorted list of spans. The span s must not
// overlap any of them. A span that ends where s begins is merged with s, and so
// is a span that begins where s ends. The list therefore stays short if a disk
// is written almost in order.
func addSpan(spans []span, s span) []span {
	i, _ := slices.BinarySearchFunc(spans, s.from, func(o span, from int64) int { return int(min(max(o.from-from, -1), 1)) })
	if i < len(spans) && spans[i].from == s.to {
		s.to = spans[i].to
		spans = slices.Delete(spans, i, i+1)
	}
	if i > 0 && spans[i-1].to == s.from {
		spans[i-1].to = s.to
		return spans
	}
	return slices.Insert(spans, i, s)
}

// content is a sparse disk in memory. A page that is not in memory consists of
// zeros if it is in one of the ranges in the field zeroes. Otherwise all its
// bytes have the value of the field fill. The ranges in the field zeroes consist
// of whole pages.
type content struct {
	size   int64
	fill   byte
	pages  map[int64][]byte // by page number
	zeroes []span
}

const pageSize = 64 << 10

func (c *content) write(p []byte, off int64) {
	for len(p) > 0 {
		at := int(off % pageSize)
		n := copy(c.page(off / pageSize)[at:], p)
		p, off = p[n:], off+int64(n)
	}
}

// The method page returns the page with the number i, so that the caller can
// write to it. If the page is not in memory, the method first creates it there.
func (c *content) page(i int64) []byte {
	page := c.pages[i]
	if page == nil {
		page = make([]byte, pageSize)
		if c.fill != 0 {
			c.fillPage(page, i)
		}
		c.pages[i] = page
	}
	return page
}

func (c *content) fillPage(page []byte, i int64) {
	b := c.fill
	for _, z := range c.zeroes {
		if z.from <= i*pageSize && i*pageSize < z.to {
			b = 0
		}
	}
	if b == 0 {
		clear(page)
		return
	}
	for j := range page {
		page[j] = b
	}
}

func (c *content) zero(off, n int64) {
	end := off + n
	head := min((off+pageSize-1)/pageSize*pageSize, end)
	tail := max(end/pageSize*pageSize, head)
	if end == c.size {
		tail = end // the last page ends with the disk
	}
	c.write(make([]byte, head-off), off)
	c.write(make([]byte, end-tail), tail)
	if head == tail {
		return
	}
	first, last := head/pageSize, (tail-1)/pageSize
	if last-first < int64(len(c.pages)) {
		for i := first; i <= last; i++ {
			delete(c.pages, i)
		}
	} else {
		for i := range c.pages {
			if first <= i && i <= last {
				delete(c.pages, i)
			}
		}
	}
	if c.fill != 0 {
		c.zeroes = append(c.zeroes, span{head, tail})
	}
}

func (c *content) read(p []byte, off int64) {
	var empty []byte
	for len(p) > 0 {
		i, at := off/pageSize, int(off%pageSize)
		page := c.pages[i]
		if page == nil {
			if empty == nil {
				empty = make([]byte, pageSize)
			}
			page = empty
			c.fillPage(page, i)
		}
		n := copy(p, page[at:])
		p, off = p[n:], off+int64(n)
	}
}

// contentReader is the source.Disk that Reopen returns for a disk of a Memory.
type contentReader struct {
	ctx     context.Context
	m       *Memory
	content *content
}

func (r *contentReader) Size() int64 { return r.content.size }

func (r *contentReader) ReadAt(p []byte, off int64) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	if off < 0 {
		return 0, fmt.Errorf("memory: cannot read at offset %d", off)
	}
	n := int(min(int64(len(p)), max(r.content.size-off, 0)))
	r.m.mu.Lock()
	r.content.read(p[:n], off)
	r.m.mu.Unlock()
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *contentReader) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}

func (r *contentReader) Close() error { return nil }
