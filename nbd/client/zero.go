package client

import (
	"context"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/nbd"
)

// zeroPiece is the maximum length of one request WRITE_ZEROES or TRIM, in bytes.
const zeroPiece = 128 << 20

// zeros is the data of requests that write zeros. It must not be changed.
var zeros [1 << 20]byte

// The method zero writes zeros to the n bytes at the given offset. For whole blocks it
// uses the first of these ways that the server supports: WRITE_ZEROES with the flag
// FAST_ZERO, WRITE_ZEROES without this flag, or a write of zeros as data. For blocks
// that the range covers only in part, it always writes zeros as data. It does not use
// TRIM, because a trimmed range may read as anything. If noHole is true, the range stays
// allocated.
func (t *target) zero(ctx context.Context, off, n int64, noHole bool) error {
	s := t.server
	head, whole := s.splitBlocks(off, n)
	if head > 0 {
		if err := s.write(zeros[:head], off); err != nil {
			return err
		}
	}
	off, n = off+head, n-head
	tail := n - whole
	for whole > 0 {
		if t.noZeroes.Load() {
			p := zeros[:min(whole, int64(len(zeros)))]
			if ctx.Err() != nil {
				return fmt.Errorf("%s: zero at %d: %w", s.life.Name, off, context.Cause(ctx))
			}
			if err := s.write(p, off); err != nil {
				return err
			}
			off, whole = off+int64(len(p)), whole-int64(len(p))
			continue
		}
		fast := !t.noFast.Load()
		k := &call{cmd: nbd.CmdWriteZeroes, off: off, n: min(whole, t.zeroLimit.Load())}
		if fast {
			k.flags |= nbd.FlagFastZero
		}
		if noHole {
			k.flags |= nbd.FlagNoHole
		}
		err := s.do(ctx, s.pick(), k)
		var server *serverError
		switch most := int64(s.maxPayload()); {
		case err == nil:
			off, whole = off+k.n, whole-k.n
		case !errors.As(err, &server):
			return s.wrap(k, err)
		case fast && (server.errno == nbd.ENOTSUP || server.errno == nbd.EINVAL):
			t.noFast.Store(true)
		case k.n > most && (server.errno == nbd.EOVERFLOW || server.errno == nbd.EINVAL):
			t.zeroLimit.Store(most)
		case server.errno == nbd.ENOTSUP || server.errno == nbd.EINVAL:
			t.noZeroes.Store(true)
		default:
			return s.wrap(k, err)
		}
	}
	if tail > 0 {
		return s.write(zeros[:tail], off)
	}
	return nil
}

// zeroFast zeroes whole blocks if the server can do that faster than it writes zeros
// that are sent as data. Otherwise zeroFast returns errors.ErrUnsupported.
func (d *WritableDisk) zeroFast(ctx context.Context, off, n int64, mayTrim bool) error {
	s := d.server
	if s.flags&nbd.SendFastZero == 0 {
		return errors.ErrUnsupported
	}
	flags := nbd.FlagFastZero
	if !mayTrim {
		flags |= nbd.FlagNoHole
	}
	return d.doPieces(ctx, off, n, &call{cmd: nbd.CmdWriteZeroes, flags: flags})
}
