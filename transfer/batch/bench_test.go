package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/report"
)

const benchJobs = 10_000

// benchFile returns a job file with many disks on a hundred hosts.
func benchFile() []byte {
	var b bytes.Buffer
	b.WriteString(`{"version":1,"limits":{"total":60,"per_server":50,"per_host":2},"defaults":{"server":"vc.example.com","verify":true},"jobs":[`)
	for i := range benchJobs {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"name":"vm%04d-0","source":"[ds1] vm%04[1]d/vm%04[1]d.vmdk","target":"images/vm%04[1]d-0.qcow2","host":"esxi%d"}`, i, i%100)
		b.WriteByte('\n')
	}
	b.WriteString("]}")
	return b.Bytes()
}

func benchSpec() *Spec {
	path := func(a string) bool { return !strings.HasPrefix(a, "[") }
	return &Spec{
		Fields:     []Field{{Name: "server", Type: Text}, {Name: "verify", Type: Boolean}, {Name: "compress", Type: Text}},
		SourcePath: path, TargetPath: path,
		Files: func(a string) []string {
			if !path(a) {
				return nil
			}
			return []string{a, a + ".partial"}
		},
	}
}

func benchLoad(b *testing.B, text []byte) *File {
	b.Helper()
	f, err := Load(bytes.NewReader(text), "jobs.json", "/jobs", benchSpec())
	if err != nil {
		b.Fatal(err)
	}
	return f
}

func benchReport(j *Job) *JobReport {
	t := report.New(j.Source, j.Target)
	t.End(report.StatusOK, 0)
	return &JobReport{Name: j.Name, Labels: j.Labels(), Attempts: 1, Report: t}
}

func benchEntry(j *Job) *entry {
	return &entry{Name: j.Name, Phase: phaseDone, Fingerprint: j.Fingerprint(), Attempts: 1, Size: -1, Report: benchReport(j)}
}

func BenchmarkLoad(b *testing.B) {
	text := benchFile()
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		benchLoad(b, text)
	}
}

// BenchmarkStore measures one change in state files of different sizes. The cases
// named "flush" include rewriting the state file after the change.
func BenchmarkStore(b *testing.B) {
	jobs := benchLoad(b, benchFile()).Jobs
	for _, n := range []int{200, benchJobs} {
		for _, flushed := range []bool{false, true} {
			name := fmt.Sprintf("put/%d", n)
			if flushed {
				name = fmt.Sprintf("flush/%d", n)
			}
			b.Run(name, func(b *testing.B) { benchStore(b, jobs[:n], flushed) })
		}
	}
}

func benchStore(b *testing.B, jobs []*Job, flushed bool) {
	s, err := OpenStore(filepath.Join(b.TempDir(), "state.json"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	for _, j := range jobs {
		text, err := json.Marshal(benchEntry(j))
		if err != nil {
			b.Fatal(err)
		}
		s.keep(j.Name, text)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if err := s.put(benchEntry(jobs[i%len(jobs)])); err != nil {
			b.Fatal(err)
		}
		if flushed {
			if err := s.flush(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkRun measures the work of a batch without the copies. The limits prevent
// most jobs from starting most of the time.
func BenchmarkRun(b *testing.B) {
	f := benchLoad(b, benchFile())
	for _, c := range []struct {
		name   string
		limits Limits
	}{
		{"total", Limits{Total: 60}},
		{"hosts", f.Limits},
		{"a server", Limits{Total: 60, PerServer: 1}},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s, err := OpenStore(filepath.Join(b.TempDir(), "state.json"))
				if err != nil {
					b.Fatal(err)
				}
				r, err := Run(context.Background(), f.Jobs, Options{
					Limits: c.limits, Store: s, Log: slog.New(slog.DiscardHandler),
					Runner: func(j *Job) Runner { return benchRunner{j} },
				})
				if err != nil || r.Counts.Done != len(f.Jobs) {
					b.Fatal(r, err)
				}
				if err := s.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// benchRunner is a job whose copy takes no time.
type benchRunner struct{ job *Job }

func (r benchRunner) Run(context.Context, *Task) *report.Report { return benchReport(r.job).Report }
func (r benchRunner) Demand() Demand                            { return r.job.Demand() }
func (r benchRunner) Size() int64                               { return -1 }
func (r benchRunner) Backing() string                           { return "" }
func (r benchRunner) Tidy()                                     {}
