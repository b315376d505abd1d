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
	// maxOptions is how many options a client may send.
	maxOptions = 256
	// maxOption is the most bytes of an option that are looked at: a name and a
	// few queries at their longest.
	maxOption = 4 * nbd.MaxString
	// maxSkip is the most bytes of an option that are skipped, to refuse it in
	// order.
	maxSkip = 32 << 20
	// padding is what follows the flags for clients that want no NoZeroes.
	padding = 124
	// allocationDepth is qemu's context for chains of images: which one has it.
	allocationDepth = "qemu:allocation-depth"
)

// handshake negotiates, by "Newstyle negotiation" of proto.md. It is ready when
// the client went on to the transmission. It reads no byte more than it needs:
// what came in plain text behind STARTTLS must not be taken for the client's.
func (c *conn) handshake() (ready bool, err error) {
	c.setHandshakeDeadline(time.Now().Add(c.s.o.Handshake))
	greeting := binary.BigEndian.AppendUint64(nil, nbd.Magic)
	greeting = binary.BigEndian.AppendUint64(greeting, nbd.OptionMagic)
	greeting = binary.BigEndian.AppendUint16(greeting, uint16(nbd.FixedNewstyle|nbd.NoZeroes))
	if _, err := c.net.Write(greeting); err != nil {
		return false, nil // a client that only looked whether there is a server
	}
	var b [4]byte
	if _, err := io.ReadFull(c.net, b[:]); err != nil {
		if err == io.EOF {
			return false, nil
		}
		return false, fmt.Errorf("client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b[:])
	if flags&^uint32(nbd.FixedNewstyle|nbd.NoZeroes) != 0 {
		return false, fmt.Errorf("client flags: found %#x, want at most %#x", flags, uint32(nbd.FixedNewstyle|nbd.NoZeroes))
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
	return false, fmt.Errorf("%d options and no export chosen", maxOptions)
}

// errLeft says that the client ended the handshake.
var errAborted = errors.New("the client has left")

// optionData is what came with an option.
type optionData struct {
	b       []byte
	tooLong bool // and was skipped
}

func (c *conn) nextOption() (nbd.Option, optionData, error) {
	var h [16]byte
	if _, err := io.ReadFull(c.net, h[:]); err != nil {
		if err == io.EOF {
			return 0, optionData{}, err
		}
		return 0, optionData{}, fmt.Errorf("next option: %w", err)
	}
	if m := binary.BigEndian.Uint64(h[:]); m != nbd.OptionMagic {
		return 0, optionData{}, fmt.Errorf("option magic: found %#016x, want %#016x", m, uint64(nbd.OptionMagic))
	}
	option, n := nbd.Option(binary.BigEndian.Uint32(h[8:])), binary.BigEndian.Uint32(h[12:])
	if n > maxSkip {
		return 0, optionData{}, fmt.Errorf("%v: %d bytes, want at most %d", option, n, maxSkip)
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
		return 0, optionData{}, fmt.Errorf("%v of %d bytes: %w", option, n, err)
	}
	return option, d, nil
}

// optionData reads the n bytes of an option. It takes memory as they come: many
// clients can announce much and send nothing.
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

// answer answers an option. An error ends the connection.
func (c *conn) answer(o nbd.Option, d optionData) (ready bool, err error) {
	secure := c.net != c.base
	switch {
	case o == nbd.OptAbort:
		// Whatever came with it; the client need not wait for the answer.
		_ = c.sendReply(o, nbd.RepAck, nil)
		return false, errAborted
	case o == nbd.OptExportName:
		// There is no way to tell an error but to close the connection.
		if c.s.o.TLSMode == TLSRequire && !secure {
			return false, errors.New("without TLS, which is required")
		}
		if d.tooLong {
			return false, errors.New("name too long")
		}
		return true, c.exportName(string(d.b))
	case c.flags&nbd.FixedNewstyle == 0:
		return false, c.refuse(o, nbd.RepErrInvalid, "only EXPORT_NAME without fixed newstyle")
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
		return false, c.refuse(o, nbd.RepErrTooBig, fmt.Sprintf("more than %d bytes", maxOption))
	}
	switch o {
	case nbd.OptList:
		return false, c.list(d.b)
	case nbd.OptStructuredReply:
		switch {
		case len(d.b) > 0:
			return false, c.refuse(o, nbd.RepErrInvalid, "data with an option that has none")
		case c.structured:
			return false, c.refuse(o, nbd.RepErrInvalid, "structured replies are negotiated already")
		}
		c.structured = true
		return false, c.sendReply(o, nbd.RepAck, nil)
	case nbd.OptListMetaContext, nbd.OptSetMetaContext:
		return false, c.negotiateContexts(o, d.b)
	}
	return c.info(o, d.b)
}

// tell sends a reply to an option.
func (c *conn) sendReply(o nbd.Option, t nbd.OptionReplyType, data []byte) error {
	_, err := c.net.Write(append(nbd.OptionReply{Option: o, Type: t, Len: uint32(len(data))}.Append(nil), data...))
	return err
}

func (c *conn) refuse(o nbd.Option, t nbd.OptionReplyType, why string) error {
	return c.sendReply(o, t, []byte(why))
}

// use opens the export that the client calls name, for this connection until
// another is used. The time that takes does not count for the handshake. The
// reply says what is wrong, if something is.
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
		c.s.o.Log.Error("open", "export", name, "error", err)
		return nbd.RepErrUnknown, "the export can't be opened: the server's log says why"
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

// goodName reports whether b can be a name, by "Strings" of proto.md.
func validName(b string) bool {
	return len(b) <= nbd.MaxString && utf8.ValidString(b) && !strings.Contains(b, "\x00")
}

func (c *conn) exportName(name string) error {
	if !validName(name) {
		return errors.New("a name that is none")
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

func (c *conn) startTLS(d optionData, secure bool) error {
	const o = nbd.OptStartTLS
	switch {
	case c.s.o.TLSMode == TLSOff:
		return c.refuse(o, nbd.RepErrUnsupported, "no TLS")
	case d.tooLong || len(d.b) > 0:
		return c.refuse(o, nbd.RepErrInvalid, "data with an option that has none")
	case secure:
		return c.refuse(o, nbd.RepErrInvalid, "TLS is on already")
	}
	if err := c.sendReply(o, nbd.RepAck, nil); err != nil {
		return err
	}
	t := tls.Server(c.base, c.s.o.TLS)
	if err := t.HandshakeContext(c.ctx); err != nil {
		return err
	}
	// What was agreed on in plain text may have been someone else's wish.
	c.net, c.structured, c.contexts, c.contextsExport = t, false, nil, ""
	if c.export != nil {
		c.s.release(c.export)
		c.export = nil
	}
	return nil
}

func (c *conn) list(data []byte) error {
	const o = nbd.OptList
	if len(data) > 0 {
		return c.refuse(o, nbd.RepErrInvalid, "data with an option that has none")
	}
	list, err := c.s.exports.List(c.ctx)
	if err != nil {
		c.s.o.Log.Error("list of exports", "error", err)
		return c.refuse(o, nbd.RepErrPolicy, "the list can't be had: the server's log says why")
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

// fields takes an option's data apart. After too little it is bad, and returns
// zeros.
type fields struct {
	b   []byte
	bad bool
}

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

// info answers INFO and GO.
func (c *conn) info(o nbd.Option, data []byte) (ready bool, err error) {
	f := fields{b: data}
	name := f.text()
	wanted := fields{b: f.take(2 * uint64(f.uint16()))}
	switch {
	case f.bad || len(f.b) > 0:
		return false, c.refuse(o, nbd.RepErrInvalid, "the lengths do not fit together")
	case !validName(name):
		return false, c.refuse(o, nbd.RepErrInvalid, "name: want UTF-8 without NUL, at most 4096 bytes")
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
			continue // InfoExport came already
		}
		if err := c.sendReply(o, nbd.RepInfo, b); err != nil {
			return false, err
		}
	}
	return o == nbd.OptGo, c.sendReply(o, nbd.RepAck, nil)
}

// negotiateContexts answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (c *conn) negotiateContexts(o nbd.Option, data []byte) error {
	set := o == nbd.OptSetMetaContext
	if set {
		c.contexts, c.contextsExport = nil, "" // also when it fails
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
		return c.refuse(o, nbd.RepErrInvalid, "the lengths do not fit together")
	case !validName(name):
		return c.refuse(o, nbd.RepErrInvalid, "name: want UTF-8 without NUL, at most 4096 bytes")
	}
	for _, q := range queries {
		if !validName(q) {
			return c.refuse(o, nbd.RepErrInvalid, "query: want UTF-8 without NUL, at most 4096 bytes")
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

// serveTLS returns the configuration that connections use.
func serveTLS(config *tls.Config) *tls.Config {
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	return config
}
