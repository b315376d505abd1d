package nfc

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/nfc/wire"
	"github.com/vddkcp/vddkcp/source"
)

// A session is a connection on which a disk is open.
type session struct {
	opener   *opener
	dialogue *dialogue
	conn     *conn
	file     wire.OpenedFile
	closing  []wire.Request // that end what was opened
	adapter  string         // adapter type in the disk's descriptor, such as "lsilogic"; may be ""
	uncount  func()         // tells the observer that the connection ends; nil if it knows none
}

// The method explain returns the *Error for an error of the present step. It is permanent if err
// is.
func (s *session) explain(err error) error { return s.dialogue.fail(err, "") }

// The method call performs a step that is one request.
func (s *session) call(r wire.Request, size int) (payload, text []byte, err error) {
	if step := stepOf(r.Type); step != s.dialogue.step {
		s.dialogue.begin(step)
	}
	payload, text, err = s.conn.call(r, size)
	if err != nil {
		return nil, nil, s.refused(err)
	}
	return payload, text, nil
}

// The method refused returns the error for a request of opening that has failed.
func (s *session) refused(err error) error {
	hint := ""
	if isMemory(err) {
		hint = "the host has no memory left for NFC connections: other backups or copies use it; wait until they have ended, or choose smaller buffers with --nfc-buffers"
	} else if s.dialogue.step == StepOpenFile && isRefusal(err) {
		hint = "the user may lack the privilege to read the disk, another program may have locked the file, or a snapshot is missing although the VM is running"
		if s.opener.params.Frozen {
			hint = "the user may lack the privilege to read the disk, or another program has locked the file: vddkcp check VM finds missing privileges"
		}
		if s.opener.opened == nil {
			err = source.Permanent(err) // after the first opening, it may be a migration, which ends
		}
	}
	return s.dialogue.fail(err, hint)
}

// The method begin opens the session.
func (s *session) begin() error {
	b := s.opener.buffers
	request := wire.NewOpenSession(uint32(b.Size), uint32(b.Count))
	if _, _, err := s.call(request, len(request.Payload)); err != nil {
		return err
	}
	s.closing = append(s.closing, wire.NewCloseSession(s.opener.o.Quirks.longClose))
	if b.Size > 0 {
		s.conn.buffer = int(b.Size)
	}
	for _, request := range []wire.Request{wire.NewSockOpts(), wire.NewResPool()} {
		if _, _, err := s.call(request, len(request.Payload)); err != nil {
			return err
		}
	}
	return nil
}

// The method open opens the file in the session, and reads what identifies the disk.
func (s *session) open() (*facts, error) {
	payload, _, err := s.call(wire.NewOpenFile(s.dialogue.ticket.File, wire.ReadDisk), wire.OpenFileSize)
	if err != nil {
		return nil, err
	}
	file, err := wire.ParseOpenFile((*[wire.OpenFileSize]byte)(payload))
	if err == nil && file.Status != 0 {
		return nil, s.refused(&hostError{code: file.Status})
	}
	if err != nil {
		return nil, s.explain(err)
	}
	s.file = file
	s.closing = append([]wire.Request{wire.NewCloseFile(file.Handle, s.opener.o.Quirks.longClose)}, s.closing...)
	found := &facts{capacity: file.Capacity}
	size, _ := wire.PayloadSize(wire.DDBGet)
	for _, entry := range []struct {
		key   string
		value *string
	}{{"uuid", &found.uuid}, {"longContentID", &found.longContentID}, {"adapterType", &s.adapter}} {
		_, text, err := s.call(wire.NewDDBGet(file.Handle, entry.key), size)
		if err != nil && (!errors.As(err, new(*hostError)) || isMemory(err)) {
			return nil, err
		}
		*entry.value = printableText(string(text)) // "" if the host does not know the entry
	}
	s.dialogue.begin(StepRead)
	head := make([]byte, min(headSize, file.Capacity))
	if _, err := s.conn.read(file.Handle, head, 0, compressions[s.opener.o.Compression]); err != nil {
		return nil, s.refused(err)
	}
	found.head = sha256.Sum256(head)
	return found, nil
}

// The method end ends the session, if the connection is not broken. It waits for the host until ctx
// ends.
func (s *session) end(ctx context.Context) {
	if s.uncount != nil {
		s.uncount()
	}
	if s.conn.cause() == nil {
		s.dialogue.begin(StepClose)
	}
	if err := s.conn.end(ctx, s.closing); err != nil {
		s.opener.o.Log.Debug("nfc: the session was not ended properly", "host", s.dialogue.address, "error", err)
	}
}

// The method readAt reads len(p) bytes at any offset. They must be in the disk. The host reads only
// whole sectors. Whole sectors go from the connection directly into p, and the sectors of which p
// has only a part through a buffer. The result empty says that p consists of zeros. If it is false,
// p may still do so.
func (s *session) readAt(p []byte, off int64, compression wire.Compression) (empty bool, err error) {
	handle := s.file.Handle
	if off%sectorSize == 0 && len(p)%sectorSize == 0 {
		return s.conn.read(handle, p, off, compression)
	}
	var sector [sectorSize]byte
	if skip := off % sectorSize; skip != 0 || len(p) < sectorSize {
		if _, err := s.conn.read(handle, sector[:], off-skip, compression); err != nil {
			return false, err
		}
		n := copy(p, sector[skip:])
		p, off = p[n:], off+int64(n)
	}
	whole := len(p) &^ (sectorSize - 1)
	if whole > 0 {
		if _, err := s.conn.read(handle, p[:whole:whole], off, compression); err != nil {
			return false, err
		}
	}
	if whole < len(p) {
		if _, err := s.conn.read(handle, sector[:], off+int64(whole), compression); err != nil {
			return false, err
		}
		copy(p[whole:], sector[:])
	}
	return false, nil
}

// The method readError returns the error of a read as callers of the disk get it.
func (s *session) readError(p []byte, off int64, err error) error {
	e := &Error{Step: StepRead, Err: err, Host: s.dialogue.address, Version: s.dialogue.version(), Banner: s.dialogue.hide(s.dialogue.banner.Text)}
	return fmt.Errorf("read [%d, %d): %w", off, off+int64(len(p)), e)
}
