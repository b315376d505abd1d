// Package report says how a copy ended. [Of] turns an error into an [Outcome]: the exit status,
// a hint, and whether another run helps. A [Report] collects what is known about a copy while
// it runs. [Report.EndWith] completes the report, and [Report.Write] writes it as JSON.
package report

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Status says in one word how a copy ended.
type Status string

// The values of Status.
const (
	StatusOK          Status = "ok"
	StatusFailed      Status = "failed"
	StatusInterrupted Status = "interrupted"
	StatusMismatch    Status = "mismatch"
	StatusSkipped     Status = "skipped"
)

// These values of Status are only in the report of a batch that has not ended.
const (
	StatusRunning Status = "running"
	StatusPending Status = "pending" // the copy has not begun, or will be tried again
)

// Report is the report of one copy. The section "JSON" of docs/cli.md describes its fields.
// Sizes are in bytes.
type Report struct {
	Version int    `json:"version"`
	Status  Status `json:"status"`
	Exit    int    `json:"exit"`
	Times
	Source      string `json:"source"`
	Target      string `json:"target"`
	Format      string `json:"format"`
	Transport   string `json:"transport"`
	VDDKVersion string `json:"vddk_version"`
	Way
	Sizes
	Reading
	Waits Waits `json:"waits"`
	Resumption
	Verify      Verify   `json:"verify"`
	PlacesAgain int      `json:"places_read_again,omitempty"`
	Digest      *Digest  `json:"digest"`
	Warnings    []string `json:"warnings"`
	Error       string   `json:"error"`
	Hint        string   `json:"hint"`
}

// Way says how a disk on a server was read. It is the zero value for other disks.
type Way struct {
	Via       string `json:"via"`                  // "vddk" or "nfc"
	Reason    string `json:"via_reason"`           // such as "asked for (--via)"
	NFCQuirks string `json:"nfc_quirks,omitempty"` // what VDDKCP_NFC changes in the protocol
}

// Times says when a copy ran.
type Times struct {
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished"`
	Seconds  float64   `json:"seconds"`
}

// Sizes says how many bytes a copy has processed in which way.
type Sizes struct {
	VirtualSize  int64 `json:"virtual_size"`
	BytesPlanned int64 `json:"bytes_planned"`
	BytesRead    int64 `json:"bytes_read"`
	BytesWritten int64 `json:"bytes_written"`
	BytesZero    int64 `json:"bytes_zero"`
	BytesCloned  int64 `json:"bytes_cloned"`
}

// Reading says how the source was read.
type Reading struct {
	Connections    int    `json:"connections"`
	ExtentsSource  string `json:"extents_source"`
	Retries        int64  `json:"retries"`
	WorkerRestarts int64  `json:"worker_restarts"`
}

// Waits says how long a copy has waited for what, in seconds. See [progress.Waits].
type Waits struct {
	Source     float64 `json:"source"`
	Encoders   float64 `json:"encoders"`
	Target     float64 `json:"target"`
	RateLimit  float64 `json:"rate_limit"`
	HostBudget float64 `json:"host_budget"`
}

// Add adds the times of another copy.
func (w *Waits) Add(other Waits) {
	w.Source += other.Source
	w.Encoders += other.Encoders
	w.Target += other.Target
	w.RateLimit += other.RateLimit
	w.HostBudget += other.HostBudget
}

// Resumption says what the copy has taken over from an earlier run.
type Resumption struct {
	ResumedFrom int64  `json:"resumed_from"` // bytes that an earlier run has copied
	ResumeProof string `json:"resume_proof"` // how it is known that the source is the same: "snapshot", "mtime" or "none"
}

// Verify is the result of comparing the target with the source.
type Verify struct {
	Status    string `json:"status"`    // VerifyOK, VerifyMismatch or VerifyNotRun
	Different int64  `json:"different"` // bytes that differ
}

// The values of Verify.Status.
const (
	VerifyOK       = "ok"
	VerifyMismatch = "mismatch"
	VerifyNotRun   = "not_run"
)

// Digest is a digest of the content of a disk.
type Digest struct {
	Algorithm string `json:"algorithm"`
	Value     string `json:"value"`
}

// New returns the report of a copy that starts now.
func New(source, target string) *Report {
	return &Report{
		Version: 1, Times: Times{Started: time.Now()}, Source: source, Target: target,
		Resumption: Resumption{ResumeProof: "none"}, Verify: Verify{Status: VerifyNotRun}, Warnings: []string{},
	}
}

// Count sets the numbers of bytes that the copy has planned, read, written, zeroed and shared, and
// the times that it has waited. The planned bytes are those of the copy: they have neither the
// bytes that are read back for a check, nor holes that were found during the copy.
func (r *Report) Count(s progress.Snapshot) {
	r.BytesPlanned, r.BytesRead, r.BytesWritten = s.Work(), s.Read, s.Written
	r.BytesZero, r.BytesCloned = s.Zeroed, s.Cloned
	r.Waits = WaitsOf(s.Waits)
}

// WaitsOf converts the times of a copy to seconds.
func WaitsOf(w progress.Waits) Waits {
	return Waits{
		Source: w[progress.WaitSource].Seconds(), Encoders: w[progress.WaitEncoders].Seconds(),
		Target: w[progress.WaitTarget].Seconds(), RateLimit: w[progress.WaitRateLimit].Seconds(),
		HostBudget: w[progress.WaitHostBudget].Seconds(),
	}
}

// End records that the copy ends now. The parameter exit is the exit status of the process.
func (r *Report) End(status Status, exit int) {
	r.Status, r.Exit, r.Finished = status, exit, time.Now()
	r.Seconds = r.Finished.Sub(r.Started).Seconds()
}

// EndWith completes the report of a copy that returned err. err is nil after a success. EndWith
// returns the Outcome of err.
func (r *Report) EndWith(err error) Outcome {
	o := Of(err)
	if err != nil {
		r.Error, r.Hint = err.Error(), o.Hint
	}
	r.End(o.Status, o.Exit)
	return o
}

// Write writes the report to path. A regular file is replaced as a whole or not at all. Any
// other file, such as a pipe, is written in place.
func (r *Report) Write(path string) error { return WriteJSON(path, r) }

// WriteJSON writes a report of any kind to path, in JSON, as [Report.Write] does.
func WriteJSON(path string, report any) error {
	text, err := json.MarshalIndent(report, "", "  ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return WriteText(path, append(text, '\n'))
}

// WriteText writes the text of a report to path, as [Report.Write] does. Characters that would
// control a terminal are escaped.
func WriteText(path string, text []byte) error {
	if err := durable.Write(path, printable.Bytes(text), durable.Private); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}
