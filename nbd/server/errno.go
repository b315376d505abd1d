package server

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

// errnoOf returns the error number of the protocol that is nearest to err. It is EIO
// where no other fits.
func errnoOf(err error) nbd.Errno {
	var own nbd.Errno
	var system unix.Errno
	switch {
	case errors.As(err, &own):
		// The disk is an NBD client, and err comes from the server of that client.
		// EINVAL, EOVERFLOW and ENOTSUP are not passed on, since the request was
		// checked before, and neither is ESHUTDOWN, since this server does not shut
		// down.
		switch own {
		case nbd.EPERM, nbd.ENOMEM, nbd.ENOSPC:
			return own
		}
		return nbd.EIO
	case errors.As(err, &system):
		switch system {
		case unix.EPERM, unix.EACCES, unix.EROFS:
			return nbd.EPERM
		case unix.ENOSPC, unix.EDQUOT, unix.EFBIG:
			return nbd.ENOSPC
		case unix.ENOMEM:
			return nbd.ENOMEM
		}
	case errors.Is(err, fs.ErrPermission):
		return nbd.EPERM
	}
	return nbd.EIO
}
