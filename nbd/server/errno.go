package server

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

// errnoOf returns the NBD error number that describes err best, or EIO if no other number
// fits.
func errnoOf(err error) nbd.Errno {
	var own nbd.Errno
	var system unix.Errno
	switch {
	case errors.As(err, &own):
		// In this case, the disk is itself an export of another NBD server, and err has
		// the error number that the other server sent. EPERM, ENOMEM and ENOSPC are
		// passed on. All other error numbers become EIO: EINVAL, EOVERFLOW and ENOTSUP
		// because the request of the client is valid, and ESHUTDOWN because this server
		// does not shut down.
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
