package batch

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// benchMonitor returns the Monitor of a batch of many jobs, of which most have ended and some run.
func benchMonitor(b *testing.B) *Monitor {
	b.Helper()
	jobs := benchLoad(b, benchFile()).Jobs
	m := newMonitor(jobs)
	for i, j := range jobs[:len(jobs)*3/4] {
		l := m.start(j, 1)
		if i%100 != 0 {
			l.counters.AddRead(1 << 30)
			m.end(l, benchReport(j), false)
			continue
		}
		l.pace.add(m.begun.Add(time.Second), 1<<20, progress.Waits{})
	}
	return m
}

// BenchmarkReport measures what a running batch spends on its report: taking the picture, for which
// jobs wait that start or end, and writing it as JSON and as a page, for which nothing waits.
func BenchmarkReport(b *testing.B) {
	m := benchMonitor(b)
	b.Run("now", func(b *testing.B) {
		for b.Loop() {
			m.Now()
		}
	})
	b.Run("picture", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.Report()
		}
	})
	for _, name := range []string{"r.json", "r.html"} {
		b.Run(name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), name)
			b.ReportAllocs()
			for b.Loop() {
				if err := m.Report().Write(path); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(fileSize(path)), "bytes")
		})
	}
}
