package server

import (
	"bufio"
	"cmp"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxVectors bounds how many pieces of memory go to the kernel at once.
	maxVectors = 64
	// spool is how many bytes are gathered for a connection that takes one
	// piece of memory at a time.
	spool = 32 << 10
)

// outbox sends the replies of a connection, in the order they are ready. The
// goroutine that brings one when no other is sending sends all that come until
// none is left; so many small ones go in one system call. What waits is bounded
// by the requests in work.
type outbox struct {
	c   *conn
	raw syscall.RawConn // nil: not a socket that the kernel can write a file to

	mu         sync.Mutex
	waiting    []*reply
	spare      []*reply // a slice for waiting
	sending    bool
	paused     bool      // sending waits for the disk
	sinceBytes int       // bytes that the client took since the time of since
	since      time.Time // while sending: when it had taken the last stallBytes

	vectors [][]byte // used by the goroutine that sends

	unflushed bool // the goroutine that reads requests has to call drain
}

// socket returns what the kernel can write to directly; nil where it is not
// such a connection (TLS, a pipe).
func socket(c net.Conn) syscall.RawConn {
	switch c := c.(type) {
	case *net.TCPConn:
		raw, _ := c.SyscallConn()
		return raw
	case *net.UnixConn:
		raw, _ := c.SyscallConn()
		return raw
	}
	return nil
}

// queueReply queues a reply that flushReplies sends, unless another goroutine sends
// it earlier. Only the goroutine that reads requests may call it: replies to
// requests that arrived together are sent together.
func (o *outbox) queueReply(r *reply) {
	if o.enqueue(r) {
		o.flushLater()
	}
}

// flushLater leaves the sending of queued replies to flushReplies.
func (o *outbox) flushLater() { o.unflushed = true }

// flushReplies starts a goroutine that sends the queued replies, since a client may
// send much before it takes the first reply. The goroutine that reads requests
// calls it before it waits for anything.
func (o *outbox) flushReplies() {
	if o.unflushed {
		o.unflushed = false
		go o.drain()
	}
}

// send queues a reply and, unless another goroutine is sending, sends all that
// is queued. It may wait for the client to take it.
func (o *outbox) send(r *reply) {
	if o.enqueue(r) {
		o.drain()
	}
}

// queue queues a reply, and reports whether the caller has to drain.
func (o *outbox) enqueue(r *reply) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.waiting = append(o.waiting, r)
	if o.sending {
		return false
	}
	o.sending, o.since, o.sinceBytes = true, time.Now(), 0
	return true
}

func (o *outbox) drain() {
	o.mu.Lock()
	for len(o.waiting) > 0 {
		batch := o.waiting
		o.waiting, o.spare = o.spare[:0], nil
		o.mu.Unlock()

		if !o.c.failed() {
			if err := o.write(batch); err != nil {
				o.c.fail(fmt.Errorf("sending replies: %w", err))
			}
		}
		for _, r := range batch {
			o.c.replySent(r)
		}
		clear(batch)

		o.mu.Lock()
		o.spare = batch[:0]
	}
	o.sending = false
	o.mu.Unlock()
}

// stalled reports whether the client has taken next to nothing for so long.
func (o *outbox) stalled(after time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sending && !o.paused && time.Since(o.since) >= after
}

// pause calls read, whose time is the disk's and not the client's.
func (o *outbox) pause(read func() error) error {
	start := time.Now()
	o.setPaused(true, 0)
	err := read()
	o.setPaused(false, time.Since(start))
	return err
}

func (o *outbox) setPaused(on bool, after time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.paused, o.since = on, o.since.Add(after)
}

// progress notes that the client took n bytes.
func (o *outbox) progress(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sinceBytes += n; o.sinceBytes >= stallBytes {
		o.since, o.sinceBytes = time.Now(), 0
	}
}

func (o *outbox) write(batch []*reply) error {
	if o.raw == nil {
		return o.writeBuffered(batch)
	}
	if o.vectors == nil {
		o.vectors = make([][]byte, 0, maxVectors+2)
	}
	for _, r := range batch {
		if r.n > 0 {
			o.vectors = append(o.vectors, r.head[:r.n])
		}
		if len(r.body) > 0 {
			o.vectors = append(o.vectors, r.body)
		}
		var err error
		switch {
		case r.stream != nil:
			err = o.writeStream(r)
		case len(o.vectors) >= maxVectors:
			err = o.flush(0)
		}
		if err != nil {
			return err
		}
	}
	return o.flush(0)
}

