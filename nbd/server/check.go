package server

import "github.com/vddkcp/vddkcp/nbd"

// The method check returns an error number and a text if a request is invalid: if its
// command or a flag is unknown, if its range is not in the export, or if the export
// does not allow the command. The error number is 0 if the request is valid.
func (o *op) check() (nbd.Errno, string) {
	e := o.c.export
	allowed := nbd.FlagFUA // proto.md allows FUA with every command
	writes := false
	beyond := nbd.EINVAL
	switch o.Type {
	case nbd.CmdRead:
		if o.c.structured {
			allowed |= nbd.FlagDF
		}
	case nbd.CmdWrite:
		writes, beyond = true, nbd.ENOSPC
	case nbd.CmdFlush, nbd.CmdCache:
	case nbd.CmdTrim:
		writes = true
	case nbd.CmdWriteZeroes:
		writes, beyond = true, nbd.ENOSPC
		allowed |= nbd.FlagNoHole | nbd.FlagFastZero
	case nbd.CmdBlockStatus:
		allowed |= nbd.FlagReqOne
	default:
		return nbd.EINVAL, "unknown command"
	}
	switch size := uint64(e.size); {
	case writes && e.writable == nil:
		return nbd.EPERM, "the export is read-only"
	case o.Flags&^allowed != 0:
		return nbd.EINVAL, "the command does not support these flags"
	case o.Type == nbd.CmdFlush && (o.Off != 0 || o.Len != 0):
		return nbd.EINVAL, "offset and length of a flush must be 0"
	case o.Off > size || uint64(o.Len) > size-o.Off:
		return beyond, "the range is past the end of the export"
	case (o.Type == nbd.CmdRead || o.Type == nbd.CmdWrite) && o.Len > nbd.MaxPayload:
		return nbd.EINVAL, "the range is longer than 32 MiB"
	case o.Type == nbd.CmdBlockStatus && len(o.c.contexts) == 0:
		return nbd.EINVAL, "no metadata context was negotiated"
	case o.Type == nbd.CmdBlockStatus && o.Len == 0:
		return nbd.EINVAL, "the range is empty"
	}
	return 0, ""
}
