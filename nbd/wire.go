// Package nbd encodes and decodes the messages of the NBD protocol and parses the URIs
// that name exports. A program that uses an export calls [ParseURI] first and passes
// the URI to package client, which reads and writes exports. Package server serves
// exports.
//
// Each message has a type with a method Append, which encodes it, and a function to
// decode it, such as [Request] and [ParseRequest].
//
// The protocol is described in doc/proto.md, and the URIs in doc/uri.md, of
// https://github.com/NetworkBlockDevice/nbd. All numbers in messages are big endian. A
// peer can send any length in a message. The functions of this package therefore never
// allocate memory of a length that a message states.
package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Magic numbers with which messages begin. They show that both sides agree where a
// message starts.
const (
	Magic                = 0x4e42444d41474943 // "NBDMAGIC", the first 8 bytes of a greeting
	OptionMagic          = 0x49484156454f5054 // "IHAVEOPT", in a newstyle greeting and in options
	OldstyleMagic        = 0x0000420281861253 // in an oldstyle greeting
	OptionReplyMagic     = 0x0003e889045565a9
	RequestMagic         = 0x25609513
	SimpleReplyMagic     = 0x67446698
	StructuredReplyMagic = 0x668e33ef
)

const (
	// DefaultPort is the TCP port that IANA assigned to NBD.
	DefaultPort = "10809"
	// MaxString is the maximum length of a name or another text in a message, in
	// bytes.
	MaxString = 4096
	// MaxPayload is the maximum length, in bytes, of the data in one request or
	// chunk, unless the receiver has advertised a higher limit.
	MaxPayload = 32 << 20
)

// HandshakeFlags are the features of the handshake that a server offers in its
// greeting, or that a client accepts in the flags that it sends back.
type HandshakeFlags uint16

const (
	FixedNewstyle HandshakeFlags = 1 << iota
	NoZeroes                     // the reply to OptExportName has no 124 bytes of padding
)

// TransmissionFlags say which commands and features an export supports.
type TransmissionFlags uint16

const (
	HasFlags TransmissionFlags = 1 << iota
	ReadOnly
	SendFlush
	SendFUA
	Rotational
	SendTrim
	SendWriteZeroes
	SendDF
	CanMultiConn
	SendResize
	SendCache
	SendFastZero
)

// Option is the number of an option. A client sends options in the handshake, to
// negotiate features and to choose an export.
type Option uint32

const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
)

func (o Option) String() string {
	switch o {
	case OptExportName:
		return "EXPORT_NAME"
	case OptAbort:
		return "ABORT"
	case OptList:
		return "LIST"
	case OptStartTLS:
		return "STARTTLS"
	case OptInfo:
		return "INFO"
	case OptGo:
		return "GO"
	case OptStructuredReply:
		return "STRUCTURED_REPLY"
	case OptListMetaContext:
		return "LIST_META_CONTEXT"
	case OptSetMetaContext:
		return "SET_META_CONTEXT"
	}
	return fmt.Sprintf("option %d", uint32(o))
}

// OptionReplyType is the type of a reply to an option. Error types have the highest
// bit (bit 31) set.
type OptionReplyType uint32

const (
	RepAck         OptionReplyType = 1
	RepServer      OptionReplyType = 2
	RepInfo        OptionReplyType = 3
	RepMetaContext OptionReplyType = 4

	RepErrUnsupported       OptionReplyType = 1<<31 + 1
	RepErrPolicy            OptionReplyType = 1<<31 + 2
	RepErrInvalid           OptionReplyType = 1<<31 + 3
	RepErrPlatform          OptionReplyType = 1<<31 + 4
	RepErrTLSRequired       OptionReplyType = 1<<31 + 5
	RepErrUnknown           OptionReplyType = 1<<31 + 6
	RepErrShutdown          OptionReplyType = 1<<31 + 7
	RepErrBlockSizeRequired OptionReplyType = 1<<31 + 8
	RepErrTooBig            OptionReplyType = 1<<31 + 9
)

