package nbd

import (
	"net"
	"time"
)

// EndTLS calls end, which is the Close or CloseWrite of a *tls.Conn over raw and sends
// close_notify. If the peer does not read, end fails after limit. A write deadline set
// before the call would not have this effect, because crypto/tls replaces it by a
// deadline 5 seconds later (closeNotify in crypto/tls/conn.go). EndTLS may leave raw
// with a write deadline that has passed.
func EndTLS(raw net.Conn, limit time.Duration, end func() error) error {
	late := time.AfterFunc(limit, func() { raw.SetWriteDeadline(time.Unix(1, 0)) })
	defer late.Stop()
	return end()
}
