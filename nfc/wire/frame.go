package wire

import (
	"encoding/binary"
	"fmt"
)

const (
	// HeaderSize is the size of the header of a frame, in bytes.
	HeaderSize = 16
	// Magic is the number with which each frame begins.
	Magic uint32 = 0xA100DA7A
	// MaxText is the maximum length of a text in an answer, in bytes.
	MaxText = 64 << 10
)

// FrameType says what a frame means. An answer has the type of its request, or the type Error.
type FrameType uint32

const (
	Error        FrameType = 1 // refuses a request; see Failure
	OpenSession  FrameType = 2
	CloseSession FrameType = 3
	OpenFile     FrameType = 4
	CloseFile    FrameType = 5
	IO           FrameType = 7 // reads a part of a file; see Read and Fragment
	SetSockOpts  FrameType = 9
	DDBGet       FrameType = 11 // asks for an entry of the disk's descriptor
	SetResPool   FrameType = 22
)

var frameNames = map[FrameType]string{
	Error:        "ERROR",
	OpenSession:  "OPEN_SESSION",
	CloseSession: "CLOSE_SESSION",
	OpenFile:     "OPEN_FILE",
	CloseFile:    "CLOSE_FILE",
	IO:           "IO",
	SetSockOpts:  "SET_SOCK_OPTS",
	DDBGet:       "DDB_GET",
	SetResPool:   "SET_RES_POOL",
}

// String returns the name and the number of the type.
func (t FrameType) String() string {
	if name := frameNames[t]; name != "" {
		return fmt.Sprintf("%s (%d)", name, uint32(t))
	}
	return fmt.Sprintf("unknown frame type %d", uint32(t))
}

// A Header is the header of a frame.
type Header struct {
	Type FrameType
	Size uint32 // size of the payload in bytes, without the data that follow the payload
	OpID uint32 // number of the request; an answer has the number of its request
}

// Append appends the encoded header to b.
func (h Header) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, Magic)
	b = binary.LittleEndian.AppendUint32(b, uint32(h.Type))
	b = binary.LittleEndian.AppendUint32(b, h.Size)
	return binary.LittleEndian.AppendUint32(b, h.OpID)
}

// ParseHeader decodes the header of a frame. It returns an error if the frame does not begin with
// Magic. The caller checks the other fields; see CheckSize.
func ParseHeader(b *[HeaderSize]byte) (Header, error) {
	if magic := u32(b[:], 0); magic != Magic {
		return Header{}, violation(b[:], fmt.Sprintf("a frame that begins with the number %#x", Magic), fmt.Sprintf("the number %#x", magic))
	}
	return Header{Type: FrameType(u32(b[:], 4)), Size: u32(b[:], 8), OpID: u32(b[:], 12)}, nil
}

// String returns the fields of the header in words.
func (h Header) String() string {
	return fmt.Sprintf("%v, opId %d, payload of %d bytes", h.Type, h.OpID, h.Size)
}

// PayloadSize returns the size of the payload in an answer of the given type, in bytes. The result
// fixed is false if the type has no fixed size: it is unknown, or its answer is as long as its
// request.
func PayloadSize(t FrameType) (size int, fixed bool) {
	switch t {
	case Error:
		return FailureSize, true
	case OpenSession:
		return 16, true
	case OpenFile:
		return OpenFileSize, true
	case IO:
		return ReadSize, true
	case SetSockOpts:
		return 12, true
	case DDBGet:
		return ddbSize, true
	case SetResPool:
		return 4, true
	}
	return 0, false
}

// CheckSize returns a *ProtocolError if the payload has another size than want bytes.
func (h Header) CheckSize(want int) error {
	if int64(h.Size) == int64(want) {
		return nil
	}
	return violation(nil, fmt.Sprintf("a payload of %d bytes in the answer %v with opId %d", want, h.Type, h.OpID), fmt.Sprintf("a payload of %d bytes", h.Size))
}

// A Request is a frame that a client sends, except for reads, which have the type Read.
type Request struct {
	Type          FrameType
	Payload, Data []byte
}

// Append appends the frame to b, with op as its opId. The opIds of a session begin at 0, and each
// request has the next number.
func (r Request) Append(b []byte, op uint32) []byte {
	b = Header{Type: r.Type, Size: uint32(len(r.Payload)), OpID: op}.Append(b)
	b = append(b, r.Payload...)
	return append(b, r.Data...)
}

// NewOpenSession returns the first request of a session. It asks for bufferCount buffers of
// bufferBytes each, which limits the length of a fragment. If both are 0, the host uses its
// defaults, such as 65536 bytes.
func NewOpenSession(bufferBytes, bufferCount uint32) Request {
	p := make([]byte, 16)
	put32(p, 4, bufferBytes)
	put32(p, 8, bufferCount)
	return Request{Type: OpenSession, Payload: p}
}

// NewSockOpts returns the second request of a session.
func NewSockOpts() Request { return Request{Type: SetSockOpts, Payload: make([]byte, 12)} }

// NewResPool returns the third request of a session.
func NewResPool() Request {
	p := make([]byte, 4)
	put32(p, 0, 1)
	return Request{Type: SetResPool, Payload: p}
}

// ReadDisk are the flags of NewOpenFile that open a disk with its whole chain for reading.
const ReadDisk uint32 = 0x1e

// NewOpenFile returns the request to open a disk. path is its datastore path, such as
// "[ds] dir/disk.vmdk".
func NewOpenFile(path string, flags uint32) Request {
	p := make([]byte, OpenFileSize)
	put32(p, 0, uint32(len(path)))
	put32(p, 16, 2) // a disk
	put32(p, 20, flags)
	return Request{Type: OpenFile, Payload: p, Data: []byte(path)}
}

// NewDDBGet returns the request for an entry of the descriptor of a disk. key has no "ddb." at its
// start.
func NewDDBGet(handle uint64, key string) Request {
	p := make([]byte, ddbSize)
	put64(p, 0, handle)
	put32(p, 8, uint32(len(key)))
	return Request{Type: DDBGet, Payload: p, Data: []byte(key)}
}

// NewCloseFile returns the request to close a disk. Its payload has 8 bytes, or 16 if long is true.
func NewCloseFile(handle uint64, long bool) Request {
	p := make([]byte, 8, 16)
	put64(p, 0, handle)
	if long {
		p = p[:16]
	}
	return Request{Type: CloseFile, Payload: p}
}

// NewCloseSession returns the last request of a session. Its payload has 4 bytes, or 16 if long is
// true.
func NewCloseSession(long bool) Request {
	p := make([]byte, 4, 16)
	if long {
		p = p[:16]
	}
	return Request{Type: CloseSession, Payload: p}
}
