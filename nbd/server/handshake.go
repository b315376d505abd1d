package server

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxOptions is how many options a client may send in one handshake.
	maxOptions = 256
	// maxOption is the maximum length, in bytes, of the data of an option that the
	// server accepts. This is enough for the longest name and several long queries.
	maxOption = 4 * nbd.MaxString
	// maxSkip is the maximum length, in bytes, of the data of an option that is
	// skipped, so that the option can be refused. Longer data end the connection.
	maxSkip = 32 << 20
	// padding is the number of zero bytes that follow the reply to EXPORT_NAME if
	// the client did not negotiate NoZeroes.
	padding = 124
	// allocationDepth is the name of the metadata context of qemu that reports which
	// image of a chain holds an extent.
	allocationDepth = "qemu:allocation-depth"
)

// The method handshake performs the handshake as described in "Newstyle negotiation" of
// proto.md. ready is true if the transmission phase follows, and false if the client
// has disconnected.
//
// The connection is read without a buffer. Otherwise bytes that an attacker sent in
// plain text after STARTTLS could be taken for bytes that the client encrypted.
func (c *conn) handshake() (ready bool, err error) {
	c.setHandshakeDeadline(time.Now().Add(c.s.o.Handshake))
	greeting := binary.BigEndian.AppendUint64(nil, nbd.Magic)
	greeting = binary.BigEndian.AppendUint64(greeting, nbd.OptionMagic)
	greeting = binary.BigEndian.AppendUint16(greeting, uint16(nbd.FixedNewstyle|nbd.NoZeroes))
	if _, err := c.net.Write(greeting); err != nil {
		return false, nil // the client has disconnected: it only tested whether a server listens
	}
	var b [4]byte
	if _, err := io.ReadFull(c.net, b[:]); err != nil {
		if err == io.EOF {
			return false, nil
		}
		return false, fmt.Errorf("cannot read the flags of the client: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(nbd.FixedNewstyle|nbd.NoZeroes) != 0 {
		return false, fmt.Errorf("client flags: found %#x, want no flags except %#x", flags, uint32(nbd.FixedNewstyle|nbd.NoZeroes))
	}
	c.flags = nbd.HandshakeFlags(flags)
	for range maxOptions {
		option, data, err := c.nextOption()
		if err != nil {
			if err == io.EOF {
				return false, nil
			}
			return false, err
		}
		ready, err = c.answer(option, data)
		if err == errAborted {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("%v: %w", option, err)
		}
		if ready {
			c.setHandshakeDeadline(time.Time{})
			return true, nil
		}
	}
	return false, fmt.Errorf("the client sent %d options without choosing an export", maxOptions)
}

// errAborted says that the client ended the handshake with ABORT.
var errAborted = errors.New("the client ended the handshake")

// optionData is the data of an option in the handshake.
type optionData struct {
	b       []byte
	tooLong bool // the data were longer than maxOption and were skipped
}

// nextOption reads the next option. It returns io.EOF if the client closed the connection
// between two options.
func (c *conn) nextOption() (nbd.Option, optionData, error) {
	var h [16]byte
	if _, err := io.ReadFull(c.net, h[:]); err != nil {
		if err == io.EOF {
			return 0, optionData{}, err
		}
		return 0, optionData{}, fmt.Errorf("cannot read the next option: %w", err)
	}
	if m := binary.BigEndian.Uint64(h[:]); m != nbd.OptionMagic {
		return 0, optionData{}, fmt.Errorf("an option begins with %#016x, want the option magic %#016x", m, uint64(nbd.OptionMagic))
	}
	option, n := nbd.Option(binary.BigEndian.Uint32(h[8:])), binary.BigEndian.Uint32(h[12:])
	if n > maxSkip {
		return 0, optionData{}, fmt.Errorf("the option %v has %d bytes of data, want at most %d bytes", option, n, maxSkip)
	}
	var d optionData
	var err error
	if n > maxOption {
		d.tooLong = true
		_, err = io.CopyN(io.Discard, c.net, int64(n))
	} else {
		d.b, err = c.optionData(int(n))
	}
	if err != nil {
		return 0, optionData{}, fmt.Errorf("cannot read the %d bytes of data of the option %v: %w", n, option, err)
	}
	return option, d, nil
}

// optionData reads the n bytes of data of an option. It allocates memory only as data
// arrive. Otherwise many clients could exhaust the memory by announcing long data and
// sending none.
func (c *conn) optionData(n int) ([]byte, error) {
	const step = 512
	b := make([]byte, 0, min(n, step))
	for len(b) < n {
		at := len(b)
		b = append(b, make([]byte, min(n-at, max(at, step)))...)
		if _, err := io.ReadFull(c.net, b[at:]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// The method answer processes an option and sends the replies to it. ready is true if
// the transmission phase follows. An error ends the connection.
func (c *conn) answer(o nbd.Option, d optionData) (ready bool, err error) {
	secure := c.net != c.base
	switch {
	case o == nbd.OptAbort:
		// The data of ABORT are ignored. It does not matter if the reply cannot
		// be sent, since the client may close the connection without waiting
		// for it.
		_ = c.sendReply(o, nbd.RepAck, nil)
		return false, errAborted
	case o == nbd.OptExportName:
		// The protocol has no error reply for EXPORT_NAME. Therefore each error
		// closes the connection.
		if c.s.o.TLSMode == TLSRequire && !secure {
			return false, errors.New("the client does not use TLS, which is required")
		}
		if d.tooLong {
			return false, fmt.Errorf("the name of the export has more than %d bytes, want at most %d bytes", maxOption, nbd.MaxString)
		}
		return true, c.exportName(string(d.b))
	case c.flags&nbd.FixedNewstyle == 0:
		return false, c.refuse(o, nbd.RepErrInvalid, "a client without fixed newstyle may only send EXPORT_NAME")
	case c.s.o.TLSMode == TLSRequire && !secure && o != nbd.OptStartTLS:
		return false, c.refuse(o, nbd.RepErrTLSRequired, "TLS is required")
	}
	switch o {
	case nbd.OptStartTLS:
		return false, c.startTLS(d, secure)
	case nbd.OptList, nbd.OptInfo, nbd.OptGo, nbd.OptStructuredReply, nbd.OptListMetaContext, nbd.OptSetMetaContext:
	default:
		return false, c.refuse(o, nbd.RepErrUnsupported, "unknown option")
	}
	if d.tooLong {
		if o == nbd.OptSetMetaContext {
			c.contexts = nil
		}
		return false, c.refuse(o, nbd.RepErrTooBig, fmt.Sprintf("the option has more than %d bytes of data", maxOption))
	}
	switch o {
	case nbd.OptList:
		return false, c.list(d.b)
	case nbd.OptStructuredReply:
		switch {
		case len(d.b) > 0:
			return false, c.refuse(o, nbd.RepErrInvalid, "this option has no data")
		case c.structured:
			return false, c.refuse(o, nbd.RepErrInvalid, "structured replies are already negotiated")
		}
		c.structured = true
		return false, c.sendReply(o, nbd.RepAck, nil)
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		return false, c.negotiateContexts(o, d.b)
	}
	return c.info(o, d.b)
}

// sendReply sends a reply to an option.
func (c *conn) sendReply(o nbd.Option, t nbd.OptionReplyType, data []byte) error {
	_, err := c.net.Write(append(nbd.OptionReply{Option: o, Type: t, Len: uint32(len(data))}.Append(nil), data...))
	return err
}

// refuse sends an error reply with a text to an option.
func (c *conn) refuse(o nbd.Option, t nbd.OptionReplyType, why string) error {
	return c.sendReply(o, t, []byte(why))
}

// selectExport makes the export with the given name the export of the connection. The
// time that the opening of its disk takes does not count against the time limit of the
// handshake. If the export cannot be opened, selectExport returns the type and the text
// of an error reply.
func (c *conn) selectExport(name string) (wrong nbd.OptionReplyType, why string) {
	c.mu.Lock()
	deadline := c.deadline
	c.mu.Unlock()
	left := time.Until(deadline)
	e, err := c.s.acquire(c.ctx, name)
	c.setHandshakeDeadline(time.Now().Add(left))
	switch {
	case err == nil:
	case errors.Is(err, ErrUnknownExport):
		return nbd.RepErrUnknown, "no such export"
	case errors.Is(err, ErrShutdown), c.ending.Load():
		return nbd.RepErrShutdown, "the server is shutting down"
	default:
		c.s.o.Log.Error("cannot open export", "export", name, "error", err)
		return nbd.RepErrUnknown, "the export cannot be opened: the server's log says why"
	}
	if c.export != nil {
		c.s.release(c.export)
	}
	c.export = e
	if c.contextsExport != e.Name {
		c.contexts = nil
	}
	return 0, ""
}

// validName reports whether b is a valid name, as the section "Strings" of proto.md
// defines it.
func validName(b string) bool {
	return len(b) <= nbd.MaxString && utf8.ValidString(b) && !strings.Contains(b, "\x00")
}

// exportName answers the option EXPORT_NAME, after which the transmission phase begins.
func (c *conn) exportName(name string) error {
	if !validName(name) {
		return errors.New("invalid export name: want UTF-8 without NUL, at most 4096 bytes")
	}
	if t, why := c.selectExport(name); t != 0 {
		return fmt.Errorf("export %q: %s", name, why)
	}
	c.s.clientEntered(c)
	b := binary.BigEndian.AppendUint64(nil, uint64(c.export.size))
	b = binary.BigEndian.AppendUint16(b, uint16(c.export.facts.flags(c.structured)))
	if c.flags&nbd.NoZeroes == 0 {
		b = append(b, make([]byte, padding)...)
	}
	_, err := c.net.Write(b)
	return err
}

// startTLS answers the option STARTTLS and performs the TLS handshake.
func (c *conn) startTLS(d optionData, secure bool) error {
	const o = nbd.OptStartTLS
	switch {
	case c.s.o.TLSMode == TLSOff:
		return c.refuse(o, nbd.RepErrUnsupported, "this server does not use TLS")
	case d.tooLong || len(d.b) > 0:
		return c.refuse(o, nbd.RepErrInvalid, "this option has no data")
	case secure:
		return c.refuse(o, nbd.RepErrInvalid, "the connection already uses TLS")
	}
	if err := c.sendReply(o, nbd.RepAck, nil); err != nil {
		return err
	}
	t := tls.Server(c.base, c.s.o.TLS)
	if err := t.HandshakeContext(c.ctx); err != nil {
		return err
	}
	// Options that were negotiated in plain text are reset, because an attacker may
	// have sent them.
	c.net, c.structured, c.contexts, c.contextsExport = t, false, nil, ""
	if c.export != nil {
		c.s.release(c.export)
		c.export = nil
	}
	return nil
}

// The method list answers the option LIST with the names and descriptions of all
// exports.
func (c *conn) list(data []byte) error {
	const o = nbd.OptList
	if len(data) > 0 {
		return c.refuse(o, nbd.RepErrInvalid, "this option has no data")
	}
	list, err := c.s.exports.List(c.ctx)
	if err != nil {
		c.s.o.Log.Error("cannot list exports", "error", err)
		return c.refuse(o, nbd.RepErrPolicy, "the exports cannot be listed: the server's log says why")
	}
	for _, e := range list {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		b = append(append(b, e.Name...), e.Description...)
		if err := c.sendReply(o, nbd.RepServer, b); err != nil {
			return err
		}
	}
	return c.sendReply(o, nbd.RepAck, nil)
}

// The type fields decodes the data of an option, with one call of a method for each
// value. If the data are too short for a value, the method sets the field bad to true
// and returns a zero value.
type fields struct {
	b   []byte // data that were not decoded yet
	bad bool
}

// take returns the next n bytes of the data of the option.
func (f *fields) take(n uint64) []byte {
	if n > uint64(len(f.b)) {
		f.b, f.bad = nil, true
		return nil
	}
	b := f.b[:n]
	f.b = f.b[n:]
	return b
}

func (f *fields) uint16() uint16 {
	if b := f.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (f *fields) uint32() uint32 {
	if b := f.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (f *fields) text() string { return string(f.take(uint64(f.uint32()))) }

// The method info answers the options INFO and GO with information about an export.
// After the option GO, ready is true, and the transmission phase begins.
func (c *conn) info(o nbd.Option, data []byte) (ready bool, err error) {
	f := fields{b: data}
	name := f.text()
	wanted := fields{b: f.take(2 * uint64(f.uint16()))}
	switch {
	case f.bad || len(f.b) > 0:
		return false, c.refuse(o, nbd.RepErrInvalid, "the lengths in the option are inconsistent")
	case !validName(name):
		return false, c.refuse(o, nbd.RepErrInvalid, "invalid export name: want UTF-8 without NUL, at most 4096 bytes")
	}
	if t, why := c.selectExport(name); t != 0 {
		return false, c.refuse(o, t, why)
	}
	if o == nbd.OptGo {
		c.s.clientEntered(c)
	}
	b := binary.BigEndian.AppendUint16(nil, uint16(nbd.InfoExport))
	b = binary.BigEndian.AppendUint64(b, uint64(c.export.size))
	b = binary.BigEndian.AppendUint16(b, uint16(c.export.facts.flags(c.structured)))
	if err := c.sendReply(o, nbd.RepInfo, b); err != nil {
		return false, err
	}
	var sent [nbd.InfoBlockSize + 1]bool
	for len(wanted.b) > 0 {
		t := nbd.InfoType(wanted.uint16())
		if t > nbd.InfoBlockSize || sent[t] {
			continue
		}
		sent[t] = true
		b := binary.BigEndian.AppendUint16(nil, uint16(t))
		switch t {
		case nbd.InfoName:
			b = append(b, c.export.Name...)
		case nbd.InfoDescription:
			if c.export.Description == "" {
				continue
			}
			b = append(b, c.export.Description...)
		case nbd.InfoBlockSize:
			b = c.export.sizes.Append(b)
		default:
			continue // the information of type InfoExport was sent before
		}
		if err := c.sendReply(o, nbd.RepInfo, b); err != nil {
			return false, err
		}
	}
	return o == nbd.OptGo, c.sendReply(o, nbd.RepAck, nil)
}

// negotiateContexts answers the options LIST_META_CONTEXT and SET_META_CONTEXT.
func (c *conn) negotiateContexts(o nbd.Option, data []byte) error {
	set := o == nbd.OptSetMetaContext
	if set {
		c.contexts, c.contextsExport = nil, "" // SET_META_CONTEXT removes the earlier contexts even if it fails
	}
	if !c.structured {
		return c.refuse(o, nbd.RepErrInvalid, "structured replies are not negotiated")
	}
	f := fields{b: data}
	name := f.text()
	var queries []string
	count := f.uint32()
	for range count {
		if f.bad {
			break
		}
		queries = append(queries, f.text())
	}
	switch {
	case f.bad || len(f.b) > 0:
		return c.refuse(o, nbd.RepErrInvalid, "the lengths in the option are inconsistent")
	case !validName(name):
		return c.refuse(o, nbd.RepErrInvalid, "invalid export name: want UTF-8 without NUL, at most 4096 bytes")
	}
	for _, q := range queries {
		if !validName(q) {
			return c.refuse(o, nbd.RepErrInvalid, "invalid query: want UTF-8 without NUL, at most 4096 bytes")
		}
	}
	if t, why := c.selectExport(name); t != 0 {
		return c.refuse(o, t, why)
	}
	var chosen []metaContext
	for id, m := range c.export.contexts() {
		m.id = uint32(id) + 1
		if m.matches(queries, !set) {
			chosen = append(chosen, m)
		}
	}
	if set {
		c.contexts, c.contextsExport = chosen, c.export.Name
	}
	for _, m := range chosen {
		id := m.id
		if !set {
			id = 0
		}
		if err := c.sendReply(o, nbd.RepMetaContext, append(binary.BigEndian.AppendUint32(nil, id), m.name...)); err != nil {
			return err
		}
	}
	return c.sendReply(o, nbd.RepAck, nil)
}

// serveTLS returns a copy of config that requires TLS 1.2 or later.
func serveTLS(config *tls.Config) *tls.Config {
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	return config
}
