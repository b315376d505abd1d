package client

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxOptionReply bounds one reply to an option. What is known is shorter.
	maxOptionReply = 64 << 10
	// maxOptionReplies bounds how many replies to one option come before ACK.
	maxOptionReplies = 256
	// padding is what follows the flags of old handshakes.
	padding = 124
)

// negotiated is what a handshake ended with.
type negotiated struct {
	size       int64 // of the export, bytes
	flags      nbd.TransmissionFlags
	sizes      nbd.BlockSizes // the protocol's defaults where the server told none
	sizesGiven bool           // sizes are the server's
	oldstyle   bool           // the server is oldstyle

	structured bool
	contexts   bool   // the allocation can be asked for
	context    uint32 // by this id
}

// shaker is a connection in the handshake. It reads no byte more than it
// needs: what an attacker put behind the reply to STARTTLS must not be taken
// for the server's, see proto.md, "STARTTLS".
type handshaker struct {
	conn     net.Conn
	uri      *nbd.URI
	infoOnly bool // the export is only asked about, not opened
}

// errUntold says that a server tells of an export only who opens it.
var errNoInfo = errors.New("the server is too old to be asked about an export")

// shake negotiates over raw. The connection returned is raw, or TLS over it.
func handshake(ctx context.Context, raw net.Conn, uri *nbd.URI, tlsConfig *tls.Config) (net.Conn, negotiated, error) {
	return (&handshaker{conn: raw, uri: uri}).run(ctx, tlsConfig)
}

func (s *handshaker) run(ctx context.Context, tlsConfig *tls.Config) (net.Conn, negotiated, error) {
	n, err := s.greet(ctx, tlsConfig)
	if _, secure := s.conn.(*tls.Conn); secure && err != nil {
		err = explainTLS(s.uri, tlsConfig, err)
	}
	if err == nil {
		err = n.check()
	}
	if err != nil {
		return nil, n, fmt.Errorf("handshake: %w", err)
	}
	return s.conn, n, nil
}

func (n *negotiated) check() error {
	if n.size < 0 {
		return violation("size of the export: %d bytes, want at most %d", uint64(n.size), int64(math.MaxInt64))
	}
	if n.flags&nbd.HasFlags == 0 {
		n.flags = nbd.HasFlags
	}
	return nil
}

func (s *handshaker) greet(ctx context.Context, tlsConfig *tls.Config) (n negotiated, err error) {
	// What a server that told none must take, and a client should keep to.
	n.sizes = nbd.BlockSizes{Min: 512, Preferred: 4096, Max: nbd.MaxPayload}
	var b [18]byte
	if err := s.readFull(b[:16]); err != nil {
		return n, fmt.Errorf("the server does not greet: %w", err)
	}
	if m := binary.BigEndian.Uint64(b[:]); m != nbd.Magic {
		return n, violation("greeting: found %#016x, want %#016x (is it an NBD server?)", m, uint64(nbd.Magic))
	}
	switch m := binary.BigEndian.Uint64(b[8:]); m {
	case nbd.OldstyleMagic:
		return s.oldstyle(n)
	case nbd.OptionMagic:
	default:
		return n, violation("greeting: found %#016x, want %#016x or %#016x", m, uint64(nbd.OptionMagic), uint64(nbd.OldstyleMagic))
	}
	if err := s.readFull(b[16:]); err != nil {
		return n, fmt.Errorf("flags: %w", err)
	}
	flags := nbd.HandshakeFlags(binary.BigEndian.Uint16(b[16:]))
	mine := flags & (nbd.FixedNewstyle | nbd.NoZeroes)
	if err := s.send(binary.BigEndian.AppendUint32(nil, uint32(mine))); err != nil {
		return n, err
	}
	if mine&nbd.FixedNewstyle == 0 {
		if s.uri.TLS {
			return n, errors.New("the server is too old for TLS, which nbds demands")
		}
		return s.exportName(n, mine)
	}
	if s.uri.TLS {
		if err := s.startTLS(ctx, tlsConfig); err != nil {
			return n, err
		}
	}
	if s.infoOnly {
		known, err := s.goOption(&n, nbd.OptInfo)
		if err == nil && !known {
			err = errNoInfo
		}
		return n, err
	}
	if n.structured, err = s.negotiateOption(nbd.OptStructuredReply, nil); err != nil {
		return n, err
	}
	if n.structured {
		if err := s.setContext(&n); err != nil {
			return n, err
		}
	}
	known, err := s.goOption(&n, nbd.OptGo)
	if err != nil || known {
		return n, err
	}
	return s.exportName(n, mine)
}

