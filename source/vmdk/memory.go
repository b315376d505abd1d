package vmdk

import (
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/image"
)

// memory caches the tables of an image and its parents. Its size is limited, regardless
// of what the images say. It is safe for concurrent use.
type memory struct {
	image.Memory
	stretches atomic.Int64 // number of stretches in all indexes of streams that share the memory
}
