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

// Process is a running worker. Its methods are safe for concurrent use, except Release.
//
// When the context of a call ends, the call returns the cause of the context, but the library
// continues with the request. Until it completes the request, or the process is killed, other
// calls with that slot return ErrBusy, and the library may write to the memory of the slot.
// A caller that cannot wait until the request is completed kills the process with Kill.
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
	closing atomic.Bool            // the request close was sent, which is the last one
	closed  atomic.Bool            // the request close was answered
	reason  atomic.Pointer[string] // see GoneError.Reason

	gone     *GoneError    // set before done is closed
	done     chan struct{} // closed when the process has ended
	released sync.Once
}

// request is the state of one request number.
type request struct {
	free   chan struct{} // a mutex: has one element while no request has this number
	state  atomic.Int32
	answer chan answer // has room for one answer
}

// States of a request. The goroutine that waits for the answer and the one that receives it
// use them to agree on which of the two frees the number.
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

// faultError is a failure of the worker that has no code of the library.
type faultError struct{ op, text string }

func (e *faultError) Error() string { return e.op + ": " + e.text }

// newProcess returns a Process and starts the goroutine that receives from it.
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

// PID returns the ID of the process.
func (p *Process) PID() int { return p.process.Pid }

// Functions returns all functions of the library that a worker looks for, and whether the
// library has them.
func (p *Process) Functions() []Function { return listFunctions(p.present) }

// Has reports whether the library has the function with the given full name.
func (p *Process) Has(name string) bool { return hasFunction(p.present, name) }

// TransportModes returns the transport modes of the library, such as
// "file:san:hotadd:nbdssl:nbd", or "" if the library does not list them.
func (p *Process) TransportModes() string { return p.modes }

// Slots returns the number of slots.
func (p *Process) Slots() int { return p.config.Slots }

// Slot returns the memory of slot i, SlotSize bytes that are shared with the worker. It is valid
// until Release, also after the process has ended. It has the data of a Read only if that
// returned nil.
func (p *Process) Slot(i int) []byte {
	n := p.config.SlotSize
	return p.memory[i*n : (i+1)*n : (i+1)*n]
}

// Open connects to the server and opens the disk. A worker can open only one disk. After an
// error it can only be closed or killed; Close undoes the steps before the error.
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

// Cleanup removes what lost workers left on the host: hot-added disks and temporary state. The
// worker must not have opened a disk.
func (p *Process) Cleanup(ctx context.Context, r OpenRequest) (cleaned, remaining uint32, err error) {
	a, err := p.login(ctx, kindCleanup, &r)
	return uint32(a.sectors), uint32(a.sectors >> 32), err
}

// PrepareAccess keeps the VM from being migrated until any process calls EndAccess with the same
// identity. The end of the worker does not undo it. The worker must not have opened a disk.
func (p *Process) PrepareAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindPrepareAccess, &r)
}

// EndAccess undoes PrepareAccess. The worker must not have opened a disk.
func (p *Process) EndAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindEndAccess, &r)
}

func (p *Process) access(ctx context.Context, kind uint32, r *OpenRequest) error {
	if r.Identity == "" {
		return errors.New("the identity for access to the VM is missing")
	}
	_, err := p.login(ctx, kind, r)
	return err
}

// login sends a request of the given kind that logs in.
func (p *Process) login(ctx context.Context, kind uint32, r *OpenRequest) (answer, error) {
	if err := r.check(); err != nil {
		return answer{}, err
	}
	if r.Path == "" && kind == kindOpen {
		return answer{}, errors.New("the path of the disk is missing")
	}
	payload := appendLogin(nil, r)
	defer clear(payload) // the payload has secrets
	if len(payload) > maxPayload {
		return answer{}, fmt.Errorf("the parameters have %d bytes together, at most %d can be passed to the library", len(payload), maxPayload)
	}
	p.log.hide(r)
	return p.control(ctx, message{kind: kind}, payload)
}

// Read reads the given number of sectors, from sector on, into the slot. The range must lie in
// the disk and fit into the slot. Each slot can have one Read or Write in progress.
func (p *Process) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	return p.transfer(ctx, kindRead, slot, sector, sectors)
}

// Write writes sectors from the slot, under the same conditions as Read. The disk must have been
// opened for writing.
func (p *Process) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	if !p.writable.Load() {
		return errors.New("the disk is not open for writing")
	}
	return p.transfer(ctx, kindWrite, slot, sector, sectors)
}

