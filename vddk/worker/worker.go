// Package worker runs VMware's libvixDiskLib in a process of its own, one process for each open
// disk:
//
//	p, err := worker.Start(ctx, worker.Config{Library: path, Root: root, Version: 8, Slots: 4, SlotSize: 1 << 20})
//	opened, err := p.Open(ctx, worker.OpenRequest{Path: "/disk.vmdk", ReadOnly: true})
//	err = p.Read(ctx, 0, sector, 2048) // into p.Slot(0)
//	err = p.Close(ctx)
//	p.Release()
//
// The library sometimes crashes, hangs or corrupts its heap. It needs a process in which
// LD_LIBRARY_PATH was set from the start, and which does not fork. Therefore only a small C
// program (program/) loads the library. If the library fails, the methods of [Process] return
// errors.
//
// The data of requests is in slots, pieces of memory that both processes share (see
// [Process.Slot]). Messages on a socket carry everything else; messages.go describes them.
// Secrets are passed to the worker only over that socket.
package worker

import (
	"fmt"

	"github.com/vddkcp/vddkcp/internal/allocation"
)

// SectorSize is the number of bytes in a sector. The library uses this size even for disks whose
// own sectors are larger.
const SectorSize = 512

// These constants limit the fields of Config and the parameters of requests to a worker.
const (
	MaxSlots    = 64
	MaxSlotSize = 2 << 20    // bytes; larger requests are not faster and fail under load
	MaxChunks   = 512 * 1024 // chunks in one Query
	MinChunk    = 128        // sectors in the smallest chunk of a Query
	MaxLine     = 4000       // bytes in a log line; longer lines are cut
)

// Config says which library a worker process loads, and how.
type Config struct {
	Library    string // path of libvixDiskLib.so.N
	Root       string // root folder of the distribution, the argument libDir of InitEx
	Dir        string // folder that is added to LD_LIBRARY_PATH of the worker; "" for none
	Version    int    // N in the name of the library
	ConfigFile string // configuration file for the library; "" for none
	Slots      int    // slots, and so the number of reads and writes in flight: 1 to MaxSlots
	SlotSize   int    // bytes of each slot, a multiple of 4096 up to MaxSlotSize
	// Log is called with each line that the library logs, one call at a time. It runs on the
	// goroutine that receives the answers of the worker; therefore it must not block and must
	// not call this package. Lines are valid UTF-8 without control characters and without
	// secrets. Long lines are cut. If lines come too fast, some are dropped, and Log gets a line
	// that says how many. Log may be nil.
	Log     func(level Level, line string)
	Program string   // path of the worker program; "" means the embedded or an installed one
	Env     []string // environment of the worker; nil means that of this process. Variables that may hold secrets are removed
}

// Level says where a log line comes from.
type Level int

const (
	Info    Level = iota // the log function of InitEx
	Warning              // the warn function of InitEx
	Panic                // the panic function of InitEx; the worker ends after it
	Output               // standard output or standard error of the worker
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

// OpenRequest names a disk and says how to reach it. Empty strings are passed to the library as
// NULL. If Server is empty, the disk is a local file, and only Path, Flags, ReadOnly, Snapshot
// and Transports are used. Printing an OpenRequest shows only the path.
type OpenRequest struct {
	Path       string
	Flags      uint32 // FlagUnbuffered and so on, combined by |
	ReadOnly   bool   // connect and open for reading only
	Server     string
	Port       uint32 // port of the server; 0 means the default of the library
	NFCPort    uint32 // NFC port of the ESXi host; 0 means the default of the library
	VMXSpec    string // "moref=ID"
	Thumbprint string // SHA-1 of the server's certificate, in the form "AA:BB:..."
	User       string
	Password   string // passed to the library even if it is empty, provided that there is a Server
	Cookie     string // session cookie; if it is empty, User and Password log in
	Snapshot   string
	Transports string
	// Identity is a name for the program that calls PrepareAccess and EndAccess. The method
	// Process.Open ignores it.
	Identity string
}

// Format implements fmt.Formatter. It prints only the path and no secrets.
func (r OpenRequest) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "{%q}", r.Path) }

// These are the bits of OpenRequest.Flags. The library defines their values.
const (
	FlagUnbuffered = 1
	FlagSingleLink = 2
	FlagReadOnly   = 4
	FlagZlib       = 16
	FlagFastLZ     = 32
	FlagSkipZ      = 64
)

// Opened has the properties of an open disk, as the library reports them.
type Opened struct {
	Capacity       uint64    // sectors of 512 bytes
	BIOSGeometry   [3]uint32 // cylinders, heads, sectors
	Geometry       [3]uint32 // physical cylinders, heads, sectors
	Adapter        int       // 1 IDE, 2 BusLogic, 3 LSI Logic
	Links          int       // links in the chain of the disk
	LogicalSector  uint32    // bytes; 0 if it is not known, as before version 7
	PhysicalSector uint32    // bytes; 0 if it is not known
	Parent         string    // parentFileNameHint
	UUID           string
	Transport      string // transport mode that the library chose, such as "nbdssl"
}

// Block is an allocated range of a disk. Its start and its length are numbers of sectors of
// SectorSize bytes.
type Block = allocation.Block

// Function is a function of VDDK that a library may have or lack.
type Function struct {
	Name     string // "VixDiskLib_Flush"
	Required bool   // Start fails if the library does not have it
	Present  bool   // the library has it
}
