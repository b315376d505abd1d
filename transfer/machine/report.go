package machine

import (
	"time"

	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Report is the report of the copy of a machine. The section "JSON" of docs/cli.md describes its
// fields.
type Report struct {
	Version int           `json:"version"`
	VM      string        `json:"vm"`
	Status  report.Status `json:"status"`
	Exit    int           `json:"exit"`
	report.Times
	report.Way
	Quiesced bool            `json:"quiesced"`
	Rounds   []Round         `json:"rounds"`
	Power    inventory.Power `json:"power"`
	Left     []string        `json:"left"`  // names of snapshots of vddkcp that are still on the server
	Files    []string        `json:"files"` // targets that are complete
	Warnings []string        `json:"warnings"`
	Error    string          `json:"error"`
	Hint     string          `json:"hint"`
}

// NewReport returns the report of a copy that begins now.
func NewReport(vm string) *Report {
	return &Report{
		Version: 1, VM: vm, Times: report.Times{Started: time.Now()}, Way: report.Way{Via: "vddk"},
		Rounds: []Round{}, Left: []string{}, Files: []string{}, Warnings: []string{},
	}
}

// Round is one pass over the disks of a machine.
type Round struct {
	N        int              `json:"n"`
	Kind     string           `json:"kind"` // "full"
	Snapshot string           `json:"snapshot"`
	Seconds  float64          `json:"seconds"`
	Disks    []*report.Report `json:"disks"`
}

// EndWith completes the report of a run that returned err, which is nil after a success.
func (r *Report) EndWith(err error) report.Outcome {
	o := report.Of(err)
	if err != nil {
		r.Error, r.Hint = err.Error(), o.Hint
	}
	t := report.Report{Times: r.Times}
	t.End(o.Status, o.Exit)
	r.Times, r.Status, r.Exit = t.Times, o.Status, o.Exit
	return o
}

// Write writes the report to path, as report.Report.Write does.
func (r *Report) Write(path string) error { return report.WriteJSON(path, r) }
