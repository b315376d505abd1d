package server

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
)

// errnoOf returns which of the protocol's error numbers says what err means.
func errnoOf(err error) nbd.Errno {
	var own nbd.Errno
	var system unix.Errno
	switch {
	case errors.As(err, &own):
		// A disk that is an NBD client gives what its server gave. What is wrong
		// with the client's request was found before the disk was asked, and it
		// is that server that shuts down, not this one.
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
