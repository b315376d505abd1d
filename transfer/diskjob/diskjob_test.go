package diskjob_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/diskjob"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestRun copies one disk that exists and one that does not. Only the error of the second
// reaches Failed, and the first target holds the bytes of its source.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	content := bytes.Repeat([]byte("disk"), 64<<10)
	if err := os.WriteFile(filepath.Join(dir, "whole"), content, 0o600); err != nil {
		t.Fatal(err)
	}
	var failed []string
	log := slog.New(slog.DiscardHandler)
	jobs := &diskjob.Jobs{
		Spec:    func(j *batch.Job) job.Spec { return job.Spec{Source: j.Source, Target: j.Target, SourceFormat: "raw"} },
		Copy:    func(ctx context.Context, _ *batch.Job, s job.Spec) (*report.Report, error) { return job.Run(ctx, s) },
		Display: progress.NewBatchDisplay(progress.Output{To: io.Discard}, 2),
		Log:     log,
		Failed:  func(t *batch.Task, _ error) { failed = append(failed, t.Name) },
	}
	for _, c := range []struct {
		name string
		size int64
		want report.Status
	}{
		{"whole", int64(len(content)), report.StatusOK},
		{"missing", -1, report.StatusFailed},
	} {
		j := &batch.Job{Name: c.name, Source: filepath.Join(dir, c.name), Target: filepath.Join(dir, c.name+".raw")}
		r := jobs.Runner(j)
		if got := r.Size(); got != c.size {
			t.Errorf("%s: Size() = %d, want %d", c.name, got, c.size)
		}
		if got := r.Backing(); got != "" {
			t.Errorf("%s: Backing() = %q, want no backing", c.name, got)
		}
		if got := r.Run(t.Context(), &batch.Task{Job: j, Log: log, Attempt: 1, Counters: new(progress.Counters), Way: func(report.Way) {}}); got.Status != c.want {
			t.Errorf("%s: status %q, want %q (%s)", c.name, got.Status, c.want, got.Error)
		}
	}
	if !slices.Equal(failed, []string{"missing"}) {
		t.Errorf("Failed was called for %q, want missing alone", failed)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "whole.raw")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the target differs from the source (%v)", err)
	}
}

// TestTidy checks that Tidy removes the second name of a complete target, and nothing that
// belongs to an unfinished copy.
func TestTidy(t *testing.T) {
	dir := t.TempDir()
	j := &batch.Job{Name: "a", Source: filepath.Join(dir, "a"), Target: filepath.Join(dir, "a.raw")}
	partial := j.Target + ".partial"
	if err := os.WriteFile(partial, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	jobs := &diskjob.Jobs{
		Spec: func(j *batch.Job) job.Spec { return job.Spec{Source: j.Source, Target: j.Target} },
		Log:  slog.New(slog.DiscardHandler),
	}
	r := jobs.Runner(j)
	r.Tidy()
	if _, err := os.Stat(partial); err != nil {
		t.Errorf("Tidy removed the data of an unfinished copy: %v", err)
	}
	if err := os.Link(partial, j.Target); err != nil {
		t.Fatal(err)
	}
	r.Tidy()
	if _, err := os.Stat(partial); !os.IsNotExist(err) {
		t.Errorf("Tidy left %s (%v)", partial, err)
	}
}
