package qcow2

import (
	"sync"
	"sync/atomic"

	"vddkcp/source"
)

const (
	// pageSize is how much of the tables is read and cached at once, in bytes:
	// the L2 tables of 512 MiB with clusters of 64 KiB.
	pageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	clusterSlots = 4
)

// memory is what an image and its backing images keep beside what is in use:
// pages of L1 and L2 tables, and a few unpacked clusters. Its size depends on
// no field of an image, but for the slots, which are as large as a cluster. It
// is safe for concurrent use.
type memory struct {
	files atomic.Uint64 // images that share it so far
	sets  [pageSets]pageSet
	slots [clusterSlots]clusterSlot
}

// pageSet holds the pages whose numbers fall on it. Who comes last replaces
// who came first; a page that was replaced stays valid for those that hold it.
type pageSet struct {
	next atomic.Uint32
	ways [pageWays]atomic.Pointer[page]
}

type page struct {
	file   uint64
	number int64
	data   []byte // shorter at the end of the file
}

// clusterSlot holds the cluster that was unpacked last of those that fall on
// it. Its lock is held while it is filled, so that readers of pieces of a
// cluster unpack it once.
type clusterSlot struct {
	mu      sync.Mutex
	file    uint64
	cluster int64
	data    []byte
	full    bool // data is that cluster
}

// page returns page number of f, which has size bytes and is known as file.
func (m *memory) page(f source.Disk, file uint64, size, number int64) ([]byte, error) {
	set := &m.sets[(uint64(number)+file*5)%pageSets]
	for i := range set.ways {
		if p := set.ways[i].Load(); p != nil && p.file == file && p.number == number {
			return p.data, nil
		}
	}
	off := number * pageSize
	p := &page{file: file, number: number, data: make([]byte, min(pageSize, size-off))}
	if err := readFull(f, p.data, off); err != nil {
		return nil, err
	}
	set.ways[set.next.Add(1)%pageWays].Store(p)
	return p.data, nil
}
