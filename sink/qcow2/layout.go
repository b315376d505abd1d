package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// Facts of the format (docs/interop/qcow2.txt of qemu) and limits of qemu.
const (
	minClusterSize     = 512
	maxClusterSize     = 2 << 20
	DefaultClusterSize = 64 << 10

	maxL1       = 32 << 20 // bytes
	maxRefTable = 8 << 20  // bytes
	maxName     = 1023     // bytes of a backing file's name
	maxHost     = 1 << 56  // bytes: what an L2 entry can point to

	headerSize  = 112 // bytes
	refOrder    = 4   // refcounts have 16 bits
	entryBytes  = 8   // of all tables but those of refcounts
	sectorShift = 9

	copied     = 1 << 63 // L1 and L2 entries: the refcount is exactly one
	compressed = 1 << 62 // L2 entries
	readsZero  = 1       // L2 entries

	featureCompression = 1 << 3 // incompatible

	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
)

// layout is what can be known of an image before it is written. It begins with
// the header's cluster, the refcount blocks that count these first clusters, and
// the L1 table. What follows is taken in order: clusters of data, L2 tables, and
// at the beginning of each range that a refcount block counts that block itself.
// The refcount table comes last, since only then is known how long it is.
type layout struct {
	size      int64 // of the disk, bytes
	cluster   int64 // bytes
	shift     uint  // of cluster
	l2Shift   uint  // of the clusters that an L2 table maps
	l1Entries int64
	perBlock  int64 // clusters that a refcount block counts
	blocks    int64 // refcount blocks that lie behind the header
	first     int64 // cluster behind the L1 table
}

func newLayout(size, cluster int64) (layout, error) {
	if cluster < minClusterSize || cluster > maxClusterSize || bits.OnesCount64(uint64(cluster)) != 1 {
		return layout{}, fmt.Errorf("clusters of %d bytes: want a power of two from %d to %d", cluster, minClusterSize, maxClusterSize)
	}
	if size < 0 || size%512 != 0 {
		return layout{}, fmt.Errorf("a disk of %d bytes: one in a qcow2 image has a multiple of 512 (a raw one any number)", size)
	}
	l := layout{size: size, cluster: cluster, shift: uint(bits.TrailingZeros64(uint64(cluster)))}
	if reach := reachOf(cluster); size > reach {
		for cluster = minClusterSize; cluster <= maxClusterSize; cluster *= 2 {
			if size <= reachOf(cluster) {
				return layout{}, fmt.Errorf("clusters of %d bytes reach %s, and the disk has %s (%d bytes): want clusters of at least %d bytes",
					l.cluster, bytesize.Format(reach), bytesize.Format(size), size, cluster)
			}
		}
		return layout{}, fmt.Errorf("a disk of %d bytes: the largest that a qcow2 image can have is %s", size, bytesize.Format(reachOf(maxClusterSize)))
	}
	l.l2Shift = l.shift - 3
	// A table is never empty, so that it has a place.
	l.l1Entries = max(1, l.ceil(size, l.shift+l.l2Shift))
	l.perBlock = cluster * 8 >> refOrder
	l1Clusters := l.ceil(l.l1Entries*entryBytes, l.shift)
	for l.first = 0; l.blocks*l.perBlock < l.first || l.blocks == 0; {
		l.blocks++
		l.first = 1 + l.blocks + l1Clusters
	}
	return l, nil
}

// reachOf is how large a disk may be, by the size of the L1 table.
func reachOf(cluster int64) int64 { return maxL1 / entryBytes * (cluster / entryBytes) * cluster }

// ceil is n/2^shift, rounded up.
func (l *layout) ceil(n int64, shift uint) int64 { return (n + 1<<shift - 1) >> shift }

func (l *layout) l1Offset() int64 { return (1 + l.blocks) << l.shift }

// blockOffset is where the refcount block is that counts the i-th range.
func (l *layout) blockOffset(i int64) int64 {
	if i < l.blocks {
		return (1 + i) << l.shift
	}
	return i * l.perBlock << l.shift
}

// header makes the first bytes of an image, a multiple of 512 of them.
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
		// For those who do not know it.
		const name = "compression type"
		extension(extFeatureNames, append([]byte{0, 3}, name+string(make([]byte, 46-len(name)))...))
	}
	b = append(b, make([]byte, 8)...) // the end of the extensions
	backing := len(b)
	b = append(b, o.BackingName...)
	if len(o.BackingName) > maxName || int64(len(b)) > l.cluster {
		return nil, fmt.Errorf("the backing file's name has %d bytes: want at most %d, and all of the header in a cluster of %d bytes", len(o.BackingName), maxName, l.cluster)
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
