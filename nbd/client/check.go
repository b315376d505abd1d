package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/nbd"
)

// checkTimeout is how long Check waits for the answer of a server.
const checkTimeout = 5 * time.Second

// checkWritable returns an error if the export is read-only, or smaller than a disk of the
// given size in bytes.
func (n *negotiated) checkWritable(name string, size int64) error {
	if n.flags&nbd.ReadOnly != 0 {
		return hinted.Error(fmt.Errorf("%s: %w", name, ErrReadOnly), "start the server without -r or --read-only, or vddkcp export with --rw")
	}
	if n.size < size {
		return hinted.Error(
			fmt.Errorf("%s is too small: the export has %d bytes (%s), and the disk has %d bytes (%s)", name, n.size, bytesize.Format(n.size), size, bytesize.Format(size)),
			fmt.Sprintf("export a disk of at least %d bytes: an NBD export cannot grow", size),
		)
	}
	return nil
}

// Check returns an error if Create cannot write a disk of the given size, in bytes, to
// the export with the given URI. It does not open the export. It only sends the option
// INFO and disconnects. Some servers serve a single client and then exit. They do not
// count this connection as their single client, and continue to wait for a client that
// opens the export.
//
// The error wraps errors.ErrUnsupported if the server does not support INFO or does not
// answer within 5 seconds. A server that accepts only one client at a time does not
// answer while it serves another client.
func Check(ctx context.Context, uri *nbd.URI, size int64, o Options) error {
	name := nbd.Text([]byte(uri.String()))
	n, err := queryInfo(ctx, uri, min(checkTimeout, cmp.Or(o.Timeout, defaultTimeout)))
	if err == nil && n.size == 0 { // nbd-server reports the size 0 for every export
		err = errNoInfo
	}
	if errors.Is(err, errNoInfo) || errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return n.checkWritable(name, size)
}

// queryInfo asks the server for information about an export with the option INFO. It opens
// a connection for this and closes it afterwards.
func queryInfo(ctx context.Context, uri *nbd.URI, limit time.Duration) (negotiated, error) {
	config, err := tlsConfig(uri)
	if err != nil {
		return negotiated{}, err
	}
	ctx, cancel := withLimit(ctx, limit)
	defer cancel()
	raw, err := dialSocket(ctx, uri)
	if err != nil {
		return negotiated{}, err
	}
	defer raw.Close()
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	s := &handshaker{conn: raw, uri: uri, infoOnly: true}
	_, n, err := s.run(ctx, config)
	switch {
	case err != nil && ctx.Err() != nil:
		return n, context.Cause(ctx)
	case err != nil:
		return n, err
	case n.oldstyle:
		s.send(nbd.Request{Type: nbd.CmdDisconnect}.Append(nil))
	default:
		s.sendOption(nbd.OptAbort, nil)
	}
	return n, nil
}