// oldstyle takes the export of a server that has only one.
func (s *handshaker) oldstyle(n negotiated) (negotiated, error) {
	if s.uri.TLS {
		return n, errors.New("the server is too old for TLS, which nbds demands")
	}
	if s.uri.Export != "" {
		return n, fmt.Errorf("the server is too old for names of exports: want none, found %q", s.uri.Export)
	}
	var b [12 + padding]byte
	if err := s.readFull(b[:]); err != nil {
		return n, fmt.Errorf("size and flags: %w", err)
	}
	n.oldstyle, n.size = true, int64(binary.BigEndian.Uint64(b[:]))
	n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(b[10:]))
	return n, nil
}

// exportName ends the handshake in the way that every newstyle server knows,
// and that leaves no room for an error.
func (s *handshaker) exportName(n negotiated, mine nbd.HandshakeFlags) (negotiated, error) {
	if s.infoOnly {
		return n, errNoInfo
	}
	if err := s.sendOption(nbd.OptExportName, []byte(s.uri.Export)); err != nil {
		return n, err
	}
	b := make([]byte, 10, 10+padding)
	if mine&nbd.NoZeroes == 0 {
		b = b[:cap(b)]
	}
	if err := s.readFull(b); err != nil {
		return n, &hinted{fmt.Errorf("export %q: %w", s.uri.Export, err), "the server may have no export of that name"}
	}
	n.size = int64(binary.BigEndian.Uint64(b))
	n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	return n, nil
}

func (s *handshaker) startTLS(ctx context.Context, config *tls.Config) error {
	ok, err := s.negotiateOption(nbd.OptStartTLS, nil)
	if err != nil {
		return err
	}
	if !ok {
		return &hinted{errors.New("the server has no TLS, which nbds demands"), "nbd:// and nbd+unix:// go without, and then whoever is on the way can read and change what is copied"}
	}
	t := tls.Client(s.conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", explainTLS(s.uri, config, err))
	}
	s.conn = t
	return nil
}

// agree sends an option that is only taken or not.
func (s *handshaker) negotiateOption(o nbd.Option, data []byte) (bool, error) {
	if err := s.sendOption(o, data); err != nil {
		return false, err
	}
	t, text, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		return violation("reply to %v: found %v of %d bytes, want ACK or an error", o, t, len(data))
	})
	switch {
	case err != nil:
		return false, err
	case t == nbd.RepErrTLSRequired, t == nbd.RepErrShutdown:
		return false, s.refused(o, t, text)
	}
	return t == nbd.RepAck, nil
}

// setContext asks for base:allocation. A server that does not have it, or does
// not know the export, says so again later.
func (s *handshaker) setContext(n *negotiated) error {
	const o = nbd.OptSetMetaContext
	if err := s.sendOption(o, nbd.AppendMetaContext(nil, s.uri.Export, nbd.BaseAllocation)); err != nil {
		return err
	}
	t, _, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		if t != nbd.RepMetaContext || len(data) < 4 || string(data[4:]) != nbd.BaseAllocation || n.contexts {
			return violation("reply to %v: found %v of %d bytes, want one META_CONTEXT of %s, ACK or an error", o, t, len(data), nbd.BaseAllocation)
		}
		n.contexts, n.context = true, binary.BigEndian.Uint32(data)
		return nil
	})
	if t != nbd.RepAck {
		n.contexts = false
	}
	return err
}

// goOption ends the handshake with GO, or learns the same by INFO. A server that
// does not know the option leaves known false.
func (s *handshaker) goOption(n *negotiated, o nbd.Option) (known bool, err error) {
	if err := s.sendOption(o, nbd.AppendGo(nil, s.uri.Export, nbd.InfoBlockSize)); err != nil {
		return false, err
	}
	exported := false
	t, text, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		if t != nbd.RepInfo || len(data) < 2 {
			return violation("reply to %v: found %v of %d bytes, want INFO, ACK or an error", o, t, len(data))
		}
		info, data := nbd.InfoType(binary.BigEndian.Uint16(data)), data[2:]
		switch info {
		case nbd.InfoExport:
			if len(data) != 10 {
				return violation("information about the export: %d bytes, want 10", len(data))
			}
			n.size = int64(binary.BigEndian.Uint64(data))
			n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(data[8:]))
			exported = true
		case nbd.InfoBlockSize:
			if len(data) != nbd.BlockSizesSize {
				return violation("information about block sizes: %d bytes, want %d", len(data), nbd.BlockSizesSize)
			}
			sizes, err := nbd.ParseBlockSizes((*[nbd.BlockSizesSize]byte)(data))
			if err != nil {
				return violation("%w", err)
			}
			n.sizes, n.sizesGiven = sizes, true
		}
		return nil
	})
	switch {
	case err != nil:
		return false, err
	case t == nbd.RepErrUnsupported:
		return false, nil
	case t != nbd.RepAck:
		return false, s.refused(o, t, text)
	case !exported:
		return false, violation("reply to %v: ACK without the export's size", o)
	}
	return true, nil
}