// IsError reports whether a reply of this type refuses the option.
func (t OptionReplyType) IsError() bool { return t&(1<<31) != 0 }

func (t OptionReplyType) String() string {
	switch t {
	case RepAck:
		return "ACK"
	case RepServer:
		return "SERVER"
	case RepInfo:
		return "INFO"
	case RepMetaContext:
		return "META_CONTEXT"
	case RepErrUnsupported:
		return "the server does not know the option"
	case RepErrPolicy:
		return "the server's policy forbids it"
	case RepErrInvalid:
		return "the server considers the option invalid"
	case RepErrPlatform:
		return "the server's platform does not support it"
	case RepErrTLSRequired:
		return "the server demands TLS"
	case RepErrUnknown:
		return "the server has no such export"
	case RepErrShutdown:
		return "the server is shutting down"
	case RepErrBlockSizeRequired:
		return "the server requires clients to request its block sizes"
	case RepErrTooBig:
		return "the server considers the option too long"
	}
	return fmt.Sprintf("option reply %#x", uint32(t))
}

// InfoType is the kind of information about an export that a reply to OptInfo or
// OptGo holds.
type InfoType uint16

const (
	InfoExport      InfoType = 0
	InfoName        InfoType = 1
	InfoDescription InfoType = 2
	InfoBlockSize   InfoType = 3
)

// Command is the type of a request in the transmission phase.
type Command uint16

const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisconnect  Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
)

func (c Command) String() string {
	switch c {
	case CmdRead:
		return "read"
	case CmdWrite:
		return "write"
	case CmdDisconnect:
		return "disconnect"
	case CmdFlush:
		return "flush"
	case CmdTrim:
		return "trim"
	case CmdCache:
		return "cache"
	case CmdWriteZeroes:
		return "write zeroes"
	case CmdBlockStatus:
		return "block status"
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// CommandFlags modify a request.
type CommandFlags uint16

const (
	FlagFUA      CommandFlags = 1 << iota // reply only after the data are durable
	FlagNoHole                            // CmdWriteZeroes must not deallocate
	FlagDF                                // CmdRead: send the data in one chunk
	FlagReqOne                            // CmdBlockStatus: return one extent
	FlagFastZero                          // CmdWriteZeroes fails unless it is faster than writing
)

// ChunkType is the type of a chunk of a structured reply. Error types have bit 15
// set.
type ChunkType uint16

const (
	ChunkNone        ChunkType = 0
	ChunkData        ChunkType = 1
	ChunkHole        ChunkType = 2
	ChunkBlockStatus ChunkType = 5
	ChunkError       ChunkType = 1<<15 + 1
	ChunkErrorOffset ChunkType = 1<<15 + 2
)

// IsError reports whether a chunk of this type says that the request failed.
func (t ChunkType) IsError() bool { return t&(1<<15) != 0 }

// ChunkDone is the flag that marks the last chunk of a structured reply.
const ChunkDone uint16 = 1

// BaseAllocation is the name of the metadata context that describes which ranges of
// an export are allocated. Its values are StateHole and StateZero.
const BaseAllocation = "base:allocation"

// Flags of the metadata context BaseAllocation. A range that has only the flag
// StateHole may read as anything. A range with the flag StateZero reads as zeros.
const (
	StateHole uint32 = 1 << iota
	StateZero
)

// Errno is an error number in a reply. The protocol defines only the numbers that are
// constants of this package.
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

func (e Errno) Error() string {
	switch e {
	case EPERM:
		return "not permitted (EPERM)"
	case EIO:
		return "input/output error (EIO)"
	case ENOMEM:
		return "out of memory (ENOMEM)"
	case EINVAL:
		return "invalid request (EINVAL)"
	case ENOSPC:
		return "no space left (ENOSPC)"
	case EOVERFLOW:
		return "request too long (EOVERFLOW)"
	case ENOTSUP:
		return "not supported (ENOTSUP)"
	case ESHUTDOWN:
		return "the server is shutting down (ESHUTDOWN)"
	}
	return fmt.Sprintf("error %d", uint32(e))
}

// Is lets errors.Is match error numbers with errors of the standard library. EPERM
// matches fs.ErrPermission, and ENOTSUP matches errors.ErrUnsupported.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission
	case ENOTSUP:
		return target == errors.ErrUnsupported
	}
	return false
}

