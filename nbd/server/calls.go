package server

import "context"

const (
	// maxCalls is how many calls to disks may be in progress at once, in addition to
	// one call for each connection. Each call to a file that hangs occupies a thread,
	// and the Go runtime ends a program with more than 10000 threads.
	maxCalls = 1024
	// maxExportCalls is how many of the maxCalls calls one export may use, so that a
	// disk that hangs does not block the other exports.
	maxExportCalls = 256
)

// The type calls is a channel that limits the number of concurrent calls to disks.
// While a call is in progress, there is an element for this call in the channel.
type calls chan struct{}

func (c calls) release() { <-c }

// acquireCall waits until the connection may call its disk. The call counts against two
// limits: one for all calls of the server, and one for the calls to this export. If a
// limit is reached, the connection may still make one call at a time, which does not
// count against the limits. After the call to the disk, the caller calls the function
// release, which acquireCall has returned. acquireCall fails only if ctx ends.
func (c *conn) acquireCall(ctx context.Context) (release func(), err error) {
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
