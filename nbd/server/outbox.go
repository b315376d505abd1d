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

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

const (
	// maxVectors is the maximum number of byte slices that one system call writes
	// to a socket.
	maxVectors = 64
	// The constant spool is the size, in bytes, of the buffer that gathers replies for a
	// connection that is not a plain socket, such as TLS.
	spool = 32 << 10
)

// The type outbox sends the replies of a connection in the order in which they are queued.
// A goroutine that queues a reply while no goroutine is sending becomes the sender: it
// sends queued replies until none is left. Several small replies are sent with one system
// call. The number of queued replies is limited, because the number of requests in
// progress is limited.
type outbox struct {
	c   *conn
	raw syscall.RawConn // nil: the connection is not a plain socket

	mu         sync.Mutex
	waiting    []*reply  // the queue
	spare      []*reply  // an empty slice to replace waiting
	sending    bool      // a goroutine is in drain, or will call it
	paused     bool      // the sender waits for the disk
	sinceBytes int       // number of bytes that the client has received after since
	since      time.Time // when sending began, or when the client had last received stallBytes bytes; valid while sending is true

	vectors [][]byte // slices for the next system call, used by the sender

	unflushed bool // flushReplies has to start a sender; used by the goroutine that reads requests
}

// The function socket returns the raw connection of a TCP or Unix socket. It returns
// nil for other connections, such as TLS.
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

// queueReply queues a reply without sending it. If no goroutine is sending, the reply
// is sent after flushReplies is called. Replies to requests that arrived together are
// therefore sent together. Only the goroutine that reads requests may call queueReply.
func (o *outbox) queueReply(r *reply) {
	if o.enqueue(r) {
		o.flushLater()
	}
}

// flushLater records that replies are queued and that no goroutine is sending them. The
// next call of flushReplies then starts a goroutine that sends them.
func (o *outbox) flushLater() { o.unflushed = true }

// flushReplies starts a goroutine that sends the queued replies, if flushLater was
// called. The goroutine that reads requests calls flushReplies before it waits for
// anything. The goroutine that reads requests must not send replies itself, because a
// client may send many requests before it receives the first reply.
func (o *outbox) flushReplies() {
	if o.unflushed {
		o.unflushed = false
		go o.drain()
	}
}

// The method send queues a reply. It then sends all queued replies, unless another
// goroutine is already sending them. It may wait until the client receives them.
func (o *outbox) send(r *reply) {
	if o.enqueue(r) {
		o.drain()
	}
}

// The method enqueue queues a reply. If it returns true, the caller has become the
// sender and must call drain.
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

// The method drain sends the queued replies until none is left. Only the sender
// calls it.
func (o *outbox) drain() {
	o.mu.Lock()
	for len(o.waiting) > 0 {
		batch := o.waiting
		o.waiting, o.spare = o.spare[:0], nil
		o.mu.Unlock()

		if !o.c.failed() {
			if err := o.write(batch); err != nil {
				o.c.fail(fmt.Errorf("cannot send replies to the client: %w", err))
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

// The method stalled reports whether the client has received fewer than 64 KiB (the
// constant stallBytes) within the given time limit, although replies were waiting to
// be sent.
func (o *outbox) stalled(limit time.Duration) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.sending && !o.paused && time.Since(o.since) >= limit
}

// The method pause calls a function that reads from the disk. The method stalled does
// not count the time of this call, since the client is not responsible for a slow disk.
func (o *outbox) pause(read func() error) error {
	start := time.Now()
	o.setPaused(true, 0)
	err := read()
	o.setPaused(false, time.Since(start))
	return err
}

// setPaused begins or ends a pause. The method stalled measures the time since
// o.since. At the end of a pause, setPaused moves o.since forward by the length of
// the pause, so that the pause does not count.
func (o *outbox) setPaused(on bool, length time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.paused, o.since = on, o.since.Add(length)
}

// The method progress records that the client received n bytes.
func (o *outbox) progress(n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sinceBytes += n; o.sinceBytes >= stallBytes {
		o.since, o.sinceBytes = time.Now(), 0
	}
}

// The method write sends a batch of replies to the client. An error means that the
// connection is broken.
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

// writeStream writes to the socket the data that follow the head of a reply. If the reply
// has a file (r.file), the method writeFile sends the data that are in this file. The
// function r.stream sends the rest, and returns the bytes with which the reply ends.
// These bytes stay in o.vectors, so that they are sent together with the next reply.
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

// socketWriter is an io.Writer that writes to the socket of a connection. Bytes that are
// still in outbox.vectors are written before the new bytes.
type socketWriter struct{ o *outbox }

func (d socketWriter) Write(b []byte) (int, error) {
	d.o.vectors = append(d.o.vectors, b)
	if err := d.o.flush(0); err != nil {
		return 0, err
	}
	return len(b), nil
}

// The method flush writes the slices in o.vectors to the socket, with the given
// flags of sendmsg(2). It waits until the kernel has accepted all of them.
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

// dropBytes returns a list of byte slices without its first n bytes, which the kernel has
// accepted. It changes the given list.
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

// writeFile makes the kernel copy the data of a reply from a file to the socket. It
// returns how many bytes were sent. Their number is less than the length of the data
// (r.length) if the file cannot be read or has become shorter. An error means that the
// connection is broken.
func (o *outbox) writeFile(r *reply) (sent int64, err error) {
	left, from, pos := r.length, int(r.file.Fd()), r.pos
	var failed error
	err = o.raw.Write(func(fd uintptr) bool {
		for left > 0 {
			n := 0
			// sendfile waits only for the disk and never for the client, because the socket is
			// non-blocking.
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

// spools is a pool of buffers that gather replies for connections that are not plain
// sockets, such as TLS.
var spools = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, spool) }}

// writeBuffered writes replies to a connection that is not a plain socket.
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
	return w.Flush() // returns the first error of all writes to w
}

// progressWriter writes to the connection in steps of 64 KiB and reports each step as
// progress. Therefore a client that receives its replies slowly does not count as
// stalled.
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
