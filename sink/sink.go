// Package sink defines what vddkcp writes to: a Disk that is filled in
// ascending order, checkpointed on the way, and published under its final
// name only when it is whole and durable.
package sink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// ErrLost says that the connection to the target is gone, and with it perhaps
// what was acknowledged and not yet synced. The caller opens the sink again
// with the state of the last checkpoint and goes on from there.
var ErrLost error = lostError{}

type lostError struct{}

func (lostError) Error() string {
	return "connection to the target lost: what was not synced may be gone"
}

// Transient tells transfer/report that the target may be there again later.
func (lostError) Transient() bool { return true }

// ErrElsewhere is wrapped by an error of Publish after which the target is whole,
// durable and has its final name, but not at the path that was asked for. There is
// nothing to go on with.
var ErrElsewhere = errors.New("the target is whole, but not where it should be")

// ErrUnsynced is wrapped by an error of Publish after which the target is whole and
// has its final name, which may not survive a crash. There is nothing to go on with.
var ErrUnsynced = errors.New("the target is whole and in its place, but may not survive a crash")

// ErrClosed is what every call on a Disk returns that has ended, Abort aside.
var ErrClosed = errors.New("the target is closed")

// ErrUnfit says that a target or an option does not fit Options.State and
// Options.Resume: no later call with the same ones succeeds either.
var ErrUnfit = errors.New("the target does not fit the checkpoint")

// Unfit marks an error as an ErrUnfit, and keeps its text.
func Unfit(err error) error { return &unfitError{err} }

type unfitError struct{ error }

func (e *unfitError) Unwrap() []error { return []error{e.error, ErrUnfit} }

// Disk is a virtual disk that is being written. It gets its calls one at a
// time, with ascending and touching ranges, unless it is Parallel. It ends
// with one of Publish, Suspend and Abort; callers defer Abort, which does
// nothing after one of the others. After an error every call fails but Suspend and
// Abort.
//
// Like a source.Disk it lives under the context that it was created with.
type Disk interface {
	// WriteAt writes multiples of Unit at multiples of Unit, but for the end
	// of the disk.
	io.WriterAt
	// ZeroAt makes [off, off+n) read as zeros, by the same rules.
	ZeroAt(ctx context.Context, off, n int64) error
	// SameAt leaves [off, off+n) to the backing; an error where there is none.
	SameAt(ctx context.Context, off, n int64) error
	// Unit is a power of two, in bytes; 1 means any.
	Unit() int64
	// Checkpoint is called between two calls; when the sink is Parallel, as
	// soon as all below off have returned, while others may run. It writes the
	// metadata for what lies below off, and returns what Options.State needs
	// and the function that makes it durable, which may run beside later calls.
	Checkpoint(off int64) (state []byte, sync func(context.Context) error, err error)
	// Finish makes the disk whole and durable, not yet under its final name.
	Finish(ctx context.Context) error
	// Publish gives it its final name, durably. It follows Finish.
	Publish(ctx context.Context) error
	// Suspend closes the sink and keeps what was written, for a later run.
	Suspend() error
	// Abort closes the sink and removes what this run made.
	Abort() error
}

// Options are what every format's Create takes beside an address and a size.
// The zero value creates a new disk.
type Options struct {
	Info    source.Info // of the source, for formats that carry it over
	Backing source.Disk // what SameAt leaves to; nil: none
	State   []byte      // of the last checkpoint; nil: new
	// Identity is what Identified returned for the target that an earlier run
	// wrote in place, a block device or an export: Create returns an *OtherError
	// for another one, before it changes anything. Empty: any. New files have
	// their own rules.
	Identity string
	Resume   int64 // bytes below are done; above lies garbage, never taken for zeros
}

// Identified is the ability to say which file, device or export is written.
type Identified interface {
	// Identity returns a string that no other target has, also if that gets
	// the same name later; "" where nothing tells them apart. It is called
	// before the disk ends.
	Identity() (string, error)
}

