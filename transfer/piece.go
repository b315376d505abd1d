package transfer

import (
	"os"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

const (
	// A hole up to this size between data of one request is read along with
	// it: that costs less than another request.
	joinGap = 32 << 10
	// Pieces that need no buffer are cut here where the sink has to work for
	// them, so that progress shows and the context's end is seen.
	zeroPiece = 128 << 20
	// How many pieces may be under way. Those with a buffer are bounded by
	// the buffers; this bounds the holes between them.
	maxPieces = 1024
)

// piece is a range on its way through the pipeline.
type piece struct {
	off, n int64
	kind   source.Kind
	read   bool     // goes through a buffer
	buf    []byte   // of n bytes, when they are read; nil again once all of it is encoded
	free   func()   // of buf
	file   *os.File // whose bytes from pos on the target is to share; nil: they are written
	pos    int64
	runs   []run           // of buf, once done
	coded  encoded         // the units of the runs that are not zeros, where the sink takes them encoded
	hashed []digest.Blocks // of buf, one for each of the pipeline's sums
	crc    uint32          // of buf, for checkpoints
	done   chan struct{}   // of capacity 1; gets one value when a worker is finished with the piece
}
