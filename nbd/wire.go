// Package nbd holds what an NBD client and an NBD server share: the messages of
// the protocol and the URIs that name exports.
//
// The protocol is doc/proto.md, the URIs are doc/uri.md of
// https://github.com/NetworkBlockDevice/nbd. All numbers on the wire are big
// endian. Nothing here allocates by a length that the other side sent.
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

// Magic numbers: of the greeting, of options and their replies, and of the
// transmission.
const (
	Magic                = 0x4e42444d41474943 // "NBDMAGIC"
	OptionMagic          = 0x49484156454f5054 // "IHAVEOPT": newstyle
	OldstyleMagic        = 0x0000420281861253
	OptionReplyMagic     = 0x0003e889045565a9
	RequestMagic         = 0x25609513
	SimpleReplyMagic     = 0x67446698
	StructuredReplyMagic = 0x668e33ef
)

const (
	// DefaultPort is the TCP port that IANA assigned.
	DefaultPort = "10809"
	// MaxString is the most bytes of a string (a name, a text) on the wire.
	MaxString = 4096
	// MaxPayload is the most bytes of data in a request or a chunk that may be
	// sent to who did not say that it takes more.
	MaxPayload = 32 << 20
)

// HandshakeFlags are what the server offers in its greeting, and what the
// client takes up.
type HandshakeFlags uint16

const (
	FixedNewstyle HandshakeFlags = 1 << iota
	NoZeroes                     // no padding after ExportName
)

// TransmissionFlags say what an export can do.
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

// Option is what a client asks for before the transmission.
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

// OptionReplyType is the kind of a reply to an option. Errors have the highest
// bit set.
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

// IsError reports whether the reply refuses the option.
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
		return "the server finds the option invalid"
	case RepErrPlatform:
		return "the server's platform can't do it"
	case RepErrTLSRequired:
		return "the server demands TLS"
	case RepErrUnknown:
		return "the server has no such export"
	case RepErrShutdown:
		return "the server is shutting down"
	case RepErrBlockSizeRequired:
		return "the server demands that block sizes are asked for"
	case RepErrTooBig:
		return "the server finds the option too big"
	}
	return fmt.Sprintf("option reply %#x", uint32(t))
}

// InfoType is the kind of an information about an export.
type InfoType uint16

const (
	InfoExport      InfoType = 0
	InfoName        InfoType = 1
	InfoDescription InfoType = 2
	InfoBlockSize   InfoType = 3
)

// Command is the kind of a request.
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
	FlagFUA CommandFlags = 1 << iota
	FlagNoHole
	FlagDF
	FlagReqOne
	FlagFastZero
)

// ChunkType is the kind of a chunk of a structured reply. Errors have bit 15
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

// IsError reports whether the chunk says that the request failed.
func (t ChunkType) IsError() bool { return t&(1<<15) != 0 }

// ChunkDone is the flag of the last chunk of a structured reply.
const ChunkDone uint16 = 1

// BaseAllocation is the metadata context that tells the allocation, by flags.
const BaseAllocation = "base:allocation"

// The flags of BaseAllocation. Only StateZero says what the content is.
const (
	StateHole uint32 = 1 << iota
	StateZero
)

// Errno is an error number on the wire. There are no others than these.
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

// Is makes the numbers comparable with the errors of Go's library.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission
	case ENOTSUP:
		return target == errors.ErrUnsupported
	}
	return false
}

// Text returns a string of the other side so that it can be shown: what does
// not print is replaced, since it could steer a terminal.
func Text(b []byte) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, string(b))
}

// Request is the header of a request; a write's data follow it.
type Request struct {
	Flags  CommandFlags
	Type   Command
	Cookie uint64 // the reply's too; opaque to the server
	Off    uint64 // bytes
	Len    uint32 // bytes
}

// RequestSize is how many bytes a Request takes.
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

// ParseRequest decodes a request. A wrong magic is an error: the stream is out
// of step.
func ParseRequest(b *[RequestSize]byte) (Request, error) {
	if m := binary.BigEndian.Uint32(b[:]); m != RequestMagic {
		return Request{}, fmt.Errorf("request magic: found %#08x, want %#08x", m, uint32(RequestMagic))
	}
	return Request{
		Flags:  CommandFlags(binary.BigEndian.Uint16(b[4:])),
		Type:   Command(binary.BigEndian.Uint16(b[6:])),
		Cookie: binary.BigEndian.Uint64(b[8:]),
		Off:    binary.BigEndian.Uint64(b[16:]),
		Len:    binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// SimpleReply is a reply without chunks; the data of a read that succeeded
// follow it.
type SimpleReply struct {
	Errno  Errno // 0: none
	Cookie uint64
}

// SimpleReplySize is how many bytes a SimpleReply takes, its magic among them.
const SimpleReplySize = 16

// Append appends the encoded reply to b.
func (r SimpleReply) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, SimpleReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(r.Errno))
	return binary.BigEndian.AppendUint64(b, r.Cookie)
}

