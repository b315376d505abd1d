package nbd

import (
	"net"
	"time"
)

// EndTLS calls end, the Close or CloseWrite of a *tls.Conn over raw, which sends
// close_notify. A peer that does not read makes its write fail after limit at the
// latest. A deadline that is set before the call would not do: crypto/tls replaces
// it by one of its own, 5 seconds later (closeNotify in crypto/tls/conn.go). The
// write deadline of raw may have passed afterwards.
func EndTLS(raw net.Conn, limit time.Duration, end func() error) error {
	late := time.AfterFunc(limit, func() { raw.SetWriteDeadline(time.Unix(1, 0)) })
	defer late.Stop()
	return end()
}
