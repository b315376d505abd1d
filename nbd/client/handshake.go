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

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxOptionReply is the maximum length of the data of one reply to an option, in
	// bytes. All replies of the protocol are shorter.
	maxOptionReply = 64 << 10
	// maxOptionReplies is the maximum number of replies to one option.
	maxOptionReplies = 256
	// padding is the number of zero bytes that an oldstyle server sends after its
	// flags. A newstyle server sends the same number of zero bytes at the end of its
	// reply to EXPORT_NAME, unless NO_ZEROES was negotiated.
	padding = 124
)

// The struct negotiated holds the result of a handshake.
type negotiated struct {
	size       int64 // size of the export in bytes
	flags      nbd.TransmissionFlags
	sizes      nbd.BlockSizes // the defaults of the protocol if the server advertised none
	sizesGiven bool           // the server advertised sizes
	oldstyle   bool           // the server is oldstyle

	structured bool   // replies are structured
	contexts   bool   // base:allocation was negotiated
	context    uint32 // ID of base:allocation in replies
}

// handshaker performs the handshake on a connection. It reads without a buffer. Otherwise
// bytes that an attacker sent in plain text after the reply to STARTTLS could stay in the
// buffer and be taken for encrypted bytes of the server (see "STARTTLS" in proto.md).
type handshaker struct {
	conn     net.Conn
	uri      *nbd.URI
	infoOnly bool // query the export with INFO and do not open it
}

// errNoInfo says that a server does not support INFO, or that its reply to INFO has no
// size. INFO is the option with which a client queries an export without opening it.
var errNoInfo = errors.New("the server cannot describe an export without opening it")

// The function handshake performs the handshake on a socket. It returns the connection
// for the transmission phase, which is the socket itself or a TLS connection over it.
func handshake(ctx context.Context, raw net.Conn, uri *nbd.URI, tlsConfig *tls.Config) (net.Conn, negotiated, error) {
	return (&handshaker{conn: raw, uri: uri}).run(ctx, tlsConfig)
}

// run performs the handshake. If an error of TLS occurs, run adds a hint to it.
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

// The method check returns an error if the size of the export is too large. The flags
// of the export are valid only if HAS_FLAGS is set. If it is not set, check clears all
// other flags.
func (n *negotiated) check() error {
	if n.size < 0 {
		return violation("size of the export: found %d bytes, want at most %d bytes", uint64(n.size), int64(math.MaxInt64))
	}
	if n.flags&nbd.HasFlags == 0 {
		n.flags = nbd.HasFlags
	}
	return nil
}

// greet reads the greeting of the server, which shows whether the server is oldstyle,
// newstyle or fixed newstyle. Then it performs the rest of the handshake for this type
// of server.
func (s *handshaker) greet(ctx context.Context, tlsConfig *tls.Config) (n negotiated, err error) {
	// These are the block sizes that proto.md prescribes if the server advertises
	// none.
	n.sizes = nbd.BlockSizes{Min: 512, Preferred: 4096, Max: nbd.MaxPayload}
	var b [18]byte
	if err := s.readFull(b[:16]); err != nil {
		return n, fmt.Errorf("cannot read the greeting of the server: %w", err)
	}
	if m := binary.BigEndian.Uint64(b[:]); m != nbd.Magic {
		return n, violation("the greeting begins with %#016x, want %#016x (is this an NBD server?)", m, uint64(nbd.Magic))
	}
	switch m := binary.BigEndian.Uint64(b[8:]); m {
	case nbd.OldstyleMagic:
		return s.oldstyle(n)
	case nbd.OptionMagic:
	default:
		return n, violation("the second number of the greeting is %#016x, want %#016x (newstyle) or %#016x (oldstyle)", m, uint64(nbd.OptionMagic), uint64(nbd.OldstyleMagic))
	}
	if err := s.readFull(b[16:]); err != nil {
		return n, fmt.Errorf("cannot read the flags of the server: %w", err)
	}
	flags := nbd.HandshakeFlags(binary.BigEndian.Uint16(b[16:]))
	mine := flags & (nbd.FixedNewstyle | nbd.NoZeroes)
	if err := s.send(binary.BigEndian.AppendUint32(nil, uint32(mine))); err != nil {
		return n, err
	}
	if mine&nbd.FixedNewstyle == 0 {
		if s.uri.TLS {
			return n, errors.New("the server is too old to support TLS, which the scheme nbds requires")
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

// The method oldstyle completes the handshake with an oldstyle server, which has one
// export without a name.
func (s *handshaker) oldstyle(n negotiated) (negotiated, error) {
	if s.uri.TLS {
		return n, errors.New("the server is too old to support TLS, which the scheme nbds requires")
	}
	if s.uri.Export != "" {
		return n, fmt.Errorf("the server is too old to support export names: found the name %q in the URI, want a URI without a name", s.uri.Export)
	}
	var b [12 + padding]byte
	if err := s.readFull(b[:]); err != nil {
		return n, fmt.Errorf("cannot read the size and the flags of the export: %w", err)
	}
	n.oldstyle, n.size = true, int64(binary.BigEndian.Uint64(b[:]))
	n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(b[10:]))
	return n, nil
}

// exportName completes the handshake with the option EXPORT_NAME. Every newstyle server
// supports this option, but cannot reply to it with an error.
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
		return n, hinted.Error(fmt.Errorf("cannot open export %q: %w", s.uri.Export, err), "check the name of the export: the server may have no export of that name")
	}
	n.size = int64(binary.BigEndian.Uint64(b))
	n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	return n, nil
}

