package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

// nameBatch is the hint for a user who has named no batch that ever ran.
const nameBatch = "name the job file or the state file of the batch, with the flags --state and --shard of its run if it had them"

// The function unreadable adds a hint to an error about the file that the user has named, or about
// the state file.
func unreadable(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return usage.WithHint(err, "the state of a batch can be read only by the user who runs the batch, and by root")
	}
	return usage.WithHint(err, nameBatch)
}

// The method printStatus prints the state of a batch that another process runs. JOBS is the job
// file or the state file of the batch.
func (c *batchCommand) printStatus(ctx context.Context, parser *jobParser) error {
	path, ofState, err := c.Jobs, false, error(nil)
	if c.Jobs != "-" && c.State == "" {
		if ofState, err = batch.IsState(c.Jobs); err != nil {
			return unreadable(err)
		}
	}
	if !ofState {
		if path, err = c.statePath(); err != nil {
			return err
		}
		if _, err := os.Stat(c.Jobs); err != nil && c.State == "" {
			return unreadable(err)
		}
	}
	s, err := batch.ReadState(path)
	if errors.Is(err, fs.ErrNotExist) && !ofState && c.State == "" {
		err = fmt.Errorf("%s is no state file, and if it is a job file, no batch has run with it: %w", printable.Name(c.Jobs), err)
	}
	if err != nil {
		return unreadable(err)
	}
	if !ofState && c.Jobs != "-" {
		// The job file may have been changed since the batch began, and is needed only for the
		// number of jobs.
		if _, jobs, err := c.load(ctx, parser); err != nil {
			c.logs.warn(fmt.Sprintf("jobs that have not begun are not counted: %v", err))
		} else {
			s.Expect(jobs)
		}
	}
	out := standardOutput(ctx)
	if c.JSON {
		return printJSON(out, s)
	}
	return writeStatus(out, s, time.Now())
}

// writeStatus writes the state of a batch as text.
func writeStatus(out io.Writer, s *batch.State, now time.Time) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", printable.Name(s.StateFile), runningText(s))
	fmt.Fprintf(&b, "%s\n", countsText(s))
	if s.Updated != nil && s.Running != durable.HeldNo {
		// The clock of this machine may be behind that of the other, or may have been set back.
		fmt.Fprintf(&b, "updated %s ago", max(now.Sub(*s.Updated), 0).Round(time.Second))
		if s.Totals != nil {
			fmt.Fprintf(&b, "; %s read, %s/s, %s", bytesize.Format(s.Totals.BytesRead), bytesize.Format(int64(s.Totals.Rate)), plural(s.Totals.Connections, "connection", "connections"))
		}
		b.WriteString("\n")
	}
	if s.Updated == nil && s.Running != durable.HeldNo {
		fmt.Fprintf(&b, "what runs now is not known: the batch has just begun, or cannot write %s\n", printable.Name(batch.NowPath(s.StateFile)))
	}
	if len(s.Jobs) > 0 {
		if s.Running == durable.HeldNo {
			b.WriteString("\nThese jobs ran when the batch was killed:\n")
		} else {
			b.WriteString("\n")
		}
		writeRunning(&b, s.Jobs, s.Running != durable.HeldNo)
	}
	if len(s.Failed) > 0 {
		b.WriteString("\nFailed, with the error of the last attempt:\n")
	}
	for _, j := range s.Failed {
		fmt.Fprintf(&b, "%s: %s\n", printable.Name(j.Name), printable.Line(j.Error))
		if j.Hint != "" {
			fmt.Fprintf(&b, "  hint: %s\n", printable.Line(j.Hint))
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// runningText says whether a process runs the batch.
func runningText(s *batch.State) string {
	process := "a process"
	if s.PID > 0 {
		process = fmt.Sprintf("process %d on %s", s.PID, printable.Name(s.Host))
	}
	switch s.Running {
	case durable.HeldYes:
		if s.Started != nil {
			process += ", since " + s.Started.Local().Format("2006-01-02 15:04:05")
		}
		return "running: " + process
	case durable.HeldUnknown:
		return "running, or was killed: " + process + ", which is not this host"
	}
	switch {
	case s.Updated != nil:
		return fmt.Sprintf("not running: %s was killed after %s", process, s.Updated.Local().Format("2006-01-02 15:04:05"))
	case s.PID > 0: // a run that ends removes the file that has the number of its process
		return fmt.Sprintf("not running: %s was killed", process)
	}
	return "not running"
}

// countsText says how many jobs are in which state.
func countsText(s *batch.State) string {
	c, pending := s.Counts, "not started"
	if s.Running != durable.HeldNo {
		pending = "waiting" // some of these jobs may have failed, and will be tried again
	}
	var parts []string
	for _, n := range []struct {
		count int
		what  string
	}{{c.Running, "running"}, {c.Failed, "failed"}, {c.Interrupted, "interrupted"}, {c.Skipped, "skipped"}, {c.Pending, pending}} {
		if n.count > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n.count, n.what))
		}
	}
	return strings.Join(append([]string{fmt.Sprintf("%d done", c.Done)}, parts...), ", ")
}

// writeRunning writes a table of the jobs that run, or of those that ran when the batch was killed.
func writeRunning(out io.Writer, jobs []*batch.JobReport, alive bool) {
	table := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	head := "JOB\tDONE\tRATE\tTIME LEFT\tBOUND BY\tSOURCE"
	if !alive {
		head = "JOB\tDONE\tSOURCE"
	}
	fmt.Fprintln(table, head)
	for _, j := range jobs {
		done, rate, left, bound := "-", "-", "-", "-"
		if l := j.Live; l != nil {
			if j.BytesPlanned > 0 {
				done = fmt.Sprintf("%d%%", min(l.BytesDone*100/j.BytesPlanned, 100))
			}
			rate = bytesize.Format(int64(l.Rate)) + "/s"
			if text := l.TimeLeft(); text != "" {
				left = text
			}
			if l.BoundBy != "" {
				bound = l.BoundBy
			}
			if stage := l.Stage(); stage != "" {
				done = strings.TrimPrefix(done+" "+stage, "- ")
			}
		}
		if !alive {
			fmt.Fprintf(table, "%s\t%s\t%s\n", printable.Name(j.Name), done, printable.Name(j.Source))
			continue
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", printable.Name(j.Name), done, rate, left, bound, printable.Name(j.Source))
	}
	_ = table.Flush() // a strings.Builder has no errors
}
