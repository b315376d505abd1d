// Package source defines the disks that vddkcp reads from.
//
// A [Disk] has a fixed size, can be read at any offset, and reports which of its ranges
// are allocated. A local file, a chain of VMDK files, an NBD server and a disk on an
// ESXi host are all Disks. Package source/open turns an address into a Disk. [Covered]
// lists the extents of a Disk and checks them; every caller that relies on extents uses
// it. [Retry] opens a Disk, and repeats calls of this Disk that fail.
//
// An ability is a small interface, such as [Identified] or [Writable], that only some
// disks implement. A caller requests it with [Ability] before the first read. Callers
// must also work with disks that lack the ability: they may be slower then, but must
// get the same bytes.
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

// Disk is a virtual disk that can be read. It depends on the context ctx that it was
// opened with: when ctx ends, calls that are blocked return the error
// context.Cause(ctx) within a second, and so do later calls. All methods are safe for
// concurrent use.
type Disk interface {
	// ReadAt reads len(p) bytes at any offset and alignment, and follows io.ReaderAt.
	// It returns fewer bytes only together with an error. The error is io.EOF if the
	// range passes Size; after any other error the content of p is undefined.
	io.ReaderAt
	// Close waits for calls in progress and releases the disk.
	io.Closer
	// Size returns the virtual size of the disk in bytes. It never changes.
	Size() int64
	// Extents yields the extents of [off, off+length), which must lie in the disk. They
	// say which parts of the range are allocated. They are ascending and not empty, and
	// cover the range without gaps or overlaps. Extents is lazy and uses a bounded
	// amount of memory. If it cannot be determined what is allocated, the range is
	// yielded as Data. An error means that the disk cannot be read, and ends the
	// iteration.
	Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error]
}

// Extent is a range of a disk whose content is all of one kind. Off and Len are in
// bytes.
type Extent struct {
	Off, Len int64
	Kind     Kind
	// Depth says which image of the chain has the range: 0 for this image, 1 for its
	// parent, and so on. If no image has the range, Depth is that of the last image in
	// the chain.
	Depth int
	// Absent reports that no image of the chain has the range. For such a range qemu-img
	// map prints "present": false. A Zero extent that is not Absent is a cluster or grain
	// that an image marks as zeros, or a hole in a file that holds data of the disk.
	Absent bool
}

// End returns the offset of the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Kind says how a caller gets the content of an extent: by reading it, without reading
// because it is zeros, or from the parent of the image.
type Kind uint8

