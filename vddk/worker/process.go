package worker

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a running worker process. Its methods are safe for concurrent use, except Release.
//
// When the context of a call ends, the call returns the cause of the context, but the library
// continues with the request. Until the library has completed the request or the process is
// killed, other calls with the same slot return ErrBusy, and the library may still access the
// memory of the slot. A caller that cannot wait for that must kill the process with Kill.
type Process struct {
	config  Config
	process *os.Process
	socket  *os.File
	output  *os.File
	memory  []byte

	present uint64 // functions of the library, one bit each; set by Start
	modes   string // transport modes; set by Start

	requests [MaxSlots + 2]request
	query    atomic.Pointer[query] // the query in progress
	capacity atomic.Uint64         // sectors; 0 until the disk is open
	writable atomic.Bool

	log     logger
	killed  atomic.Bool
	closing atomic.Bool            // the request "close" was sent, which is the last one
	closed  atomic.Bool            // the request "close" was answered
	reason  atomic.Pointer[string] // see GoneError.Reason

	gone     *GoneError    // set before done is closed
	done     chan struct{} // closed when the process has ended
	released sync.Once
}

// request is the state of one request number of the protocol. Each number can have one request
// in progress.
type request struct {
	free   chan struct{} // a mutex: has one element while no request has this number
	state  atomic.Int32
	answer chan answer // has room for one answer
}

// These are the states of a request. Two goroutines use them: the one that waits for the answer,
// and the one that receives it. The state decides which of the two frees the request number.
const (
	idle int32 = iota
	waiting
	abandoned // the context of the call has ended, so that the receiver frees the number
)

type answer struct {
	message
	payload []byte
}

var errNotOpen = errors.New("no disk is open in this worker, or the disk has no sectors")

// faultError says that the worker program itself failed, and not a function of the library. It
// has no error code.
type faultError struct{ op, text string }

func (e *faultError) Error() string { return e.op + ": " + e.text }

// newProcess returns a Process for a started worker and starts to receive its messages.
func newProcess(c Config, process *os.Process, socket, output *os.File, memory []byte) *Process {
	p := &Process{config: c, process: process, socket: socket, output: output, memory: memory, done: make(chan struct{})}
	p.log.write = c.Log
	for i := range p.requests {
		p.requests[i].free = make(chan struct{}, 1)
		p.requests[i].free <- struct{}{}
		p.requests[i].answer = make(chan answer, 1)
	}
	go p.run()
	return p
}

// PID returns the process ID of the worker.
func (p *Process) PID() int { return p.process.Pid }

// Functions returns all functions that the worker can call if the library has them. The field
// Function.Present is true for those that the library has.
func (p *Process) Functions() []Function { return listFunctions(p.present) }

// Has reports whether the library has a function. name is its full name, such as
// "VixDiskLib_Flush".
func (p *Process) Has(name string) bool { return hasFunction(p.present, name) }

// TransportModes returns the transport modes that the library supports, such as
// "file:san:hotadd:nbdssl:nbd". It is "" if the library does not list them.
func (p *Process) TransportModes() string { return p.modes }

// Slot returns the memory of slot i, for the data of a read or write: SlotSize bytes that are
// shared with the worker. The memory is valid until Release is called, even if the process has
// ended. It contains the data of a Read only if that Read returned nil.
func (p *Process) Slot(i int) []byte {
	n := p.config.SlotSize
	return p.memory[i*n : (i+1)*n : (i+1)*n]
}

// Open connects to the server and opens the disk. A worker can open only one disk. After an
// error, the worker can only be closed or killed. Closing it undoes the steps that succeeded
// before the error.
func (p *Process) Open(ctx context.Context, r OpenRequest) (Opened, error) {
	a, err := p.login(ctx, kindOpen, &r)
	if err != nil {
		return Opened{}, err
	}
	o, err := parseOpened(a.payload)
	if err != nil {
		return Opened{}, p.breach(err)
	}
	p.writable.Store(!r.ReadOnly)
	p.capacity.Store(o.Capacity)
	return o, nil
}

