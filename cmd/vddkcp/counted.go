package main

import "vddkcp/source"

// countSource fills in what the report says of how the source was read, and
// shows what VDDK warned of before a copy failed with err.
func (j *job) countSource(err error) {
	if j.source == nil {
		return
	}
	if c, ok := source.Ability[source.Counted](j.source); ok {
		s := c.Stats()
		j.report.Transport, j.report.VDDKVersion, j.report.Connections = s.Transport, s.Library, s.Connections
		j.report.Retries, j.report.WorkerRestarts = s.Retries, s.Restarts
		if s.ExtentsSource != "" {
			j.report.ExtentsSource = s.ExtentsSource
		}
	}
	if err == nil {
		return
	}
	if l, ok := source.Ability[interface{ LastWarnings() []string }](j.source); ok {
		for _, line := range l.LastWarnings() {
			j.log.Warn("VDDK said: " + line)
		}
	}
}
