// Package source defines what vddkcp reads from: a Disk of a known size, whose
// content can be read at any offset and whose allocation can be asked for.
//
// A local file, a VMDK chain, an NBD server and a disk on an ESXi host are all
// Disks. Whatever only some of them can do is an optional ability, a small
// interface of its own that is asked for with [Ability] before the first byte
// is read. An ability is always a permission: where it is missing the caller
// takes the slower way and the bytes are the same.
package source

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
)

// Disk is a virtual disk that can be read. It lives under the context that it
// was opened with: when that ends, blocked and later calls return its cause
// within a second. All methods are safe for concurrent use.
type Disk interface {
	// ReadAt reads len(p) bytes at any offset and alignment, and follows
	// io.ReaderAt: it returns io.EOF only for what lies at or past Size, and
	// leaves p undefined after any other error. It never returns fewer bytes
	// than asked for without an error.
	io.ReaderAt
	// Close releases the disk after waiting for calls in progress.
	io.Closer
	// Size is the disk's virtual size in bytes. It never changes.
	Size() int64
	// Extents yields the allocation of [off, off+length), which must lie in
	// the disk: ascending, touching, non-empty extents that cover the range
	// exactly. It is lazy and uses bounded memory. A query for the allocation
	// that fails yields Data, not an error; an error means that the disk
	// itself can't be read, and ends the iteration.
	Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error]
}

// Extent is a range of a disk, in bytes, whose content is of one kind.
type Extent struct {
	Off, Len int64
	Kind     Kind
	// Depth is the allocation depth: 0 when this image has the range, 1 when
	// its parent has it, and so on; the last image where none has it.
	Depth int
	// Absent says that no image of the chain has the range ("present": false
	// in qemu-img's map). A Zero extent that is not Absent is an explicit zero
	// cluster or grain.
	Absent bool
}

// End is the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Kind tells how the content of an extent is known.
type Kind uint8

const (
	// Data must be read to be known. It is the zero value, so that a forgotten
	// field costs time and never content.
	Data Kind = iota
	// Zero reads as zeros.
	Zero
	// Inherited means that this link of a chain of images has no content of
	// its own here: the content is that of the parent, or is unchanged since
	// the base.
	Inherited
)

func (k Kind) String() string {
	switch k {
	case Data:
		return "data"
	case Zero:
		return "zero"
	case Inherited:
		return "same"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Opener opens a file that an image names: an extent, a parent, a backing or a
// data file. From is the path of the image that names it, name is the
// reference as it is written there, and format is "raw", "vmdk" and so on, or
// empty to probe. The Opener decides which places may be named at all.
type Opener func(ctx context.Context, from, name, format string) (Disk, error)

// Allocator is the ability to hand out memory that ReadAt fills without a
// copy. Any other memory works too, more slowly.
type Allocator interface {
	// Buffer returns n bytes, blocking until they are free or ctx ends. They
	// stay valid until free is called, also after Close.
	Buffer(ctx context.Context, n int) (b []byte, free func(), err error)
}

// Identified is the ability to say which disk, in which state, this is.
type Identified interface {
	// Identity returns a string that differs when the disk or its content is
	// another, and by what it is proved: "snapshot" (immutable), "mtime" (file
	// identity and modification time) or "none".
	Identity(ctx context.Context) (id, proof string, err error)
}

// Described is the ability to tell about the image beside its bytes.
type Described interface {
	Info() Info
}

// Info describes an image. A field that the format does not have is zero.
type Info struct {
	Format, Subformat, AdapterType, HWVersion, ToolsVersion, UUID, CID string

	LogicalSector, ClusterSize, Allocated int64    // bytes
	GuestSector, GuestPhysical            int64    // logical and physical sector size that the image records for its guest, bytes; 0: not recorded
	Geometry                              [3]int64 // cylinders, heads, sectors
	Chain                                 []string // paths, this image first
	Parts                                 []Part   // of this image, in order; nil: the one file is all
}

// Part is a stretch of a disk as an image's descriptor gives it, and the file
// that holds it.
type Part struct {
	Kind   string // as the format calls it: "FLAT", "SPARSE", "ZERO" and so on
	Size   int64  // of the disk, bytes; each part begins where the one before ends
	Path   string // "" where no file holds it
	Offset int64  // of the part in the file, bytes; 0 where the file has tables of its own
}

// InFile is the ability to say where plain bytes of the disk lie in a local
// file.
type InFile interface {
	// InFile returns the file and the position in it of the byte at off, and
	// for how many bytes (n > 0) that stays true. The file is for reading, is
	// not to be closed, and is valid until the disk is closed.
	InFile(off int64) (f *os.File, pos, n int64, ok bool)
}

// Uncached is the ability to read without leaving what is read in the page
// cache of this host.
type Uncached interface {
	// ReadUncached makes all later reads uncached. Pages that were in the
	// cache before stay there. It is called before the first read.
	ReadUncached()
}

// ZeroFlags change how [Writable.ZeroAt] makes a range read as zeros. The zero
// value keeps the range allocated and takes as long as writing may take.
type ZeroFlags uint8

const (
	// MayTrim allows the disk to deallocate the range.
	MayTrim ZeroFlags = 1 << iota
	// FastOnly makes ZeroAt return errors.ErrUnsupported, with the range
	// unchanged, when it would not be faster than writing zeros.
	FastOnly
)

// Has reports whether all of the flags in f are set.
func (flags ZeroFlags) Has(f ZeroFlags) bool { return flags&f == f }

// Writable is the ability to write to the disk, for serving it read-write.
// Flush covers the writes that returned before it was called; an error of it
// stays until the disk is opened again.
type Writable interface {
	io.WriterAt
	// ZeroAt makes the n bytes from off on read as zeros.
	ZeroAt(ctx context.Context, off, n int64, flags ZeroFlags) error
	Trim(ctx context.Context, off, n int64) error
	Flush(ctx context.Context) error
}

// Counted is the ability to tell how the disk has been read so far, for the
// report. A disk that has it repeats what fails.
type Counted interface{ Stats() Stats }

// Ender is the ability to say that a disk has ended by itself: it gave up, or is
// not the one any more that was opened.
type Ender interface {
	// Ended returns why no later call on the disk can succeed, or nil.
	Ended() error
}

// Stats is what a disk counts. A field that does not apply is zero.
type Stats struct {
	Transport     string // "file", "nbd", or VDDK's transport mode
	Library       string // the version of VDDK
	Connections   int    // that reading settled on
	Most          int    // connections that it may come to use
	Retries       int64  // calls that were made once more
	Reopenings    int64  // openings after the first, failed ones too
	Restarts      int64  // worker processes that were replaced
	ExtentsSource string // "query" or "full" where the disk knows better than its extents tell
}

// Wrapper is implemented by a Disk around another one that changes neither its
// bytes nor its lifetime (one that logs, limits or counts).
type Wrapper interface{ Unwrap() Disk }

// Ability returns d as a T, where d or a disk that it wraps is one. It is the
// only place that asks for an ability.
func Ability[T any](d Disk) (T, bool) {
	for {
		if t, ok := d.(T); ok {
			return t, true
		}
		w, ok := d.(Wrapper)
		if !ok {
			var none T
			return none, false
		}
		d = w.Unwrap()
	}
}
