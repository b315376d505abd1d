package vmdk

import (
	"sync/atomic"

	"github.com/vddkcp/vddkcp/internal/image"
)

// memory is what an image and its parents keep beside what is in use. Its size
// depends on no field of an image.
type memory struct {
	image.Memory
	stretches atomic.Int64 // in the indexes of the extents that share it
}
