package job_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// disk writes a raw disk of 2 MiB, of which the second half is a hole, and returns its
// path.
func disk(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 2<<20); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestPlanWritesNothing checks that Plan says what Run would do, and makes no file.
func TestPlanWritesNothing(t *testing.T) {
	dir := t.TempDir()
	spec := job.Spec{Source: disk(t, dir), Target: filepath.Join(dir, "copy.raw")}
	p, err := job.Plan(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if p.Target != "raw file" || p.Size != 2<<20 || p.Data != 1<<20 || p.Holes != 1<<20 || p.Need != 1<<20 || p.Shared != 0 {
		t.Errorf("plan %+v", p)
	}
	if r := p.Report; r.Status != report.StatusSkipped || r.Exit != 0 || r.VirtualSize != 2<<20 {
		t.Errorf("report %+v", r)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("files %v, %v", files, err)
	}
}

// TestErrors checks that Run and Plan return a report with the error, and leave no file
// at the target.
func TestErrors(t *testing.T) {
	dir := t.TempDir()
	src, dst := disk(t, dir), filepath.Join(dir, "copy.raw")
	boom := errors.New("boom")
	stopped, stop := context.WithCancelCause(t.Context())
	stop(boom)
	for name, c := range map[string]struct {
		ctx  context.Context
		spec job.Spec
		exit int
		is   error
	}{
		"no target":      {t.Context(), job.Spec{Source: src}, exit.Usage, nil},
		"no source":      {t.Context(), job.Spec{Source: dst, Target: dst}, exit.Failed, os.ErrNotExist},
		"size of a disk": {t.Context(), job.Spec{Source: src, Target: dst, Size: new(int64)}, exit.Usage, nil},
		"the caller":     {t.Context(), job.Spec{Source: src, Target: dst, Opened: func() error { return boom }}, exit.Failed, boom},
		"context":        {stopped, job.Spec{Source: src, Target: dst}, exit.Failed, boom},
	} {
		run, runErr := job.Run(c.ctx, c.spec)
		plan, planErr := job.Plan(c.ctx, c.spec)
		for _, end := range []struct {
			r   *report.Report
			err error
		}{{run, runErr}, {plan.Report, planErr}} {
			if end.err == nil || end.r.Exit != c.exit || report.Of(end.err).Exit != c.exit || end.r.Error != end.err.Error() || c.is != nil && !errors.Is(end.err, c.is) {
				t.Errorf("%s: %v, report %+v", name, end.err, end.r)
			}
		}
		if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the target: %v", name, err)
		}
	}
}

// TestStream copies a stream whose size is unknown.
func TestStream(t *testing.T) {
	dir := t.TempDir()
	in, err := os.Open(disk(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	dst := filepath.Join(dir, "copy.raw")
	r, err := job.Run(t.Context(), job.Spec{Source: "-", Target: dst, Stdin: in})
	if err != nil || r.VirtualSize != 2<<20 {
		t.Errorf("%v, report %+v", err, r)
	}
	want, err := os.ReadFile(in.Name())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the copy differs: %v", err)
	}
}