// Text returns a string from the peer in a form that is safe to show. It replaces each
// character that is not printable by "?", since such a character could control a
// terminal.
func Text(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, string(b))
}

// Request is the header of a request. In a write request, the data follow it.
type Request struct {
	Flags  CommandFlags
	Type   Command
	Cookie uint64 // chosen by the client; the reply repeats it
	Off    uint64 // offset in the export, in bytes
	Len    uint32 // length of the range, in bytes
}

// RequestSize is the length of an encoded Request, in bytes.
const RequestSize = 28

// Append appends the encoded request to b.
func (r Request) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, RequestMagic)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Flags))
	b = binary.BigEndian.AppendUint16(b, uint16(r.Type))
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Off)
	return binary.BigEndian.AppendUint32(b, r.Len)
}

// ParseRequest decodes a request. It returns an error if the magic number is wrong. The
// connection cannot be used after that, because the start of the next request is unknown.
func ParseRequest(b *[RequestSize]byte) (Request, error) {
	if m := binary.BigEndian.Uint32(b[:]); m != RequestMagic {
		return Request{}, fmt.Errorf("a request begins with %#08x, want the request magic %#08x", m, uint32(RequestMagic))
	}
	return Request{
		Flags:  CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Type:   Command(binary.BigEndian.Uint16(b[6:])),
		Cookie: binary.BigEndian.Uint64(b[8:]),
		Off:    binary.BigEndian.Uint64(b[16:]),
		Len:    binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// SimpleReply is a reply without chunks. If it answers a read that succeeded, the
// data follow it.
type SimpleReply struct {
	Errno  Errno // 0: the request succeeded
	Cookie uint64
}

// SimpleReplySize is the length of an encoded SimpleReply with its magic number, in
// bytes.
const SimpleReplySize = 16

// Append appends the encoded reply to b.
func (r SimpleReply) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, SimpleReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(r.Errno))
	return binary.BigEndian.AppendUint64(b, r.Cookie)
}

// ParseSimpleReply decodes the part of a simple reply after the magic number. The caller
// reads the magic number first, to find out which kind of message follows.
func ParseSimpleReply(b *[SimpleReplySize - 4]byte) SimpleReply {
	return SimpleReply{Errno(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint64(b[4:])}
}

// Chunk is the header of a chunk of a structured reply. The data of the chunk follow
// it.
type Chunk struct {
	Flags  uint16 // ChunkDone; receivers ignore all other flags
	Type   ChunkType
	Cookie uint64 // that of the request
	Len    uint32 // bytes after the header
}

// ChunkSize is the length of an encoded Chunk with its magic number, in bytes.
const ChunkSize = 20

// Append appends the encoded header to b.
func (c Chunk) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, StructuredReplyMagic)
	b = binary.BigEndian.AppendUint16(b, c.Flags)
	b = binary.BigEndian.AppendUint16(b, uint16(c.Type))
	b = binary.BigEndian.AppendUint64(b, c.Cookie)
	return binary.BigEndian.AppendUint32(b, c.Len)
}

// ParseChunk decodes the part of the header of a chunk after the magic number. The caller
// reads the magic number first, to find out which kind of message follows.
func ParseChunk(b *[ChunkSize - 4]byte) Chunk {
	return Chunk{
		Flags:  binary.BigEndian.Uint16(b[:]),
		Type:   ChunkType(binary.BigEndian.Uint16(b[2:])),
		Cookie: binary.BigEndian.Uint64(b[4:]),
		Len:    binary.BigEndian.Uint32(b[12:]),
	}
}

