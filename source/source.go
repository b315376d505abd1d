// Package source defines the disks that vddkcp reads from.
//
// A [Disk] has a fixed size, can be read at any offset, and reports which of its ranges
// are allocated. A local file, a chain of VMDK files, an NBD server and a disk on an
// ESXi host are all Disks. Package source/open turns an address into a Disk. [Covered]
// lists the extents of a Disk and checks them; every caller that acts on extents uses
// it. [Retry] wraps the opening of a Disk so that failed calls are repeated.
//
// An ability is a small interface, such as [Identified] or [Writable], that only some
// disks implement. A caller requests it with [Ability] before the first read. Without
// the ability a caller must work too, more slowly and with the same bytes.
//
// Package source/sourcetest has a test suite that every implementation of Disk must
// pass.
package source

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
)

// Disk is a virtual disk that can be read. It depends on the context that it was opened
// with: when that context ends, blocked calls and later calls return the cause of its
// end within a second. All methods are safe for concurrent use.
type Disk interface {
	// ReadAt reads len(p) bytes at any offset and alignment, and follows io.ReaderAt.
	// It returns fewer bytes only together with an error. The error is io.EOF if the
	// range passes Size; after any other error the content of p is undefined.
	io.ReaderAt
	// Close waits for calls in progress and releases the disk.
	io.Closer
	// Size returns the virtual size of the disk in bytes. It never changes.
	Size() int64
	// Extents yields the allocation of [off, off+length), which must lie in the disk.
	// The extents are ascending and not empty, and cover the range without gaps or
	// overlaps. Extents is lazy and uses a bounded amount of memory. If the allocation
	// cannot be determined, the range is yielded as Data. An error means that the disk
	// cannot be read, and ends the iteration.
	Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error]
}

// Extent is a range of a disk whose content is all of one kind. Off and Len are in
// bytes.
type Extent struct {
	Off, Len int64
	Kind     Kind
	// Depth is the number of the image in the chain that has the range: 0 for this
	// image, 1 for its parent, and so on. If no image has it, Depth is the number of
	// the last one.
	Depth int
	// Absent reports that no image of the chain has the range, which is "present":
	// false in the output of qemu-img map. A Zero extent that is not Absent is an
	// explicit zero cluster or grain.
	Absent bool
}

// End returns the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Kind says how the content of an extent is known.
type Kind uint8

