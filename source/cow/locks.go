package cow

import "sync"

// stripes is how many locks the blocks share.
const stripes = 1024

// locks are held by writers, shared to write to blocks that are here, alone to
// change the state of a block. Readers need none: a block is here only after
// all of it was written. Block b has lock b%stripes; several are taken in
// ascending order, so that no two calls wait for each other.
type locks [stripes]sync.RWMutex

func (l *locks) of(b int64) *sync.RWMutex { return &l[b%stripes] }

// each calls do for the locks of n blocks from b on, at most stripes, in
// ascending order.
func (l *locks) each(b, n int64, do func(*sync.RWMutex)) {
	from := b % stripes
	for i := range max(0, from+n-stripes) {
		do(&l[i])
	}
	for i := from; i < min(from+n, stripes); i++ {
		do(&l[i])
	}
}

func (l *locks) lock(b, n int64)    { l.each(b, n, (*sync.RWMutex).Lock) }
func (l *locks) unlock(b, n int64)  { l.each(b, n, (*sync.RWMutex).Unlock) }
func (l *locks) rLock(b, n int64)   { l.each(b, n, (*sync.RWMutex).RLock) }
func (l *locks) rUnlock(b, n int64) { l.each(b, n, (*sync.RWMutex).RUnlock) }
