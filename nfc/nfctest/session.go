package nfctest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/internal/zero"
)

// Types of frames.
const (
	frameError         = 1
	frameOpenSession   = 2
	frameCloseSession  = 3
	frameOpenFile      = 4
	frameCloseFile     = 5
	frameIO            = 7
	frameSocketOptions = 9
	frameDDB           = 11
	frameAllocation    = 13
	frameResourcePool  = 22
)

// requests says which sizes of payload a request may have, and at which step it is answered.
var requests = map[uint32]struct {
	name  string
	step  Step
	sizes []uint32
}{
	frameOpenSession:   {"OPEN_SESSION", StepOpenSession, []uint32{16}},
	frameCloseSession:  {"CLOSE_SESSION", StepClose, []uint32{4, 16}},
	frameOpenFile:      {"OPEN_FILE", StepOpenFile, []uint32{60}},
	frameCloseFile:     {"CLOSE_FILE", StepClose, []uint32{8, 16}},
	frameIO:            {"IO", StepRead, []uint32{44}},
	frameSocketOptions: {"SET_SOCK_OPTS", StepSocketOptions, []uint32{12}},
	frameDDB:           {"DDB_GET", StepDDB, []uint32{16}},
	frameAllocation:    {"the allocation query", "", []uint32{48}},
	frameResourcePool:  {"SET_RES_POOL", StepResourcePool, []uint32{4}},
}

// beginning is the order of the first requests of a session.
var beginning = []uint32{frameOpenSession, frameSocketOptions, frameResourcePool, frameOpenFile}

const (
	magic         = 0xA100DA7A
	headSize      = 16
	sectorSize    = 512
	defaultBuffer = 64 << 10
	defaultCount  = 4
	maxBuffer     = 2 << 20
	maxSession    = 16 << 20
	maxRead       = 1 << 20
	readOnlyFlags = 0x1e
)

// Codes of ERROR.
const (
	codeInvalid  = 2
	codeMemory   = 5
	codeNotFound = 6
	codeRefused  = 11
)

// session is the part of a connection that is about frames. It belongs to the goroutine that reads
// the requests, except the atomic fields and the queue.
type session struct {
	next         uint32 // the opId of the next request
	begun        int    // number of requests of beginning that were answered well
	buffer       int    // the longest data of a fragment
	disk         *Disk  // nil: no file is open
	handle       uint64
	handles      uint64 // number of files that were opened
	closed       bool   // CLOSE_SESSION came
	waiting      atomic.Int32
	inFlight     atomic.Int32 // reads without a complete answer; waiting counts the other requests
	mostInFlight int
	queue        *queue
	workers      sync.WaitGroup
}

// frame is a request of the client.
type frame struct {
	kind, op uint32
	p        []byte // the payload
}

// frames reads and answers requests until the connection ends.
func (c *conn) frames() error {
	c.queue = newQueue(c.h.options, c.n)
	n := min(max(runtime.GOMAXPROCS(0), 2), 4)
	if c.h.options.Shuffle {
		n = 1
	}
	for range n {
		w := &worker{c: c}
		c.workers.Go(w.run)
	}
	if c.queue.delayed != nil {
		c.workers.Go(c.queue.delay)
	}
	defer func() {
		c.wire.drop()
		c.queue.close()
		c.workers.Wait()
		c.closeFile()
	}()
	var payload [60]byte
	for {
		if c.in.shares() {
			c.violation("a frame shares a TLS record with the one before")
		}
		head, err := c.in.take(headSize)
		if err != nil {
			return c.atEnd(err)
		}
		if c.closed || le.Uint32(head) != magic {
			return c.last(head)
		}
		f := frame{kind: le.Uint32(head[4:]), op: le.Uint32(head[12:])}
		size := le.Uint32(head[8:])
		known, ok := requests[f.kind]
		if !ok {
			return c.wrong("a frame of the unknown type %d came", f.kind)
		}
		if !slices.Contains(known.sizes, size) {
			return c.wrong("%s has a payload of %d bytes", known.name, size)
		}
		b, err := c.in.take(int(size))
		if err != nil {
			return err
		}
		f.p = payload[:copy(payload[:], b)]
		if err := c.request(f, known.name); err != nil {
			return err
		}
	}
}

