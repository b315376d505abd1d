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
// A write deadline set before the call would not limit the time, because crypto/tls replaces
// it by a deadline 5 seconds later (closeNotify in crypto/tls/conn.go). When EndTLS returns,
// the socket may have a write deadline that has passed.
func EndTLS(raw net.Conn, limit time.Duration, sendNotify func() error) error {
	late := time.AfterFunc(limit, func() { raw.SetWriteDeadline(time.Unix(1, 0)) })
	defer late.Stop()
	return sendNotify()
}