// AppendOption appends an option with its data to b.
func AppendOption(b []byte, o Option, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, OptionMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// AppendGo appends the data of OptGo or OptInfo: the name of the export, and the types
// of information that the client requests. InfoExport need not be requested, since
// servers always send it.
func AppendGo(b []byte, export string, infos ...InfoType) []byte {
	b = appendString(b, export)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// AppendMetaContext appends the data of OptSetMetaContext or OptListMetaContext to b: the
// name of the export and the queries.
func AppendMetaContext(b []byte, export string, queries ...string) []byte {
	b = appendString(b, export)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = appendString(b, q)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
}

// OptionReply is the header of a reply to an option. The data of the reply follow it.
type OptionReply struct {
	Option Option
	Type   OptionReplyType
	Len    uint32
}

// OptionReplySize is the length of an encoded OptionReply, in bytes.
const OptionReplySize = 20

// Append appends the encoded header to b.
func (r OptionReply) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, OptionReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(r.Option))
	b = binary.BigEndian.AppendUint32(b, uint32(r.Type))
	return binary.BigEndian.AppendUint32(b, r.Len)
}

// ParseOptionReply decodes the header of a reply to an option. A wrong magic number is
// an error.
func ParseOptionReply(b *[OptionReplySize]byte) (OptionReply, error) {
	if m := binary.BigEndian.Uint64(b[:]); m != OptionReplyMagic {
		return OptionReply{}, fmt.Errorf("a reply to an option begins with %#016x, want the magic %#016x", m, uint64(OptionReplyMagic))
	}
	return OptionReply{
		Option: Option(binary.BigEndian.Uint32(b[8:])),
		Type:   OptionReplyType(binary.BigEndian.Uint32(b[12:])),
		Len:    binary.BigEndian.Uint32(b[16:]),
	}, nil
}

// BlockSizes are the constraints of an export on the offsets and lengths of requests,
// in bytes.
type BlockSizes struct {
	Min       uint32 // offsets and lengths are multiples of Min: a power of two, at most 65536
	Preferred uint32 // requests of multiples of Preferred are fast: a power of two, at least Min
	Max       uint32 // maximum length of the data in one request: a multiple of Min, or 2^32-1 for no limit
}

// BlockSizesSize is the length of encoded BlockSizes, in bytes. It does not include the
// InfoType before them.
const BlockSizesSize = 12

// Append appends the encoded sizes to b.
func (s BlockSizes) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, s.Min)
	b = binary.BigEndian.AppendUint32(b, s.Preferred)
	return binary.BigEndian.AppendUint32(b, s.Max)
}

// ParseBlockSizes decodes block sizes and returns an error if they break the rules of
// the section "Block size constraints" of proto.md.
func ParseBlockSizes(b *[BlockSizesSize]byte) (BlockSizes, error) {
	s := BlockSizes{binary.BigEndian.Uint32(b[:]), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])}
	switch {
	case s.Min == 0 || s.Min&(s.Min-1) != 0 || s.Min > 64<<10:
		return s, fmt.Errorf("minimum block size: found %d bytes, want a power of two, at most 65536 bytes", s.Min)
	case s.Preferred&(s.Preferred-1) != 0 || s.Preferred < s.Min:
		return s, fmt.Errorf("preferred block size: found %d bytes, want a power of two and at least the minimum block size of %d bytes", s.Preferred, s.Min)
	case s.Max < s.Min || s.Max%s.Min != 0 && s.Max != 1<<32-1:
		return s, fmt.Errorf("maximum block size: found %d bytes, want a multiple of the minimum block size of %d bytes, or 2^32-1", s.Max, s.Min)
	}
	return s, nil
}