// Cleanup removes what lost workers left on the host, such as hot-added disks and temporary
// state. It must not be called after Open.
func (p *Process) Cleanup(ctx context.Context, r OpenRequest) (cleaned, remaining uint32, err error) {
	a, err := p.login(ctx, kindCleanup, &r)
	return uint32(a.sectors), uint32(a.sectors >> 32), err
}

// PrepareAccess keeps the VM from being migrated until a process calls EndAccess with the same
// OpenRequest.Identity. This may be another process: the end of this worker does not undo
// PrepareAccess. PrepareAccess must not be called after Open.
func (p *Process) PrepareAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindPrepareAccess, &r)
}

// EndAccess undoes PrepareAccess. It must not be called after Open.
func (p *Process) EndAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindEndAccess, &r)
}

func (p *Process) access(ctx context.Context, kind uint32, r *OpenRequest) error {
	if r.Identity == "" {
		return errors.New("OpenRequest.Identity is empty, but PrepareAccess and EndAccess need it")
	}
	_, err := p.login(ctx, kind, r)
	return err
}

// The method login sends a request of the given kind. For this request the library logs in to a
// server.
func (p *Process) login(ctx context.Context, kind uint32, r *OpenRequest) (answer, error) {
	if err := r.check(); err != nil {
		return answer{}, err
	}
	if r.Path == "" && kind == kindOpen {
		return answer{}, errors.New("OpenRequest.Path is empty, but Open needs the path of the disk")
	}
	payload := appendLogin(nil, r)
	defer clear(payload) // the payload has secrets
	if len(payload) > maxPayload {
		return answer{}, fmt.Errorf("the parameters of the login have %d bytes together, but at most %d can be passed to the library", len(payload), maxPayload)
	}
	p.log.hide(r)
	return p.control(ctx, message{kind: kind}, payload)
}

// Read reads sectors of the disk into a slot, beginning with the given sector. The range must
// lie in the disk and fit into the slot. Each slot can have only one Read or Write in progress.
func (p *Process) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	return p.transfer(ctx, kindRead, slot, sector, sectors)
}

// Write writes sectors from a slot to the disk, under the same conditions as Read. The disk must
// have been opened for writing.
func (p *Process) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	if !p.writable.Load() {
		return errors.New("the disk is not open for writing")
	}
	return p.transfer(ctx, kindWrite, slot, sector, sectors)
}

func (p *Process) transfer(ctx context.Context, kind uint32, slot int, sector uint64, sectors int) error {
	if slot < 0 || slot >= p.config.Slots {
		return fmt.Errorf("slot %d does not exist: the worker has %d slots, counted from 0", slot, p.config.Slots)
	}
	if sectors <= 0 || sectors > p.config.SlotSize/SectorSize {
		return fmt.Errorf("cannot read or write %d sectors in one request, expected 1 to %d sectors", sectors, p.config.SlotSize/SectorSize)
	}
	if n := p.capacity.Load(); n == 0 {
		return errNotOpen
	} else if sector > n || uint64(sectors) > n-sector {
		return fmt.Errorf("cannot access the sectors %d to %d, because the disk has %d sectors", sector, sector+uint64(sectors), n)
	}
	c := call{p: p, r: &p.requests[slot]}
	select {
	case <-c.r.free:
	default:
		if err := p.Err(); err != nil {
			return err
		}
		return ErrBusy
	}
	defer c.release()
	m := message{kind: kind, slot: uint32(slot), sector: sector, sectors: uint64(sectors)}
	return c.io(ctx, m)
}

// Flush makes written data durable: the data of all calls of Write that returned before Flush was
// called.
func (p *Process) Flush(ctx context.Context) error {
	if p.capacity.Load() == 0 {
		return errNotOpen
	}
	c := call{p: p, r: &p.requests[slotFlush]}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	return c.io(ctx, message{kind: kindFlush, slot: slotFlush})
}

