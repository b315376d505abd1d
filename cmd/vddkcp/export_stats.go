package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"vddkcp/internal/bytesize"
	"vddkcp/nbd/server"
)

// statsFile is --stats, and the table of -v.
type statsFile struct {
	server.Stats
	started time.Time
	file    *os.File // nil: none is asked for
}

// openStats opens the file at once: that it can't be is to be known before
// clients come.
func openStats(path string) (*statsFile, error) {
	s := &statsFile{started: time.Now()}
	if path == "" {
		return s, nil
	}
	var err error
	if s.file, err = os.Create(path); err != nil {
		return nil, fmt.Errorf("stats: %w", err)
	}
	return s, nil
}

// exportStats is the JSON of --stats.
type exportStats struct {
	Version    int                `json:"version"`
	Started    time.Time          `json:"started"`
	Finished   time.Time          `json:"finished"`
	Seconds    float64            `json:"seconds"`
	Operations []server.Operation `json:"operations"`
}

func (s *statsFile) write(log *slog.Logger) error {
	operations := s.Snapshot()
	if log.Enabled(context.Background(), slog.LevelDebug) {
		printOperations(os.Stderr, operations)
	}
	if s.file == nil {
		return nil
	}
	now := time.Now()
	e := json.NewEncoder(s.file)
	e.SetIndent("", "  ")
	err := e.Encode(exportStats{1, s.started, now, now.Sub(s.started).Seconds(), append([]server.Operation{}, operations...)})
	if closed := s.file.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return fmt.Errorf("stats: %w", err)
	}
	return nil
}

// printOperations prints a table for people.
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
