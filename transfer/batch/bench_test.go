package batch_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"vddkcp/transfer"
	"vddkcp/transfer/batch"
)

// BenchmarkRun is what scheduling and the state file cost a job whose copy takes no
// time, by how many jobs there are.
func BenchmarkRun(b *testing.B) {
	for _, jobs := range []int{100, 10000} {
		b.Run(fmt.Sprint(jobs), func(b *testing.B) {
			lines := make([]string, jobs)
			for i := range lines {
				lines[i] = fmt.Sprintf("j%d h%d s", i, i%8)
			}
			dir := b.TempDir()
			file, err := batch.Load(strings.NewReader(`{"version":1,`+jobsOf(lines...)+`}`), "jobs.json", dir, testSpec())
			if err != nil {
				b.Fatal(err)
			}
			o := batch.Options{
				Limits: batch.Limits{PerHost: 2}, ContinueOnError: true,
				Copy: func(_ context.Context, t *batch.Task) *transfer.Report {
					r := transfer.NewReport(t.Source, t.Target)
					r.End(transfer.StatusOK, 0)
					return r
				},
				Size: func(*batch.Job) int64 { return -1 }, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Stopped: func(error) int { return 130 },
			}
			b.ReportAllocs()
			for range b.N {
				store, err := batch.OpenStore(filepath.Join(dir, "state.json"))
				if err != nil {
					b.Fatal(err)
				}
				o.Store = store
				r, err := batch.Run(b.Context(), file.Jobs, o)
				if err != nil || r.Exit != 0 {
					b.Fatalf("%v, %v", r, err)
				}
				if err := store.Close(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N*jobs), "us/job")
		})
	}
}