// Query asks which blocks are allocated in the sectors [start, start+sectors). The blocks are
// returned in ascending order, with gaps between them. All numbers are sectors. chunk, the unit
// of the blocks, is a power of two and at least MinChunk. start and sectors are multiples of it.
// The range lies in the disk and has at most MaxChunks chunks. If the library returns blocks that
// are not in order or not in the range, Query returns an error.
func (p *Process) Query(ctx context.Context, start, sectors, chunk uint64) ([]Block, error) {
	capacity := p.capacity.Load()
	switch {
	case capacity == 0:
		return nil, errNotOpen
	case chunk < MinChunk || bits.OnesCount64(chunk) != 1 || chunk > 1<<31:
		return nil, fmt.Errorf("cannot query in chunks of %d sectors, expected a power of two of at least %d", chunk, MinChunk)
	case start%chunk != 0 || sectors%chunk != 0 || sectors == 0 || sectors/chunk > MaxChunks:
		return nil, fmt.Errorf("cannot query %d sectors from sector %d on: both numbers must be multiples of %d, and the number of sectors must be at most %d and not 0", sectors, start, chunk, MaxChunks*chunk)
	case start > capacity || sectors > capacity-start:
		return nil, fmt.Errorf("cannot query the sectors %d to %d, because the disk has %d sectors", start, start+sectors, capacity)
	}
	c := call{p: p, r: &p.requests[slotControl]}
	if err := c.acquire(ctx); err != nil {
		return nil, err
	}
	defer c.release()
	q := &query{start: start, end: start + sectors, next: start, chunks: sectors / chunk}
	p.query.Store(q)
	if _, err := c.control(ctx, message{kind: kindQuery, sector: start, sectors: sectors, flags: uint32(chunk)}, nil); err != nil {
		return nil, err
	}
	return q.blocks, q.err
}

// Close waits for requests in flight, closes the disk, disconnects from the server, calls Exit
// of the library, and waits for the end of the process. If ctx ends before that, the process is
// killed.
//
// Close returns the error of the first step that failed, or a *GoneError if the process had
// ended before. A failure of Exit is not an error, because the disk is closed by then. Reads and
// writes that begin during Close return ErrBusy or a *GoneError.
func (p *Process) Close(ctx context.Context) error {
	err := p.close(ctx)
	var gone *GoneError
	if errors.As(err, &gone) && gone.Closed {
		err = nil // another call has closed the worker
	}
	if p.closed.Load() {
		select {
		case <-p.done:
		case <-ctx.Done():
		}
	}
	p.Kill()
	return err
}

// The method close waits until no other request is in progress, and sends the request "close".
func (p *Process) close(ctx context.Context) error {
	if p.closed.Load() {
		return nil
	}
	// Each request needs its request number. When all numbers are acquired here, no request is
	// in flight, and none can begin.
	for i := range p.requests[:slotControl] {
		c := call{p: p, r: &p.requests[i]}
		if err := c.acquire(ctx); err != nil {
			return err
		}
	}
	c := call{p: p, r: &p.requests[slotControl]}
	if err := c.acquire(ctx); err != nil {
		return err
	}
	defer c.release()
	p.closing.Store(true)
	_, err := c.control(ctx, message{kind: kindClose}, nil)
	return err
}

// Kill kills the process and waits for its end. It does nothing if the process has ended.
func (p *Process) Kill() {
	select {
	case <-p.done:
		return
	default:
	}
	p.killed.Store(true)
	p.process.Kill()
	// The deadline stops the goroutine that reads the socket. Without the deadline, this goroutine
	// might wait forever, because a child of the worker may keep the other end of the socket open.
	p.socket.SetReadDeadline(time.Unix(1, 0))
	<-p.done
}

// Done returns a channel that is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns nil while the process runs. After its end, it returns a *GoneError that says how
// the process ended.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.gone
	default:
		return nil
	}
}

// Release kills the process if it is still running, and unmaps the memory of the slots. No slot
// may be in use. After Release, no method except Err may be called.
func (p *Process) Release() {
	p.Kill()
	p.released.Do(func() {
		unix.Munmap(p.memory)
		p.memory = nil
	})
}

