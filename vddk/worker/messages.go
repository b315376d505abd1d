package worker

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strings"
)

// This process and a worker process exchange packets over a SOCK_SEQPACKET socket. A packet has
// up to 64 KiB. Numbers are little-endian. program/message.h describes the same protocol for the
// worker program, and a test compares both files.
//
// A packet is a head of 32 bytes and a payload:
//
//	offset 0  kind     uint32
//	       4  slot     uint32  request number: the number of a slot, slotFlush or slotControl
//	       8  sector   uint64
//	      16  sectors  uint64
//	      24  flags    uint32
//	      28  length   uint32  bytes of the payload
//
// A string in a payload consists of its length (uint32), its bytes, and a NUL byte. The bytes
// must not include a NUL. NULL is sent as the length 0xffffffff, with nothing after it.
//
// This process sends these requests. The first column is the kind of the request. The other columns
// are fields of the head, and the payload; a field that is left empty is 0. In the column slot, the
// numbers of the slots are 0 to 63, SF stands for slotFlush (64), and SC for slotControl (65).
//
//	to the worker     slot  sector     sectors  flags       payload
//	"init"            SC                                    initNumbers, library, root, configuration file
//	"open"            SC                                    loginNumbers, the strings of loginStrings
//	"cleanup"         SC                                    as for "open"
//	"prepare access"  SC                                    as for "open"
//	"end access"      SC                                    as for "open"
//	"query"           SC    first      number   chunk size
//	"close"           SC
//	"read", "write"   0-63  first      number
//	"flush"           SF
//	"text"            0-SF  the error
//
// The worker answers each request by a packet of the kind "done", with the same request number
// in the field slot. Each request number can have only one request in progress. Before the
// answer "done" to a "query", the worker sends the allocated blocks in packets of the kind
// "blocks".
//
// The request "text" is sent after a "read", "write" or "flush" that failed, with the request
// number of that request and the error code of its answer. It asks for the text of this error.
//
//	from the worker   slot  sector     sectors  flags       payload
//	"done"            0-SC  the error  (below)  (below)     (below)
//	"blocks"          SC                                    pairs of uint64: start, count
//	"log"                              dropped  level       a log line of the library
//	"fatal"                                     level       why the worker ends
//
// In an answer "done", the error is 0 after a success. The answer to "text" repeats the error
// that the request asks about. The flags are doneFault if the worker program itself failed, and
// doneLibrary otherwise. The payload depends on the request, and so does the field sectors if it
// is not 0:
//
//	any request, flags doneFault: the step that failed, and why it failed
//	a request with SC, an error:  the name of the library's function, and the text of the error
//	"text":     the text of the error
//	"init":     the transport modes; sectors has one bit for each function of the library
//	"open":     openedNumbers, and the strings parent, UUID and transport mode
//	"cleanup":  nothing; sectors has the two counts of VixDiskLib_Cleanup: cleaned + remaining<<32
//	all others: nothing
const (
	kindInit      = 1
	kindOpen      = 2
	kindCleanup   = 3
	kindEndAccess = 4
	kindQuery     = 5
	kindClose     = 6
	kindRead      = 7
	kindWrite     = 8
	kindFlush     = 9
	kindText      = 10
	// kindPrepareAccess requests a call of VixDiskLib_PrepareForAccess.
	kindPrepareAccess = 11

	kindDone   = 64
	kindBlocks = 65
	kindLog    = 66
	kindFatal  = 67
)

const (
	slotFlush   = MaxSlots
	slotControl = MaxSlots + 1

	doneLibrary = 0 // the error is a code of the library
	doneFault   = 1 // the worker itself failed, and the payload says why

	headSize   = 32
	maxPacket  = 64 << 10
	maxPayload = maxPacket - headSize
	blockSize  = 16
	noString   = 0xffffffff

	initNumbersSize   = 16
	loginNumbersSize  = 16
	openedNumbersSize = 48

	socketFD  = 3
	arenaFD   = 4
	programFD = 5
)

// message is the head of a packet. The length of the payload is not part of it.
type message struct {
	kind, slot      uint32
	sector, sectors uint64
	flags           uint32
}

// The method append appends the head of a packet to b. The parameter payload is the length of the
// payload.
func (m message) append(b []byte, payload int) []byte {
	b = binary.LittleEndian.AppendUint32(b, m.kind)
	b = binary.LittleEndian.AppendUint32(b, m.slot)
	b = binary.LittleEndian.AppendUint64(b, m.sector)
	b = binary.LittleEndian.AppendUint64(b, m.sectors)
	b = binary.LittleEndian.AppendUint32(b, m.flags)
	return binary.LittleEndian.AppendUint32(b, uint32(payload))
}

// appendString appends s to b as a string of the protocol.
func appendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
	b = append(b, s...)
	return append(b, 0)
}