// atEnd is called when the client has ended the connection between two frames.
func (c *conn) atEnd(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) && len(c.in.pending) > 0 && c.closed {
		c.violation("% x came after CLOSE_SESSION", c.in.pending)
	}
	return err
}

// last reads what comes after CLOSE_SESSION: message 4, or nothing.
func (c *conn) last(head []byte) error {
	b := bytes.Clone(head)
	rest, err := c.in.take(messageSize - headSize)
	b = append(b, rest...)
	switch {
	case !c.closed && err == nil && le.Uint32(b) == msgComplete:
		return c.wrong("message 4 came before CLOSE_SESSION")
	case !c.closed:
		return c.wrong("% x is no head of a frame", head)
	case err != nil || !bytes.Equal(b, message(msgComplete, 4, 0)):
		return c.wrong("% x came after CLOSE_SESSION, which is not message 4", head)
	}
	c.h.mu.Lock()
	c.h.stats.Ends++
	c.h.mu.Unlock()
	more, err := c.in.take(1)
	if err == nil {
		return c.wrong("%x came after message 4", more)
	}
	return err
}

// request checks and answers a request.
func (c *conn) request(f frame, name string) error {
	c.h.requests.Add(1)
	if c.h.options.Log != nil && f.kind != frameIO {
		c.logf("> %s, opId %d: % x", name, f.op, f.p)
	}
	if f.op != c.next {
		c.violation("%s has opId %d in place of %d", name, f.op, c.next)
	}
	c.next = f.op + 1
	if place := slices.Index(beginning, f.kind); place >= 0 {
		if place != c.begun {
			return c.wrong("%s came as number %d of the requests that begin a session", name, c.begun+1)
		}
		if n := c.waiting.Load(); n > 0 {
			c.violation("%s came before the answer to the request before", name)
		}
	} else if c.begun < len(beginning) && f.kind != frameCloseSession {
		return c.wrong("%s came before a file was open", name)
	}
	if f.kind == frameIO {
		return c.onIO(f)
	}
	c.waiting.Add(1)
	var r *Rule
	if step := requests[f.kind].step; step != "" {
		r = c.fault(step, Read{})
	}
	if r != nil && r.refuses() {
		if err := c.skipExtra(f); err != nil {
			return err
		}
		c.reply(r, f, make([]byte, len(f.p)), nil)
		return nil
	}
	switch f.kind {
	case frameOpenSession:
		c.onOpenSession(r, f)
	case frameSocketOptions:
		c.simple(r, f, 256<<10, 256<<10, 1)
	case frameResourcePool:
		if le.Uint32(f.p) != 1 {
			c.violation("SET_RES_POOL has %d in place of 1", le.Uint32(f.p))
		}
		c.begun++
		c.reply(r, f, []byte{0, 0, 0, 0}, nil)
	case frameOpenFile:
		return c.onOpenFile(r, f)
	case frameDDB:
		return c.onDDB(r, f)
	case frameAllocation:
		c.violation("an allocation query came")
		c.refuse(r, f, codeInvalid, "allocation queries are not supported")
	case frameCloseFile:
		c.onCloseFile(r, f)
	case frameCloseSession:
		c.onCloseSession(r, f)
	}
	return nil
}

// skipExtra skips the bytes after the payload of a request.
func (c *conn) skipExtra(f frame) error {
	switch f.kind {
	case frameOpenFile:
		return c.in.discard(int64(le.Uint32(f.p)))
	case frameDDB:
		return c.in.discard(int64(le.Uint32(f.p[8:])))
	}
	return nil
}

