package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

type lsCommand struct {
	Pattern string `arg:"" optional:"" name:"PATTERN" help:"Which VMs to list: a name, a path in the inventory, moref=ID or uuid=UUID. In a name or path, *, ? and [...] are wildcards. Without PATTERN, all VMs are listed."`
	Disks   bool   `help:"Print a line for each disk instead of a line for each VM."`
	JSON    bool   `name:"json" help:"Print JSON, always with all disks."`
	serverFlags
	diskFlags
}

func (c *lsCommand) Run(ctx context.Context, logs *logFlags) error {
	err := c.withSession(ctx, logs, func(ctx context.Context, s *vsphere.Session, _ *slog.Logger) error {
		vms, err := listVMs(ctx, s, c.Pattern)
		if err != nil {
			return err
		}
		out := standardOutput(ctx)
		switch {
		case c.JSON:
			return printVMsJSON(out, vms)
		case c.Disks:
			return printDisks(out, vms)
		}
		return printVMs(out, vms)
	})
	if err != nil {
		return fmt.Errorf("ls: %w", err)
	}
	return nil
}

// printVMs prints the VMs as a table for people, one VM per line.
func printVMs(out io.Writer, vms []*inventory.VM) error {
	names := displayNames(vms)
	table := newTable(out, "NAME", "POWER", "HOST", "GUEST", "DISKS", "SIZE", "COPY")
	for i, vm := range vms {
		var size int64
		for _, d := range vm.Disks {
			size += d.Size
		}
		table.line(names[i], string(vm.Power), vm.Host, vm.Guest, strconv.Itoa(len(vm.Disks)), bytesize.Format(size), copyOfVM(vm))
	}
	return table.flush()
}

// printDisks prints the disks of the VMs as a table for people, one disk per line.
func printDisks(out io.Writer, vms []*inventory.VM) error {
	names := displayNames(vms)
	table := newTable(out, "NAME", "DISK", "LABEL", "SIZE", "DATASTORE", "COPY", "REASON")
	for i, vm := range vms {
		for _, d := range vm.Disks {
			table.line(names[i], strconv.Itoa(d.N), d.Label, bytesize.Format(d.Size), d.Datastore, copyOfDisk(vm, &d), d.Reason)
		}
	}
	return table.flush()
}

// printVMsJSON prints the VMs as one JSON object. It encodes one VM at a time, so that it needs
// little memory for the text.
func printVMsJSON(out io.Writer, vms []*inventory.VM) error {
	w := bufio.NewWriter(out)
	var buffer bytes.Buffer
	e := json.NewEncoder(&buffer)
	e.SetEscapeHTML(false)
	e.SetIndent("        ", "    ")
	w.WriteString("{\n    \"vms\": [")
	before, after := "\n        ", "]\n}\n"
	for _, vm := range vms {
		buffer.Reset()
		if err := e.Encode(withoutNull(vm)); err != nil {
			return err
		}
		w.WriteString(before)
		before, after = ",\n        ", "\n    ]\n}\n"
		if _, err := w.Write(bytes.TrimSuffix(buffer.Bytes(), []byte("\n"))); err != nil {
			return err
		}
	}
	w.WriteString(after)
	return w.Flush()
}

// withoutNull returns the VM with empty lists instead of nil, because JSON would have null for nil.
func withoutNull(vm *inventory.VM) *inventory.VM {
	v := *vm
	if v.Snapshots == nil {
		v.Snapshots = []inventory.Node{}
	}
	if v.NICs == nil {
		v.NICs = []inventory.NIC{}
	}
	if v.Disks == nil {
		v.Disks = []inventory.Disk{}
	}
	return &v
}

// displayNames returns for each VM the name that tables show: the name of the VM, or the path in
// the inventory if another VM in the list has the same name.
func displayNames(vms []*inventory.VM) []string {
	count := map[string]int{}
	for _, vm := range vms {
		count[vm.Name]++
	}
	names := make([]string, len(vms))
	for i, vm := range vms {
		names[i] = vm.Name
		if count[vm.Name] > 1 && vm.Path != "" {
			names[i] = vm.Path
		}
	}
	return names
}

// copyOfDisk says when a disk can be copied: "now", "when off" or "never".
func copyOfDisk(vm *inventory.VM, d *inventory.Disk) string {
	switch {
	case d.Verdict.CopyableIn(vm.Power):
		return "now"
	case d.Verdict == inventory.WhenOff:
		return "when off"
	}
	return "never"
}

// copyOfVM says when the disks of a VM can be copied, and why not now. If this differs between the
// disks, the text names the disks.
func copyOfVM(vm *inventory.VM) string {
	if len(vm.Disks) == 0 {
		if vm.Verdict == inventory.Never {
			return "never: " + vm.Reason
		}
		return "no disks"
	}
	var groups []string // in the order of the disks
	disks := map[string][]string{}
	for i := range vm.Disks {
		d := &vm.Disks[i]
		text := copyOfDisk(vm, d)
		if text != "now" && d.Reason != "" {
			text += ": " + d.Reason
		}
		if !slices.Contains(groups, text) {
			groups = append(groups, text)
		}
		disks[text] = append(disks[text], strconv.Itoa(d.N))
	}
	if len(groups) == 1 {
		return groups[0]
	}
	for i, text := range groups {
		word := "disk "
		if len(disks[text]) > 1 {
			word = "disks "
		}
		groups[i] = word + strings.Join(disks[text], ", ") + " " + text
	}
	return strings.Join(groups, "; ")
}

// The type table prints lines of text in aligned columns. Every column is as wide as its widest
// text, so that nothing is cut off.
type table struct{ w *tabwriter.Writer }

func newTable(out io.Writer, heads ...string) *table {
	t := &table{tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)}
	t.line(heads...)
	return t
}

// The method line adds a line. The texts may come from a server, so everything that is not safe to
// show is escaped, such as characters that would end the column or the line. The last text is a
// sentence, and the other ones are names, which are quoted if they need escapes. An empty text is
// shown as "-".
func (t *table) line(texts ...string) {
	for i, text := range texts {
		if text == "" {
			text = "-"
		}
		if i == len(texts)-1 {
			io.WriteString(t.w, printable.Line(text)+"\n")
		} else {
			io.WriteString(t.w, printable.Name(text)+"\t")
		}
	}
}

func (t *table) flush() error { return t.w.Flush() }

// plural returns the number n with the word that belongs to it.
func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
