package nfc

import (
	"fmt"
	"sync"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

// minRequest is the smallest size that limits gives to requests, in bytes.
const minRequest = 64 << 10

// limits are the size and the number of the requests of a disk. They become smaller when the host
// has no memory for the requests. Their methods are safe for concurrent use.
type limits struct {
	mu      sync.Mutex
	size    int // bytes of a request
	depth   int // requests in flight
	changes int // number of calls of halve that have had an effect

	// The function waits is called when a request waits because the limits have become smaller. Its
	// result is called after the wait. It may be nil.
	waits func() (end func())
	// The function changed is called with a text about each change of the limits. It may be nil.
	changed func(text string)
}

// The method get returns the present limits. The result changes is for the method halve.
func (l *limits) get() (size, depth, changes int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size, l.depth, l.changes
}

// The method halve halves the limits after the host has refused a request. The parameter changes is
// the value that get returned together with the size of the request: the refusals of several
// requests of one size count as one.
func (l *limits) halve(changes int) {
	l.mu.Lock()
	if changes != l.changes {
		l.mu.Unlock()
		return
	}
	size, depth := l.size, l.depth
	l.size = max(l.size/2&^(sectorSize-1), min(l.size, minRequest))
	l.depth = max(l.depth/2, 1)
	l.changes++
	text := fmt.Sprintf("%d requests of %s at a time instead of %d of %s: the host had no memory for one", l.depth, bytesize.Format(int64(l.size)), depth, bytesize.Format(int64(size)))
	l.mu.Unlock()
	if l.changed != nil {
		l.changed(text)
	}
}