// simple answers a request whose payload must be zeros.
func (c *conn) simple(r *Rule, f frame, numbers ...uint32) {
	if !zero.Is(f.p) {
		c.violation("request %d has a payload that is not zero", f.kind)
	}
	var p []byte
	for _, n := range numbers {
		p = le.AppendUint32(p, n)
	}
	c.begun++
	c.reply(r, f, p, nil)
}

// newFrame returns a frame.
func newFrame(kind, op uint32, p, extra []byte) []byte {
	b := make([]byte, headSize, headSize+len(p)+len(extra))
	le.PutUint32(b, magic)
	le.PutUint32(b[4:], kind)
	le.PutUint32(b[8:], uint32(len(p)))
	le.PutUint32(b[12:], op)
	return append(append(b, p...), extra...)
}

// newError returns an ERROR.
func newError(op uint32, code uint64, text string) []byte {
	p := le.AppendUint64(nil, code)
	p = le.AppendUint32(p, 0)
	p = le.AppendUint32(p, uint32(len(text)))
	return newFrame(frameError, op, p, []byte(text))
}

// reply answers a request that is not a read.
func (c *conn) reply(r *Rule, f frame, p, extra []byte) {
	c.queue.add(job{rule: r, answer: newFrame(f.kind, f.op, p, extra)})
}

// refuse answers a request with ERROR and zeros.
func (c *conn) refuse(r *Rule, f frame, code uint64, text string) {
	c.logf("< ERROR %d, opId %d: %s", code, f.op, text)
	answer := append(newError(f.op, code, text), newFrame(f.kind, f.op, make([]byte, len(f.p)), nil)...)
	c.queue.add(job{rule: r, answer: answer})
}

func (c *conn) onOpenSession(r *Rule, f frame) {
	size, count := int64(le.Uint32(f.p[4:])), int64(le.Uint32(f.p[8:]))
	if le.Uint32(f.p) != 0 || le.Uint32(f.p[12:]) != 0 || (size == 0) != (count == 0) {
		c.violation("OPEN_SESSION has the payload % x", f.p)
	}
	if size == 0 || count == 0 {
		size, count = defaultBuffer, defaultCount
	}
	switch {
	case size > maxBuffer || size*count > maxSession:
		c.refuse(r, f, codeInvalid, fmt.Sprintf("%d buffers of %d bytes exceed the limit", count, size))
		return
	case !c.h.acquire(c, size*count):
		c.refuse(r, f, codeMemory, memoryText(size*count))
		return
	}
	c.buffer = int(size)
	c.begun++
	c.reply(r, f, make([]byte, len(f.p)), nil)
}

func memoryText(n int64) string {
	return fmt.Sprintf("Failed to allocate the requested %d bytes", n+24)
}

func (c *conn) onOpenFile(r *Rule, f frame) error {
	n, kind, flags := le.Uint32(f.p), le.Uint32(f.p[16:]), le.Uint32(f.p[20:])
	if n == 0 || n > 4096 {
		return c.wrong("OPEN_FILE has a path of %d bytes", n)
	}
	if kind != 2 || !zero.Is(f.p[4:16]) || !zero.Is(f.p[24:]) {
		c.violation("OPEN_FILE has the payload % x", f.p)
	}
	b, err := c.in.take(int(n))
	if err != nil {
		return err
	}
	path := string(b)
	c.logf("> path %q, flags %#x", path, flags)
	if !utf8.ValidString(path) || strings.Contains(path, "\x00") || !strings.HasPrefix(path, "[") {
		c.violation("OPEN_FILE has the path %q", path)
	}
	if flags != readOnlyFlags {
		c.violation("OPEN_FILE has the flags %#x in place of %#x", flags, readOnlyFlags)
		c.refuse(r, f, codeRefused, "the ticket does not permit these flags")
		return nil
	}
	if c.ticket.allowed != nil && !c.ticket.allowed(path) {
		c.refuse(r, f, codeRefused, "the ticket does not permit this file")
		return nil
	}
	d, err := c.h.open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		c.refuse(r, f, codeNotFound, "could not find the file")
		return nil
	case err != nil:
		c.refuse(r, f, codeRefused, err.Error())
		return nil
	case d.InUse:
		c.refuse(r, f, codeRefused, "failed to open the file")
		return nil
	}
	c.disk = d
	c.handles++
	c.handle = 0xffffffff_80000000 + uint64(c.n)<<8 + c.handles
	c.begun++
	c.reply(r, f, c.opened(), nil)
	return nil
}

