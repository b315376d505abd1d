package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/nbd"
)

// lookTimeout is how long Check waits for a server.
const checkTimeout = 5 * time.Second

// writable refuses an export that can't hold a disk of size bytes.
func (n *negotiated) checkWritable(name string, size int64) error {
	if n.flags&nbd.ReadOnly != 0 {
		return &hinted{fmt.Errorf("%s: %w", name, ErrReadOnly), "start the server without -r or --read-only, or vddkcp export with --rw"}
	}
	if n.size < size {
		return &hinted{
			fmt.Errorf("%s is too small: it has %d bytes (%s), and the disk %d (%s)", name, n.size, bytesize.Format(n.size), size, bytesize.Format(size)),
			fmt.Sprintf("an NBD export can't grow: let the server have one of at least %d bytes", size),
		}
	}
	return nil
}

// Check looks whether Create could write a disk of size bytes to the export that
// uri names, without opening it: the server sees a connection that asks (by INFO)
// and goes, which none takes for the one client that it waits for. It returns
// errors.ErrUnsupported where a server tells nothing in that way, or nothing at
// all within some seconds: one that is busy with its only client does not.
func Check(ctx context.Context, uri *nbd.URI, size int64, o Options) error {
	name := nbd.Text([]byte(uri.String()))
	n, err := queryInfo(ctx, uri, min(checkTimeout, cmp.Or(o.Timeout, defaultTimeout)))
	if err == nil && n.size == 0 { // nbd-server's INFO says so of every export
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

// ask learns of an export by a connection of its own.
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
