package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// magic has the bytes with which an image of any version begins, including version 1.
const magic = "QFI\xfb"

const (
	headerSize2  = 72       // bytes in a header of version 2
	headerSize3  = 104      // bytes in the shortest header of version 3
	minCluster   = 9        // base-2 logarithm of the smallest cluster in bytes
	maxCluster   = 21       // base-2 logarithm of the largest cluster in bytes
	minExtended  = 14       // base-2 logarithm of the smallest cluster that may have subclusters
	maxL1        = 32 << 20 // bytes in an L1 table, the limit of qemu
	maxName      = 1023     // bytes in the name of a backing or data file
	maxRefOrder  = 6        // the largest refcount_order
	subclusters  = 32       // subclusters in a cluster
	compressZlib = 0        // compression_type of zlib
	compressZstd = 1        // compression_type of zstd
)

// These are bits of the header field incompatible_features (section "Header" of the
// specification, bytes 72 to 79).
const (
	featureDirty = 1 << iota
	featureCorrupt
	featureDataFile
	featureCompression
	featureExtendedL2

	featuresKnown = featureDirty | featureCorrupt | featureDataFile | featureCompression | featureExtendedL2
)

// These are the types of header extensions that this package reads.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extDataFile      = 0x44415441
)

// The type header has the parsed header of an image and its extensions ("Header" and
// "Header extensions" of the specification, docs/interop/qcow2.txt of qemu).
type header struct {
	version      uint32
	clusterShift uint   // base-2 logarithm of the size of a cluster in bytes
	size         int64  // bytes of the disk
	l1Offset     int64  // offset of the L1 table in the file, bytes
	l1Entries    int64  // entries of the L1 table that the disk needs; the table may have more
	snapshots    uint32 // number of internal snapshots
	features     uint64 // incompatible_features
	compression  uint8  // compression_type

	backingName   string // name of the backing file; "": there is none
	backingFormat string // format of the backing file; "": not recorded
	dataName      string // name of the external data file; "": not recorded
}

func (h *header) has(feature uint64) bool { return h.features&feature != 0 }

// entryShift returns the base-2 logarithm of the size of an L2 entry in bytes.
func (h *header) entryShift() uint {
	if h.has(featureExtendedL2) {
		return 4
	}
	return 3
}

// readHeader reads and checks the header of f and its extensions.
func readHeader(f source.Disk) (*header, error) {
	b := make([]byte, min(f.Size(), headerSize3+8))
	if err := image.ReadFull(f, b, 0); err != nil {
		return nil, err
	}
	if !Probe(b) {
		if len(b) == 0 {
			return nil, fmt.Errorf("the file is empty, want a qcow2 image")
		}
		return nil, fmt.Errorf("the file is no qcow2 image: found %q at offset 0, want %q", b[:min(len(b), 4)], magic)
	}
	if len(b) < headerSize2 {
		return nil, fmt.Errorf("the file has %d bytes, but a qcow2 header has %d: the file is truncated", len(b), headerSize2)
	}
	u32 := func(off int) uint32 { return binary.BigEndian.Uint32(b[off:]) }
	u64 := func(off int) uint64 { return binary.BigEndian.Uint64(b[off:]) }

	h := &header{version: u32(4), snapshots: u32(60)}
	switch h.version {
	case 2, 3:
	case 1:
		return nil, fmt.Errorf("the image is of QCOW version 1, which is not supported (qemu-img convert -O qcow2 makes an image of version 3)")
	default:
		return nil, fmt.Errorf("header: version %d at offset 4, want 2 or 3", h.version)
	}
	clusterBits := u32(20)
	if clusterBits < minCluster || clusterBits > maxCluster {
		return nil, fmt.Errorf("header: cluster_bits %d at offset 20, want %d to %d (clusters of 512 bytes to 2 MiB)", clusterBits, minCluster, maxCluster)
	}
	h.clusterShift = uint(clusterBits)
	length, order := uint32(headerSize2), uint32(4)
	if h.version == 3 {
		if len(b) < headerSize3 {
			return nil, fmt.Errorf("the file has %d bytes, but a qcow2 header of version 3 has at least %d: the file is truncated", len(b), headerSize3)
		}
		h.features, order, length = u64(72), u32(96), u32(100)
		if length < headerSize3 || length%8 != 0 || int64(length) > 1<<h.clusterShift {
			return nil, fmt.Errorf("header: header_length %d at offset 100, want a multiple of 8 from %d up to the cluster size of %d", length, headerSize3, 1<<h.clusterShift)
		}
		if length > headerSize3 && len(b) > headerSize3 {
			h.compression = b[headerSize3]
		}
	}
	end, err := h.readBackingName(f, u64(8), u32(16), length)
	if err != nil {
		return nil, err
	}
	names, err := h.readExtensions(f, int64(length), end)
	if err != nil {
		return nil, err
	}
	if err := h.checkFeatures(names); err != nil {
		return nil, err
	}
	switch crypt := u32(32); crypt {
	case 0:
	case 1:
		return nil, fmt.Errorf("the image is encrypted with AES (crypt_method 1): encrypted images are not supported")
	case 2:
		return nil, fmt.Errorf("the image is encrypted with LUKS (crypt_method 2): encrypted images are not supported")
	default:
		return nil, fmt.Errorf("header: crypt_method %d at offset 32, want 0: encrypted images are not supported", crypt)
	}
	if order > maxRefOrder {
		return nil, fmt.Errorf("header: refcount_order %d at offset 96, want at most %d", order, maxRefOrder)
	}
	return h, h.checkTable(f.Size(), u64(24), u32(36), u64(40))
}

