package raw

import (
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLongRangesEnd checks that ZeroAt and Trim of a long range of a block device use
// several ioctls, and that they stop between two of them when their context has ended.
func TestLongRangesEnd(t *testing.T) {
	const size, from = 4 << 30, 1 << 20
	for name, change := range map[string]func(d *WritableDisk, ctx context.Context) error{
		"zero":    func(d *WritableDisk, ctx context.Context) error { return d.ZeroAt(ctx, from, size-from, 0) },
		"discard": func(d *WritableDisk, ctx context.Context) error { return d.Trim(ctx, from, size-from) },
	} {
		t.Run(name, func(t *testing.T) {
			d := openEmpty(t)
			if err := os.Truncate(d.path, size); err != nil {
				t.Fatal(err)
			}
			d.size, d.block, d.sector = size, true, 512
			ctx, end := context.WithCancel(t.Context())
			defer end()
			next, calls := int64(from), 0
			d.ioctl = func(_ int, request uintptr, off, n int64) error {
				if off != next || n <= 0 || n > devicePiece || request != unix.BLKZEROOUT && request != unix.BLKDISCARD {
					t.Errorf("call %#x of %d bytes at %d, want at most %d at %d", request, n, off, devicePiece, next)
				}
				next += n
				calls++
				return nil
			}
			if err := change(d, ctx); err != nil || next != size {
				t.Errorf("up to %d of %d, %v", next, int64(size), err)
			}
			whole := d.ioctl
			d.ioctl = func(fd int, request uintptr, off, n int64) error {
				end()
				return whole(fd, request, off, n)
			}
			next, calls = from, 0
			if err := change(d, ctx); !errors.Is(err, context.Canceled) || calls != 1 {
				t.Errorf("%v after %d calls, want the end of the context after 1", err, calls)
			}
		})
	}
}