// The method control makes a request with the request number slotControl. The main thread of the
// worker program carries out such requests.
func (p *Process) control(ctx context.Context, m message, payload []byte) (answer, error) {
	c := call{p: p, r: &p.requests[slotControl]}
	if err := c.acquire(ctx); err != nil {
		return answer{}, err
	}
	defer c.release()
	return c.control(ctx, m, payload)
}

// breach kills the worker, because it has violated the protocol; err says how. The result is the
// *GoneError of the worker.
func (p *Process) breach(err error) error {
	p.setReason(fmt.Sprintf("broke the protocol: %v", err))
	p.Kill()
	return p.Err()
}

// setReason records why the process ends. If a reason is already recorded, it stays.
func (p *Process) setReason(s string) { p.reason.CompareAndSwap(nil, &s) }

// A call reserves a request number for one request, or for several requests one after the other.
type call struct {
	p    *Process
	r    *request
	held bool // release has to free the number
}

// The method acquire waits until no other call has the request number, and reserves it.
func (c *call) acquire(ctx context.Context) error {
	select {
	case <-c.r.free:
		c.held = true
		return nil
	case <-c.p.done:
		return c.p.gone
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// The method release frees the request number. It does nothing if exchange has returned without
// waiting for the answer: then the goroutine that receives the answer frees the number.
func (c *call) release() {
	if c.held {
		c.r.free <- struct{}{}
	}
}

// exchange sends a request and waits for its answer. If ctx ends first, exchange returns, and the
// goroutine that later receives the answer frees the request number.
func (c *call) exchange(ctx context.Context, m message, payload []byte) (answer, error) {
	c.held = true
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	var small [headSize]byte
	packet := append(m.append(small[:0], len(payload)), payload...)
	if len(payload) > 0 {
		defer clear(packet) // the packet may have secrets
	}
	c.r.state.Store(waiting)
	if _, err := c.p.socket.Write(packet); err != nil {
		// The errors EPIPE, ECONNRESET and ErrClosed mean that the worker has ended. They are not
		// recorded as the reason of its end, because the receiving goroutine finds out more.
		if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, os.ErrClosed) {
			c.p.setReason(fmt.Sprintf("could not be sent a request: %v", err))
			c.p.Kill()
		}
		<-c.p.done
		return answer{}, c.p.gone
	}
	select {
	case a := <-c.r.answer:
		return a, nil
	case <-ctx.Done():
		if c.r.state.CompareAndSwap(waiting, abandoned) {
			c.held = false
			return answer{}, context.Cause(ctx)
		}
		return <-c.r.answer, nil
	case <-c.p.done:
		select {
		case a := <-c.r.answer:
			return a, nil
		default:
			return answer{}, c.p.gone
		}
	}
}

var operations = map[uint32]string{
	kindRead:  functionPrefix + "Read",
	kindWrite: functionPrefix + "Write",
	kindFlush: functionPrefix + "Flush",
}

// The method io makes a request that the worker answers with an error code. If the code is not 0,
// io also asks for the text of the error.
func (c *call) io(ctx context.Context, m message) error {
	a, err := c.exchange(ctx, m, nil)
	if err != nil || a.sector == 0 {
		return err
	}
	e := &Error{Code: a.sector, Op: operations[m.kind]}
	// The library may crash while it is asked for the text. Then the error has no text.
	if a, err := c.exchange(ctx, message{kind: kindText, slot: m.slot, sector: e.Code}, nil); err == nil {
		if list, err := parseStrings(a.payload, 1); err == nil {
			e.Text = clean(c.p.log.redact(list[0]))
		}
	}
	return e
}

// The method control makes a request that the main thread of the worker program carries out. The
// caller has reserved the request number slotControl with c.acquire.
func (c *call) control(ctx context.Context, m message, payload []byte) (answer, error) {
	m.slot = slotControl
	a, err := c.exchange(ctx, m, payload)
	if err != nil || a.sector == 0 && a.flags == doneLibrary {
		return a, err
	}
	list, err := parseStrings(a.payload, 2)
	if err != nil {
		return a, c.p.breach(fmt.Errorf("the worker reported an error in an invalid message, expected the name of the function that failed and the text of the error: %w", err))
	}
	if a.flags == doneFault {
		return a, &faultError{clean(list[0]), clean(c.p.log.redact(list[1]))}
	}
	return a, &Error{Code: a.sector, Op: clean(list[0]), Text: clean(c.p.log.redact(list[1]))}
}

// The method run receives messages until the socket is closed, then waits for the process to end.
func (p *Process) run() {
	defer close(p.done)
	output := make(chan struct{})
	go func() {
		defer close(output)
		p.log.readOutput(&outputReader{pipe: p.output})
	}()

	if err := p.receive(); err != nil {
		p.setReason(fmt.Sprintf("broke the protocol: %v", err))
		p.killed.Store(true)
		p.process.Kill()
	}
	// Normally the socket is closed because the worker ends. If the library has closed it by
	// mistake, the worker does not end by itself, and it is killed after one second.
	patience := time.AfterFunc(time.Second, func() {
		p.setReason("closed its socket but did not end")
		p.killed.Store(true)
		p.process.Kill()
	})
	state, err := p.process.Wait()
	patience.Stop()
	p.socket.Close()
	// The pipe contains everything that the process wrote. A child of the worker may keep the pipe
	// open, and then io.EOF never comes. Therefore a deadline that has already passed is set: it
	// makes outputReader read only what is in the pipe now.
	p.output.SetReadDeadline(time.Unix(1, 0))
	<-output
	p.output.Close()

	gone := &GoneError{PID: p.process.Pid, Killed: p.killed.Load(), Closed: p.closed.Load(), Last: p.log.last()}
	if err != nil {
		p.setReason(err.Error())
	} else if status, ok := state.Sys().(syscall.WaitStatus); ok {
		if status.Signaled() {
			gone.Signal = status.Signal()
		} else {
			gone.Status = status.ExitStatus()
		}
	}
	if reason := p.reason.Load(); reason != nil {
		gone.Reason = *reason
	}
	p.gone = gone
}

// The method receive receives messages until the socket is closed. It returns an error if the
// worker violated the protocol.
func (p *Process) receive() error {
	buffer := make([]byte, maxPacket+1)
	reset := false
	for {
		n, err := p.socket.Read(buffer)
		if errors.Is(err, unix.ECONNRESET) && !reset {
			// The worker has ended without reading all requests. The kernel reports that by one
			// error. After that error, the messages that the worker had sent can be read.
			reset = true
			continue
		}
		if err != nil {
			return nil // io.EOF, or the deadline that Kill has set
		}
		m, payload, err := parseMessage(buffer[:n])
		if err != nil {
			return err
		}
		switch m.kind {
		case kindLog:
			p.log.line(Level(m.flags), payload, m.sectors)
		case kindFatal:
			p.setReason(clean(p.log.redact(string(payload))))
			p.log.line(Level(m.flags), payload, 0)
		case kindBlocks:
			q := p.query.Load()
			if q == nil {
				return errors.New(`the worker sent the message "blocks", but no query was sent to it`)
			}
			q.add(payload)
		case kindDone:
			if err := p.deliver(m, payload); err != nil {
				return err
			}
		}
	}
}

// deliver passes an answer to the call that waits for it. If that call has ended, deliver frees
// the request number.
func (p *Process) deliver(m message, payload []byte) error {
	r := &p.requests[m.slot]
	if m.slot == slotControl && p.closing.Load() {
		p.closed.Store(true) // from now on, any end of the worker is a normal one
	}
	a := answer{message: m}
	if len(payload) > 0 {
		a.payload = []byte(string(payload))
	}
	switch {
	case r.state.CompareAndSwap(waiting, idle):
		r.answer <- a
	case r.state.CompareAndSwap(abandoned, idle):
		r.free <- struct{}{}
	default:
		return fmt.Errorf("the worker sent an answer with the request number %d, but no request with this number is in progress", m.slot)
	}
	return nil
}

// The function clean returns text of the library as one line of valid UTF-8, with a space in place
// of each character that cannot be printed.
func clean(s string) string {
	s = strings.TrimSpace(strings.ToValidUTF8(s, "?"))
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