// capacity returns the size of the disk that is open, in whole sectors.
func (c *conn) capacity() int64 { return (c.disk.Size + sectorSize - 1) &^ (sectorSize - 1) }

// opened returns the payload of the answer to OPEN_FILE.
func (c *conn) opened() []byte {
	const heads, sectors = 255, 63
	p := make([]byte, 60)
	le.PutUint64(p[8:], c.handle)
	le.PutUint32(p[16:], 2)
	le.PutUint32(p[20:], readOnlyFlags)
	le.PutUint64(p[28:], uint64(c.capacity()))
	le.PutUint32(p[36:], sectorSize)
	le.PutUint32(p[40:], uint32(c.capacity()/sectorSize/heads/sectors))
	le.PutUint32(p[44:], heads)
	le.PutUint32(p[48:], sectors)
	return p
}

// checkHandle records a violation if a request has another handle than that of the open file.
func (c *conn) checkHandle(f frame) bool {
	if c.disk == nil || le.Uint64(f.p) != c.handle {
		c.violation("request %d has the handle %#x, which is not open", f.kind, le.Uint64(f.p))
		return false
	}
	return true
}

func (c *conn) onDDB(r *Rule, f frame) error {
	n := le.Uint32(f.p[8:])
	if n == 0 || n > 1024 {
		return c.wrong("DDB_GET has a key of %d bytes", n)
	}
	b, err := c.in.take(int(n))
	if err != nil {
		return err
	}
	key := string(b)
	if strings.HasPrefix(key, "ddb.") || strings.Contains(key, "\x00") || le.Uint32(f.p[12:]) != 0 {
		c.violation("DDB_GET has the key %q and the payload % x", key, f.p)
	}
	if !c.checkHandle(f) {
		c.refuse(r, f, codeInvalid, "invalid handle")
		return nil
	}
	text := c.disk.DDB[key]
	p := make([]byte, 16)
	le.PutUint32(p[12:], uint32(len(text)))
	c.reply(r, f, p, []byte(text))
	return nil
}

func (c *conn) onCloseFile(r *Rule, f frame) {
	if n := c.inFlight.Load(); n > 0 {
		c.violation("CLOSE_FILE came with %d reads in flight", n)
	}
	if !zero.Is(f.p[8:]) {
		c.violation("CLOSE_FILE has the payload % x", f.p)
	}
	if !c.checkHandle(f) {
		c.refuse(r, f, codeInvalid, "invalid handle")
		return
	}
	c.closeFile()
	c.begun = len(beginning) - 1
	c.reply(r, f, make([]byte, len(f.p)), nil)
}

func (c *conn) onCloseSession(r *Rule, f frame) {
	if !zero.Is(f.p) {
		c.violation("CLOSE_SESSION has the payload % x", f.p)
	}
	if n := c.inFlight.Load(); n > 0 {
		c.violation("CLOSE_SESSION came with %d reads in flight", n)
	}
	if c.disk != nil {
		c.violation("CLOSE_SESSION came with an open file")
	}
	c.closed = true
	c.h.sessionEnded(c)
	c.h.mu.Lock()
	c.h.stats.CloseHandshakes++
	c.h.mu.Unlock()
	c.reply(r, f, make([]byte, len(f.p)), nil)
}

// closeFile closes the open file, if there is one.
func (c *conn) closeFile() {
	if c.disk == nil {
		return
	}
	if c.disk.Close != nil {
		if err := c.disk.Close(); err != nil {
			c.logf("closing the disk: %v", err)
		}
	}
	c.disk = nil
}
