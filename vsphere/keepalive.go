package vsphere

import (
	"context"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
)

// stayAlive calls the server from time to time until ctx ends, because a server ends sessions that
// are idle, vCenter after 30 minutes. It never gives up: a call that fails is only logged, since
// the server may be back at the next one, and calls of other callers report the failure.
func (s *Session) stayAlive(ctx context.Context) {
	ticker := time.NewTicker(s.KeepAlive)
	defer ticker.Stop()
	failure := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		_, err := methods.GetCurrentTime(ctx, s.client)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failure = ""
		case err.Error() == failure: // one warning is enough while nothing changes
			s.Log.Debug("vsphere: cannot keep the session open", "server", s.address(), "error", err)
		default:
			failure = err.Error()
			s.Log.Warn("vsphere: cannot keep the session open", "server", s.address(), "error", err)
		}
	}
}
