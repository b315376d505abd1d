package vddk

import (
	"context"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestDisk(t *testing.T) {
	for _, test := range []struct {
		name string
		size int
		o    Options
	}{
		{"default", 5<<20 + 1024, Options{}},
		{"small requests", 3<<20 + 512, Options{RequestSize: 4096, Depth: 2}},
		{"three connections", 4 << 20, Options{RequestSize: 64 << 10, Connections: 3}},
		{"less than a chunk", 1024, Options{}},
		{"empty", 0, Options{}},
		{"writable", 1<<20 + 512, Options{Writable: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, content := newFakeHost(t, test.size)
			host.holes = []worker.Block{{Start: 128, Count: 256}, {Start: 1024, Count: 128}}
			for _, h := range host.holes {
				if int(h.Start+h.Count)*sectorSize <= len(content) {
					clear(content[h.Start*sectorSize : (h.Start+h.Count)*sectorSize])
				}
			}
			sourcetest.Run(t, sourcetest.Config{Content: content, Open: func(ctx context.Context, t testing.TB) source.Disk {
				d, err := host.open(ctx, Params{}, test.o)
				if err != nil {
					t.Fatal(err)
				}
				return d
			}})
		})
	}
}
