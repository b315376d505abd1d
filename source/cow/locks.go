package cow

import "sync"

// stripes is the number of locks. Each lock is for many blocks.
const stripes = 1024

// The type locks has the read-write locks of the blocks. A writer is a call that writes a
// block to the layer. To write to a block that is present, a writer holds the lock of the
// block for reading (RLock), so that several writers can write at once. To change the state
// of the block, a writer holds the lock exclusively (Lock). Readers of the block need no
// lock, because a block becomes present only after all of it was written.
// Block b has lock b%stripes. Several locks are acquired in ascending order, so that two
// calls cannot wait for each other.
type locks [stripes]sync.RWMutex

func (l *locks) of(b int64) *sync.RWMutex { return &l[b%stripes] }

// The method each calls the function visit for the locks of n consecutive blocks, the
// first of which is block b. It does so once for each lock, in the ascending order of
// the locks. The number of blocks must not be larger than the number of locks.
func (l *locks) each(b, n int64, visit func(*sync.RWMutex)) {
	from := b % stripes
	for i := range max(0, from+n-stripes) {
		visit(&l[i])
	}
	for i := from; i < min(from+n, stripes); i++ {
		visit(&l[i])
	}
}

func (l *locks) lock(b, n int64)    { l.each(b, n, (*sync.RWMutex).Lock) }
func (l *locks) unlock(b, n int64)  { l.each(b, n, (*sync.RWMutex).Unlock) }
func (l *locks) rLock(b, n int64)   { l.each(b, n, (*sync.RWMutex).RLock) }
func (l *locks) rUnlock(b, n int64) { l.each(b, n, (*sync.RWMutex).RUnlock) }
