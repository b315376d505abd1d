// Package worker runs VMware's libvixDiskLib in a process of its own: one
// process for one open disk. The library crashes, hangs and corrupts its heap,
// needs LD_LIBRARY_PATH from the start of its process, and can't live through a
// fork; so a small C program (program/) is all that ever loads it, and what
// goes wrong in it is an error here.
//
// Data lies in memory that both processes map (the slots of [Process.Slot]) and
// never crosses the socket between them; secrets cross that socket only.
// messages.go describes what is said on it.
package worker

import (
	"fmt"

	"github.com/vddkcp/vddkcp/internal/allocation"
)

// SectorSize is the library's unit, in bytes, whatever the disk's own is.
const SectorSize = 512

// Limits of a worker.
const (
	MaxSlots    = 64
	MaxSlotSize = 2 << 20    // bytes: larger requests gain nothing and fail under load
	MaxChunks   = 512 * 1024 // of one Query
	MinChunk    = 128        // sectors
	MaxLine     = 4000       // bytes of a line of the log; more is cut off
)

// Config says which library a worker loads, and how.
type Config struct {
	Library    string // path of libvixDiskLib.so.N
	Root       string // of the distribution: libDir of InitEx
	Dir        string // for LD_LIBRARY_PATH, which only the worker's environment has; "": none
	Version    int    // N of the library
	ConfigFile string // of the library; "": none
	Slots      int    // requests at once, 1 to MaxSlots
	SlotSize   int    // bytes of each, a multiple of 4096 up to MaxSlotSize
	// Log gets what the library says, one line a call and one call at a time,
	// from a goroutine that also carries the completions: it must neither block nor call this package. A
	// line holds no control characters and is valid UTF-8; what was too long
	// is cut off, what came too fast is counted in a line of its own. Nil: not
	// wanted.
	Log     func(level Level, line string)
	Program string   // path of the worker; "": the embedded one, or an installed one
	Env     []string // nil: this process's own. What may hold a secret is left out.
}

// Level says where a line comes from.
type Level int

const (
	Info    Level = iota // InitEx's log
	Warning              // InitEx's warn
	Panic                // InitEx's panic: the worker ends with it
	Output               // standard output or error of the worker: the library printed it
)

func (l Level) String() string {
	switch l {
	case Info:
		return "info"
	case Warning:
		return "warning"
	case Panic:
		return "panic"
	case Output:
		return "output"
	}
	return fmt.Sprintf("Level(%d)", int(l))
}

// OpenRequest names a disk and how to reach it. A field that is empty is not
// handed to the library at all. Without Server the disk is a local one, and
// only Snapshot, Transports, ReadOnly, Path and Flags count.
// Printing it shows the path only.
type OpenRequest struct {
	Path       string
	Flags      uint32 // Flag...
	ReadOnly   bool   // of the connection
	Server     string
	Port       uint32
	NFCPort    uint32
	VMXSpec    string // "moref=ID"
	Thumbprint string // SHA-1, as the library wants it
	User       string
	Password   string // also empty it is handed over, where there is a Server
	Cookie     string // "": log in by User and Password
	Snapshot   string
	Transports string
	// Identity names the caller to PrepareAccess and EndAccess. Open ignores it.
	Identity string
}

// Format implements fmt.Formatter: no secret is ever printed.
func (r OpenRequest) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "{%q}", r.Path) }

// Flags of Open.
const (
	FlagUnbuffered = 1
	FlagSingleLink = 2
	FlagReadOnly   = 4
	FlagZlib       = 16
	FlagFastLZ     = 32
	FlagSkipZ      = 64
)

// Opened is what the library tells of an open disk.
type Opened struct {
	Capacity       uint64    // sectors of 512 bytes
	BIOSGeometry   [3]uint32 // cylinders, heads, sectors
	Geometry       [3]uint32 // physical
	Adapter        int       // 1 IDE, 2 BusLogic, 3 LSI Logic
	Links          int
	LogicalSector  uint32 // bytes; 0: not known, as before version 7
	PhysicalSector uint32 // bytes
	Parent         string // parentFileNameHint
	UUID           string
	Transport      string // that the library chose: "nbdssl"
}

// Block is an allocated range, in sectors of 512 bytes.
type Block = allocation.Block

// Function is a function of the library.
type Function struct {
	Name     string // "VixDiskLib_Flush"
	Required bool   // without it the library is refused
	Present  bool
}
