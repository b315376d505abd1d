package nfc

import (
	"encoding/binary"
	"io"
	"net"
)

// tlsHeader is the size of the header of a TLS record: its type, its version, and the length of
// what follows (RFC 8446, section 5.1).
const tlsHeader = 5

// records is a connection with TLS records of which no Read returns bytes of more than one record.
// Package crypto/tls reads as many bytes as the connection returns. Without this type, it could
// read bytes that follow the last record of the first TLS session, and they would be lost.
type records struct {
	net.Conn
	head [tlsHeader]byte
	have int // bytes of head that were read
	left int // bytes of the record that were not read yet
}

// Read implements net.Conn.
func (r *records) Read(p []byte) (int, error) {
	if r.left > 0 {
		n, err := r.Conn.Read(p[:min(len(p), r.left)])
		r.left -= n
		return n, err
	}
	n, err := r.Conn.Read(p[:min(len(p), tlsHeader-r.have)])
	copy(r.head[r.have:], p[:n])
	if r.have += n; r.have == tlsHeader {
		r.have, r.left = 0, int(binary.BigEndian.Uint16(r.head[3:]))
	}
	return n, err
}

// maxSkipped is the largest number of records of the first TLS session that afterTLS skips.
const maxSkipped = 4

// These are types of TLS records.
const (
	tlsAlert       = 0x15
	tlsApplication = 0x17
)

// afterTLS is the connection after the first TLS session was left. The host should have sent nothing
// more in that session. If it has sent a message that ends the session, afterTLS skips this message.
// It consists of TLS records, which come before the first bytes of NFC or of the second TLS session. A
// plain alert is not skipped. It belongs to the second TLS session, because all alerts of the first
// session are encrypted.
type afterTLS struct {
	net.Conn
	skipped func(head []byte)

	head  []byte // bytes that were read and not returned yet
	begun bool   // the first bytes of NFC, or of the second TLS session, were found
}

// Read implements net.Conn.
func (a *afterTLS) Read(p []byte) (int, error) {
	if !a.begun {
		if err := a.skip(); err != nil {
			return 0, err
		}
	}
	if len(a.head) > 0 {
		n := copy(p, a.head)
		a.head = a.head[n:]
		return n, nil
	}
	return a.Conn.Read(p)
}

// The method skip reads the records that belong to the first TLS session, and the bytes that follow them.
func (a *afterTLS) skip() error {
	for n := 0; ; n++ {
		var head [tlsHeader]byte
		got, err := io.ReadFull(a.Conn, head[:])
		size := int(binary.BigEndian.Uint16(head[3:]))
		old := (head[0] == tlsAlert || head[0] == tlsApplication) && head[1] == 3 && head[2] == 3 && size != 2
		switch {
		case err == io.ErrUnexpectedEOF: // the other layer reports that the connection has ended
		case err != nil:
			return err
		case old && n < maxSkipped:
			a.skipped(head[:])
			if _, err := io.CopyN(io.Discard, a.Conn, int64(size)); err != nil {
				return lost(err)
			}
			continue
		}
		a.head, a.begun = head[:got], true
		return nil
	}
}
