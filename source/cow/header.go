package cow

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"

	"github.com/vddkcp/vddkcp/internal/durable"
)

// header says of which disk a file is the layer. It is written once, when the
// layer is made, twice in the file: either copy is enough.
type header struct {
	Size      int64  `json:"size"`       // of the disk, bytes
	BlockSize int64  `json:"block_size"` // bytes; 0 asks for any
	Source    string `json:"source"`     // the identity of the disk below
	Proof     string `json:"proof"`      // by what that is proved
}

const (
	version  = 1
	magic    = "vddkcp cow layer"
	slotSize = 32 << 10
	headers  = int64(2)
)

// record is how a header is written, see docs/cow.md.
var record = durable.Record{Magic: magic, Version: version, SlotSize: slotSize}

func (h header) encode() ([]byte, error) {
	payload, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(payload) > record.Room() {
		return nil, fmt.Errorf("the identity of the disk below takes %d bytes, and a header %d", len(payload), record.Room())
	}
	return record.Encode(0, payload), nil
}

// decodeHeader reads the payload of a slot.
func decodeHeader(payload []byte) (h header, err error) {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return h, fmt.Errorf("its header: %w", err)
	}
	if b := h.BlockSize; h.Size < 0 || b < minBlockSize || b > maxBlockSize || b&(b-1) != 0 {
		return h, fmt.Errorf("its header has a disk of %d bytes in blocks of %d bytes, want a power of two from %d to %d", h.Size, b, minBlockSize, maxBlockSize)
	}
	return h, nil
}

// readHeader reads the header of a file that is not empty.
func readHeader(f io.ReaderAt) (header, error) {
	slots, err := record.ReadSlots(f)
	if err != nil {
		return header{}, err
	}
	var wrong error
	torn := false
	for _, slot := range slots {
		h, err := header{}, slot.Err
		if err == nil {
			if h, err = decodeHeader(slot.Payload); err == nil {
				return h, nil
			}
		}
		var version *durable.VersionError
		switch {
		case err == durable.ErrTorn:
			torn = true
			continue
		case err == durable.ErrNoRecord:
			continue
		case errors.As(err, &version):
			err = fmt.Errorf("it is a layer of version %d, want %d: another version of vddkcp made it", version.Got, version.Want)
		}
		wrong = cmp.Or(wrong, err)
	}
	switch {
	case wrong != nil:
		return header{}, wrong
	case torn:
		return header{}, errors.New("its headers are damaged, or were never finished: remove it to begin anew, what was written to it is lost")
	}
	return header{}, fmt.Errorf("it begins with %q and is no layer of vddkcp: remove it, or name another file", slots[0].Bytes[:min(len(slots[0].Bytes), 16)])
}

// differs returns in what a layer, h, is not the one that is wanted.
func (h header) differs(want header) error {
	const back = "; bring that disk back as it was, or remove the layer"
	switch {
	case h.Size != want.Size:
		return fmt.Errorf("it is the layer of a disk of %d bytes, and the disk has %d"+back, h.Size, want.Size)
	case h.Source != want.Source && !sameFile(h.Source, want.Source):
		return fmt.Errorf("it is the layer of %s, and the disk is %s"+back, named(h.Source), named(want.Source))
	case h.Proof != want.Proof:
		return fmt.Errorf("it is the layer of %s as proved by %q, and now that is proved by %q"+back, named(h.Source), h.Proof, want.Proof)
	case want.BlockSize != 0 && h.BlockSize != want.BlockSize:
		return fmt.Errorf("its blocks have %d bytes, and %d are asked for: ask for none, or for those", h.BlockSize, want.BlockSize)
	}
	return nil
}

func named(id string) string {
	if id == "" {
		return "a disk without an identity"
	}
	return id
}

// layout is where things lie in the file. All is known from the size of the
// disk and of the blocks.
type layout struct {
	size, block int64 // bytes
	blocks      int64 // of the disk
	pages       int64 // of the table
	data        int64 // where the disk's byte 0 lies in the file
}

const (
	tableStart = headers * slotSize
	// maxPages bounds the pages of a table, each of which takes 8 bytes of
	// memory also when nothing was written to its part of the disk.
	maxPages = 1 << 20
	// dataAlign is what the blocks begin at a multiple of, in bytes.
	dataAlign = 1 << 20
)

func newLayout(size, block int64) (layout, error) {
	l := layout{size: size, block: block}
	if size > 0 {
		l.blocks = (size-1)/block + 1
		l.pages = (l.blocks-1)/pageBlocks + 1
	}
	if l.pages > maxPages {
		return l, fmt.Errorf("a disk of %d bytes in blocks of %d is too large: want at most %d blocks", size, block, int64(maxPages*pageBlocks))
	}
	l.data = (tableStart + l.pages*pageSize + dataAlign - 1) &^ (dataAlign - 1)
	if l.data > 1<<63-1-size {
		return l, fmt.Errorf("a disk of %d bytes is too large for a file", size)
	}
	return l, nil
}

// The identity of a raw file as package source/raw gives it, and as it was in layers
// until November 2026: then it had the number of the device too, which changes when
// file systems are mounted in another order.
var (
	fileIdentity    = regexp.MustCompile(`^file:inode ([0-9]+)[^:]*:([0-9]+:[0-9]+)$`)
	oldFileIdentity = regexp.MustCompile(`^file:[0-9]+:([0-9]+):([0-9]+:[0-9]+)$`)
)

// sameFile says whether an old identity of a file is of the file that has id.
func sameFile(old, id string) bool {
	was, is := oldFileIdentity.FindStringSubmatch(old), fileIdentity.FindStringSubmatch(id)
	return was != nil && is != nil && slices.Equal(was[1:], is[1:])
}