// transfer makes a read or write and waits for its end.
func (p *Process) transfer(ctx context.Context, kind uint32, slot int, sector uint64, sectors int) error {
	if slot < 0 || slot >= p.config.Slots {
		return fmt.Errorf("slot %d does not exist: the worker has %d slots, counted from 0", slot, p.config.Slots)
	}
	if sectors <= 0 || sectors > p.config.SlotSize/SectorSize {
		return fmt.Errorf("request of %d sectors, expected 1 to %d, which fit into a slot", sectors, p.config.SlotSize/SectorSize)
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

// Flush makes everything durable that was written by calls of Write that returned before.
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

// Query returns the allocated blocks of the sectors [start, start+sectors) in ascending order,
// with gaps between them. All numbers are sectors. chunk is a power of two, at least MinChunk;
// start and sectors are multiples of it, with at most MaxChunks chunks, and the range lies in
// the disk. Blocks that are not in order or not in the range are an error.
func (p *Process) Query(ctx context.Context, start, sectors, chunk uint64) ([]Block, error) {
	capacity := p.capacity.Load()
	switch {
	case capacity == 0:
		return nil, errNotOpen
	case chunk < MinChunk || bits.OnesCount64(chunk) != 1 || chunk > 1<<31:
		return nil, fmt.Errorf("cannot query in chunks of %d sectors, expected a power of two of at least %d", chunk, MinChunk)
	case start%chunk != 0 || sectors%chunk != 0 || sectors == 0 || sectors/chunk > MaxChunks:
		return nil, fmt.Errorf("cannot query %d sectors at sector %d, expected two multiples of %d sectors, and at most %d sectors", sectors, start, chunk, MaxChunks*chunk)
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

// Close waits for requests in flight, closes the disk, disconnects, ends the library and waits for
// the end of the process, which is killed if ctx ends before that. The error is that of the
// first step that failed, or a *GoneError if the process had ended before. Failures in the end
// of the library (Exit) are not errors, because the disk is closed by then. Reads and writes
// that begin meanwhile return ErrBusy or *GoneError.
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

// close sends the request close, when no other request is in progress.
func (p *Process) close(ctx context.Context) error {
	if p.closed.Load() {
		return nil
	}
	// When all numbers are acquired, no request is in flight, and none can begin.
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
	// The receiver must stop even if a child of the worker keeps the other end open.
	p.socket.SetReadDeadline(time.Unix(1, 0))
	<-p.done
}

// Done returns a channel that is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns a *GoneError that says how the process ended, or nil while it runs.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.gone
	default:
		return nil
	}
}

// Release kills the process if it is running and unmaps the memory of the slots. No slot may be
// in use. Afterwards, no method except Err may be called.
func (p *Process) Release() {
	p.Kill()
	p.released.Do(func() {
		unix.Munmap(p.memory)
		p.memory = nil
	})
}

// control makes a request that the main thread of the worker carries out.
func (p *Process) control(ctx context.Context, m message, payload []byte) (answer, error) {
	c := call{p: p, r: &p.requests[slotControl]}
	if err := c.acquire(ctx); err != nil {
		return answer{}, err
	}
	defer c.release()
	return c.control(ctx, m, payload)
}

// breach kills a worker that has broken the protocol, and returns its *GoneError.
func (p *Process) breach(err error) error {
	p.setReason(fmt.Sprintf("broke the protocol: %v", err))
	p.Kill()
	return p.Err()
}

// setReason sets the reason for the end of the process unless there is one already.
func (p *Process) setReason(s string) { p.reason.CompareAndSwap(nil, &s) }

// call is the use of one request number for one request, or for several one after the other.
type call struct {
	p    *Process
	r    *request
	held bool // release has to free the number
}

// acquire waits until the request number is free, and reserves it.
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

// release frees the number, unless the goroutine that receives the answer has to free it.
func (c *call) release() {
	if c.held {
		c.r.free <- struct{}{}
	}
}

// exchange sends a request and waits for its answer. If ctx ends first, the goroutine that
// receives the answer frees the number.
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
		// If the worker has ended, the goroutine that receives from it finds out how.
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

// io makes a request that is answered with a code, and asks for the text if that is an error.
func (c *call) io(ctx context.Context, m message) error {
	a, err := c.exchange(ctx, m, nil)
	if err != nil || a.sector == 0 {
		return err
	}
	e := &Error{Code: a.sector, Op: operations[m.kind]}
	// The library may crash meanwhile. Then the error has no text.
	if a, err := c.exchange(ctx, message{kind: kindText, slot: m.slot, sector: e.Code}, nil); err == nil {
		if list, err := parseStrings(a.payload, 1); err == nil {
			e.Text = clean(c.p.log.redact(list[0]))
		}
	}
	return e
}

// control makes a request that the main thread of the worker carries out. c.r must be the
// number slotControl.
func (c *call) control(ctx context.Context, m message, payload []byte) (answer, error) {
	m.slot = slotControl
	a, err := c.exchange(ctx, m, payload)
	if err != nil || a.sector == 0 && a.flags == doneLibrary {
		return a, err
	}
	list, err := parseStrings(a.payload, 2)
	if err != nil {
		return a, c.p.breach(fmt.Errorf("the worker sent an error without a text: %w", err))
	}
	if a.flags == doneFault {
		return a, &faultError{clean(list[0]), clean(c.p.log.redact(list[1]))}
	}
	return a, &Error{Code: a.sector, Op: clean(list[0]), Text: clean(c.p.log.redact(list[1]))}
}

// run receives from the worker until it ends, and then waits for the end of the process.
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
	// The socket is closed, normally because the worker ends. If the library closed the socket
	// by mistake, the worker does not end by itself and is killed.
	patience := time.AfterFunc(time.Second, func() {
		p.setReason("closed its socket but did not end")
		p.killed.Store(true)
		p.process.Kill()
	})
	state, err := p.process.Wait()
	patience.Stop()
	p.socket.Close()
	// Everything that the process wrote is in the pipe by now. Waiting for io.EOF could take
	// forever, because a child of the worker may keep the pipe open.
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

// receive receives messages until the socket is closed. It returns an error if the worker broke
// the protocol.
func (p *Process) receive() error {
	buffer := make([]byte, maxPacket+1)
	reset := false
	for {
		n, err := p.socket.Read(buffer)
		if errors.Is(err, unix.ECONNRESET) && !reset {
			// The worker has ended without reading all requests. The kernel reports that once,
			// and before the messages that the worker sent until then.
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
				return errors.New("the worker sent the message blocks without a query")
			}
			q.add(payload)
		case kindDone:
			if err := p.deliver(m, payload); err != nil {
				return err
			}
		}
	}
}

// deliver passes an answer to the call that waits for it.
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
		return fmt.Errorf("the worker answered the request number %d, which has no request in progress", m.slot)
	}
	return nil
}

// clean returns text of the library as valid UTF-8 in one line of printable characters.
func clean(s string) string {
	s = strings.TrimSpace(strings.ToValidUTF8(s, "?"))
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
