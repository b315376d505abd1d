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

// Process is a running worker. Its methods are safe for concurrent use, but
// for Release.
//
// When a call's context ends the call returns the context's cause, and the
// library goes on with it: the slot stays taken (ErrBusy), and its memory may
// still be written to, until the completion comes or the process is killed.
// Who has no patience kills it.
type Process struct {
	config  Config
	process *os.Process
	socket  *os.File
	output  *os.File
	memory  []byte

	present uint64 // functions, a bit each; set by Start
	modes   string

	requests [MaxSlots + 2]request
	query    atomic.Pointer[query] // the one that is being answered
	capacity atomic.Uint64         // sectors; 0 until the disk is open
	writable atomic.Bool

	log     logger
	killed  atomic.Bool
	closing atomic.Bool // close is the last request of all
	closed  atomic.Bool // and has its answer
	reason  atomic.Pointer[string]

	gone     *GoneError // before done is closed
	done     chan struct{}
	released sync.Once
}

// request is one of the numbers that a request can have.
type request struct {
	free   chan struct{} // holds a token while nobody has a request under this number
	state  atomic.Int32
	answer chan answer // of one: the worker answers once
}

// States of a request, between the goroutine that waits for the answer and the
// one that receives it.
const (
	idle int32 = iota
	waiting
	abandoned // its context ended: the receiver gives the number back
)

type answer struct {
	message
	payload []byte
}

var errNotOpen = errors.New("no disk is open in this worker, or one of no sectors")

// faultError is what the worker says of a failure that has no code.
type faultError struct{ op, text string }

func (e *faultError) Error() string { return e.op + ": " + e.text }

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

// PID is the process's id.
func (p *Process) PID() int { return p.process.Pid }

// Functions lists each function of the library's interface.
func (p *Process) Functions() []Function { return listFunctions(p.present) }

// Has says whether the library has a function, given with its full name.
func (p *Process) Has(name string) bool { return hasFunction(p.present, name) }

// TransportModes is what ListTransportModes returns: "file:san:hotadd:nbdssl:nbd".
func (p *Process) TransportModes() string { return p.modes }

// Slots is the number of slots.
func (p *Process) Slots() int { return p.config.Slots }

// Slot returns the memory of slot i, SlotSize bytes that the worker shares. It
// is valid until Release, also after the process has ended; what is in it
// counts only after the Read of it returned nil.
func (p *Process) Slot(i int) []byte {
	n := p.config.SlotSize
	return p.memory[i*n : (i+1)*n : (i+1)*n]
}

// Open connects to the server and opens the disk. A worker opens one disk in
// its life; after an error it can only be closed or killed: closing undoes what
// was done before the error.
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

// Cleanup removes what a lost process left on the host: hot-added disks and
// temporary state. It is for a worker that has not opened a disk.
func (p *Process) Cleanup(ctx context.Context, r OpenRequest) (cleaned, remaining uint32, err error) {
	a, err := p.login(ctx, kindCleanup, &r)
	return uint32(a.sectors), uint32(a.sectors >> 32), err
}

// PrepareAccess keeps the VM from being migrated until EndAccess is called with
// the same identity, by this process or another one: the end of the process does
// not undo it. It is for a worker that has not opened a disk.
func (p *Process) PrepareAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindPrepareAccess, &r)
}

// EndAccess undoes PrepareAccess. It is for a worker that has not opened a disk.
func (p *Process) EndAccess(ctx context.Context, r OpenRequest) error {
	return p.access(ctx, kindEndAccess, &r)
}

func (p *Process) access(ctx context.Context, kind uint32, r *OpenRequest) error {
	if r.Identity == "" {
		return errors.New("no identity to access the VM with")
	}
	_, err := p.login(ctx, kind, r)
	return err
}

func (p *Process) login(ctx context.Context, kind uint32, r *OpenRequest) (answer, error) {
	if err := r.check(); err != nil {
		return answer{}, err
	}
	if r.Path == "" && kind == kindOpen {
		return answer{}, errors.New("no path to open")
	}
	payload := appendLogin(nil, r)
	defer clear(payload) // it holds secrets
	if len(payload) > maxPayload {
		return answer{}, fmt.Errorf("the names and secrets have %d bytes together, at most %d can be handed to the library", len(payload), maxPayload)
	}
	p.log.hide(r)
	return p.control(ctx, message{kind: kind}, payload)
}