// OtherError says that a target that is written in place is not the one that an
// earlier run wrote.
type OtherError struct {
	Name    string
	Is, Was string // their identities
}

func (e *OtherError) Error() string {
	return fmt.Sprintf("%s is another target than that of the copy that stopped: it is %s, and was %s", e.Name, e.Is, e.Was)
}

// CheckIdentity returns an *OtherError unless a target that is written in place
// has the identity that Options ask for.
func (o Options) CheckIdentity(name, identity string) error {
	if o.Identity == "" || o.Identity == identity {
		return nil
	}
	return &OtherError{name, identity, o.Identity}
}

// IdentityOf returns the identity of d, "" where it is not Identified.
func IdentityOf(d Disk) (string, error) {
	i, ok := Ability[Identified](d)
	if !ok {
		return "", nil
	}
	return i.Identity()
}

// Parallel is the ability to take calls concurrently and in any order.
type Parallel interface {
	MaxParallel() int // at least 1
}

// Connected is the ability to tell over how many connections the target is
// written: so many times the requests of one are worth having in flight.
type Connected interface{ Connections() int }

// Zeroed is the ability to tell that ZeroAt has nothing to do.
type Zeroed interface {
	// ZeroedFrom says whether everything at or above off that was not written
	// reads as zeros. False after a resume, above Options.Resume.
	ZeroedFrom(off int64) bool
}

// UnknownSize is the size to create a Sizer with, when what it will hold comes
// as a stream.
const UnknownSize = -1

// Sizer is the ability to be created with UnknownSize.
type Sizer interface {
	// SetSize says how long the disk is, in bytes. It is called once, after
	// the last write and before Finish, where the size was unknown.
	SetSize(n int64) error
}

// Verifiable is the ability to read back what was written.
type Verifiable interface {
	// Reopen is called between Finish and Publish. It reads past the page
	// cache where it can.
	Reopen(ctx context.Context) (source.Disk, error)
}

// Readback is the ability to read back what was written below the last
// checkpoint, before Finish: so that a resumed copy can see whether it is there.
type Readback interface{ io.ReaderAt }

// Cloner is the ability to share blocks with a local file instead of writing.
type Cloner interface {
	// CloneUnit is what positions, offsets and lengths must be multiples of,
	// in bytes, for blocks to be shared with f; 0: they can't be.
	CloneUnit(f *os.File) int64
	// CloneFrom makes [off, off+n) share its blocks with f from pos on, by the
	// rules of WriteAt. It returns an error that is errors.ErrUnsupported where
	// the ranges can't be shared (other file systems, alignment): nothing
	// changed, and the disk takes further calls.
	CloneFrom(f *os.File, pos, off, n int64) error
}

// Encoder is the ability to take units already encoded, so that many
// goroutines can encode for one ordered sink. Units that are neither zero nor
// the backing's go through it instead of WriteAt.
type Encoder interface {
	// NewEncoding returns an Encoding for one goroutine, or nil where this sink
	// stores units as they are: then they go through WriteAt.
	NewEncoding() Encoding
	// Place takes the result of Encode for the unit at off, in order with
	// ZeroAt and SameAt: what Encode appended, at least a byte, or the unit
	// itself, which is then plain. It does not keep enc.
	Place(off int64, enc []byte, plain bool) error
}

// Encoding encodes one unit at a time. It is for one goroutine.
type Encoding interface {
	// Encode appends the encoded unit, which lies at off in the disk, to dst,
	// which has no size that it must keep to. Dst is returned as it came where
	// the unit is plain, since it did not shrink, and where it is not: then the
	// backing has the same, and SameAt takes it instead of Place. The unit is
	// of Unit bytes, but for one at the end of the disk.
	Encode(dst, unit []byte, off int64) (enc []byte, plain bool, err error)
}

// Ability returns d as a T where it is one. It is the only place that asks.
func Ability[T any](d Disk) (T, bool) {
	t, ok := d.(T)
	return t, ok
}
