package nbd

import (
	"net"
	"time"
)

// EndTLS ends a TLS connection over the given socket. It does this with the function
// sendNotify, which sends the TLS alert close_notify. This function is the method Close or
// CloseWrite of the *tls.Conn. If the peer does not read, sendNotify fails after the given
// time limit.
//
// EndTLS sets the write deadline of the socket when the time limit has passed. A
// deadline that is set before the call of sendNotify would have no effect, because
// crypto/tls replaces it by a deadline of its own, 5 seconds after the call
// (closeNotify in crypto/tls/conn.go). When EndTLS returns, the socket may have a write
// deadline that has passed.
func EndTLS(raw net.Conn, limit time.Duration, sendNotify func() error) error {
	late := time.AfterFunc(limit, func() { raw.SetWriteDeadline(time.Unix(1, 0)) })
	defer late.Stop()
	return sendNotify()
}
