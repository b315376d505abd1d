// Package sink defines what vddkcp writes to: a [Disk]. A Create function of a
// format (or sink/open, which knows all formats) returns a Disk. The caller writes
// the disk in ascending order, and may make checkpoints between writes. It then
// calls Finish, which makes the disk complete and durable, and Publish, which gives
// the disk its final name.
package sink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// ErrLost says that the connection to the target is lost. Data that the target
// acknowledged but had not made durable may be lost as well. The caller opens the
// target again with the state of the last checkpoint and continues from there.
var ErrLost error = lostError{}

type lostError struct{}

func (lostError) Error() string {
	return "connection to the target lost: data that was not made durable may be lost"
}

// Transient returns true, because a retry may succeed after ErrLost: the server may
// accept a new connection later.
func (lostError) Transient() bool { return true }

// ErrElsewhere is wrapped by an error of Publish. It says that the target is
// complete and durable under its final name, but not at the requested path, for
// example because the folder of the target was moved. There is nothing to resume.
var ErrElsewhere = errors.New("the target is complete, but not at the requested path")

// ErrUnsynced is wrapped by an error of Publish. It says that the target is
// complete under its final name, but that a crash of the machine may still undo the
// renaming. There is nothing to resume.
var ErrUnsynced = errors.New("the target is complete and has its final name, but may not survive a crash")

// ErrClosed is the error of every method that is called after Publish, Suspend or
// Abort has ended the Disk. Only Abort does not return it.
var ErrClosed = errors.New("the target is closed")

// ErrUnfit says that a copy cannot be resumed, because the target or an option
// does not match Options.State and Options.Resume. A retry with the same values
// fails again.
var ErrUnfit = errors.New("the target does not match the checkpoint")

// Unfit returns an error with the text of err that wraps both err and ErrUnfit.
func Unfit(err error) error { return &unfitError{err} }

type unfitError struct{ error }

func (e *unfitError) Unwrap() []error { return []error{e.error, ErrUnfit} }

// Disk is a virtual disk that is being written. Its methods are called one at a
// time, and its ranges are written in ascending order. The caller may leave out
// ranges of zeros only if the disk is Zeroed. A disk that is Parallel takes calls
// in any order. A Disk ends with one call of Publish, Suspend or Abort. Callers
// defer Abort, which does nothing after the disk has ended. After one method has
// returned an error, every method fails, except Suspend and Abort.
//
// All calls fail after the end of the context with which the Disk was created.
type Disk interface {
	// WriteAt writes p at the given offset. Offsets and lengths must be
	// multiples of Unit, except at the end of the disk.
	io.WriterAt
	// ZeroAt makes [off, off+n) read as zeros. The rules of WriteAt apply.
	ZeroAt(ctx context.Context, off, n int64) error
	// SameAt makes [off, off+n) read as the same range of the backing disk. It fails
	// if the disk has no backing disk.
	SameAt(ctx context.Context, off, n int64) error
	// Unit returns the alignment of writes in bytes, a power of two. The
	// result 1 means that any alignment is allowed.
	Unit() int64
	// Checkpoint starts a checkpoint at the given offset. Unless the disk is Parallel,
	// no other method may run at the same time. With a Parallel disk, Checkpoint is
	// called when all writes below the given offset have returned, while writes above
	// it may still run.
	//
	// Checkpoint writes the metadata for everything below the given offset. It returns
	// the value for Options.State, with which a later run resumes, and a function that
	// makes the checkpoint durable. This function may run concurrently with later
	// calls of the disk.
	Checkpoint(off int64) (state []byte, sync func(context.Context) error, err error)
	// Finish makes the disk whole and durable, but not yet under its final name.
	Finish(ctx context.Context) error
	// Publish gives the disk its final name, durably. It is called after Finish.
	Publish(ctx context.Context) error
	// Suspend closes the disk and keeps its data, for a later run that resumes.
	Suspend() error
	// Abort closes the disk and removes everything that this run made.
	Abort() error
}

// Options are common to the Create functions of all formats. These functions take
// an address and a size as well. The zero value creates a new disk.
type Options struct {
	Info    source.Info // description of the source, for formats that record it
	Backing source.Disk // the disk that SameAt refers to; nil: none
	State   []byte      // state of the last checkpoint, to resume a target; nil creates a new one
	// Identity is the identity (see Identified) of the block device or NBD export that
	// an earlier run wrote to. If the target has a different identity, Create returns
	// an *OtherError before it changes anything. An empty Identity allows any target.
	// Identity has no effect if the target is a new file.
	Identity string
	Resume   int64 // offset in bytes: below it the target is complete, above it the content is undefined
}

// Identified is the ability to identify the file, device or export that is written.
type Identified interface {
	// Identity returns a string that is different for every target, even for two
	// targets that have the same name at different times. It returns "" if the target
	// has nothing that identifies it. It must be called before the disk ends.
	Identity() (string, error)
}

// OtherError says that an earlier run wrote to another block device or export. Name
// is the name of the present target.
type OtherError struct {
	Name    string
	Is, Was string // the identities now and in the earlier run
}

func (e *OtherError) Error() string {
	return fmt.Sprintf("%s is not the target of the copy that stopped: it is %s, but the target of that copy was %s", e.Name, e.Is, e.Was)
}

