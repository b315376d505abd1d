package nfc

import (
	"context"

	"github.com/vddkcp/vddkcp/source"
)

// Open opens a disk for reading. The returned disk repeats failed calls, as Options.Retry says, and
// implements source.Identified, source.Described and source.Counted.
func Open(ctx context.Context, p Params, t Tickets, o Options) (source.Disk, error) {
	return nil, errNotYet
}
