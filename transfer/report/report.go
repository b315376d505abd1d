// Package report says what became of a copy: its status, exit status, counts and hint, as people and
// programs read them.
package report

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Status says in a word how a copy ended.
type Status string

// The states that a report may give.
const (
	StatusOK          Status = "ok"
	StatusFailed      Status = "failed"
	StatusInterrupted Status = "interrupted"
	StatusMismatch    Status = "mismatch"
	StatusSkipped     Status = "skipped"
)

// Report is what --report writes, by docs/cli.md, "JSON". Sizes are bytes.
type Report struct {
	Version        int       `json:"version"`
	Status         Status    `json:"status"`
	Exit           int       `json:"exit"`
	Started        time.Time `json:"started"`
	Finished       time.Time `json:"finished"`
	Seconds        float64   `json:"seconds"`
	Source         string    `json:"source"`
	Target         string    `json:"target"`
	Format         string    `json:"format"`
	Transport      string    `json:"transport"`
	VDDKVersion    string    `json:"vddk_version"`
	VirtualSize    int64     `json:"virtual_size"`
	BytesPlanned   int64     `json:"bytes_planned"`
	BytesRead      int64     `json:"bytes_read"`
	BytesWritten   int64     `json:"bytes_written"`
	BytesZero      int64     `json:"bytes_zero"`
	BytesCloned    int64     `json:"bytes_cloned"`
	Connections    int       `json:"connections"`
	ExtentsSource  string    `json:"extents_source"`
	Retries        int64     `json:"retries"`
	WorkerRestarts int64     `json:"worker_restarts"`
	ResumedFrom    int64     `json:"resumed_from"`
	ResumeProof    string    `json:"resume_proof"`
	Verify         Verify    `json:"verify"`
	Digest         *Digest   `json:"digest"`
	Warnings       []string  `json:"warnings"`
	Error          string    `json:"error"`
	Hint           string    `json:"hint"`
}

// Verify is what a report says of the comparison of source and target.
type Verify struct {
	Status    string `json:"status"` // VerifyOK and so on
	Different int64  `json:"different"`
}

// What a report says of verifying.
const (
	VerifyOK       = "ok"
	VerifyMismatch = "mismatch"
	VerifyNotRun   = "not_run"
)

// Digest is a content digest of a disk.
type Digest struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"value"`
}

// New returns the report of a copy that starts now.
func New(source, target string) *Report {
	return &Report{
		Version: 1, Started: time.Now(), Source: source, Target: target,
		ResumeProof: "none", Verify: Verify{Status: VerifyNotRun}, Warnings: []string{},
	}
}

// Count takes over what the copy counted.
func (r *Report) Count(s progress.Snapshot) {
	r.BytesPlanned, r.BytesRead, r.BytesWritten = s.Planned, s.Read, s.Written
	r.BytesZero, r.BytesCloned = s.Zeroed, s.Cloned
}

// End notes the time, the status and the exit status.
func (r *Report) End(status Status, exit int) {
	r.Status, r.Exit, r.Finished = status, exit, time.Now()
	r.Seconds = r.Finished.Sub(r.Started).Seconds()
}

// EndWith ends the report of a copy that returned err, which may be nil. It returns
// what the error means.
func (r *Report) EndWith(err error) Outcome {
	o := Of(err)
	if err != nil {
		r.Error, r.Hint = err.Error(), o.Hint
	}
	r.End(o.Status, o.Exit)
	return o
}

// reportMode is the mode of reports, whose messages may have what only this user
// should see.
const reportMode = 0o600

// Write writes the report to path as durable.Write does: as a whole or not at
// all, or in place where path is no regular file.
func (r *Report) Write(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = durable.Write(path, append(printable.Bytes(text), '\n'), reportMode)
	}
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
