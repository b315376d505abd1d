package metrics_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/metrics"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func night() *metrics.Status {
	return &metrics.Status{
		Command: "run", Name: "wave \"1\"\\ü\n", Started: time.Unix(1764600000, 0), Updated: time.Unix(1764600010, 250e6),
		Jobs: map[string]int{"running": 3, "done": 12}, Read: 1 << 40, Written: 5, Rate: 1.5e8, Connections: 7, Retries: 2,
		Waits: report.Waits{Source: 1.25},
	}
}

func TestText(t *testing.T) {
	s := night()
	text := string(s.Text())
	for _, want := range []string{
		"# HELP vddkcp_read_bytes_total Bytes read from sources since the start of the run.\n# TYPE vddkcp_read_bytes_total counter\n",
		`vddkcp_running{command="run",name="wave \"1\"\\ü\\n"} 1` + "\n",
		`vddkcp_last_update_timestamp_seconds{command="run",name="wave \"1\"\\ü\\n"} 1.76460001025e+09` + "\n",
		`,state="done"} 12` + "\n", `,state="running"} 3` + "\n", `,for="source"} 1.25` + "\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics lack %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "vddkcp_exit_status") {
		t.Error("a run that goes on has an exit status")
	}
	s.Finished, s.Exit = s.Updated, 4
	if text = string(s.Text()); !strings.Contains(text, `vddkcp_exit_status{command="run",name="wave \"1\"\\ü\\n"} 4`) || !strings.Contains(text, "} 0\n") {
		t.Errorf("of a run that has ended:\n%s", text)
	}
}

// readMetrics is a program for Python's client of Prometheus. Its parser fails on a text that is
// not in the format. The program prints each sample.
const readMetrics = `
import sys
from prometheus_client.parser import text_string_to_metric_families
for family in text_string_to_metric_families(open(sys.argv[1]).read()):
    assert family.documentation and family.type in ("counter", "gauge"), family
    for sample in family.samples:
        print(family.type, sample.name, sorted(sample.labels.items()), sample.value)
`

// TestForeignParser lets the parser of another program read the metrics.
func TestForeignParser(t *testing.T) {
	peer.Need(t, "/usr/bin/python3")
	if err := exec.Command("/usr/bin/python3", "-c", "import prometheus_client").Run(); err != nil {
		const missing = "the test needs the Python module prometheus_client (Debian: apt-get install python3-prometheus-client)"
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	path := filepath.Join(t.TempDir(), "night.prom")
	if err := night().Write(path); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v; want 0644, because the node exporter runs as another user", info.Mode(), err)
	}
	script := filepath.Join(t.TempDir(), "read.py")
	if err := os.WriteFile(script, []byte(readMetrics), 0o600); err != nil {
		t.Fatal(err)
	}
	got := peer.Run(t, "/usr/bin/python3", script, path)
	for _, want := range []string{
		"counter vddkcp_read_bytes_total [('command', 'run'), ('name', 'wave \"1\"\\\\ü\\\\n')] 1099511627776.0",
		"('state', 'done')] 12.0", "counter vddkcp_wait_seconds_total", "gauge vddkcp_connections",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the parser did not find %q:\n%s", want, got)
		}
	}
}