// appendOptional appends s to b as a string of the protocol. An empty string is sent as NULL.
func appendOptional(b []byte, s string) []byte {
	if s == "" {
		return binary.LittleEndian.AppendUint32(b, noString)
	}
	return appendString(b, s)
}

// appendInit appends the payload of the request "init" to b.
func appendInit(b []byte, c *Config) []byte {
	for _, n := range []int{c.Version, c.Slots, c.SlotSize, 0} {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	b = appendString(b, c.Library)
	b = appendString(b, c.Root)
	return appendOptional(b, c.ConfigFile)
}

// loginStrings is the number of strings in the payload of the requests for which the library logs
// in to a server: "open", "cleanup", "prepare access" and "end access".
const loginStrings = 10

// appendLogin appends to b the payload of an "open", "cleanup", "prepare access" or "end access",
// the requests for which the library logs in to a server.
func appendLogin(b []byte, r *OpenRequest) []byte {
	readOnly, flags := uint32(0), r.Flags
	if r.ReadOnly {
		readOnly, flags = 1, flags|FlagReadOnly
	}
	b = binary.LittleEndian.AppendUint32(b, r.Port)
	b = binary.LittleEndian.AppendUint32(b, r.NFCPort)
	b = binary.LittleEndian.AppendUint32(b, readOnly)
	b = binary.LittleEndian.AppendUint32(b, flags)
	b = appendOptional(b, r.Path)
	b = appendOptional(b, r.Server)
	b = appendOptional(b, r.VMXSpec)
	b = appendOptional(b, r.Thumbprint)
	b = appendOptional(b, r.User)
	if r.Server == "" {
		b = appendOptional(b, "")
	} else {
		b = appendString(b, r.Password)
	}
	b = appendOptional(b, r.Cookie)
	b = appendOptional(b, r.Snapshot)
	b = appendOptional(b, r.Transports)
	return appendOptional(b, r.Identity)
}

// The method check returns an error if a string of the request cannot be sent to the worker. The
// error does not contain the string, which may be a secret.
func (r *OpenRequest) check() error {
	for name, s := range map[string]string{
		"path": r.Path, "server": r.Server, "vm": r.VMXSpec, "thumbprint": r.Thumbprint, "user": r.User,
		"password": r.Password, "cookie": r.Cookie, "snapshot": r.Snapshot, "transports": r.Transports, "identity": r.Identity,
	} {
		if i := strings.IndexByte(s, 0); i >= 0 {
			return fmt.Errorf("%s has a NUL byte at offset %d, which cannot be passed to the library", name, i)
		}
		if len(s) > 16<<10 {
			return fmt.Errorf("%s has %d bytes, but at most 16384 can be passed to the library", name, len(s))
		}
	}
	return nil
}

var errTruncated = errors.New("truncated")

// parseMessage parses and checks a packet b from a worker. The returned payload shares its
// memory with b.
func parseMessage(b []byte) (m message, payload []byte, err error) {
	if len(b) < headSize {
		return m, nil, fmt.Errorf("the message is %[2]w: it has %[1]d bytes, but its head alone must have 32", len(b), errTruncated)
	}
	m = message{
		kind:    binary.LittleEndian.Uint32(b),
		slot:    binary.LittleEndian.Uint32(b[4:]),
		sector:  binary.LittleEndian.Uint64(b[8:]),
		sectors: binary.LittleEndian.Uint64(b[16:]),
		flags:   binary.LittleEndian.Uint32(b[24:]),
	}
	payload = b[headSize:]
	if n := binary.LittleEndian.Uint32(b[28:]); uint64(n) != uint64(len(payload)) {
		return m, nil, fmt.Errorf("the message of kind %d has a payload of %d bytes, but its head says that the payload has %d bytes", m.kind, len(payload), n)
	}
	switch m.kind {
	case kindDone:
		if m.slot > slotControl {
			return m, nil, fmt.Errorf(`the message "done" has the request number %d, expected at most %d`, m.slot, slotControl)
		}
		if m.flags > doneFault {
			return m, nil, fmt.Errorf(`the message "done" has the flags %#x, expected 0 or 1`, m.flags)
		}
	case kindBlocks:
		if m.slot != slotControl {
			return m, nil, fmt.Errorf(`the message "blocks" has the request number %d, expected %d`, m.slot, slotControl)
		}
		if len(payload) == 0 || len(payload)%blockSize != 0 {
			return m, nil, fmt.Errorf(`the message "blocks" has a payload of %d bytes, expected a multiple of %d bytes, the size of a block`, len(payload), blockSize)
		}
	case kindLog, kindFatal:
		name := map[uint32]string{kindLog: "log", kindFatal: "fatal"}[m.kind]
		if len(payload) > MaxLine {
			return m, nil, fmt.Errorf("the line in the message %q has %d bytes, expected at most %d", name, len(payload), MaxLine)
		}
		if m.flags > uint32(Panic) {
			return m, nil, fmt.Errorf("the line in the message %q has the level %d, expected at most %d", name, m.flags, Panic)
		}
	default:
		return m, nil, fmt.Errorf("the message is of the unknown kind %d", m.kind)
	}
	return m, payload, nil
}

// parseStrings parses a payload that must consist of exactly count strings. NULL becomes "".
func parseStrings(b []byte, count int) ([]string, error) {
	list := make([]string, count)
	for i := range list {
		if len(b) < 4 {
			return nil, fmt.Errorf("string %d of the %d strings in the message is %w: expected its length as a number of 4 bytes, found only %d bytes", i+1, count, errTruncated, len(b))
		}
		n := binary.LittleEndian.Uint32(b)
		b = b[4:]
		if n == noString {
			continue
		}
		if uint64(n)+1 > uint64(len(b)) {
			return nil, fmt.Errorf("string %d of the %d strings in the message is %w: expected %d bytes and a NUL byte, found only %d bytes", i+1, count, errTruncated, n, len(b))
		}
		list[i] = string(b[:n])
		if strings.IndexByte(list[i], 0) >= 0 || b[n] != 0 {
			return nil, fmt.Errorf("string %d of the %d strings in the message contains a NUL byte, or no NUL byte follows it", i+1, count)
		}
		b = b[n+1:]
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("%d bytes follow the last string of the message, expected none", len(b))
	}
	return list, nil
}

// maxCapacity is the largest size of a disk in sectors. Its size in bytes fits into an int64.
const maxCapacity = (1<<63 - 1) / SectorSize

// parseOpened parses the payload of the answer to the request "open".
func parseOpened(b []byte) (Opened, error) {
	var o Opened
	if len(b) < openedNumbersSize {
		return o, fmt.Errorf(`the answer to the request "open" is %w: its payload has %d bytes, expected at least %d`, errTruncated, len(b), openedNumbersSize)
	}
	list, err := parseStrings(b[openedNumbersSize:], 3)
	if err != nil {
		return o, fmt.Errorf(`the answer to the request "open" is invalid: %w`, err)
	}
	u32 := func(off int) uint32 { return binary.LittleEndian.Uint32(b[off:]) }
	o = Opened{
		Capacity:       binary.LittleEndian.Uint64(b),
		BIOSGeometry:   [3]uint32{u32(8), u32(12), u32(16)},
		Geometry:       [3]uint32{u32(20), u32(24), u32(28)},
		Adapter:        int(int32(u32(32))),
		Links:          int(int32(u32(36))),
		LogicalSector:  sectorSize(u32(40)),
		PhysicalSector: sectorSize(u32(44)),
		Parent:         clean(list[0]),
		UUID:           clean(list[1]),
		Transport:      clean(list[2]),
	}
	if o.Capacity > maxCapacity {
		return o, fmt.Errorf("the library reports a disk of %d sectors, expected at most %d", o.Capacity, uint64(maxCapacity))
	}
	return o, nil
}

// sectorSize returns n if n can be the size of a sector, and 0 otherwise. Some libraries say
// that they are version 7, but return an older structure without sector sizes. Then n is an
// arbitrary number.
func sectorSize(n uint32) uint32 {
	if n < SectorSize || n > 64<<10 || bits.OnesCount32(n) != 1 {
		return 0
	}
	return n
}

// A query collects the allocated blocks that a worker lists for one call of Process.Query.
type query struct {
	start, end uint64 // sectors
	chunks     uint64 // chunks that were asked about, and so the largest number of blocks
	got        uint64 // blocks so far
	next       uint64 // end of the last block, before which no other block may begin
	blocks     []Block
	err        error // what is wrong with the answer; its further blocks are ignored
}

// The method add adds the blocks of one packet to the blocks collected so far. It joins adjacent
// blocks.
func (q *query) add(payload []byte) {
	for ; len(payload) >= blockSize && q.err == nil; payload = payload[blockSize:] {
		b := Block{Start: binary.LittleEndian.Uint64(payload), Count: binary.LittleEndian.Uint64(payload[8:])}
		q.got++
		switch {
		case b.Count == 0 || b.Start < q.next || b.Start > q.end || b.Count > q.end-b.Start:
			q.err = fmt.Errorf("%sQueryAllocatedBlocks returned a block of %[3]d sectors at sector %[2]d, expected a block that is not empty, begins at sector %[4]d or later, and ends at sector %[5]d or earlier",
				functionPrefix, b.Start, b.Count, q.next, q.end)
			return
		case q.got > q.chunks:
			q.err = fmt.Errorf("%[1]sQueryAllocatedBlocks returned more than %[2]d blocks for %[2]d chunks, expected at most one for each chunk", functionPrefix, q.chunks)
			return
		}
		q.next = b.Start + b.Count
		if n := len(q.blocks); n > 0 && q.blocks[n-1].Start+q.blocks[n-1].Count == b.Start {
			q.blocks[n-1].Count += b.Count
			continue
		}
		q.blocks = append(q.blocks, b)
	}
}
