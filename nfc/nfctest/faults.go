package nfctest

import (
	"fmt"
	"slices"
	"sync"
)

// Step is a step of the dialogue with a host.
type Step string

// The steps. A fault at a step happens when the host is about to answer there.
const (
	StepConnect       Step = "connect"    // a connection was accepted
	StepBanner        Step = "banner"     // the greeting
	StepTLS           Step = "tls"        // the client has begun the first TLS session
	StepSession       Step = "session"    // the answer to "BANNER "
	StepThumbprint    Step = "thumbprint" // the answer to THUMBPRINT_SHA2
	StepProxy         Step = "proxy"      // the answer to PROXY
	StepSecondTLS     Step = "second tls" // the client has begun the second TLS session
	StepHandshake36   Step = "handshake 36"
	StepHandshake51   Step = "handshake 51"
	StepHandshake52   Step = "handshake 52"
	StepOpenSession   Step = "open session"
	StepSocketOptions Step = "socket options"
	StepResourcePool  Step = "resource pool"
	StepOpenFile      Step = "open file"
	StepDDB           Step = "ddb"
	StepRead          Step = "read"
	StepClose         Step = "close" // CLOSE_FILE and CLOSE_SESSION, which count separately
)

// Kind is what happens in place of the right answer.
type Kind int

// The kinds of faults. On panics if a kind is not possible at a step.
const (
	// Nothing lets the right answer be sent. It is for Fault.Do and Fault.Hold.
	Nothing Kind = iota

	// The following kinds are possible at every step.

	Drop    // a FIN in place of the answer
	Reset   // a RST in place of the answer
	Silence // no answer until the rule is released; Nothing with Hold is the same

	// The following kinds are possible at every step that has an answer.

	Cut   // half of the answer, then a FIN
	Stall // half of the answer, then no byte until the rule is released

	// The following kinds are about lines of text: banner, session, thumbprint, proxy.

	Line        // the answer is Fault.Text
	EndlessLine // a line that does not end

	// The following kinds are about the dialogue before the frames.

	WrongThumbprint  // thumbprint: the SHA-256 of another certificate
	CloseNotify      // proxy: the host ends the first TLS session with a close-notify after its answer
	OtherCertificate // tls, second tls: another certificate
	Number           // handshake 36, handshake 51: the message says Fault.Code in place of 1 or the version

	// The following kinds are possible in the handshake and in frames.

	EndOfSession // message 4 in place of the answer
	NFCError     // message 20, an error with Fault.Code and Fault.Text, in place of the answer
	HugeNFCError // message 20 whose text has 0xffffffff bytes by its header
	WrongType

	// The following kinds are possible in frames. An ERROR has Fault.Code and Fault.Text.

	ErrorAlone     // ERROR
	ErrorThenZeros // ERROR, then an answer of zeros without bytes that follow
	ErrorThenData  // ERROR, then the right answer
	ErrorTwice     // ERROR, then two answers of zeros
	NoMemory       // ERROR 5, "Failed to allocate the requested N bytes", then an answer of zeros
	HugeError      // ERROR whose text has 0xffffffff bytes by its header
	WrongMagic
	WrongOpID
	WrongSize // the size of the payload is four bytes more than it is
	HugeSize  // the size of the payload is 0xffffffff
	Status    // open file, read: the status is Fault.Code, without data
	HugeDDB   // ddb: the length of the text is 0xffffffff

	// The following kinds are about one fragment of a read, the one that Fault.Fragment says. The
	// other fragments are right.

	WrongOffset      // the offset is not that of the request
	WrongLength      // the length of the request is not the right one
	Overlap          // the fragment comes in two parts that have bytes in common
	Twice            // the fragment comes twice
	Beyond           // the fragment ends after the request
	ZeroLength       // an empty fragment comes before the right one
	WrongPacked      // the number of bytes that follow is 16 more than it is
	HugePacked       // the number of bytes that follow is 0xffffffff
	WrongCompression // a type of compression that was not asked for
	Missing          // the fragment does not come
	BrokenZlib       // a zlib stream with wrong bytes
	ShortZlib        // a zlib stream with less data than the fragment has
	Bomb             // a zlib stream with 16 MiB of zeros; SkipZ with a length of 0xfffffe00
	SkipZDescending  // the second run is before the first one
	SkipZOverlap     // the second run begins inside the first one
	SkipZBeyond      // a run ends after the fragment
	SkipZShort       // the bytes end inside a run
	SkipZCut         // the bytes end inside the head of a run
	SkipZHead        // the bytes end inside the first eight ones
	SkipZLength      // the first number is not the length of the fragment
	SkipZSecond      // the second number is not 0
	lastKind
)

