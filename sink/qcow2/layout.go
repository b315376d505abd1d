package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// The constants below are values of the format qcow2 (docs/interop/qcow2.txt of
// qemu) and limits of qemu.
const (
	minClusterSize     = 512
	maxClusterSize     = 2 << 20
	DefaultClusterSize = 64 << 10

	maxL1       = 32 << 20 // bytes
	maxRefTable = 8 << 20  // bytes
	maxName     = 1023     // bytes in the name of a backing file
	maxHost     = 1 << 56  // bytes: the range that an L2 entry can address

	headerSize  = 112 // bytes
	refOrder    = 4   // refcounts have 16 bits
	entryBytes  = 8   // in the L1, L2 and refcount tables, but not in refcount blocks
	sectorShift = 9

	copied     = 1 << 63 // flag in L1 and L2 entries: the refcount is exactly one
	compressed = 1 << 62 // flag in L2 entries
	readsZero  = 1       // flag in L2 entries

	featureCompression = 1 << 3 // an incompatible feature

	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
)

// The type layout holds the part of an image's structure that is known before the
// image is written. The file begins with the cluster of the header, the refcount
// blocks for the clusters up to the end of the L1 table, and the L1 table itself.
// The clusters after the L1 table are allocated in order: data clusters, L2 tables,
// and refcount blocks. Each of these later refcount blocks counts a range of
// clusters and is at the beginning of its range. The refcount table comes last, when
// its length is known.
type layout struct {
	size      int64 // size of the disk, bytes
	cluster   int64 // cluster size, bytes
	shift     uint  // log2 of cluster
	l2Shift   uint  // log2 of the number of clusters that an L2 table maps
	l1Entries int64
	perBlock  int64 // number of clusters that a refcount block counts
	blocks    int64 // number of refcount blocks between header and L1 table
	first     int64 // the first cluster behind the L1 table
}

func newLayout(size, cluster int64) (layout, error) {
	if cluster < minClusterSize || cluster > maxClusterSize || bits.OnesCount64(uint64(cluster)) != 1 {
		return layout{}, fmt.Errorf("cluster size of %d bytes: want a power of two from %d to %d bytes", cluster, minClusterSize, maxClusterSize)
	}
	if size < 0 || size%512 != 0 {
		return layout{}, fmt.Errorf("a disk of %d bytes: the size of a disk in a qcow2 image must be a multiple of 512 bytes (a raw disk can have any size)", size)
	}
	l := layout{size: size, cluster: cluster, shift: uint(bits.TrailingZeros64(uint64(cluster)))}
	if reach := reachOf(cluster); size > reach {
		for cluster = minClusterSize; cluster <= maxClusterSize; cluster *= 2 {
			if size <= reachOf(cluster) {
				return layout{}, fmt.Errorf("clusters of %d bytes are too small: a qcow2 image with such clusters holds at most %s, and the disk has %s (%d bytes); want clusters of at least %d bytes",
					l.cluster, bytesize.Format(reach), bytesize.Format(size), size, cluster)
			}
		}
		return layout{}, fmt.Errorf("a disk of %d bytes is too large: a qcow2 image holds at most %s", size, bytesize.Format(reachOf(maxClusterSize)))
	}
	l.l2Shift = l.shift - 3
	// The L1 table has at least one entry, even for a disk of 0 bytes, so that its
	// offset in the file is valid.
	l.l1Entries = max(1, l.ceil(size, l.shift+l.l2Shift))
	l.perBlock = cluster * 8 >> refOrder
	l1Clusters := l.ceil(l.l1Entries*entryBytes, l.shift)
	for l.first = 0; l.blocks*l.perBlock < l.first || l.blocks == 0; {
		l.blocks++
		l.first = 1 + l.blocks + l1Clusters
	}
	return l, nil
}

// reachOf returns the size, in bytes, of the largest disk that fits in an image
// with the given cluster size. The limit is the maximum size of the L1 table.
func reachOf(cluster int64) int64 { return maxL1 / entryBytes * (cluster / entryBytes) * cluster }

// The method ceil returns n/2^shift, rounded up.
func (l *layout) ceil(n int64, shift uint) int64 { return (n + 1<<shift - 1) >> shift }

func (l *layout) l1Offset() int64 { return (1 + l.blocks) << l.shift }

// blockOffset returns the offset in the file of the i-th refcount block, which
// counts the i-th range of clusters.
func (l *layout) blockOffset(i int64) int64 {
	if i < l.blocks {
		return (1 + i) << l.shift
	}
	return i * l.perBlock << l.shift
}

// The method header returns the bytes with which the image begins. It pads them to a
// multiple of 512 bytes.
func (l *layout) header(o Options, refTable, refTableClusters int64) ([]byte, error) {
	b := make([]byte, headerSize, l.cluster)
	extension := func(kind uint32, data []byte) {
		b = binary.BigEndian.AppendUint32(b, kind)
		b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
		b = append(b, data...)
		b = append(b, make([]byte, -len(data)&7)...)
	}
	if o.BackingName != "" {
		extension(extBackingFormat, []byte(o.BackingFormat))
	}
	if o.Compression == Zstd {
		// This extension of the header contains the name of the feature "compression
		// type". A reader that does not support the feature can show the name in its
		// error message.
		const name = "compression type"
		extension(extFeatureNames, append([]byte{0, 3}, name+string(make([]byte, 46-len(name)))...))
	}
	b = append(b, make([]byte, 8)...) // the end of the extensions
	backing := len(b)
	b = append(b, o.BackingName...)
	if len(o.BackingName) > maxName {
		return nil, fmt.Errorf("the name of the backing file has %d bytes: want at most %d bytes", len(o.BackingName), maxName)
	}
	if int64(len(b)) > l.cluster {
		return nil, fmt.Errorf("the header of the image has %d bytes with the name of the backing file, and does not fit in one cluster of %d bytes: use a shorter name or larger clusters", len(b), l.cluster)
	}
	put32 := func(at int, v uint32) { binary.BigEndian.PutUint32(b[at:], v) }
	put64 := func(at int, v int64) { binary.BigEndian.PutUint64(b[at:], uint64(v)) }
	copy(b, "QFI\xfb")
	put32(4, 3) // version
	if o.BackingName != "" {
		put64(8, int64(backing))
		put32(16, uint32(len(o.BackingName)))
	}
	put32(20, uint32(l.shift))
	put64(24, l.size)
	put32(36, uint32(l.l1Entries))
	put64(40, l.l1Offset())
	put64(48, refTable)
	put32(56, uint32(refTableClusters))
	put32(96, refOrder)
	put32(100, headerSize)
	if o.Compression == Zstd {
		put64(72, featureCompression)
		b[104] = 1
	}
	return append(b, make([]byte, -len(b)&511)...), nil
}
