package worker

import "context"

// Process is a running worker. Its methods are safe for concurrent use, but
// for Release.
//
// When a call's context ends the call returns the context's cause, and the
// library goes on with it: the slot stays taken (ErrBusy), and its memory may
// still be written to, until the completion comes or the process is killed.
// Who has no patience kills it.
type Process struct{}

// Start starts a worker, which loads and initialises the library. The errors
// are *ProgramError, *LoadError, *Error (of InitEx) and *GoneError. The process
// outlives ctx; it ends with Close or Kill, or with this process.
func Start(ctx context.Context, c Config) (*Process, error) { panic("not implemented") }

// PID is the process's id.
func (p *Process) PID() int { panic("not implemented") }

// Functions lists each function of the library's interface.
func (p *Process) Functions() []Function { panic("not implemented") }

// Has says whether the library has a function, given with its full name.
func (p *Process) Has(name string) bool { panic("not implemented") }

// TransportModes is what ListTransportModes returns: "file:san:hotadd:nbdssl:nbd".
func (p *Process) TransportModes() string { panic("not implemented") }

// Open connects to the server and opens the disk. A worker opens one disk in
// its life; after an error it can only be closed or killed.
func (p *Process) Open(ctx context.Context, r OpenRequest) (Opened, error) {
	panic("not implemented")
}

// Slots is the number of slots.
func (p *Process) Slots() int { panic("not implemented") }

// Slot returns the memory of slot i, SlotSize bytes that the worker shares. It
// is valid until Release, also after the process has ended; what is in it
// counts only after the Read of it returned nil.
func (p *Process) Slot(i int) []byte { panic("not implemented") }

// Read reads sectors into the slot. The range must lie in the disk and fit the
// slot. One Read or Write a slot at a time, and each slot may have one.
func (p *Process) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	panic("not implemented")
}

// Write writes sectors from the slot, likewise. The disk must have been opened
// for writing.
func (p *Process) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	panic("not implemented")
}

// Flush makes what was written durable, for every Write that returned before.
func (p *Process) Flush(ctx context.Context) error { panic("not implemented") }

// Query asks for the allocated blocks of [start, start+sectors): ascending,
// disjoint, inside the range. Start and sectors are multiples of chunk, a power
// of two of at least MinChunk sectors; at most MaxChunks chunks, all of them
// inside the disk. An answer that breaks these rules is an error.
func (p *Process) Query(ctx context.Context, start, sectors, chunk uint64) ([]Block, error) {
	panic("not implemented")
}

// Cleanup removes what a lost process left on the host: hot-added disks and
// temporary state. It is for a worker that has not opened a disk.
func (p *Process) Cleanup(ctx context.Context, r OpenRequest) (cleaned, remaining uint32, err error) {
	panic("not implemented")
}

// EndAccess undoes the PrepareForAccess of a lost process. It is for a worker
// that has not opened a disk.
func (p *Process) EndAccess(ctx context.Context, r OpenRequest) error { panic("not implemented") }

// Close waits for requests in flight, closes the disk, disconnects, ends the
// access prepared, ends the library and waits for the process. When ctx ends
// before that, the process is killed. The error is the first of these steps'.
func (p *Process) Close(ctx context.Context) error { panic("not implemented") }

// Kill ends the process at once and waits for it. After its end it does nothing.
func (p *Process) Kill() { panic("not implemented") }

// Done is closed when the process has ended and was waited for.
func (p *Process) Done() <-chan struct{} { panic("not implemented") }

// Err says how the process ended, as a *GoneError; nil while it runs.
func (p *Process) Err() error { panic("not implemented") }

// Release kills the process if it runs and gives the slots' memory back. No
// slot may be in use; no other method may be called afterwards, except Err.
func (p *Process) Release() { panic("not implemented") }