// writeStream writes the data that follow the head of r to the socket: from the
// file that r names, and the rest by r.stream. The end of the reply is left in
// o.vectors, so that it is sent together with the next reply.
func (o *outbox) writeStream(r *reply) error {
	if err := o.flush(unix.MSG_MORE); err != nil {
		return err
	}
	sent := int64(0)
	if r.file != nil {
		var err error
		if sent, err = o.writeFile(r); err != nil {
			return err
		}
	}
	tail, err := r.stream(socketWriter{o}, sent)
	if len(tail) > 0 {
		o.vectors = append(o.vectors, tail)
	}
	return err
}

// directly writes to the socket with the outbox's own means.
type socketWriter struct{ o *outbox }

func (d socketWriter) Write(b []byte) (int, error) {
	d.o.vectors = append(d.o.vectors, b)
	if err := d.o.flush(0); err != nil {
		return 0, err
	}
	return len(b), nil
}

// flush writes the vectors to the socket.
func (o *outbox) flush(flags int) error {
	v := o.vectors
	if len(v) == 0 {
		return nil
	}
	var failed error
	err := o.raw.Write(func(fd uintptr) bool {
		for len(v) > 0 {
			n, err := unix.SendmsgBuffers(int(fd), v, nil, nil, flags|unix.MSG_NOSIGNAL)
			switch err {
			case nil:
				v = dropBytes(v, n)
				o.progress(n)
			case unix.EAGAIN:
				return false
			case unix.EINTR:
			default:
				failed = os.NewSyscallError("sendmsg", err)
				return true
			}
		}
		return true
	})
	clear(o.vectors)
	o.vectors = o.vectors[:0]
	if err == nil {
		err = failed
	}
	return err
}

// cut takes n bytes off the front.
func dropBytes(v [][]byte, n int) [][]byte {
	for len(v) > 0 && n >= len(v[0]) {
		n -= len(v[0])
		v = v[1:]
	}
	if n > 0 {
		v[0] = v[0][n:]
	}
	return v
}

// writeFile has the kernel copy the data of r from its file to the socket. It
// returns how many bytes were sent, which is fewer than r.length where the file
// can't be read or is shorter. An error is the connection's.
func (o *outbox) writeFile(r *reply) (sent int64, err error) {
	left, from, pos := r.length, int(r.file.Fd()), r.pos
	var failed error
	err = o.raw.Write(func(fd uintptr) bool {
		for left > 0 {
			n := 0
			// sendfile waits for the disk here, and never for the client: the
			// socket is non-blocking.
			err := o.pause(func() (err error) {
				n, err = unix.Sendfile(int(fd), from, &pos, int(left))
				return err
			})
			switch {
			case err == unix.EINTR:
			case err == unix.EAGAIN:
				return false
			case err == unix.EPIPE || err == unix.ECONNRESET || err == unix.ENOTCONN:
				failed = os.NewSyscallError("sendfile", err)
				return true
			case err != nil || n == 0: // the file failed or has ended
				return true
			default:
				left -= int64(n)
				o.progress(n)
			}
		}
		return true
	})
	return r.length - left, cmp.Or(err, failed)
}

var spools = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, spool) }}

// writeThrough writes replies to a connection that is no socket of the kernel.
func (o *outbox) writeBuffered(batch []*reply) error {
	w := spools.Get().(*bufio.Writer)
	defer spools.Put(w)
	defer w.Reset(nil)
	w.Reset(progressWriter{o})
	for _, r := range batch {
		w.Write(r.head[:r.n])
		if len(r.body) > 0 {
			w.Write(r.body)
		}
		if r.stream != nil {
			tail, err := r.stream(w, 0)
			if err != nil {
				return err
			}
			w.Write(tail)
		}
	}
	return w.Flush() // a bufio.Writer keeps its first error
}

// observed writes in steps, so that a client that takes its replies slowly is
// seen to take them.
type progressWriter struct{ o *outbox }

func (w progressWriter) Write(b []byte) (int, error) {
	const step = 64 << 10
	done := 0
	for done < len(b) {
		n, err := w.o.c.net.Write(b[done:min(done+step, len(b))])
		done += n
		if err != nil {
			return done, err
		}
		w.o.progress(n)
	}
	return done, nil
}