// Read reads sectors into the slot. The range must lie in the disk and fit the
// slot. One Read or Write a slot at a time, and each slot may have one.
func (p *Process) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	return p.transfer(ctx, kindRead, slot, sector, sectors)
}

// Write writes sectors from the slot, likewise. The disk must have been opened
// for writing.
func (p *Process) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	if !p.writable.Load() {
		return errors.New("the disk is not open for writing")
	}
	return p.transfer(ctx, kindWrite, slot, sector, sectors)
}

func (p *Process) transfer(ctx context.Context, kind uint32, slot int, sector uint64, sectors int) error {
	if slot < 0 || slot >= p.config.Slots {
		return fmt.Errorf("slot %d of %d", slot, p.config.Slots)
	}
	if sectors <= 0 || sectors > p.config.SlotSize/SectorSize {
		return fmt.Errorf("%d sectors, a slot has room for 1 to %d", sectors, p.config.SlotSize/SectorSize)
	}
	if n := p.capacity.Load(); n == 0 {
		return errNotOpen
	} else if sector > n || uint64(sectors) > n-sector {
		return fmt.Errorf("sectors [%d, %d) of a disk of %d", sector, sector+uint64(sectors), n)
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

// Flush makes what was written durable, for every Write that returned before.
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

// Query asks for the allocated blocks of [start, start+sectors): ascending,
// apart from each other, inside the range. Start and sectors are multiples of
// chunk, a power of two of at least MinChunk sectors; at most MaxChunks chunks,
// all of them inside the disk. An answer that breaks these rules is an error.
func (p *Process) Query(ctx context.Context, start, sectors, chunk uint64) ([]Block, error) {
	capacity := p.capacity.Load()
	switch {
	case capacity == 0:
		return nil, errNotOpen
	case chunk < MinChunk || bits.OnesCount64(chunk) != 1 || chunk > 1<<31:
		return nil, fmt.Errorf("query: chunk of %d sectors, expected a power of two from %d", chunk, MinChunk)
	case start%chunk != 0 || sectors%chunk != 0 || sectors == 0 || sectors/chunk > MaxChunks:
		return nil, fmt.Errorf("query: %d sectors at %d, expected multiples of %d, at most %d", sectors, start, chunk, MaxChunks*chunk)
	case start > capacity || sectors > capacity-start:
		return nil, fmt.Errorf("query: sectors [%d, %d) of a disk of %d", start, start+sectors, capacity)
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

// Close waits for requests in flight, closes the disk, disconnects, ends the
// access prepared, ends the library and waits for the process, which is killed
// when ctx ends before that. The error is the first of these steps'; of a
// process that is gone already, how it went. How the library ends (Exit), and
// whether it does in time, is no error: everything is closed by then. Reads and
// writes that come meanwhile return ErrBusy or *GoneError.
func (p *Process) Close(ctx context.Context) error {
	err := p.close(ctx)
	var gone *GoneError
	if errors.As(err, &gone) && gone.Closed {
		err = nil // by another call
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

func (p *Process) close(ctx context.Context) error {
	if p.closed.Load() {
		return nil
	}
	// With every slot in hand nothing is in flight, and nothing can start.
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

// Kill ends the process at once and waits for it. After its end it does nothing.
func (p *Process) Kill() {
	select {
	case <-p.done:
		return
	default:
	}
	p.killed.Store(true)
	p.process.Kill()
	// A helper that the library forked off may hold the other end open.
	p.socket.SetReadDeadline(time.Unix(1, 0))
	<-p.done
}

// Done is closed when the process has ended and was waited for.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended, as a *GoneError; nil while it runs.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.gone
	default:
		return nil
	}
}

// Release kills the process if it runs and gives the slots' memory back. No
// slot may be in use; no other method may be called afterwards, except Err.
func (p *Process) Release() {
	p.Kill()
	p.released.Do(func() {
		unix.Munmap(p.memory)
		p.memory = nil
	})
}

// control makes a request of the main thread of the worker.
func (p *Process) control(ctx context.Context, m message, payload []byte) (answer, error) {
	c := call{p: p, r: &p.requests[slotControl]}
	if err := c.acquire(ctx); err != nil {
		return answer{}, err
	}
	defer c.release()
	return c.control(ctx, m, payload)
}

// breach ends a worker that said what none of ours would.
func (p *Process) breach(err error) error {
	p.setReason(fmt.Sprintf("broke the protocol: %v", err))
	p.Kill()
	return p.Err()
}

func (p *Process) setReason(s string) { p.reason.CompareAndSwap(nil, &s) }

// call is the use of one number for one request, or for several in turn.
type call struct {
	p    *Process
	r    *request
	held bool // the token of r
}

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

func (c *call) release() {
	if c.held {
		c.r.free <- struct{}{}
	}
}

// exchange sends a request and waits for its answer. When ctx ends first, the
// number is given back by whoever receives the answer.
func (c *call) exchange(ctx context.Context, m message, payload []byte) (answer, error) {
	c.held = true
	if ctx.Err() != nil {
		return answer{}, context.Cause(ctx)
	}
	var small [headSize]byte
	packet := append(m.append(small[:0], len(payload)), payload...)
	if len(payload) > 0 {
		defer clear(packet) // it may hold secrets
	}
	c.r.state.Store(waiting)
	if _, err := c.p.socket.Write(packet); err != nil {
		// Where the worker is gone, the goroutine that receives finds out how.
		if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, os.ErrClosed) {
			c.p.setReason(fmt.Sprintf("could not be told: %v", err))
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

// io makes a request whose answer is a code, and asks for the text of an error.
func (c *call) io(ctx context.Context, m message) error {
	a, err := c.exchange(ctx, m, nil)
	if err != nil || a.sector == 0 {
		return err
	}
	e := &Error{Code: a.sector, Op: operations[m.kind]}
	// The library may be about to die of the same: then the code must do.
	if a, err := c.exchange(ctx, message{kind: kindText, slot: m.slot, sector: e.Code}, nil); err == nil {
		if list, err := parseStrings(a.payload, 1); err == nil {
			e.Text = clean(c.p.log.redact(list[0]))
		}
	}
	return e
}

// control makes a request of the main thread; r must be its number.
func (c *call) control(ctx context.Context, m message, payload []byte) (answer, error) {
	m.slot = slotControl
	a, err := c.exchange(ctx, m, payload)
	if err != nil || a.sector == 0 && a.flags == doneLibrary {
		return a, err
	}
	list, err := parseStrings(a.payload, 2)
	if err != nil {
		return a, c.p.breach(fmt.Errorf("error without its text: %w", err))
	}
	if a.flags == doneFault {
		return a, &faultError{clean(list[0]), clean(c.p.log.redact(list[1]))}
	}
	return a, &Error{Code: a.sector, Op: clean(list[0]), Text: clean(c.p.log.redact(list[1]))}
}

// run receives what the worker says until it ends, and then waits for it.
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
	// It closed its socket, which it does by dying. A library that has closed
	// it would keep it alive.
	patience := time.AfterFunc(time.Second, func() {
		p.setReason("closed its socket and did not end")
		p.killed.Store(true)
		p.process.Kill()
	})
	state, err := p.process.Wait()
	patience.Stop()
	p.socket.Close()
	// Everything that the process wrote is in the pipe by now. A process that the
	// library started may keep the pipe open for ever, so io.EOF is not waited for.
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

// receive returns nil when the socket ended, or an error when the worker broke
// the protocol.
func (p *Process) receive() error {
	buffer := make([]byte, maxPacket+1)
	reset := false
	for {
		n, err := p.socket.Read(buffer)
		if errors.Is(err, unix.ECONNRESET) && !reset {
			// It died with requests unread. The kernel tells that first, and
			// once; what the worker said before is still to come.
			reset = true
			continue
		}
		if err != nil {
			return nil // EOF, or the deadline of Kill
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
				return errors.New("blocks that nobody asked for")
			}
			q.add(payload)
		case kindDone:
			if err := p.deliver(m, payload); err != nil {
				return err
			}
		}
	}
}

func (p *Process) deliver(m message, payload []byte) error {
	r := &p.requests[m.slot]
	if m.slot == slotControl && p.closing.Load() {
		p.closed.Store(true) // from here on the worker may end as it likes
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
		return fmt.Errorf("answer to request %d, which there is none of", m.slot)
	}
	return nil
}

// clean makes foreign text fit for a line: valid UTF-8 of characters that print.
func clean(s string) string {
	s = strings.TrimSpace(strings.ToValidUTF8(s, "?"))
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
