package vddk

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/internal/allocation"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// BenchmarkRead reads through one real worker with a library that has no delays. It measures the
// cost of the pool, of the worker and of the socket between them.
func BenchmarkRead(b *testing.B) {
	const size = 256 << 20
	s := newStandIn(b, size, source.Extent{Off: 0, Len: size})
	for _, request := range []int{64 << 10, 256 << 10, 1 << 20} {
		for _, depth := range []int{1, 4} {
			b.Run(fmt.Sprintf("%dKiB/depth%d", request>>10, depth), func(b *testing.B) {
				d, err := s.open(b.Context(), s.remote, Options{Connections: 1, RequestSize: request, Depth: depth})
				if err != nil {
					b.Fatal(err)
				}
				defer d.Close()
				b.SetBytes(int64(request))
				b.ReportAllocs()
				b.ResetTimer()
				readInParallel(b, d, depth, request)
			})
		}
	}
}

// BenchmarkPool reads through a simulated worker that costs nothing. It measures the cost of the
// pool.
func BenchmarkPool(b *testing.B) {
	host := fakeQueries(b, 256<<20)
	host.content = nothing{}
	d := host.mustOpen(Params{}, Options{Connections: 1})
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	readInParallel(b, d, 4, 1<<20)
}

type nothing struct{}

func (nothing) ReadAt(p []byte, _ int64) (int, error) { return len(p), nil }

func readInParallel(b *testing.B, d *Disk, readers, request int) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if i >= int64(b.N) {
					return
				}
				p, free, err := d.Buffer(b.Context(), request)
				if err != nil {
					b.Error(err)
					return
				}
				if _, err := d.ReadAt(p, i*int64(request)%d.Size()); err != nil && err != io.EOF {
					b.Error(err)
					return
				}
				free()
			}
		})
	}
	wg.Wait()
}

func BenchmarkAllocation(b *testing.B) {
	for _, every := range []int{2, 100} {
		b.Run(fmt.Sprintf("one_in_%d", every), func(b *testing.B) {
			host := fakeQueries(b, window)
			host.holes = host.holes[:0]
			for c := uint64(0); c < windowChunks; c += uint64(every) {
				host.holes = append(host.holes, worker.Block{Start: c * chunkSectors, Count: chunkSectors})
			}
			blocks, _ := (&fakeWorker{host: host}).Query(b.Context(), 0, windowChunks*chunkSectors, chunkSectors)
			b.ReportAllocs()
			for b.Loop() {
				a, err := allocation.New(0, windowChunks, chunkSectors, blocks)
				if err != nil {
					b.Fatal(err)
				}
				for c := uint32(0); c < a.Chunks(); {
					_, c = a.Run(c)
				}
			}
		})
	}
}

// BenchmarkConnections reads a disk whose connections have a bandwidth of 200 MB/s and a latency
// of 1 ms each, with fixed numbers of connections and with the number that the tuner finds.
func BenchmarkConnections(b *testing.B) {
	const size = 8 << 30
	for _, host := range []struct {
		name string
		conf []string
	}{
		{"free", nil},
		{"two_are_best", []string{"host-bandwidth 420 2 30"}},
	} {
		s := newStandIn(b, size, source.Extent{Off: size - 4096, Len: 4096})
		s.Conf(append(host.conf, "transport nbd", "bandwidth 200", "latency read 1000")...)
		for _, connections := range []int{1, 2, 4, 8, 0} {
			b.Run(fmt.Sprintf("%s/%d", host.name, connections), func(b *testing.B) {
				d, err := s.open(b.Context(), s.remote, Options{Connections: connections})
				if err != nil {
					b.Fatal(err)
				}
				defer d.Close()
				d.pool.mu.Lock()
				for d.pool.growth.opening {
					d.pool.changed.Wait()
				}
				d.pool.mu.Unlock()
				b.SetBytes(1 << 20)
				b.ResetTimer()
				readInParallel(b, d, 4*max(connections, maxAuto), 1<<20)
				b.ReportMetric(float64(d.Stats().Connections), "connections")
			})
		}
	}
}