const (
	// Data means that the extent must be read. Data is the zero value, so that a
	// forgotten field costs time and never content.
	Data Kind = iota
	// Zero means that the extent reads as zeros, so that it need not be read.
	Zero
	// Inherited means that this image of a chain has no content of its own here, so
	// that the content is that of its parent. Only a disk that was opened without its
	// parents has such extents.
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

// Opener opens a file that an image refers to: an extent, a parent, a backing file or a
// data file. from is the path of the image, name is the reference as the image spells
// it, and format is "raw", "vmdk" or "qcow2"; if format is empty, the Opener detects
// it. The Opener decides which places images may refer to.
type Opener func(ctx context.Context, from, name, format string) (Disk, error)

// Allocator is the ability to provide buffers that ReadAt fills without copying. ReadAt
// also accepts any other buffer, and is then slower.
type Allocator interface {
	// Buffer returns n bytes. It blocks until they are available or ctx ends. The bytes
	// stay valid until free is called, even after Close.
	Buffer(ctx context.Context, n int) (b []byte, free func(), err error)
}

// Identified is the ability to name the disk and the state that it is in.
type Identified interface {
	// Identity returns a string that differs for another disk and, as far as proof
	// says, for another content. proof is "snapshot" if the content cannot change,
	// "mtime" if a change shows in the modification time of a file, or "none" if
	// nothing shows a change.
	Identity(ctx context.Context) (id, proof string, err error)
}

// Described is the ability to describe the image: its format, its parts and the files
// that it consists of.
type Described interface {
	Info() Info
}

// Info describes an image. A field is zero if the format does not have it.
type Info struct {
	Format, Subformat, AdapterType, HWVersion, ToolsVersion, UUID, CID string

	LogicalSector, ClusterSize, Allocated int64    // bytes
	GuestSector, GuestPhysical            int64    // logical and physical sector size recorded for the guest, bytes
	Geometry                              [3]int64 // cylinders, heads, sectors
	Chain                                 []string // paths of this image, its parent, and so on
	Parts                                 []Part   // in the order of the disk; nil if the image is a single file
}

// Part is a range of a disk as the descriptor of an image lists it, and the file that
// holds the range.
type Part struct {
	Kind   string // in the words of the format: "FLAT", "SPARSE", "ZERO" and so on
	Size   int64  // bytes of the disk; each part begins where the previous one ends
	Path   string // of the file; empty if no file holds the part
	Offset int64  // of the part in the file, in bytes; 0 if the file has tables of its own
}

// InFile is the ability to say where in a local file the bytes of the disk lie,
// uncompressed and unencrypted.
type InFile interface {
	// InFile returns the file that holds the byte at off, the position of that byte in
	// the file, and the number n of bytes for which this holds; n is greater than 0.
	// The caller may read the file but must not close it. The file stays open until the
	// disk is closed. ok is false if no local file has the byte.
	InFile(off int64) (f *os.File, pos, n int64, ok bool)
}

// Uncached is the ability to read without filling the page cache of this host.
type Uncached interface {
	// ReadUncached makes all later reads uncached. Pages that are in the cache already
	// may stay there. It must be called before the first read.
	ReadUncached()
}

// ZeroFlags change how [Writable.ZeroAt] makes a range read as zeros. The zero
// value keeps the range allocated and takes as long as writing may take.
type ZeroFlags uint8

const (
	// MayTrim allows the disk to deallocate the range.
	MayTrim ZeroFlags = 1 << iota
	// FastOnly makes ZeroAt return errors.ErrUnsupported if it would not be faster than
	// writing zeros. A part of the range may have been zeroed by then.
	FastOnly
)

// Has reports whether all of the flags in f are set.
func (flags ZeroFlags) Has(f ZeroFlags) bool { return flags&f == f }

// Writable is the ability to write to the disk, so that it can be served read-write.
// Flush makes those writes durable that returned before Flush was called. After a
// failed Flush, every later Flush fails until the disk is opened again.
type Writable interface {
	io.WriterAt
	// ZeroAt makes the n bytes from off on read as zeros.
	ZeroAt(ctx context.Context, off, n int64, flags ZeroFlags) error
	// Trim allows the disk to deallocate the n bytes from off on. Their content is
	// undefined afterwards.
	Trim(ctx context.Context, off, n int64) error
	// Flush makes the writes durable that returned before Flush was called.
	Flush(ctx context.Context) error
}

// Counted is the ability to report statistics. Disks that have it repeat failed calls
// by themselves.
type Counted interface{ Stats() Stats }

// Ender is the ability of a disk to end by itself: it gave up repeating failed calls,
// or found that it is no longer the disk that was opened.
type Ender interface {
	// Ended returns why no later call on the disk can succeed, or nil.
	Ended() error
}

// Stats are the statistics of a disk. A field that does not apply is zero.
type Stats struct {
	Transport     string // "file", "nbd", or VDDK's transport mode
	Library       string // version of VDDK
	Connections   int    // number that is in use
	Most          int    // number of connections that may be used later
	Retries       int64  // number of repeated calls
	Reopenings    int64  // number of openings after the first one, including failed ones
	Restarts      int64  // number of worker processes that were replaced
	ExtentsSource string // "query" or "full" if the disk knows it; empty: derive it from the extents
}

// Wrapper is implemented by a Disk that wraps another one without changing its bytes or
// its lifetime, for example to log, limit or count its calls.
type Wrapper interface{ Unwrap() Disk }

// Ability returns d as a T if d, or a disk that it wraps, implements T. All code
// requests abilities here and never with a type assertion, so that wrapped disks keep
// theirs.
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
