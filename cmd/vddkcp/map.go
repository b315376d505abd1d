package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

type mapCommand struct {
	Src  string `arg:"" name:"SRC" help:"The disk, at any address that the command info accepts."`
	JSON bool   `name:"json" help:"Print JSON, as qemu-img map --output=json does."`
	sourceFlags
}

func (c *mapCommand) Run(ctx context.Context, logs *logFlags) error {
	a, err := address.Parse(c.Src, address.Disk)
	if err != nil {
		return err
	}
	if err := c.choose(reads{}, a); err != nil {
		return err
	}
	src, done, err := c.open(ctx, a, logs)
	if err != nil {
		return err
	}
	defer done()
	out := bufio.NewWriterSize(standardOutput(ctx), 64<<10)
	print := printMapTable
	if c.JSON {
		print = printMapJSON
	}
	counters := new(progress.Counters)
	style := progress.Lines // even on a terminal, where the table may be too
	if logs.asJSON() {
		style = progress.JSON
	}
	display := progress.NewDisplay(displayTo(style), c.Src, counters)
	display.End("")
	err = shown(display, func() error { return print(ctx, out, src, counters) })
	if err == nil {
		err = out.Flush()
	}
	if err != nil && !strings.Contains(err.Error(), c.Src) { // most errors name the source
		err = fmt.Errorf("map %s: %w", c.Src, err)
	}
	return err
}

// printMapJSON prints the JSON array that docs/cli.md describes, one object per
// line. It does not use encoding/json, which is too slow for a disk with hundreds
// of millions of extents.
func printMapJSON(ctx context.Context, w *bufio.Writer, src source.Disk, counters *progress.Counters) error {
	format := formatOf(src)
	w.WriteByte('[')
	first := true
	for m, err := range source.MapAll(ctx, src, func(n int64) { counters.Examined(n, src.Size()) }) {
		if err != nil {
			return err
		}
		b := w.AvailableBuffer()
		if !first {
			b = append(b, ",\n"...)
		}
		first = false
		b = append(b, `{ "start": `...)
		b = strconv.AppendInt(b, m.Off, 10)
		b = append(b, `, "length": `...)
		b = strconv.AppendInt(b, m.Len, 10)
		b = append(b, `, "depth": `...)
		b = strconv.AppendInt(b, int64(m.Depth), 10)
		b = append(b, `, "present": `...)
		b = strconv.AppendBool(b, !m.Absent && m.Kind != source.Inherited)
		b = append(b, `, "zero": `...)
		b = strconv.AppendBool(b, m.Kind == source.Zero)
		b = append(b, `, "data": `...)
		b = strconv.AppendBool(b, m.Kind == source.Data || isDataHole(format, m))
		if m.File != nil {
			b = append(b, `, "offset": `...)
			b = strconv.AppendInt(b, m.Pos, 10)
		}
		b = append(b, '}')
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	_, err := w.WriteString("]\n")
	return err
}

// isDataHole is called for a mapping. It reports whether the mapping reads as zeros and
// qemu-img map prints "data": true for it. qemu-img does so for a hole in the file of a
// flat VMDK, and in the file of a qcow2 image with preallocated metadata. It does not do so
// for a raw file, even if the raw file is the backing file of a qcow2 image.
func isDataHole(format string, m source.Mapping) bool {
	return m.Kind == source.Zero && m.File != nil && (format == "vmdk" || format == "qcow2" && m.Depth == 0)
}

func formatOf(src source.Disk) string {
	if d, ok := source.Ability[source.Described](src); ok {
		return d.Info().Format
	}
	return "raw"
}

// printMapTable prints the extents with data, as qemu-img map does.
func printMapTable(ctx context.Context, w *bufio.Writer, src source.Disk, counters *progress.Counters) error {
	w.WriteString("Offset          Length          Mapped to       File\n")
	names := map[*os.File]string{nil: "-"}
	for m, err := range source.MapAll(ctx, src, func(n int64) { counters.Examined(n, src.Size()) }) {
		if err != nil {
			return err
		}
		if m.Kind != source.Data {
			continue
		}
		name, ok := names[m.File]
		if !ok {
			name = printable.Name(m.File.Name())
			names[m.File] = name
		}
		b := w.AvailableBuffer()
		b = appendHex(b, m.Off)
		b = appendHex(b, m.Len)
		if m.File == nil {
			b = append(b, "-               "...)
		} else {
			b = appendHex(b, m.Pos)
		}
		b = append(b, name...)
		b = append(b, '\n')
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// appendHex appends the number n to the text b, in the format %#-16x of C.
func appendHex(b []byte, n int64) []byte {
	start := len(b)
	if n != 0 {
		b = append(b, "0x"...)
	}
	b = strconv.AppendInt(b, n, 16)
	for len(b) < start+16 {
		b = append(b, ' ')
	}
	return b
}