// startTLS negotiates TLS and replaces s.conn by the TLS connection.
func (s *handshaker) startTLS(ctx context.Context, config *tls.Config) error {
	ok, err := s.negotiateOption(nbd.OptStartTLS, nil)
	if err != nil {
		return err
	}
	if !ok {
		return hinted.Error(errors.New("the server does not support TLS, which the scheme nbds requires"), "use nbd:// or nbd+unix:// to copy without TLS: others in the network can then read and change the data")
	}
	t := tls.Client(s.conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", explainTLS(s.uri, config, err))
	}
	s.conn = t
	return nil
}

// negotiateOption sends an option to which the server replies with ACK or an error and
// no other information. It reports whether the server has accepted the option.
func (s *handshaker) negotiateOption(o nbd.Option, data []byte) (bool, error) {
	if err := s.sendOption(o, data); err != nil {
		return false, err
	}
	t, text, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		return violation("reply to %v: found the reply type %v with %d bytes of data, want ACK or an error", o, t, len(data))
	})
	switch {
	case err != nil:
		return false, err
	case t == nbd.RepErrTLSRequired, t == nbd.RepErrShutdown:
		return false, s.refused(o, t, text)
	}
	return t == nbd.RepAck, nil
}

// setContext negotiates the metadata context base:allocation. A refusal is not an error,
// and the extents of the disk are then unknown. If the server refuses because it has no
// export with the name in the URI, it also refuses the next option, which opens the
// export. The user then gets the error for that option.
func (s *handshaker) setContext(n *negotiated) error {
	const o = nbd.OptSetMetaContext
	if err := s.sendOption(o, nbd.AppendMetaContext(nil, s.uri.Export, nbd.BaseAllocation)); err != nil {
		return err
	}
	t, _, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		switch {
		case t != nbd.RepMetaContext:
			return violation("reply to %v: found the reply type %v with %d bytes of data, want META_CONTEXT, ACK or an error", o, t, len(data))
		case len(data) < 4:
			return violation("reply to %v: found META_CONTEXT with %d bytes of data, want at least 4 bytes", o, len(data))
		case string(data[4:]) != nbd.BaseAllocation:
			return violation("reply to %v: found the metadata context %q, want the metadata context %q, which the client requested", o, nbd.Text(data[4:min(len(data), 4+nbd.MaxString)]), nbd.BaseAllocation)
		case n.contexts:
			return violation("reply to %v: found a second META_CONTEXT, want ACK or an error after the first", o)
		}
		n.contexts, n.context = true, binary.BigEndian.Uint32(data)
		return nil
	})
	if t != nbd.RepAck {
		n.contexts = false
	}
	return err
}

