package nfc_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestOrders reads disks whose host answers in fragments of any size and in any order.
func TestOrders(t *testing.T) {
	fragments := []int{512, 3 * 512, 4 << 10, 20<<10 + 512, 64 << 10, 1 << 20, 0}
	buffers := []nfcbudget.Buffers{{Size: 64 << 10, Count: 1}, {Size: 1 << 20, Count: 4}, {Size: 2 << 20, Count: 8}, {}}
	sizes := []int{1, 511, 513, 64 << 10, 1<<20 + 1, 2<<20 - 511, 2<<20 + 512}
	for seed := range 30 {
		o := nfctest.Options{Fragment: fragments[seed%len(fragments)], Shuffle: true, Seed: int64(seed)}
		if seed%5 == 4 {
			o.Piece = 1000 + 531*seed
		}
		r := rand.New(rand.NewPCG(uint64(seed), 2))
		options := nfc.Options{
			Compression: nfc.Compressions[seed%3], Buffers: buffers[seed%4], Clear: seed%2 == 0, Depth: 1 + r.IntN(32),
			RequestSize: 4096 << r.IntN(9),
		}
		if seed == 5 {
			options.RequestSize = 512
		}
		if seed%4 == 3 {
			options.Quirks, _ = nfc.ParseQuirks("session=zeros")
		}
		size := sizes[r.IntN(len(sizes))]
		name := fmt.Sprintf("%d/%s/fragment=%d/request=%d/depth=%d/size=%d", seed, options.Compression, o.Fragment, options.RequestSize, options.Depth, size)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			raw := pattern(size, uint64(seed))
			h, ts := newHost(t, raw, o)
			content := append(raw[:size:size], make([]byte, -size&511)...) // the capacity is whole sectors
			d := open(t, ts, nfc.Params{Name: file, Frozen: seed%2 == 0}, options)
			readRandomly(t, d, content, uint64(seed), 4, 12)
			readAll(t, d, content, 1+r.IntN(2<<20))
			d.Close()
			if s := h.Stats(); s.Connections != 1 || s.InFlight > options.Depth {
				t.Errorf("%+v", s)
			}
		})
	}
}

// readRandomly compares ranges at random places, in several goroutines.
func readRandomly(t *testing.T, d source.Disk, content []byte, seed uint64, goroutines, reads int) {
	t.Helper()
	var wg sync.WaitGroup
	for g := range goroutines {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(g)))
			other := bytes.Repeat([]byte{0xa5}, len(content)+10)
			p := bytes.Clone(other)
			for range reads {
				off := r.IntN(len(content))
				n := 1 + r.IntN(min(len(content)-off+9, 1<<r.IntN(22)))
				if r.IntN(2) == 0 {
					off, n = off&^511, max(n&^511, 512)
				}
				want := content[off:min(off+n, len(content))]
				got, err := d.ReadAt(p[:n:n], int64(off))
				if err == io.EOF && len(want) < n {
					err = nil
				}
				if err != nil || !bytes.Equal(p[:got], want) {
					t.Errorf("read of %d bytes at %d: %d bytes, %v", n, off, got, err)
					return
				}
				if p[n] != 0xa5 {
					t.Errorf("read of %d bytes at %d has written the byte after it", n, off)
					return
				}
				copy(p[:n], other)
			}
		})
	}
	wg.Wait()
}

// TestConformanceOfOrders runs the suite that every disk must pass, with fragments in random order.
func TestConformanceOfOrders(t *testing.T) {
	for i, compression := range nfc.Compressions {
		t.Run(compression, func(t *testing.T) {
			t.Parallel()
			size := 100<<10 + 100 + i
			_, ts := newHost(t, pattern(size, 9), nfctest.Options{Shuffle: true, Seed: int64(i), Fragment: 3*512 + i*4096})
			sourcetest.Run(t, sourcetest.Config{
				Open: func(ctx context.Context, t testing.TB) source.Disk {
					d, err := nfc.Open(ctx, nfc.Params{Name: file}, ts, nfc.Options{Compression: compression, RequestSize: 100 << 10})
					if err != nil {
						t.Fatal(err)
					}
					return d
				},
				Content: append(pattern(size, 9), make([]byte, -size&511)...),
			})
		})
	}
}
