package job

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestWaits copies a disk that reports its connections and a wait for the budget of its host, and
// then reads slowly. It checks the report and the counters.
func TestWaits(t *testing.T) {
	dst := filepath.Join(t.TempDir(), "copy.raw")
	synctest.Test(t, func(t *testing.T) {
		counters := new(progress.Counters)
		connections := 0
		r, err := Run(t.Context(), Spec{
			Source: "vm:web01#1", Target: dst, Counters: counters, RequestSize: 1 << 20, Depth: 1,
			OpenDisk: func(ctx context.Context, _ *sourceopen.Opener) (source.Disk, error) {
				observer.Connections(ctx, 3)
				observer.Connections(ctx, -1)
				end := observer.Wait(ctx)
				time.Sleep(time.Minute)
				end()
				time.Sleep(time.Second) // opening the source
				return &sourcetest.Memory{Bytes: bytes.Repeat([]byte{9}, 4<<20), OnRead: func(int64, int) error {
					connections = counters.Snapshot().Connections
					time.Sleep(time.Second)
					return nil
				}}, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		if want := (report.Waits{Source: 5, HostBudget: 60}); r.Waits != want || r.Seconds != 65 {
			t.Errorf("waits %+v in %v s, want %+v", r.Waits, r.Seconds, want)
		}
		if connections != 2 {
			t.Errorf("%d connections during the copy, want 2", connections)
		}
	})
}
