package nfctest

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// wire is the socket of a connection. A goroutine, pump, reads ahead, so that the host notices at
// every step that the client has gone.
type wire struct {
	*net.TCPConn
	sent  *atomic.Int64
	muted atomic.Bool  // writes are discarded
	limit atomic.Int64 // bytes until the next write ends the connection; 0: no limit
	gone  chan struct{}

	mu      sync.Mutex
	changed sync.Cond // buf or err has changed
	buf     bytes.Buffer
	err     error // of the socket; what is in buf came before
	records bool  // Read takes no byte past the end of the current TLS record
	rest    int   // bytes of the current record that were not read
}

// maxAhead limits the bytes that pump reads ahead.
const maxAhead = 1 << 20

func newWire(socket *net.TCPConn, sent *atomic.Int64) *wire {
	w := &wire{TCPConn: socket, sent: sent, gone: make(chan struct{})}
	w.changed.L = &w.mu
	return w
}

// pump reads from the socket until it fails.
func (w *wire) pump() {
	defer close(w.gone)
	b := make([]byte, 16<<10)
	for {
		n, err := w.TCPConn.Read(b)
		w.mu.Lock()
		w.buf.Write(b[:n])
		w.err = err
		w.changed.Broadcast()
		for w.buf.Len() > maxAhead && w.err == nil {
			w.changed.Wait()
		}
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// await waits until n bytes have come. The caller holds w.mu.
func (w *wire) await(n int) error {
	for w.buf.Len() < n {
		if w.err != nil {
			return w.err
		}
		w.changed.Wait()
	}
	return nil
}

// comes reports whether bytes come, or have come, within the given time.
func (w *wire) comes(within time.Duration) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	late := false
	timer := time.AfterFunc(within, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		late = true
		w.changed.Broadcast()
	})
	defer timer.Stop()
	for w.buf.Len() == 0 && w.err == nil && !late {
		w.changed.Wait()
	}
	return w.buf.Len() > 0
}

// peek returns the next n bytes without reading them, and fewer of them with an error.
func (w *wire) peek(n int) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.await(n)
	return bytes.Clone(w.buf.Bytes()[:min(n, w.buf.Len())]), err
}

func (w *wire) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.records && w.rest == 0 {
		if err := w.await(5); err != nil {
			return 0, err
		}
		w.rest = 5 + int(binary.BigEndian.Uint16(w.buf.Bytes()[3:]))
	}
	if err := w.await(1); err != nil {
		return 0, err
	}
	if w.records {
		p = p[:min(len(p), w.rest)]
	}
	n, _ := w.buf.Read(p)
	w.rest -= n
	w.changed.Broadcast()
	return n, nil
}

func (w *wire) Write(p []byte) (int, error) {
	if w.muted.Load() {
		return len(p), nil
	}
	if limit := w.limit.Load(); limit > 0 {
		if int64(len(p)) > limit {
			n, _ := w.TCPConn.Write(p[:limit])
			w.sent.Add(int64(n))
			w.drop()
			return n, io.ErrClosedPipe
		}
		w.limit.Add(-int64(len(p)))
	}
	n, err := w.TCPConn.Write(p)
	w.sent.Add(int64(n))
	return n, err
}

// drop ends the host's side of the connection with a FIN. Later writes are discarded.
func (w *wire) drop() {
	w.muted.Store(true)
	w.CloseWrite()
}

// reset ends the connection with a RST.
func (w *wire) reset() {
	w.muted.Store(true)
	w.SetLinger(0)
	w.Close()
}

// Close ends the connection and the pump.
func (w *wire) Close() error {
	err := w.TCPConn.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = net.ErrClosed
	}
	w.changed.Broadcast()
	return err
}

// reader takes messages out of a stream, and knows which bytes came in one TLS record.
type reader struct {
	r       io.Reader // with records, one Read returns bytes of one record
	records bool
	buf     []byte
	pending []byte // the part of buf that was not taken
	sizes   []int  // of the records in pending
	begun   bool   // a part of the first record in pending was taken
}

func newReader(r io.Reader, records bool) *reader {
	return &reader{r: r, records: records, buf: make([]byte, 17<<10)}
}

// fill reads more. The bytes that were not taken move to the front of the buffer.
func (r *reader) fill() error {
	n := copy(r.buf, r.pending)
	if n == len(r.buf) {
		r.buf = append(r.buf, make([]byte, len(r.buf))...)
	}
	m, err := r.r.Read(r.buf[n:])
	r.pending = r.buf[:n+m]
	if m > 0 {
		r.sizes = append(r.sizes, m)
		return nil
	}
	return err
}

// shares reports whether bytes are left of a record of which a message was taken.
func (r *reader) shares() bool { return r.records && r.begun }

// take returns the next n bytes. They are valid until the next call.
func (r *reader) take(n int) ([]byte, error) {
	for len(r.pending) < n {
		if err := r.fill(); err != nil {
			if err == io.EOF && len(r.pending) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	b := r.pending[:n:n]
	r.pending = r.pending[n:]
	for n > 0 && n >= r.sizes[0] {
		n -= r.sizes[0]
		r.sizes = slices.Delete(r.sizes, 0, 1)
		r.begun = false
	}
	if n > 0 {
		r.sizes[0] -= n
		r.begun = true
	}
	return b, nil
}

// discard skips the next n bytes.
func (r *reader) discard(n int64) error {
	for n > 0 {
		b, err := r.take(int(min(n, 16<<10)))
		if err != nil {
			return err
		}
		n -= int64(len(b))
	}
	return nil
}

// pieces is a writer that writes a few bytes at a time.
type pieces struct {
	w io.Writer
	n int
}

// inPieces returns a writer for NFC with the longest write that the options permit.
func (h *Host) inPieces(w io.Writer) io.Writer {
	if h.options.Piece <= 0 {
		return w
	}
	return pieces{w, h.options.Piece}
}

func (p pieces) Write(b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = p.w.Write(b[n:min(n+p.n, len(b))])
		n += m
	}
	return n, err
}
