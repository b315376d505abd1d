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
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/hinted"
)

// header says which disk a layer belongs to. It is written twice when the layer is
// created, and never changed. One intact copy is enough to open the layer.
type header struct {
	Size      int64  `json:"size"`       // of the disk, in bytes
	BlockSize int64  `json:"block_size"` // in bytes; 0 in a request means any
	Source    string `json:"source"`     // identity of the base
	Proof     string `json:"proof"`      // proof of that identity, see source.Identified
}

const (
	magic    = "vddkcp cow layer"
	slotSize = 32 << 10
	headers  = int64(2)
)

// format says which versions of the format this package reads.
var format = fileversion.Format{
	Name: "layer", Oldest: 1, Newest: 1,
	Otherwise: "give another file for the layer, because vddkcp never overwrites a layer",
}

// record is the format in which a header is written. docs/cow.md describes it.
var record = durable.Record{Magic: magic, Version: uint32(format.Newest), SlotSize: slotSize}

func (h header) encode() ([]byte, error) {
	payload, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(payload) > record.Room() {
		return nil, fmt.Errorf("the identity of the base disk is too long: the header of the layer would have %d bytes, want at most %d", len(payload), record.Room())
	}
	return record.Encode(0, payload), nil
}

// decodeHeader decodes the JSON payload of one of the two copies of a header, and
// checks its values.
func decodeHeader(payload []byte) (h header, err error) {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return h, hinted.Error(fmt.Errorf("invalid header: %w", err), "if a newer vddkcp wrote the layer, use that vddkcp, or "+format.Otherwise)
	}
	if b := h.BlockSize; h.Size < 0 || b < minBlockSize || b > maxBlockSize || b&(b-1) != 0 {
		return h, fmt.Errorf("invalid header: the disk has %d bytes and a block has %d bytes, want a block size that is a power of two from %d to %d", h.Size, b, minBlockSize, maxBlockSize)
	}
	return h, nil
}

// readHeader reads the header of the layer in f, which must not be empty. The file has
// two copies of the header, and readHeader returns the first valid one.
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
			err = format.Check(int64(version.Got))
		}
		wrong = cmp.Or(wrong, err)
	}
	switch {
	case wrong != nil:
		return header{}, wrong
	case torn:
		return header{}, errors.New("both headers are damaged or incomplete, and the data of the layer is lost: remove the file to start over")
	}
	return header{}, fmt.Errorf("not a layer of vddkcp: the file begins with %q; remove the file, or use another file for the layer", slots[0].Bytes[:min(len(slots[0].Bytes), 16)])
}

// The method differs compares h, the header of an existing layer, with the header that
// the caller expects. If the two are different, it returns an error that says what is
// different.
func (h header) differs(want header) error {
	const back = "; use the disk that the layer belongs to, or remove the layer"
	switch {
	case h.Size != want.Size:
		return fmt.Errorf("the layer belongs to a disk of %d bytes, but the base disk has %d bytes"+back, h.Size, want.Size)
	case h.Source != want.Source && !sameFile(h.Source, want.Source):
		return fmt.Errorf("the layer belongs to %s, but the base disk is %s"+back, named(h.Source), named(want.Source))
	case h.Proof != want.Proof:
		return fmt.Errorf("cannot check that %s is unchanged since the layer was created: the proof of unchanged content (snapshot, mtime or none) was %q then, and is %q now"+back, named(h.Source), h.Proof, want.Proof)
	case want.BlockSize != 0 && h.BlockSize != want.BlockSize:
		return fmt.Errorf("the layer has blocks of %d bytes, not of %d bytes: leave out the block size, or give the block size of the layer", h.BlockSize, want.BlockSize)
	}
	return nil
}

// The function named returns the words with which an error names a disk that has the
// given identity. The identity is "" if the disk has none.
func named(id string) string {
	if id == "" {
		return "a disk without an identity"
	}
	return fmt.Sprintf("disk %q", id)
}

// layout says where the parts of a layer lie in its file. The size of the disk and the
// block size determine the layout.
type layout struct {
	size, block int64 // size of the disk and of a block, in bytes
	blocks      int64 // number of blocks of the disk
	pages       int64 // number of pages of the table
	data        int64 // offset in the file of byte 0 of the disk
}

const (
	tableStart = headers * slotSize
	// maxPages limits the pages of a table. Each page takes 8 bytes of memory, even if
	// its part of the disk was never written.
	maxPages = 1 << 20
	// dataAlign is the alignment of the first block in the file, in bytes.
	dataAlign = 1 << 20
)

func newLayout(size, block int64) (layout, error) {
	l := layout{size: size, block: block}
	if size > 0 {
		l.blocks = (size-1)/block + 1
		l.pages = (l.blocks-1)/pageBlocks + 1
	}
	if l.pages > maxPages {
		return l, fmt.Errorf("the disk of %d bytes is too large for blocks of %d bytes: a layer has at most %d blocks", size, block, int64(maxPages*pageBlocks))
	}
	l.data = (tableStart + l.pages*pageSize + dataAlign - 1) &^ (dataAlign - 1)
	if l.data > 1<<63-1-size {
		return l, fmt.Errorf("the disk of %d bytes is too large: its layer would be a file of more than 8 EiB", size)
	}
	return l, nil
}

// fileIdentity matches the identity of a raw file as package source/raw returns it.
// oldFileIdentity matches the form that layers from before November 2026 have. That
// form also has the device number, which changes when file systems are mounted in
// another order.
var (
	fileIdentity    = regexp.MustCompile(`^file:inode ([0-9]+)[^:]*:([0-9]+:[0-9]+)$`)
	oldFileIdentity = regexp.MustCompile(`^file:[0-9]+:([0-9]+):([0-9]+:[0-9]+)$`)
)

// sameFile reports whether two identities of raw files identify the same file. The
// parameter old has the old form, with a device number, and the parameter id has the
// present form.
func sameFile(old, id string) bool {
	was, is := oldFileIdentity.FindStringSubmatch(old), fileIdentity.FindStringSubmatch(id)
	return was != nil && is != nil && slices.Equal(was[1:], is[1:])
}