// checkTable checks those fields of the header that describe the L1 table, and stores
// their values in h. The parameter size is the size of the disk in bytes. According to
// the header, the L1 table has the given number of entries, and begins at the given
// offset in the file.
func (h *header) checkTable(fileSize int64, size uint64, entries uint32, offset uint64) error {
	if size > math.MaxInt64 {
		return fmt.Errorf("header: size %d at offset 24, want less than 8 EiB", size)
	}
	h.size = int64(size)
	if int64(entries)*8 > maxL1 {
		return fmt.Errorf("header: l1_size %d at offset 36, want at most %d entries", entries, maxL1/8)
	}
	if size == 0 {
		return nil
	}
	// An L2 table fills a cluster. Each of its entries describes one cluster of the
	// disk.
	shift := 2*h.clusterShift - h.entryShift()
	h.l1Entries = (h.size-1)>>shift + 1
	if h.l1Entries > int64(entries) {
		return fmt.Errorf("header: l1_size %d at offset 36: a disk of %d bytes with clusters of %d bytes needs %d entries", entries, h.size, 1<<h.clusterShift, h.l1Entries)
	}
	cluster := uint64(1) << h.clusterShift
	if offset == 0 || offset%cluster != 0 || offset > math.MaxInt64-maxL1 {
		return fmt.Errorf("header: l1_table_offset %d at offset 40, want a multiple of the cluster size of %d", offset, cluster)
	}
	h.l1Offset = int64(offset)
	if end := h.l1Offset + h.l1Entries*8; end > fileSize {
		return fmt.Errorf("the L1 table at offset %d has %d entries and ends at %d, but the file has %d bytes: the file is truncated or damaged", offset, h.l1Entries, end, fileSize)
	}
	return nil
}

// readBackingName reads the name of the backing file and stores the name in h. The name
// has n bytes and begins at the given offset in the file. The parameter length is the
// size of the header in bytes. The header extensions lie after the header, and end before
// the name. readBackingName returns the offset where the space for these extensions ends.
// If there is no name, this is the end of the first cluster, or the end of the file if
// that comes first.
func (h *header) readBackingName(f source.Disk, offset uint64, n, length uint32) (end int64, err error) {
	cluster := int64(1) << h.clusterShift
	end = min(cluster, f.Size())
	if offset == 0 {
		return end, nil
	}
	if offset < uint64(length) || offset > uint64(cluster) {
		return 0, fmt.Errorf("header: backing_file_offset %d at offset 8, want %d to %d (after the header, in the first cluster)", offset, length, cluster)
	}
	if n > maxName || int64(n) > cluster-int64(offset) {
		return 0, fmt.Errorf("header: backing_file_size %d at offset 16, want at most %d: the name of the backing file begins at offset %d, and must end in the first cluster of %d bytes", n, min(maxName, cluster-int64(offset)), offset, cluster)
	}
	if int64(offset)+int64(n) > f.Size() {
		return 0, fmt.Errorf("the backing file's name ends at offset %d, but the file has %d bytes: the file is truncated", offset+uint64(n), f.Size())
	}
	name := make([]byte, n)
	if err := image.ReadFull(f, name, int64(offset)); err != nil {
		return 0, err
	}
	if bytes.IndexByte(name, 0) >= 0 {
		return 0, fmt.Errorf("the backing file's name at offset %d has a zero byte: %s", offset, quote(string(name)))
	}
	h.backingName = string(name)
	return min(end, int64(offset)), nil
}