const (
	// Data means that the extent must be read. Data is the zero value of Kind. If code
	// forgets to set the field, the extent is therefore read needlessly, and no content
	// is lost.
	Data Kind = iota
	// Zero means that the extent reads as zeros, so that it need not be read.
	Zero
	// Inherited means that the image that was opened does not have the range. The content
	// of the range is that of the parent of the image. Only a disk that was opened
	// without its parents has such extents.
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
// data file. The parameter from is the path of the image, and name is the name of the
// file as the image has it. format is "raw", "vmdk" or "qcow2". If format is empty, the
// Opener detects the format. The Opener decides which files an image may refer to, and
// returns an error for others.
type Opener func(ctx context.Context, from, name, format string) (Disk, error)

// Allocator is the ability to provide buffers into which ReadAt reads without copying.
// ReadAt also accepts other buffers, but is slower with them.
type Allocator interface {
	// Buffer returns n bytes. It blocks until they are available or ctx ends. The
	// caller must call free when it no longer needs the bytes. They stay valid until
	// then, even if the disk is closed.
	Buffer(ctx context.Context, n int) (b []byte, free func(), err error)
}

// Identified is the ability to name the disk and the state that it is in.
type Identified interface {
	// Identity returns an id, which differs between disks, and a proof, which says
	// whether the id also changes with the content. The proof is "snapshot" if the
	// content cannot change, "mtime" if the id has the modification time of a file, which
	// changes with the content, or "none" if the content can change while the id stays
	// the same.
	Identity(ctx context.Context) (id, proof string, err error)
}

// Described is the ability to describe the image: its format, its parts and the files
// that it consists of.
type Described interface {
	Info() Info
}

// Info describes an image. If the format of the image does not record a value, the
// field is zero.
type Info struct {
	Format, Subformat, AdapterType, HWVersion, ToolsVersion, UUID, CID string

	LogicalSector, ClusterSize, Allocated int64    // bytes
	GuestSector, GuestPhysical            int64    // logical and physical sector size recorded for the guest, bytes
	Geometry                              [3]int64 // cylinders, heads, sectors
	Chain                                 []string // paths of this image, its parent, and so on
	Parts                                 []Part   // in the order of the disk; nil if the image is a single file
}

// Part describes an entry in the descriptor of an image: a range of the disk, and the
// file that holds the range.
type Part struct {
	Kind   string // in the words of the format: "FLAT", "SPARSE", "ZERO" and so on
	Size   int64  // bytes of the disk; each part begins where the previous one ends
	Path   string // of the file; empty if no file holds the part
	Offset int64  // of the part in the file, in bytes; 0 if the file has tables of its own
}

// InFile is the ability to say where the bytes of the disk lie in a local file. The
// file must have the same bytes as the disk, neither compressed nor encrypted.
type InFile interface {
	// InFile returns the file that holds the byte at the given offset of the disk, and
	// the position pos of that byte in the file. The n bytes of the disk that begin with
	// that byte are contiguous in the file, and n is greater than 0. The caller may read
	// the file but must not close it. The file stays open until the disk is closed. The
	// result ok is false if no local file has the byte.
	InFile(off int64) (f *os.File, pos, n int64, ok bool)
}

// Uncached is the ability to read without filling the page cache of the machine on which
// the program runs.
type Uncached interface {
	// ReadUncached says that no later read should leave anything in the page cache.
	// Pages that are in the cache already may stay there. It must be called before the
	// first read.
	ReadUncached()
}

// ZeroFlags change how [Writable.ZeroAt] makes a range read as zeros. The zero value
// has no flag. The range then stays allocated, and ZeroAt may take as long as writing
// zeros.
type ZeroFlags uint8

const (
	// MayTrim allows the disk to deallocate the range.
	MayTrim ZeroFlags = 1 << iota
	// FastOnly makes ZeroAt return errors.ErrUnsupported if it would not be faster than
	// writing zeros. When it returns this error, a part of the range may have been
	// zeroed.
	FastOnly
)

// Has reports whether all flags that are set in f are also set in the receiver.
func (flags ZeroFlags) Has(f ZeroFlags) bool { return flags&f == f }

// Writable is the ability to write to the disk, so that it can be served read-write.
type Writable interface {
	io.WriterAt
	// ZeroAt makes n bytes, beginning at the given offset, read as zeros.
	ZeroAt(ctx context.Context, off, n int64, flags ZeroFlags) error
	// Trim allows the disk to deallocate n bytes, beginning at the given offset. Their
	// content is undefined afterwards.
	Trim(ctx context.Context, off, n int64) error
	// Flush makes those writes durable that returned before Flush was called. After a
	// failed Flush, every later Flush fails until the disk is opened again.
	Flush(ctx context.Context) error
}

// Counted is the ability to report statistics, such as the number of repeated calls. A
// disk with this ability repeats failed calls itself.
type Counted interface{ Stats() Stats }

// Ender is the ability of a disk to report that it has ended before it was closed. A
// disk ends when it stops repeating failed calls, or when it finds that another disk
// has taken its place or that its content has changed.
type Ender interface {
	// Ended returns nil if the disk can still be used. Otherwise it returns the reason
	// why no later call of the disk can succeed.
	Ended() error
}

// Rereadable is the ability of a disk whose protocol is not known for certain. After a copy, some
// places of such a disk are read again and compared with the target.
type Rereadable interface {
	// OpenAgain opens the disk a second time, and reads it in another way than the disk itself:
	// where possible, without what may have gone wrong. The caller closes the result before the
	// disk.
	OpenAgain(ctx context.Context) (Disk, error)
}

// Stats are the statistics of a disk. A field that does not apply to the disk is zero.
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

// Wrapper is implemented by a Disk that wraps another Disk without changing its bytes or
// its lifetime, for example to log, limit or count its calls.
type Wrapper interface{ Unwrap() Disk }

// Ability returns d, or a disk that d wraps, as a value of the type T. The returned
// bool is false if none of these disks is a T. All code must request abilities with
// this function. A type assertion would not find the abilities of a wrapped disk.
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
