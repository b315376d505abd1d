package sourcetest

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"iter"
	"os"
	"sort"
	"sync"

	"github.com/vddkcp/vddkcp/source"
)

// Memory is a disk in memory, for tests of code that reads from a Disk. The fields are
// set before the first call. The zero value is an empty disk. Memory has the abilities
// source.Identified and Described. A test that needs a disk without these abilities
// embeds the Memory in a struct as a field of the type source.Disk.
type Memory struct {
	// Context is the context that the disk was opened with. If it is nil, the disk has
	// a context that never ends.
	Context context.Context
	// Bytes is the content.
	Bytes []byte
	// Content, if it is not nil, is the content instead of Bytes. The size of the disk is
	// then Length. The bytes that Content.ReadAt returns must not depend on what the
	// buffer had before the call.
	Content io.ReaderAt
	Length  int64
	// ExtentList are the extents of the disk. If it is nil, the disk is one Data
	// extent. The list is not checked, because some tests need a disk that reports
	// wrong extents.
	ExtentList []source.Extent
	// OnRead, if it is not nil, is called before each read that is not empty and lies
	// in the disk. Several calls of OnRead may run at the same time. If OnRead returns
	// an error, the read returns this error. If OnRead blocks, it must return when
	// Context ends.
	OnRead func(off int64, n int) error
	// OnExtent, if it is not nil, is called before each extent is yielded. Several
	// calls of OnExtent may run at the same time. If it returns an error, the error is
	// yielded instead of the extent.
	OnExtent func(source.Extent) error
	// ID and Proof are the result of Identity. An empty Proof stands for "snapshot".
	ID, Proof string
	// Description is the result of Info. An empty Format stands for "memory".
	Description source.Info

	// The field reads counts the reads in progress, for which Close waits. This counter is not
	// a lock, because a test in a bubble of package testing/synctest hangs if a goroutine waits
	// for a lock. Its method Add is called with mu locked, and not after Close was called.
	reads  sync.WaitGroup
	mu     sync.Mutex
	closed bool
}

// Size implements source.Disk.
func (m *Memory) Size() int64 {
	if m.Content != nil {
		return m.Length
	}
	return int64(len(m.Bytes))
}

// ReadAt implements source.Disk.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	if err := m.ended(); err != nil {
		m.mu.Unlock()
		return 0, err
	}
	m.reads.Add(1)
	m.mu.Unlock()
	defer m.reads.Done()
	if off < 0 {
		return 0, fmt.Errorf("cannot read at the negative offset %d", off)
	}
	if off >= m.Size() {
		return 0, io.EOF
	}
	var atEnd error
	if rest := m.Size() - off; int64(len(p)) > rest {
		p, atEnd = p[:rest], io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if m.OnRead != nil {
		if err := m.OnRead(off, len(p)); err != nil {
			return 0, err
		}
	}
	if m.Content == nil {
		return copy(p, m.Bytes[off:]), atEnd
	}
	if n, err := m.Content.ReadAt(p, off); n < len(p) {
		return n, err
	}
	return len(p), atEnd
}

// Extents yields the part of ExtentList that lies in the range.
func (m *Memory) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > m.Size() {
			yield(source.Extent{}, fmt.Errorf("extents of [%d, %d): the range is outside the disk of %d bytes", off, end, m.Size()))
			return
		}
		list := m.ExtentList
		if list == nil {
			list = []source.Extent{{Len: m.Size()}}
		}
		first := sort.Search(len(list), func(i int) bool { return list[i].End() > off })
		for _, e := range list[first:] {
			if e.Off >= end || length == 0 {
				return
			}
			from, to := max(e.Off, off), min(e.End(), end)
			e.Off, e.Len = from, to-from
			err := context.Cause(ctx)
			if err == nil {
				m.mu.Lock()
				err = m.ended()
				m.mu.Unlock()
			}
			if err == nil && m.OnExtent != nil {
				err = m.OnExtent(e)
			}
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Identity returns the fields ID and Proof.
func (m *Memory) Identity(context.Context) (id, proof string, err error) {
	if m.Proof == "" {
		return m.ID, "snapshot", nil
	}
	return m.ID, m.Proof, nil
}

// Info returns the field Description.
func (m *Memory) Info() source.Info {
	info := m.Description
	if info.Format == "" {
		info.Format = "memory"
	}
	return info
}

// Close waits for reads in progress.
func (m *Memory) Close() error {
	m.mu.Lock()
	closed := m.closed
	m.closed = true
	m.mu.Unlock()
	m.reads.Wait()
	if closed {
		return os.ErrClosed
	}
	return nil
}

// Closed reports whether Close was called.
func (m *Memory) Closed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closed
}

// ended returns an error if the disk was closed or its context has ended. The caller
// holds mu.
func (m *Memory) ended() error {
	if m.Context != nil {
		if err := context.Cause(m.Context); err != nil {
			return err
		}
	}
	if m.closed {
		return os.ErrClosed
	}
	return nil
}

// Pattern returns a disk of any size that uses no memory for its content. The disk has
// data in the given extents, which must be ascending and must not overlap. The data
// consist of words of 8 bytes, each of which is computed from its offset. The rest of
// the disk is zeros, and ExtentList reports it as zeros. Reading is about as fast as
// copying memory, so that benchmarks can use the disk.
func Pattern(size int64, data ...source.Extent) *Memory {
	var list []source.Extent
	next := int64(0)
	for _, e := range data {
		if e.Off > next {
			list = append(list, source.Extent{Off: next, Len: e.Off - next, Kind: source.Zero})
		}
		list = append(list, e)
		next = e.End()
	}
	if next < size {
		list = append(list, source.Extent{Off: next, Len: size - next, Kind: source.Zero})
	}
	return &Memory{Content: pattern(list), Length: size, ExtentList: list}
}

// The type pattern is the content of a disk that Pattern returned. It lists the extents of the
// whole disk, those with data and those with zeros.
type pattern []source.Extent

func (list pattern) ReadAt(p []byte, off int64) (int, error) {
	n := 0
	for i := sort.Search(len(list), func(i int) bool { return list[i].End() > off }); n < len(p); i++ {
		if i == len(list) {
			return n, io.EOF
		}
		at := off + int64(n)
		part := p[n:min(len(p), n+int(min(list[i].End()-at, int64(len(p)))))]
		if list[i].Kind == source.Data {
			fillPattern(part, at)
		} else {
			clear(part)
		}
		n += len(part)
	}
	return n, nil
}

// fillPattern fills p with the data that the disk has at the given offset.
func fillPattern(p []byte, off int64) {
	// The data consist of words of 8 bytes. The word with the number i is computed from
	// i*factor + addend. Because factor is odd, no two words are equal. Without addend,
	// the first word of the disk would be zero.
	const factor, addend = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
	word := uint64(off/8)*factor + addend
	if skip := int(off % 8); skip > 0 && len(p) > 0 {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], word^word>>29)
		p = p[copy(p, b[skip:]):]
		word += factor
	}
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, word^word>>29)
		word += factor
		p = p[8:]
	}
	if len(p) > 0 {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], word^word>>29)
		copy(p, b[:])
	}
}
