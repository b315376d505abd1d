package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/manual"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

// manCommand is vddkcp man, which writes the manual pages. Only packagers need it, so --help does
// not list it.
type manCommand struct {
	Dir string `help:"Folder to which the manual pages are written." required:"" placeholder:"DIR" type:"path"`
}

// Run writes the pages.
func (c *manCommand) Run(app *kong.Application, servers *servers) error {
	date, err := manualDate()
	if err != nil {
		return err
	}
	book := newManual(app)
	book.Date = date
	parser, err := newJobParser(servers)
	if err != nil {
		return err
	}
	spec, err := parser.spec()
	if err != nil {
		return err
	}
	for _, o := range batch.Objects(spec) {
		book.JobFile = append(book.JobFile, documented(o))
	}
	if _, err := book.Write(c.Dir); err != nil {
		return fmt.Errorf("man: %w", err)
	}
	return nil
}

func newManual(app *kong.Application) *manual.Book {
	return &manual.Book{App: app, Version: programVersion(), Examples: helpExamples, Statuses: exitStatuses}
}

// printHelp prints the help of a command. kong's own help has no place for examples, and its two
// columns do not fit on a narrow terminal.
func printHelp(_ kong.HelpOptions, ctx *kong.Context) error {
	node := ctx.Selected()
	if node == nil {
		node = ctx.Model.Node
	}
	_, err := io.WriteString(ctx.Stdout, newManual(ctx.Model).Help(node, helpWidth()))
	return err
}

// helpWidth returns the width of the help in columns: that of the terminal, but not more than 80,
// because long lines are hard to read.
func helpWidth() int {
	if columns, err := strconv.Atoi(os.Getenv("COLUMNS")); err == nil && columns > 0 {
		return min(columns, 80)
	}
	if columns, ok := textColumns(); ok {
		return min(columns, 80)
	}
	return 80
}

// manualDate returns the date of the manual pages. Builds on different days must have the same
// result, so it is never today's: it is the time in SOURCE_DATE_EPOCH, as is usual for reproducible
// builds, or the time of the commit from which vddkcp was built. The result is zero if neither is
// known.
func manualDate() (time.Time, error) {
	if seconds := os.Getenv("SOURCE_DATE_EPOCH"); seconds != "" {
		n, err := strconv.ParseInt(seconds, 10, 64)
		if err != nil {
			return time.Time{}, usage.Errorf("the environment variable SOURCE_DATE_EPOCH is %q: want a number of seconds since 1970", seconds)
		}
		return time.Unix(n, 0), nil
	}
	build, _ := debug.ReadBuildInfo()
	if build != nil {
		for _, s := range build.Settings {
			if s.Key == "vcs.time" {
				return time.Parse(time.RFC3339, s.Value)
			}
		}
	}
	return time.Time{}, nil
}

// The function documented describes an object of job files for the manual.
func documented(o batch.Object) manual.Object {
	d := manual.Object{Title: cmp.Or(o.Name, "job file"), About: o.Help}
	for _, f := range o.Fields {
		d.Fields = append(d.Fields, manual.Field{Name: f.Name, Help: f.Help, Type: strings.Join(f.Types, " or "), Values: f.Values})
	}
	return d
}