// refused is the error of an option that had to be taken.
func (s *handshaker) refused(o nbd.Option, t nbd.OptionReplyType, text string) error {
	message := fmt.Sprintf("%v: %v", o, t)
	if t == nbd.RepErrUnknown {
		message = fmt.Sprintf("%v: the server has no export %q", o, nbd.Text([]byte(s.uri.Export)))
	}
	if text != "" {
		message += ": " + text
	}
	hint := ""
	switch t {
	case nbd.RepErrTLSRequired:
		hint = "want " + withTLS(s.uri)
	case nbd.RepErrUnknown:
		names, more := s.listExports()
		if slices.Contains(names, s.uri.Export) {
			message = fmt.Sprintf("%v: the server has the export %q and did not open it", o, nbd.Text([]byte(s.uri.Export)))
			if text != "" {
				message += ": " + text
			}
			hint = "see the server's log, or what it says on its terminal: it can't open its disk"
			break
		}
		hint = exportsHint(names, more)
	}
	err := errors.New(message)
	if hint == "" {
		return err
	}
	return &hinted{err, hint}
}

// list asks which exports there are, where the server tells: the first names,
// and how many there are more.
func (s *handshaker) listExports() (names []string, more int) {
	const o = nbd.OptList
	if err := s.sendOption(o, nil); err != nil {
		return nil, 0
	}
	// Only for a hint: what is wrong with the replies does not matter.
	s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		if t != nbd.RepServer || len(data) < 4 || int64(binary.BigEndian.Uint32(data)) > int64(len(data)-4) {
			return violation("reply to %v: %v of %d bytes", o, t, len(data))
		}
		if len(names) < maxHintExports {
			names = append(names, string(data[4:4+binary.BigEndian.Uint32(data)]))
		} else {
			more++
		}
		return nil
	})
	return names, more
}

// replies takes the replies to an option up to the last, whose type it returns
// with its text, which is empty but for errors. The others go to each.
func (s *handshaker) readReplies(o nbd.Option, each func(nbd.OptionReplyType, []byte) error) (nbd.OptionReplyType, string, error) {
	for range maxOptionReplies {
		var b [nbd.OptionReplySize]byte
		if err := s.readFull(b[:]); err != nil {
			return 0, "", fmt.Errorf("reply to %v: %w", o, err)
		}
		reply, err := nbd.ParseOptionReply(&b)
		if err != nil {
			return 0, "", violation("reply to %v: %w", o, err)
		}
		if reply.Option != o {
			return 0, "", violation("reply to %v: found one to %v", o, reply.Option)
		}
		if reply.Len > maxOptionReply {
			return 0, "", violation("reply to %v: %d bytes, want at most %d", o, reply.Len, maxOptionReply)
		}
		data := make([]byte, reply.Len)
		if err := s.readFull(data); err != nil {
			return 0, "", fmt.Errorf("reply to %v: %w", o, err)
		}
		switch {
		case reply.Type == nbd.RepAck && len(data) > 0:
			return 0, "", violation("reply to %v: ACK of %d bytes, want none", o, len(data))
		case reply.Type == nbd.RepAck:
			return reply.Type, "", nil
		case reply.Type.IsError():
			text := nbd.Text(data[:min(len(data), nbd.MaxString)])
			return reply.Type, strings.TrimSpace(text), nil
		}
		if err := each(reply.Type, data); err != nil {
			return 0, "", err
		}
	}
	return 0, "", violation("reply to %v: %d parts and no end", o, maxOptionReplies)
}

func (s *handshaker) sendOption(o nbd.Option, data []byte) error {
	return s.send(nbd.AppendOption(nil, o, data))
}

func (s *handshaker) send(b []byte) error {
	_, err := s.conn.Write(b)
	if secure, ok := s.conn.(*tls.Conn); ok && isClosed(err) {
		// Why the server closed may have come before.
		if _, why := secure.Read(make([]byte, 1)); why != nil {
			return why
		}
	}
	return err
}

func (s *handshaker) readFull(b []byte) error {
	_, err := io.ReadFull(s.conn, b)
	return notEOF(err)
}