// CheckIdentity returns an *OtherError if Options.Identity is set and differs from
// the identity of the present target. The parameters are the name and the identity
// of this target.
func (o Options) CheckIdentity(name, identity string) error {
	if o.Identity == "" || o.Identity == identity {
		return nil
	}
	return &OtherError{name, identity, o.Identity}
}

// CheckResume returns an error if a target cannot be resumed with these options. It is for
// targets whose checkpoints record the same state at every offset. The parameter size is the
// size of the disk in bytes, or UnknownSize, which allows every offset. The parameter state is
// what a checkpoint of this target records. If Options.State differs from it, the error wraps
// ErrUnfit.
func (o Options) CheckResume(size int64, state []byte) error {
	switch {
	case o.Resume < 0 || size != UnknownSize && (size < 0 || o.Resume > size):
		return fmt.Errorf("cannot resume at offset %d: want an offset from 0 to the end of the disk, which has %d bytes", o.Resume, size)
	case o.State == nil && o.Resume > 0:
		return fmt.Errorf("cannot resume at offset %d: the state of the checkpoint is missing (sink.Options.State is nil)", o.Resume)
	case o.State != nil && string(o.State) != string(state):
		return Unfit(fmt.Errorf("cannot resume: the checkpoint was made for another target: it records %q, want %q (format of the target, and size of the disk in bytes)", o.State, state))
	}
	return nil
}

// IdentityOf returns the identity of d, or "" if d is not Identified.
func IdentityOf(d Disk) (string, error) {
	i, ok := Ability[Identified](d)
	if !ok {
		return "", nil
	}
	return i.Identity()
}

// Parallel is the ability to take calls in any order, and as many as
// MaxParallel of them at the same time.
type Parallel interface {
	MaxParallel() int // at least 1
}

// Connected is the ability to report the number of connections to the target. With
// n connections, a caller should make n times as many concurrent calls as with one
// connection, to keep all of them busy.
type Connected interface{ Connections() int }

// Zeroed is the ability to report that unwritten ranges read as zeros, so that
// callers need not call ZeroAt.
type Zeroed interface {
	// ZeroedFrom reports whether all unwritten ranges at or after the given
	// offset read as zeros. If the disk was resumed, the result may be false
	// even for offsets after Options.Resume.
	ZeroedFrom(off int64) bool
}

// UnknownSize is the size with which a Sizer is created for a disk whose size is
// not known yet.
const UnknownSize = -1

// Sizer is the ability to be created with UnknownSize and to get the size later.
type Sizer interface {
	// SetSize sets the size of the disk in bytes. If the disk was created with
	// UnknownSize, SetSize is called once, after the last write and before Finish.
	SetSize(n int64) error
}

// Verifiable is the ability to read the whole disk back.
type Verifiable interface {
	// Reopen opens the disk for reading between Finish and Publish. Where possible,
	// it reads from the device and not from the page cache.
	Reopen(ctx context.Context) (source.Disk, error)
}

// Readback is the ability to read data back before Finish is called, up to the
// offset of the last checkpoint. A resumed copy uses it to check that the target
// still has the data of the earlier run.
type Readback interface{ io.ReaderAt }

// Cloner is the ability to share blocks with a local file instead of writing
// data.
type Cloner interface {
	// CloneUnit returns the alignment, in bytes, that positions, offsets and
	// lengths must have for sharing blocks with the file f. It returns 0 if
	// the disk cannot share blocks with f.
	CloneUnit(f *os.File) int64
	// CloneFrom makes [off, off+n) of the disk share blocks with the n bytes of the
	// file f that begin at the position pos. The rules of WriteAt apply. If blocks
	// cannot be shared, for example because f is in another file system, the error
	// wraps errors.ErrUnsupported. Then nothing has changed, and further calls of the
	// disk may succeed.
	CloneFrom(f *os.File, pos, off, n int64) error
}

// Encoder is the ability to take pieces of the disk that are already encoded,
// for example compressed. Many goroutines can then encode such pieces for one
// sequential sink. A piece is called a unit and has as many bytes as the method
// Unit returns. Units that are neither zeros nor equal to the backing disk are
// passed to Place instead of WriteAt.
type Encoder interface {
	// NewEncoding returns an Encoding for one goroutine, or nil if this sink stores
	// units without encoding them. In that case the caller uses WriteAt.
	NewEncoding() Encoding
	// Place stores the unit that lies at the given offset of the disk. Calls of Place,
	// ZeroAt and SameAt are made in ascending order. If the parameter plain is true,
	// enc is the unit itself. If plain is false, enc is what Encoding.Encode has
	// appended, at least one byte. Place does not use enc after it has returned.
	Place(off int64, enc []byte, plain bool) error
}

// Encoding encodes one unit at a time. It is not safe for concurrent use.
type Encoding interface {
	// Encode appends the encoded form of a unit to the slice dst. The parameter
	// off is the offset of the unit in the disk. The unit at the end of the
	// disk may be shorter than the others. The encoded form may have any
	// length.
	//
	// In two cases Encode appends nothing and returns dst unchanged. If the encoded
	// form would not be smaller than the unit, the result plain is true, and the unit
	// must be stored as it is. If the backing disk has the same content, the result
	// plain is false, and the caller calls SameAt instead of Place.
	Encode(dst, unit []byte, off int64) (enc []byte, plain bool, err error)
}

// Ability returns d as a T if d implements T. Callers use this function, and not a
// type assertion, to find out whether a disk has an ability.
func Ability[T any](d Disk) (T, bool) {
	t, ok := d.(T)
	return t, ok
}
