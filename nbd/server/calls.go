package server

import "context"

const (
	// maxCalls is how many calls to disks are in progress at once, beside one for
	// each connection. A call to a file that hangs keeps a thread, and the runtime
	// ends a program that has too many.
	maxCalls = 1024
	// maxExportCalls is how many of them one export has, so that a disk that hangs
	// leaves some to the others.
	maxExportCalls = 256
)

// calls bounds calls to disks; each takes an element.
type calls chan struct{}

func (c calls) release() { <-c }

// enterCall waits until a call to the disk can be made: as one of those that all
// share, or as the one that the connection always has. It returns what is to be
// called after it.
func (c *conn) acquireCall(ctx context.Context) (leave func(), err error) {
	e := c.export.calls
	select {
	case e <- struct{}{}:
	case c.ownCall <- struct{}{}:
		return c.ownCall.release, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case c.s.calls <- struct{}{}:
		return func() { c.s.calls.release(); e.release() }, nil
	case c.ownCall <- struct{}{}:
		e.release()
		return c.ownCall.release, nil
	case <-ctx.Done():
		e.release()
		return nil, context.Cause(ctx)
	}
}
