package export

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// statsFile counts the requests of clients. At the end, the counts are written as JSON to
// the file that --stats names. With --verbose, they are also printed as a table.
type statsFile struct {
	server.Stats
	started time.Time
	path    string // "" without --stats
}

// openStats creates the file of the statistics without any counts. If the file cannot be
// written, the user gets the error before clients connect.
func openStats(path string) (*statsFile, error) {
	s := &statsFile{started: time.Now(), path: path}
	if path == "" {
		return s, nil
	}
	return s, s.replace(nil)
}

// Stats is the content of the JSON file whose path is Options.Stats.
type Stats struct {
	Version    int                `json:"version"`
	Started    time.Time          `json:"started"`
	Finished   time.Time          `json:"finished"`
	Seconds    float64            `json:"seconds"`
	Operations []server.Operation `json:"operations"`
}

func (s *statsFile) write(tables io.Writer, log *slog.Logger) error {
	operations := s.Snapshot()
	if log.Enabled(context.Background(), slog.LevelDebug) {
		printOperations(tables, operations)
	}
	if s.path == "" {
		return nil
	}
	return s.replace(operations)
}

// The method replace writes a new file of the statistics, which replaces the old file. If
// the path of the old file is a symbolic link, the link is replaced.
func (s *statsFile) replace(operations []server.Operation) error {
	now := time.Now()
	text, err := json.MarshalIndent(Stats{1, s.started, now, now.Sub(s.started).Seconds(), append([]server.Operation{}, operations...)}, "", "  ")
	if err == nil {
		err = durable.Write(s.path, append(text, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("cannot write the statistics: %w", err)
	}
	return nil
}

// printOperations prints a table of the operations for people.
func printOperations(out io.Writer, operations []server.Operation) {
	if len(operations) == 0 {
		return
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "operation\tcount\tfailed\tbytes\ttime\taverage\tup to: count")
	for _, o := range operations {
		var sizes []string
		for _, c := range o.Sizes {
			upTo := "more"
			if c.UpTo > 0 {
				upTo = bytesize.Format(c.UpTo)
			}
			sizes = append(sizes, fmt.Sprintf("%s: %d", strings.ReplaceAll(upTo, " ", ""), c.Count))
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%v\t%v\t%s\n", o.Name, o.Count, o.Failed, o.Bytes,
			o.Time.Round(time.Microsecond), o.Average.Round(time.Microsecond), strings.Join(sizes, ", "))
	}
	w.Flush()
}
