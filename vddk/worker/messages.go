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
// This process sends these requests. The columns are fields of the head; a field that is left
// empty is 0. "control" stands for slotControl, and "flush" for slotFlush.
//
//	to the worker   slot     sector  sectors  flags  payload
//	init            control                          initNumbers, library, root, configuration file
//	open            control                          loginNumbers, the strings of loginStrings
//	cleanup         control                          the same
//	prepare access  control                          the same
//	end access      control                          the same
//	query           control  first   number   chunk
//	close           control
//	read, write     0-63     first   number
//	flush           flush
//	text            0-flush  error                   (asks for the text of an error of the last request with this number)
//
// The worker answers each request by one packet of the kind done, with the same request number.
// Each request number can have only one request in progress. The answer to a query consists of
// packets of the kind blocks, followed by done.
//
//	from the worker slot     sector  sectors  flags  payload
//	done            any      error   see below  doneLibrary or doneFault
//	blocks          control                          pairs of uint64: start, count
//	log                              dropped  level  the line
//	fatal                                     level  why the worker ends
//
// The payload of done depends on the request:
//
//	a control request whose error is not 0: the name of the function, and the text of the error
//	text: the text of the error
//	init: the transport modes; the field sectors has a bit for each function
//	open: openedNumbers and the strings parent, UUID and transport mode
//	cleanup: none; the field sectors is cleaned + remaining<<32
//	any request with doneFault: the step that failed, and why
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

// append appends the head of a packet to b. payload is the length of the payload.
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

// appendInit appends the payload of the request init to b.
func appendInit(b []byte, c *Config) []byte {
	for _, n := range []int{c.Version, c.Slots, c.SlotSize, 0} {
		b = binary.LittleEndian.AppendUint32(b, uint32(n))
	}
	b = appendString(b, c.Library)
	b = appendString(b, c.Root)
	return appendOptional(b, c.ConfigFile)
}

// loginStrings is the number of strings in the payload of the requests that log in: open,
// cleanup, prepare access and end access.
const loginStrings = 10

// appendLogin appends the payload of a request that logs in to b: of open, cleanup, prepare
// access or end access.
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

// check returns an error if a string of the request cannot be sent to the worker. The error does
// not contain the string, which may be a secret.
func (r *OpenRequest) check() error {
	for name, s := range map[string]string{
		"path": r.Path, "server": r.Server, "vm": r.VMXSpec, "thumbprint": r.Thumbprint, "user": r.User,
		"password": r.Password, "cookie": r.Cookie, "snapshot": r.Snapshot, "transports": r.Transports, "identity": r.Identity,
	} {
		if i := strings.IndexByte(s, 0); i >= 0 {
			return fmt.Errorf("%s: NUL byte at offset %d, which cannot be passed to the library", name, i)
		}
		if len(s) > 16<<10 {
			return fmt.Errorf("%s has %d bytes, at most 16384 can be passed to the library", name, len(s))
		}
	}
	return nil
}

var errTruncated = errors.New("truncated")

// parseMessage parses and checks a packet b from a worker. The returned payload shares its
// memory with b.
func parseMessage(b []byte) (m message, payload []byte, err error) {
	if len(b) < headSize {
		return m, nil, fmt.Errorf("the message is %[2]w: it has %[1]d bytes, and its head alone has 32", len(b), errTruncated)
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
		return m, nil, fmt.Errorf("the message of kind %d has a payload of %d bytes, but the length in its head is %d", m.kind, len(payload), n)
	}
	switch m.kind {
	case kindDone:
		if m.slot > slotControl {
			return m, nil, fmt.Errorf("the message done has the request number %d, the largest number is %d", m.slot, slotControl)
		}
		if m.flags > doneFault {
			return m, nil, fmt.Errorf("the message done has the flags %#x, expected 0 or 1", m.flags)
		}
	case kindBlocks:
		if m.slot != slotControl || len(payload) == 0 || len(payload)%blockSize != 0 {
			return m, nil, fmt.Errorf("the message blocks has the request number %d and %d bytes, expected number %d and a multiple of %d bytes", m.slot, len(payload), slotControl, blockSize)
		}
	case kindLog, kindFatal:
		if len(payload) > MaxLine || m.flags > uint32(Panic) {
			return m, nil, fmt.Errorf("the message log has a line of %d bytes and the level %d, expected at most %d bytes and a level of at most %d", len(payload), m.flags, MaxLine, Panic)
		}
	default:
		return m, nil, fmt.Errorf("the kind %d of the message is unknown", m.kind)
	}
	return m, payload, nil
}

// parseStrings parses a payload that must consist of exactly count strings. NULL becomes "".
func parseStrings(b []byte, count int) ([]string, error) {
	list := make([]string, count)
	for i := range list {
		if len(b) < 4 {
			return nil, fmt.Errorf("string %d of the %d strings in the message is %w in its length", i+1, count, errTruncated)
		}
		n := binary.LittleEndian.Uint32(b)
		b = b[4:]
		if n == noString {
			continue
		}
		if uint64(n)+1 > uint64(len(b)) {
			return nil, fmt.Errorf("string %d of the %d strings in the message has %d bytes, but is %w", i+1, count, n, errTruncated)
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

// parseOpened parses the payload of the answer to the request open.
func parseOpened(b []byte) (Opened, error) {
	var o Opened
	if len(b) < openedNumbersSize {
		return o, fmt.Errorf("the answer to open is %[2]w: it has %[1]d bytes", len(b), errTruncated)
	}
	list, err := parseStrings(b[openedNumbersSize:], 3)
	if err != nil {
		return o, fmt.Errorf("invalid answer to open: %w", err)
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
		return o, fmt.Errorf("the library reports a disk of %d sectors, at most %d are possible", o.Capacity, uint64(maxCapacity))
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

// query collects the allocated blocks in the answer to Process.Query.
type query struct {
	start, end uint64 // sectors
	chunks     uint64 // chunks that were asked about, and so the largest number of blocks
	got        uint64 // blocks so far
	next       uint64 // end of the last block, before which no other block may begin
	blocks     []Block
	err        error // how the answer breaks the rules of Query; its other blocks are ignored
}

// add adds the blocks of one packet to the answer. It joins adjacent blocks.
func (q *query) add(payload []byte) {
	for ; len(payload) >= blockSize && q.err == nil; payload = payload[blockSize:] {
		b := Block{Start: binary.LittleEndian.Uint64(payload), Count: binary.LittleEndian.Uint64(payload[8:])}
		q.got++
		switch {
		case b.Count == 0 || b.Start < q.next || b.Start > q.end || b.Count > q.end-b.Start:
			q.err = fmt.Errorf("%sQueryAllocatedBlocks returned a block of %[3]d sectors at sector %[2]d, expected blocks in ascending order in the sectors %[4]d to %[5]d",
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
