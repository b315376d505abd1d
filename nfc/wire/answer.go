package wire

import "fmt"

const (
	// OpenFileSize is the size of the payload of OPEN_FILE, in bytes.
	OpenFileSize = 60
	// FailureSize is the size of the payload of ERROR, in bytes.
	FailureSize = 16
	// ddbSize is the size of the payload of DDB_GET, in bytes.
	ddbSize = 16

	maxCapacity = 1 << 60 // bytes
	sectorSize  = 512
)

// An OpenedFile is the answer to the request to open a disk.
type OpenedFile struct {
	Status     uint64 // 0 if the disk was opened; the other fields have a meaning only then
	Handle     uint64 // any number, 0 included
	Flags      uint32
	Capacity   int64 // bytes
	SectorSize uint32
	Geometry   [3]uint32 // cylinders, heads, sectors
}

// ParseOpenFile decodes the payload of an answer to NewOpenFile. The caller checks the status. If
// the status is 0, the capacity must be a multiple of 512 bytes, and 512 bytes to 1 EiB.
func ParseOpenFile(b *[OpenFileSize]byte) (OpenedFile, error) {
	f := OpenedFile{
		Status:     u64(b[:], 0),
		Handle:     u64(b[:], 8),
		Flags:      u32(b[:], 20),
		SectorSize: u32(b[:], 36),
		Geometry:   [3]uint32{u32(b[:], 40), u32(b[:], 44), u32(b[:], 48)},
	}
	if f.Status != 0 {
		return f, nil
	}
	capacity := u64(b[:], 28)
	if capacity == 0 || capacity > maxCapacity || capacity%sectorSize != 0 {
		return OpenedFile{}, violation(b[:], "a disk of at least 512 and at most 2^60 bytes, a multiple of 512", fmt.Sprintf("a disk of %d bytes", capacity))
	}
	f.Capacity = int64(capacity)
	return f, nil
}

// ParseDDBGet decodes the payload of an answer to NewDDBGet, which must have 16 bytes. The entry, a
// text of textSize bytes, follows the payload. textSize is 0 if the disk does not have the entry.
// The error is a *ProtocolError if the text would be longer than MaxText.
func ParseDDBGet(b []byte) (textSize int, err error) {
	if len(b) != ddbSize {
		return 0, violation(b, fmt.Sprintf("a payload of %d bytes in the answer %v", ddbSize, DDBGet), fmt.Sprintf("%d bytes", len(b)))
	}
	return checkText(b, "an entry of the disk's descriptor", u32(b, 12))
}

// A Failure is the payload of a frame with the type Error, which refuses a request.
type Failure struct {
	Code     uint64 // a code of the host's NFC library
	TextSize int    // length of the text that follows the payload, in bytes
}

// ParseFailure decodes the payload of a frame with the type Error. The error is a *ProtocolError if
// the text that follows would be longer than MaxText. The code is returned in any case.
func ParseFailure(b *[FailureSize]byte) (Failure, error) {
	n, err := checkText(b[:], "an error text", u32(b[:], 12))
	return Failure{Code: u64(b[:], 0), TextSize: n}, err
}