// goOption sends an option that asks for information about the export: GO or INFO. The
// option GO also completes the handshake, and the option INFO does not. known is false
// if the server does not support the option.
func (s *handshaker) goOption(n *negotiated, o nbd.Option) (known bool, err error) {
	if err := s.sendOption(o, nbd.AppendGo(nil, s.uri.Export, nbd.InfoBlockSize)); err != nil {
		return false, err
	}
	exported := false
	t, text, err := s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		if t != nbd.RepInfo || len(data) < 2 {
			return violation("reply to %v: found the reply type %v with %d bytes of data, want INFO, ACK or an error", o, t, len(data))
		}
		info, data := nbd.InfoType(binary.BigEndian.Uint16(data)), data[2:]
		switch info {
		case nbd.InfoExport:
			if len(data) != 10 {
				return violation("the information about the export has %d bytes, want 10 bytes", len(data))
			}
			n.size = int64(binary.BigEndian.Uint64(data))
			n.flags = nbd.TransmissionFlags(binary.BigEndian.Uint16(data[8:]))
			exported = true
		case nbd.InfoBlockSize:
			if len(data) != nbd.BlockSizesSize {
				return violation("the information about block sizes has %d bytes, want %d bytes", len(data), nbd.BlockSizesSize)
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
		return false, violation("reply to %v: the server acknowledged the option without sending the size of the export", o)
	}
	return true, nil
}

// The method refused returns the error for an option that the client needs and the
// server has refused. The caller passes the type of the server's reply, and the
// explanation that the server sent as text.
func (s *handshaker) refused(o nbd.Option, t nbd.OptionReplyType, text string) error {
	problem, hint := t.String(), ""
	switch t {
	case nbd.RepErrTLSRequired:
		hint = "use " + withTLS(s.uri)
	case nbd.RepErrUnknown:
		export := nbd.Text([]byte(s.uri.Export))
		names, more := s.listExports()
		if slices.Contains(names, s.uri.Export) {
			problem = fmt.Sprintf("the server has the export %q and did not open it", export)
			hint = "see the server's log or its terminal for the reason why it cannot open the disk"
			break
		}
		problem = fmt.Sprintf("the server has no export %q", export)
		hint = exportsHint(names, more)
	}
	message := fmt.Sprintf("%v: %s", o, problem)
	if text != "" {
		message += ": " + text
	}
	err := errors.New(message)
	if hint == "" {
		return err
	}
	return hinted.Error(err, hint)
}

// listExports returns the names of the first maxHintExports exports of the server, and
// how many more exports it has. It returns no names if the server does not list its
// exports.
func (s *handshaker) listExports() (names []string, more int) {
	const o = nbd.OptList
	if err := s.sendOption(o, nil); err != nil {
		return nil, 0
	}
	// The names are only used in a hint for the user, so an error of readReplies is
	// ignored.
	s.readReplies(o, func(t nbd.OptionReplyType, data []byte) error {
		if t != nbd.RepServer || len(data) < 4 || int64(binary.BigEndian.Uint32(data)) > int64(len(data)-4) {
			return violation("reply to %v: found the reply type %v with %d bytes of data, want SERVER with a name, ACK or an error", o, t, len(data))
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

// readReplies reads the replies to an option up to the last one, which is ACK or an
// error. It calls the function visit with the type and the data of each reply before
// the last one. It returns the type of the last reply and, if that is an error, its
// text.
func (s *handshaker) readReplies(o nbd.Option, visit func(nbd.OptionReplyType, []byte) error) (nbd.OptionReplyType, string, error) {
	for range maxOptionReplies {
		var b [nbd.OptionReplySize]byte
		if err := s.readFull(b[:]); err != nil {
			return 0, "", fmt.Errorf("cannot read the reply to %v: %w", o, err)
		}
		reply, err := nbd.ParseOptionReply(&b)
		if err != nil {
			return 0, "", violation("reply to %v: %w", o, err)
		}
		if reply.Option != o {
			return 0, "", violation("found a reply to the option %v, want a reply to the option %v", reply.Option, o)
		}
		if reply.Len > maxOptionReply {
			return 0, "", violation("reply to %v: found %d bytes of data, want at most %d bytes", o, reply.Len, maxOptionReply)
		}
		data := make([]byte, reply.Len)
		if err := s.readFull(data); err != nil {
			return 0, "", fmt.Errorf("cannot read the reply to %v: %w", o, err)
		}
		switch {
		case reply.Type == nbd.RepAck && len(data) > 0:
			return 0, "", violation("reply to %v: found ACK with %d bytes of data, want none", o, len(data))
		case reply.Type == nbd.RepAck:
			return reply.Type, "", nil
		case reply.Type.IsError():
			text := nbd.Text(data[:min(len(data), nbd.MaxString)])
			return reply.Type, strings.TrimSpace(text), nil
		}
		if err := visit(reply.Type, data); err != nil {
			return 0, "", err
		}
	}
	return 0, "", violation("reply to %v: found %d replies and none of them is ACK or an error, want ACK or an error as the last of at most %d replies", o, maxOptionReplies, maxOptionReplies)
}

// sendOption sends an option with its data.
func (s *handshaker) sendOption(o nbd.Option, data []byte) error {
	return s.send(nbd.AppendOption(nil, o, data))
}

// send writes b to the connection. If that fails because the server has closed a TLS
// connection, send returns the alert that the server sent before, because the alert
// gives the reason.
func (s *handshaker) send(b []byte) error {
	_, err := s.conn.Write(b)
	if secure, ok := s.conn.(*tls.Conn); ok && isClosed(err) {
		// The server may have sent a TLS alert before it closed the connection. Reading
		// returns this alert as an error.
		if _, why := secure.Read(make([]byte, 1)); why != nil {
			return why
		}
	}
	return err
}

// readFull reads exactly len(b) bytes from the server into b.
func (s *handshaker) readFull(b []byte) error {
	_, err := io.ReadFull(s.conn, b)
	return notEOF(err)
}
