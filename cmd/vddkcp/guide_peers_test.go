package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// guidePeers says, for the headings of the tables of coming-from.md, why the lines of a program are
// not run. Lines of programs with an empty reason are run.
var guidePeers = map[string]string{
	"nbdkit":   "",
	"qemu-img": "",
	"nbdcopy":  "",
	"govc":     "",
	"virt-v2v": "virt-v2v needs a guest, and half an hour without KVM; scripts/guests runs it",
	"ovftool":  "ovftool is VMware's, and can be downloaded only after a registration",
}

// guideNotRun are the beginnings of lines that cannot be run, although their program is installed.
var guideNotRun = map[string]string{
	"nbdkit vddk":         "Debian has no package with nbdkit's vddk plugin, which needs VMware's library",
	"nbdkit -r -U - vddk": "Debian has no package with nbdkit's vddk plugin, which needs VMware's library",
	"qemu-nbd -r -t":      "it serves until it is stopped",
	"qemu-img convert -n": "it needs an NBD server that keeps running",
	"nbdcopy --blkhash":   "Debian's nbdcopy has no --blkhash",
	"govc datastore.":     "the simulated datastores have no files",
	"govc export.ovf":     "the simulated server offers no lease for an export",
}

// guideRow is a row of a table of coming-from.md.
type guideRow struct {
	line         int // in the page, from 1
	program      string
	theirs, ours string // "" if the cell has prose
}

var guideCode = regexp.MustCompile("^`([^`]+)`$")

// guideRows returns the rows of the tables whose second column is "vddkcp".
func guideRows(t *testing.T, page string) []guideRow {
	t.Helper()
	var rows []guideRow
	program := ""
	for i, line := range strings.Split(page, "\n") {
		if !strings.HasPrefix(line, "| ") {
			if !strings.HasPrefix(line, "|--") {
				program = ""
			}
			continue
		}
		cells := strings.Split(strings.ReplaceAll(line, `\|`, "\x00"), "|")
		if len(cells) != 5 {
			t.Fatalf("coming-from.md:%d: %d cells, want 3", i+1, len(cells)-2)
		}
		code := func(n int) string {
			m := guideCode.FindStringSubmatch(strings.TrimSpace(strings.ReplaceAll(cells[n], "\x00", "|")))
			if m == nil {
				return ""
			}
			return m[1]
		}
		if strings.TrimSpace(cells[2]) == "vddkcp" {
			program = strings.TrimSpace(cells[1])
			continue
		}
		if program != "" {
			rows = append(rows, guideRow{i + 1, program, code(1), code(2)})
		}
	}
	return rows
}

// TestComingFrom runs the lines of the tables of coming-from.md: those of vddkcp, and those of the
// other program if it is installed. Images of the same name that both make must have the same
// content.
func TestComingFrom(t *testing.T) {
	needGuide(t)
	page, err := os.ReadFile("../../docs/guide/coming-from.md")
	if err != nil {
		t.Fatal(err)
	}
	g := newGuide(t, guideInventory, true, 2)
	sh(t, `cd %s && qemu-img convert -O raw web01.vmdk disk.raw && cp --reflink=auto --sparse=always disk.raw changed.raw &&
		printf X | dd of=changed.raw bs=1 seek=30000000 conv=notrunc status=none`, g.dir)
	rows := guideRows(t, string(page))
	used := map[string]bool{}
	var notRun []string
	permits := make(chan struct{}, 2)
	var server sync.Mutex // a VM can have one snapshot of vddkcp at a time
	for _, row := range rows {
		reason, known := guidePeers[row.program]
		if !known {
			t.Errorf("coming-from.md:%d: guidePeers has no %s", row.line, row.program)
		}
		if row.ours == "" {
			t.Errorf("coming-from.md:%d: the row has no line of vddkcp", row.line)
			continue
		}
		for start, why := range guideNotRun {
			if strings.HasPrefix(row.theirs, start) {
				used[start] = true
				reason = why
			}
		}
		if row.theirs == "" {
			reason = "the same"
		} else if reason != "" {
			notRun = append(notRun, row.theirs+": "+reason)
		}
		t.Run(fmt.Sprint("line", row.line), func(t *testing.T) {
			t.Parallel()
			permits <- struct{}{}
			defer func() { <-permits }()
			if regexp.MustCompile(`vc1|vc\.example|govc`).MatchString(row.ours + row.theirs) {
				server.Lock()
				defer server.Unlock()
			}
			ours := g.runRow(t, row.line, row.ours)
			defer os.RemoveAll(ours)
			if reason == "" {
				theirs := g.runRow(t, row.line, row.theirs)
				defer os.RemoveAll(theirs)
				compareRows(t, row, theirs, ours)
			}
		})
	}
	for start := range guideNotRun {
		if !used[start] {
			t.Errorf("guideNotRun has %q, which is in no row", start)
		}
	}
	if len(rows) < 40 {
		t.Errorf("only %d rows", len(rows))
	}
	t.Logf("%d rows; lines that were not run:\n%s", len(rows), strings.Join(notRun, "\n"))
}

// runRow runs a line in a new copy of the folder, and returns the copy.
func (g *guide) runRow(t *testing.T, number int, line string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "images")
	peer.Run(t, "cp", "-a", "--reflink=auto", "--sparse=always", g.dir, dir)
	c := exec.Command("timeout", "--kill-after=10", "120", "bash", "--norc", "-c", g.toReal.Replace(line))
	c.Dir, c.Env = dir, g.environment
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("coming-from.md:%d: %s: %v\n%s", number, line, err, out)
	}
	return dir
}

// compareRows compares the images that the lines of a row have made.
func compareRows(t *testing.T, row guideRow, theirs, ours string) {
	t.Helper()
	made := false
	for _, name := range []string{"out.raw", "out.qcow2", "out.vmdk", "web01.qcow2"} {
		a, b := filepath.Join(theirs, name), filepath.Join(ours, name)
		_, noTheirs := os.Stat(a)
		_, noOurs := os.Stat(b)
		if noTheirs != nil && noOurs != nil {
			continue
		}
		made = true
		if out, err := exec.Command("qemu-img", "compare", a, b).CombinedOutput(); err != nil {
			t.Errorf("coming-from.md:%d: %s differs: %v\n%s", row.line, name, err, out)
		}
	}
	if !made && (strings.Contains(row.theirs, " out.") || strings.Contains(row.ours, " out.")) {
		t.Errorf("coming-from.md:%d: no image was made", row.line)
	}
}
