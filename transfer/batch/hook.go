package batch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// hookGrace is the time between SIGTERM and SIGKILL when a command must be ended.
const hookGrace = 5 * time.Second

// maxHookLine is the length, in bytes, at which a line of a command's output is cut.
const maxHookLine = 4 << 10

// The kinds of commands of a job.
const (
	hookBefore = "before"
	hookAfter  = "after"
)

// The method hook runs a command of the job of an attempt. While the command runs, the monitor
// names it. kind is hookBefore or hookAfter. report is the report of the copy, and nil for a before
// command.
func (r *run) hook(ctx context.Context, a *attempt, kind string, report *JobReport, log *slog.Logger) error {
	argv := a.job.Before
	if kind == hookAfter {
		argv = a.job.After
	}
	r.monitor.setHook(a.live, kind)
	defer r.monitor.setHook(a.live, "")
	return r.command(ctx, kind, argv, a.job, report, log)
}

// The method command runs a command of a job and logs each line that the command prints. If ctx
// ends, or if the command takes longer than the job allows, the method first ends all processes
// that the command has started, and then returns.
func (r *run) command(ctx context.Context, kind string, argv []string, job *Job, report *JobReport, log *slog.Logger) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s command %q: %w", kind, argv[0], err)
		}
	}()
	status, reportFile := "", ""
	if report != nil {
		status = string(report.Status)
		if reportFile, err = temporary(report); err != nil {
			return err
		}
		defer os.Remove(reportFile)
	}
	limited, cancel := context.WithTimeoutCause(ctx, job.HookTimeout, fmt.Errorf("the command did not end within hook_timeout, %s", job.HookTimeout))
	defer cancel()
	cmd := exec.CommandContext(limited, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), "VDDKCP_JOB="+job.Name, "VDDKCP_STATUS="+status, "VDDKCP_TARGET="+job.Target, "VDDKCP_REPORT="+reportFile)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ended := false // the command was stopped because the context limited ended
	cmd.Cancel = func() error {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return err
		}
		ended = true
		// SIGTERM is also sent to the process group of the command. The group includes the
		// processes that the command started.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
		return nil
	}
	lines := &lineWriter{handleLine: func(line string) { log.Info(kind+" command", "says", line) }}
	cmd.Stdout, cmd.Stderr = lines, lines
	// A background process may keep the output of the command open after the command has ended. The
	// job waits for the end of the output, but only for a limited time.
	cmd.WaitDelay = hookGrace
	gone, err := r.spawn(func() (group int, err error) {
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		return cmd.Process.Pid, nil
	})
	if err != nil {
		if limited.Err() != nil {
			return context.Cause(limited)
		}
		return err
	}
	defer gone()
	err = cmd.Wait()
	if ended {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		err = context.Cause(limited)
	}
	lines.end()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // the command succeeded; a background process still has its output open
	}
	if err != nil && lines.last != "" {
		err = fmt.Errorf("%w; its last output: %q", err, lines.last)
	}
	return err
}

func (r *run) spawn(start func() (group int, err error)) (gone func(), err error) {
	if r.o.Spawn != nil {
		return r.o.Spawn(start)
	}
	_, err = start()
	return func() {}, err
}

// The function temporary writes a report to a temporary file that only the user can read, and
// returns the path of the file.
func temporary(report *JobReport) (path string, err error) {
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp("", "vddkcp-report-*.json")
	if err != nil {
		return "", err
	}
	_, err = f.Write(append(text, '\n'))
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", err
	}
	return f.Name(), nil
}

// lineWriter passes each line that is written to it to the function handleLine.
type lineWriter struct {
	handleLine func(line string)
	rest       []byte // the beginning of a line that is not complete yet
	last       string // the last line
}

var _ io.Writer = (*lineWriter)(nil)

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			if len(w.rest) < maxHookLine {
				return len(p), nil
			}
			line, rest = w.rest, nil
		}
		w.emit(line)
		w.rest = append(w.rest[:0], rest...)
	}
}

func (w *lineWriter) emit(line []byte) {
	text := strings.ToValidUTF8(strings.TrimRight(string(line[:min(len(line), maxHookLine)]), "\r \t"), "?")
	if text != "" {
		w.last = text
		w.handleLine(text)
	}
}

func (w *lineWriter) end() { w.emit(w.rest) }
