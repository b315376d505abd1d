package worker_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

func BenchmarkRead(b *testing.B) {
	for _, depth := range []int{1, 4} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			p, _ := open(b, config(b, nil), remote)
			ctx := context.Background()
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			var wg sync.WaitGroup
			work := make(chan int, depth)
			for slot := range depth {
				wg.Go(func() {
					for i := range work {
						if err := p.Read(ctx, slot, uint64(i%7)*2048, 2048); err != nil {
							b.Error(err)
						}
					}
				})
			}
			b.ResetTimer()
			for i := range b.N {
				work <- i
			}
			close(work)
			wg.Wait()
		})
	}
}

func BenchmarkStart(b *testing.B) {
	c := config(b, nil)
	for range b.N {
		p, err := worker.Start(context.Background(), c)
		if err != nil {
			b.Fatal(err)
		}
		p.Release()
	}
}
