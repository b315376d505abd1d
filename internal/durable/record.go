package durable

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Record is the format of a small record that a file contains twice, in two slots. The caller
// writes one slot and makes it durable before it writes the other one. Therefore one slot is
// always intact, even if the power fails during a write.
//
// A slot consists of these fields, in this order: Magic, the version, the length of the payload,
// the sequence number (only if Numbered is set), a checksum (CRC-32C), and the payload. The
// checksum covers all other fields. Numbers are little-endian and have 4 bytes; the sequence
// number has 8.
type Record struct {
	Magic    string // begins each slot
	Version  uint32
	SlotSize int  // bytes of one slot in the file
	Numbered bool // each slot has a sequence number, which shows which of the two slots is newer
}

var (
	// ErrNoRecord says that a slot does not begin with Record.Magic. No record was written
	// into the slot.
	ErrNoRecord = errors.New("this part of the file contains no record of vddkcp")
	// ErrTorn says that a slot begins with Record.Magic but its checksum is wrong. The slot was
	// not written completely, or is damaged.
	ErrTorn = errors.New("the record in the file is incomplete or damaged")
)

// VersionError says that a slot is intact but has another version than Record.Version.
type VersionError struct{ Got, Want uint32 }

func (e *VersionError) Error() string {
	return fmt.Sprintf("the record in the file has version %d, want version %d", e.Got, e.Want)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// headerSize returns the number of bytes of a slot that precede the payload.
func (r *Record) headerSize() int {
	n := len(r.Magic) + 4 + 4 + 4 // version, length, checksum
	if r.Numbered {
		n += 8
	}
	return n
}

// Room returns the size in bytes of the largest payload that fits into a slot.
func (r *Record) Room() int { return r.SlotSize - r.headerSize() }

// Encode returns the content of a slot with the given payload, which has at most Room bytes. If the
// payload is shorter than that, the content does not fill the slot. The sequence number is ignored
// unless Numbered is set.
func (r *Record) Encode(sequence uint64, payload []byte) []byte {
	b := make([]byte, 0, r.headerSize()+len(payload))
	b = append(b, r.Magic...)
	b = binary.LittleEndian.AppendUint32(b, r.Version)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	if r.Numbered {
		b = binary.LittleEndian.AppendUint64(b, sequence)
	}
	b = binary.LittleEndian.AppendUint32(b, crc32.Update(crc32.Checksum(b, castagnoli), castagnoli, payload))
	return append(b, payload...)
}

// Decode checks the content of a slot and returns its sequence number and payload. The payload is a
// part of the given slice and not a copy. Bytes after the payload are ignored. The error is
// ErrNoRecord, ErrTorn or a *VersionError.
func (r *Record) Decode(slot []byte) (sequence uint64, payload []byte, err error) {
	header := r.headerSize()
	if len(slot) < header || string(slot[:len(r.Magic)]) != r.Magic {
		return 0, nil, ErrNoRecord
	}
	fields := slot[len(r.Magic):header]
	length := binary.LittleEndian.Uint32(fields[4:])
	if int64(length) > int64(len(slot)-header) {
		return 0, nil, ErrTorn
	}
	payload = slot[header : header+int(length)]
	sum := crc32.Update(crc32.Checksum(slot[:header-4], castagnoli), castagnoli, payload)
	if sum != binary.LittleEndian.Uint32(fields[len(fields)-4:]) {
		return 0, nil, ErrTorn
	}
	if version := binary.LittleEndian.Uint32(fields); version != r.Version {
		return 0, nil, &VersionError{version, r.Version}
	}
	if r.Numbered {
		sequence = binary.LittleEndian.Uint64(fields[8:])
	}
	return sequence, payload, nil
}

// Slot is the content of one of the two slots of a file, as ReadSlots read it.
type Slot struct {
	Bytes    []byte // what the file has there; shorter than a slot at the end of the file
	Sequence uint64
	Payload  []byte
	Err      error // of Decode
}

// ReadSlots reads both slots from the start of f. It returns an error only if reading fails. A
// slot without a valid record has an error in the field Err.
func (r *Record) ReadSlots(f io.ReaderAt) (slots [2]Slot, err error) {
	b := make([]byte, 2*r.SlotSize)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return slots, err
	}
	for i := range slots {
		s := &slots[i]
		s.Bytes = b[min(i*r.SlotSize, n):min((i+1)*r.SlotSize, n)]
		s.Sequence, s.Payload, s.Err = r.Decode(s.Bytes)
	}
	return slots, nil
}
