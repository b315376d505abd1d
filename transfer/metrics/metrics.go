// Package metrics writes the state of a run in the text format of Prometheus, for the textfile
// collector of the node exporter. The section "Metrics" of docs/cli.md describes the metrics.
package metrics

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Status is the state of a run.
type Status struct {
	Command  string // such as "run"
	Name     string // distinguishes runs on the same machine
	Started  time.Time
	Updated  time.Time
	Finished time.Time // zero while the run goes on
	Exit     int       // exit status, if the run has ended

	Jobs map[string]int // number of jobs by state; nil for a run without jobs

	Read, Written, Zeroed, Cloned int64 // bytes since Started
	Rate                          float64
	Connections                   int
	Retries                       int64
	Waits                         report.Waits
}

// Start is how each file begins that Status.Write writes.
const Start = "# HELP vddkcp_"

// public is the mode of the file. The node exporter runs as a user of its own and must be able to
// read the file. The file has only numbers, the command and the name.
const public = 0o644

// Write replaces the file at path durably with the metrics of s.
func (s *Status) Write(path string) error {
	if err := durable.Write(path, s.Text(), public); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	return nil
}

// The type writer writes metrics, each with the labels of the run.
type writer struct {
	bytes.Buffer
	labels string
}

// The method head begins a metric. All its samples must follow.
func (w *writer) head(name, kind, help string) {
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

// The method sample writes a value. The names and values of further labels alternate in the
// parameter more.
func (w *writer) sample(name string, value float64, more ...string) {
	labels := w.labels
	for i := 0; i < len(more); i += 2 {
		labels += label(more[i], more[i+1])
	}
	fmt.Fprintf(w, "%s{%s} %s\n", name, strings.TrimPrefix(labels, ","), strconv.FormatFloat(value, 'g', -1, 64))
}

// The method one writes a metric with a single value.
func (w *writer) one(name, kind, help string, value float64) {
	w.head(name, kind, help)
	w.sample(name, value)
}

var escapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func label(name, value string) string {
	return fmt.Sprintf(`,%s="%s"`, name, escapes.Replace(strings.ToValidUTF8(value, "?")))
}

// Text returns the metrics of s.
func (s *Status) Text() []byte {
	w := &writer{labels: label("command", s.Command) + label("name", printable.Line(s.Name))}
	running := 0.0
	if s.Finished.IsZero() {
		running = 1
	}
	w.one("vddkcp_running", "gauge", "Whether the run goes on (1) or has ended (0). A run that was killed stays at 1: see vddkcp_last_update_timestamp_seconds.", running)
	w.one("vddkcp_start_timestamp_seconds", "gauge", "When the run started, in seconds since 1970.", seconds(s.Started))
	w.one("vddkcp_last_update_timestamp_seconds", "gauge", "When these metrics were written, in seconds since 1970.", seconds(s.Updated))
	if running == 0 {
		w.one("vddkcp_end_timestamp_seconds", "gauge", "When the run ended, in seconds since 1970. Absent while it goes on.", seconds(s.Finished))
		w.one("vddkcp_exit_status", "gauge", "Exit status of the run. Absent while it goes on.", float64(s.Exit))
	}
	if s.Jobs != nil {
		w.head("vddkcp_jobs", "gauge", "Number of jobs in each state.")
		for _, state := range slices.Sorted(maps.Keys(s.Jobs)) {
			w.sample("vddkcp_jobs", float64(s.Jobs[state]), "state", state)
		}
	}
	w.one("vddkcp_read_bytes_total", "counter", "Bytes read from sources since the start of the run.", float64(s.Read))
	w.one("vddkcp_written_bytes_total", "counter", "Bytes written to targets since the start of the run.", float64(s.Written))
	w.one("vddkcp_zeroed_bytes_total", "counter", "Bytes of targets that were zeroed without writing zeros since the start of the run.", float64(s.Zeroed))
	w.one("vddkcp_cloned_bytes_total", "counter", "Bytes whose blocks the target shares with the source since the start of the run.", float64(s.Cloned))
	w.one("vddkcp_read_bytes_per_second", "gauge", "Rate at which sources are read, over the last ten seconds.", s.Rate)
	w.one("vddkcp_retries_total", "counter", "Requests to sources and targets that were tried again, of copies that have ended.", float64(s.Retries))
	w.one("vddkcp_connections", "gauge", "Connections to sources that are open now.", float64(s.Connections))
	w.head("vddkcp_wait_seconds_total", "counter", "Time that copies have waited, by what they waited for.")
	for _, wait := range []struct {
		what  string
		value float64
	}{{"source", s.Waits.Source}, {"encoders", s.Waits.Encoders}, {"target", s.Waits.Target}, {"rate_limit", s.Waits.RateLimit}, {"host_budget", s.Waits.HostBudget}} {
		w.sample("vddkcp_wait_seconds_total", wait.value, "for", wait.what)
	}
	return w.Bytes()
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
