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

// Memory is a disk in memory, for the tests of what reads from disks. The
// fields are set before the first call; the zero value is an empty disk. It is
// Identified and Described; a struct that embeds a source.Disk hides that.
type Memory struct {
	// Context is the one that the disk was opened with; nil never ends.
	Context context.Context
	// Bytes are the content.
	Bytes []byte
	// Content is read instead of Bytes when it isn't nil, and is Length bytes
	// long. It may not rely on the bytes that are in the buffer.
	Content io.ReaderAt
	Length  int64
	// ExtentList covers the disk; nil: all is data. It is not checked, so that
	// a disk whose extents are wrong can be made.
	ExtentList []source.Extent
	// OnRead is called, concurrently, before a read that is inside the disk
	// and not empty. An error of it is the read's. It may block, and then has
	// to look at Context itself.
	OnRead func(off int64, n int) error
	// OnExtent is called, concurrently, before an extent is yielded. An error
	// of it is yielded in its place.
	OnExtent func(source.Extent) error
	// ID is the identity, proved by Proof ("" is "snapshot").
	ID, Proof string
	// Description is what Info returns, with the format "memory" where it has
	// none.
	Description source.Info

	// reads are in progress, for Close to wait; a lock held by them would hang
	// tests in a synctest bubble. It is added to under mu, and before Close.
	reads  sync.WaitGroup
	mu     sync.Mutex
	closed bool
}

// Size is the length of the content in bytes.
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
		return 0, fmt.Errorf("read at negative offset %d", off)
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

// Extents yields what of ExtentList lies in the range.
func (m *Memory) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > m.Size() {
			yield(source.Extent{}, fmt.Errorf("extents [%d, %d) of a disk of %d bytes", off, end, m.Size()))
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

// Closed says whether Close was called.
func (m *Memory) Closed() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.closed
}

// ended returns why the disk can't be used any more. The caller holds m.mu.
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

// Pattern is a Memory of any size that takes no memory for its content: in the
// extents of data, which ascend and don't overlap, each 8 bytes are made from
// their offset, everywhere else are zeros, and ExtentList says so. Reading is
// about as fast as memory is, for benchmarks.
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

// pattern is the content of the extents of a disk, which it covers.
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

// fillPattern fills p with the pattern's bytes at off.
func fillPattern(p []byte, off int64) {
	// An odd multiplier makes all words differ, and the one at 0 is the only
	// zero without the addend.
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