// Fault says what a host does in place of the right answer.
type Fault struct {
	Step       Step
	Connection int // the n-th connection of the host; 0: each
	// Skip is the number of times that the step is left alone first, and Times the number of
	// times that the fault happens after that; 0: always.
	Skip, Times int
	// Where selects reads at StepRead; nil: all.
	Where func(r Read) bool

	Kind     Kind
	Hold     bool   // the fault waits until the rule is released
	Code     uint64 // of an error or a status; 0: 11. For Number: the number
	Text     string // of an error or a line
	Fragment int    // of a read: 0 is the first fragment
	Do       func() // is called first, by a goroutine of the host
}

// Rule is a fault that a host was given with On.
type Rule struct {
	Fault
	h *Host

	// The following fields are guarded by the mutex of the host.
	seen, hits int
	arrived    chan struct{}
	released   chan struct{}
	once       struct{ arrive, release sync.Once } // close the channels
}

// On makes a fault happen. If several rules match, the newest one counts.
func (h *Host) On(f Fault) *Rule {
	if !possible(f.Step, f.Kind) {
		panic(fmt.Sprintf("nfctest: the fault %d is not possible at step %q", f.Kind, f.Step))
	}
	if f.Kind == Silence {
		f.Kind, f.Hold = Nothing, true
	}
	if f.Code == 0 && f.Kind != Number {
		f.Code = 11
	}
	if f.Text == "" && f.Kind != Line {
		f.Text = "simulated error"
	}
	r := &Rule{Fault: f, h: h, arrived: make(chan struct{}), released: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = append(h.faults, r)
	h.rules.Store(int32(len(h.faults)))
	return r
}

// possible reports whether a kind of fault can happen at a step.
func possible(s Step, k Kind) bool {
	switch {
	case k < Nothing || k >= lastKind:
		return false
	case k <= Silence:
		return true
	case k == OtherCertificate:
		return s == StepTLS || s == StepSecondTLS
	}
	switch s {
	case StepTLS, StepSecondTLS:
		return k == Cut
	case StepBanner, StepSession, StepThumbprint, StepProxy:
		return k <= EndlessLine || k == WrongThumbprint && s == StepThumbprint || k == CloseNotify && s == StepProxy
	case StepHandshake36, StepHandshake51:
		return k <= Stall || k >= Number && k <= WrongType
	case StepHandshake52:
		return k <= Stall || k > Number && k <= WrongType
	case StepOpenSession, StepSocketOptions, StepResourcePool, StepOpenFile, StepDDB, StepClose:
		return k <= Stall || k > Number && k <= HugeSize || k == Status && s == StepOpenFile || k == HugeDDB && s == StepDDB
	case StepRead:
		return k <= Stall || k > Number && k != HugeDDB
	}
	return false // StepConnect, and steps that do not exist
}

// Arrived returns a channel that is closed when the fault has begun for the first time.
func (r *Rule) Arrived() <-chan struct{} { return r.arrived }

// Release lets the answers go on that the rule makes wait. None waits any more.
func (r *Rule) Release() { r.once.release.Do(func() { close(r.released) }) }

// Hits returns how often the fault has begun.
func (r *Rule) Hits() int {
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	return r.hits
}

// Remove ends the rule and releases the answers that wait.
func (r *Rule) Remove() {
	h := r.h
	h.mu.Lock()
	h.faults = slices.DeleteFunc(h.faults, func(o *Rule) bool { return o == r })
	h.rules.Store(int32(len(h.faults)))
	h.mu.Unlock()
	r.Release()
}

// ClearFaults ends all rules.
func (h *Host) ClearFaults() {
	h.mu.Lock()
	rules := slices.Clone(h.faults)
	h.mu.Unlock()
	for _, r := range rules {
		r.Remove()
	}
}

// fault returns the rule for a step of a connection; nil: none.
func (c *conn) fault(s Step, read Read) *Rule {
	if c.h.rules.Load() == 0 {
		return nil
	}
	r := c.findRule(s, read)
	if r == nil {
		return nil
	}
	c.logf("fault %d at step %q", r.Kind, s)
	if r.Do != nil {
		r.Do()
	}
	r.once.arrive.Do(func() { close(r.arrived) })
	return r
}

func (c *conn) findRule(s Step, read Read) *Rule {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	for _, r := range slices.Backward(c.h.faults) {
		if r.Step != s || r.Connection > 0 && r.Connection != c.n || r.Where != nil && s == StepRead && !r.Where(read) {
			continue
		}
		if r.seen++; r.seen <= r.Skip || r.Times > 0 && r.hits == r.Times {
			continue
		}
		r.hits++
		return r
	}
	return nil
}

// await waits until a rule is released. It returns an error if the connection ends first.
func (c *conn) await(r *Rule) error {
	select {
	case <-r.released:
		return nil
	case <-c.wire.gone:
	case <-c.h.closed:
	}
	return errEnded
}

// hold waits if a fault is to wait before it happens.
func (c *conn) hold(r *Rule) error {
	if r == nil || !r.Hold {
		return nil
	}
	return c.await(r)
}