// ParseSimpleReply decodes what follows the magic, which told that it is one.
func ParseSimpleReply(b *[SimpleReplySize - 4]byte) SimpleReply {
	return SimpleReply{Errno(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint64(b[4:])}
}

// Chunk is the header of a chunk of a structured reply; Len bytes follow it.
type Chunk struct {
	Flags  uint16 // ChunkDone; others are to be ignored
	Type   ChunkType
	Cookie uint64
	Len    uint32
}

// ChunkSize is how many bytes a Chunk takes, its magic among them.
const ChunkSize = 20

// Append appends the encoded header to b.
func (c Chunk) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, StructuredReplyMagic)
	b = binary.BigEndian.AppendUint16(b, c.Flags)
	b = binary.BigEndian.AppendUint16(b, uint16(c.Type))
	b = binary.BigEndian.AppendUint64(b, c.Cookie)
	return binary.BigEndian.AppendUint32(b, c.Len)
}

// ParseChunk decodes what follows the magic, which told that it is one.
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

// AppendGo appends the data of OptGo or OptInfo: the export and what is asked
// for beside InfoExport.
func AppendGo(b []byte, export string, infos ...InfoType) []byte {
	b = appendString(b, export)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// AppendMetaContext appends the data of OptSetMetaContext or
// OptListMetaContext.
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

// OptionReply is the header of a reply to an option; Len bytes follow it.
type OptionReply struct {
	Option Option
	Type   OptionReplyType
	Len    uint32
}

// OptionReplySize is how many bytes an OptionReply takes.
const OptionReplySize = 20

// Append appends the encoded header to b.
func (r OptionReply) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, OptionReplyMagic)
	b = binary.BigEndian.AppendUint32(b, uint32(r.Option))
	b = binary.BigEndian.AppendUint32(b, uint32(r.Type))
	return binary.BigEndian.AppendUint32(b, r.Len)
}

// ParseOptionReply decodes a reply's header.
func ParseOptionReply(b *[OptionReplySize]byte) (OptionReply, error) {
	if m := binary.BigEndian.Uint64(b[:]); m != OptionReplyMagic {
		return OptionReply{}, fmt.Errorf("option reply magic: found %#016x, want %#016x", m, uint64(OptionReplyMagic))
	}
	return OptionReply{
		Option: Option(binary.BigEndian.Uint32(b[8:])),
		Type:   OptionReplyType(binary.BigEndian.Uint32(b[12:])),
		Len:    binary.BigEndian.Uint32(b[16:]),
	}, nil
}

// BlockSizes are what requests must fit to, in bytes.
type BlockSizes struct {
	Min       uint32 // a power of two, at most 64 KiB: of offsets and lengths
	Preferred uint32 // a power of two, at least Min
	Max       uint32 // of the data of one request: a multiple of Min, or 2^32-1 for no limit
}

// BlockSizesSize is how many bytes BlockSizes take, the InfoType not counted.
const BlockSizesSize = 12

// Append appends the encoded sizes to b.
func (s BlockSizes) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, s.Min)
	b = binary.BigEndian.AppendUint32(b, s.Preferred)
	return binary.BigEndian.AppendUint32(b, s.Max)
}

// ParseBlockSizes decodes and checks block sizes, by "Block size constraints".
func ParseBlockSizes(b *[BlockSizesSize]byte) (BlockSizes, error) {
	s := BlockSizes{binary.BigEndian.Uint32(b[:]), binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])}
	switch {
	case s.Min == 0 || s.Min&(s.Min-1) != 0 || s.Min > 64<<10:
		return s, fmt.Errorf("minimum block size: found %d, want a power of two up to 65536", s.Min)
	case s.Preferred&(s.Preferred-1) != 0 || s.Preferred < s.Min:
		return s, fmt.Errorf("preferred block size: found %d, want a power of two, at least the minimum of %d", s.Preferred, s.Min)
	case s.Max < s.Min || s.Max%s.Min != 0 && s.Max != 1<<32-1:
		return s, fmt.Errorf("maximum block size: found %d, want a multiple of the minimum of %d, or 2^32-1", s.Max, s.Min)
	}
	return s, nil
}