// readExtensions reads the header extensions, which lie in [off, end) of f. It stores the
// format of the backing file and the name of the data file in h. It returns the names
// that the extension "feature name table" has for incompatible features. The keys of the
// result are the numbers of the features' bits.
func (h *header) readExtensions(f source.Disk, off, end int64) (names map[uint8]string, err error) {
	var head [8]byte
	for end-off >= 8 {
		if err := image.ReadFull(f, head[:], off); err != nil {
			return nil, err
		}
		kind, n := binary.BigEndian.Uint32(head[:]), int64(binary.BigEndian.Uint32(head[4:]))
		if kind == extEnd {
			break
		}
		if n > end-off-8 {
			return nil, fmt.Errorf("header extension %#08x at offset %d has %d bytes, but only %d bytes are left in the header: the header is damaged", kind, off, n, end-off-8)
		}
		switch kind {
		case extBackingFormat, extFeatureNames, extDataFile:
			data := make([]byte, min(n, 64*48, int64(1)<<maxCluster)) // enough for the names of 64 features
			if kind != extFeatureNames && n > maxName {
				return nil, fmt.Errorf("header extension %#08x at offset %d: a name of %d bytes, want at most %d", kind, off, n, maxName)
			}
			if err := image.ReadFull(f, data, off+8); err != nil {
				return nil, err
			}
			switch kind {
			case extFeatureNames:
				names = featureNames(data)
			case extBackingFormat:
				h.backingFormat = string(data)
			case extDataFile:
				h.dataName = string(data)
			}
			if kind != extFeatureNames && bytes.IndexByte(data, 0) >= 0 {
				return nil, fmt.Errorf("header extension %#08x at offset %d: the name %s has a zero byte", kind, off, quote(string(data)))
			}
		}
		off += 8 + (n+7)&^7
	}
	return names, nil
}

// featureNames parses the header extension "feature name table". It returns the names
// of the incompatible features. The keys of the result are the numbers of the features'
// bits.
func featureNames(data []byte) map[uint8]string {
	names := map[uint8]string{}
	for ; len(data) >= 48; data = data[48:] {
		if data[0] == 0 { // incompatible
			name, _, _ := bytes.Cut(data[2:48], []byte{0})
			names[data[1]] = string(name)
		}
	}
	return names
}

// checkFeatures returns an error if the image has incompatible features that this package
// does not support. The parameter names is used for the text of the error: it has names
// of features, and its keys are the numbers of the features' bits.
func (h *header) checkFeatures(names map[uint8]string) error {
	if unknown := h.features &^ featuresKnown; unknown != 0 {
		var list []string
		for ; unknown != 0; unknown &= unknown - 1 {
			bit := uint8(bits.TrailingZeros64(unknown))
			text := "bit " + strconv.Itoa(int(bit))
			if name := names[bit]; name != "" {
				text += " (" + quote(name) + ")"
			}
			list = append(list, text)
		}
		return fmt.Errorf("header: incompatible_features at offset 72 has %s set, which is not known: the image cannot be read", strings.Join(list, ", "))
	}
	if h.has(featureCorrupt) {
		return fmt.Errorf("the image is marked as corrupt (incompatible feature bit 1): its tables may be wrong; make a copy of the image, and repair the copy with qemu-img check -r all")
	}
	if h.has(featureExtendedL2) && h.clusterShift < minExtended {
		return fmt.Errorf("header: cluster_bits %d at offset 20, want at least %d with extended L2 entries", h.clusterShift, minExtended)
	}
	switch {
	case h.has(featureCompression) && h.compression == compressZlib:
		return fmt.Errorf("header: compression_type is 0 (zlib) at offset 104, but incompatible feature bit 3 is set: this bit must be set only for other compression types")
	case !h.has(featureCompression) && h.compression != compressZlib:
		return fmt.Errorf("header: compression_type is %d at offset 104, but incompatible feature bit 3 is not set: this bit must be set for all compression types except 0 (zlib)", h.compression)
	case h.compression > compressZstd:
		return fmt.Errorf("header: compression_type %d at offset 104, want 0 (zlib) or 1 (zstd)", h.compression)
	}
	return nil
}

// Probe reports whether head, the first bytes of a file, belongs to a qcow2 image or
// to an older QCOW image. Four bytes are enough.
func Probe(head []byte) bool { return bytes.HasPrefix(head, []byte(magic)) }

// The function quote quotes text of an image for a message. Only the first 200 bytes of a
// longer text are quoted.
func quote(s string) string {
	if len(s) > 200 {
		return strconv.Quote(s[:200]) + "..."
	}
	return strconv.Quote(s)
}
