package raw

import (
	"bytes"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
)

// powerCut stands between a file and the kernel and knows what a power cut may
// leave of it: what was written before the last fsync began, and of the rest any
// sectors.
type powerCut struct {
	mu      sync.Mutex
	durable []byte
	pending []pendingWrite
}

type pendingWrite struct {
	off  int64
	data []byte
}

func (c *powerCut) system() system {
	sys := kernel()
	write := func(fd int, p []byte, off int64) (int, error) {
		n, err := unix.Pwrite(fd, p, off)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.pending = append(c.pending, pendingWrite{off, bytes.Clone(p[:n])})
		return n, err
	}
	sys.pwrite, sys.pwriteUncache = write, write
	sys.fsync = func(fd int) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, w := range c.pending {
			copy(c.durable[w.off:], w.data)
		}
		c.pending = nil
		return unix.Fsync(fd)
	}
	return sys
}

// cut returns what the file may hold after a power cut.
func (c *powerCut) cut(r *rand.Rand) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	left := bytes.Clone(c.durable)
	for _, w := range c.pending {
		for at := 0; at < len(w.data); at += 512 {
			if r.IntN(2) == 0 {
				copy(left[w.off+int64(at):], w.data[at:min(at+512, len(w.data))])
			}
		}
	}
	return left
}

// Whenever the power fails, what the last checkpoint says is done is there.
func TestCheckpointsSurviveAPowerCut(t *testing.T) {
	const size = 6<<20 + 512
	// How many checkpoints one copy takes depends on how busy the machine is.
	kept := 0
	for seed := uint64(0); seed < 6 || kept < 10 && seed < 200; seed++ {
		r := rand.New(rand.NewPCG(11, seed))
		src := &sourcetest.Memory{Bytes: make([]byte, size)}
		for off := int64(0); off < size; {
			n := min(size-off, 512*(1+r.Int64N(400)))
			e := source.Extent{Off: off, Len: n}
			if r.IntN(3) == 0 {
				e.Kind = source.Zero
			} else {
				rand.NewChaCha8([32]byte{byte(off), byte(seed)}).Read(src.Bytes[off : off+n])
			}
			src.ExtentList = append(src.ExtentList, e)
			off += n
		}
		cut := &powerCut{durable: make([]byte, size)}
		dst, err := createFile(t.Context(), filepath.Join(t.TempDir(), "d"), size, Options{Options: sink.Options{}}, cut.system())
		if err != nil {
			t.Fatal(err)
		}
		plan, err := transfer.NewPlan(t.Context(), src)
		if err != nil {
			t.Fatal(err)
		}
		_, err = transfer.Copy(t.Context(), src, dst, plan, transfer.Options{
			RequestSize: 64 << 10, Requests: 3, Interval: 1,
			Keep: func(c transfer.Checkpoint) error {
				kept++
				for range 2 {
					if left := cut.cut(r); !bytes.Equal(left[:c.Offset], src.Bytes[:c.Offset]) {
						t.Errorf("seed %d: the checkpoint at %d claims what is not there", seed, c.Offset)
					}
				}
				return nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if kept < 10 {
		t.Errorf("only %d checkpoints were looked at", kept)
	}
}
