package main

import (
	"os/exec"
	"strings"
	"testing"
)

// Which rooms a room may import, by the first rule that matches it. What is
// not named here may import internal/ only. CONTRIBUTING.md has the reasons.
var imports = []struct{ room, may string }{
	{"vddkcp/cmd/vddkcp", "nbd nbd/client nbd/server source source/cow source/open source/raw sink sink/open sink/raw transfer transfer/batch transfer/digest transfer/journal transfer/progress vddk"},
	{"vddkcp/transfer/batch", "transfer"},
	{"vddkcp/transfer/digest", ""},
	{"vddkcp/transfer/journal", "transfer"},
	{"vddkcp/transfer/progress", ""},
	{"vddkcp/transfer", "source sink transfer/digest transfer/progress"},
	{"vddkcp/nbd/client", "nbd sink source"},
	{"vddkcp/nbd/server", "nbd source"},
	{"vddkcp/nbd", ""},
	{"vddkcp/source/open", "nbd nbd/client source source/ova source/qcow2 source/raw source/vmdk vddk"},
	{"vddkcp/sink/open", "nbd nbd/client sink sink/qcow2 sink/raw sink/vmdk"},
	{"vddkcp/vddk", "source vddk/worker"},
	{"vddkcp/internal/image", "source"},
	{"vddkcp/internal/lifecycle", "sink"},
	{"vddkcp/source/", "source"},
	{"vddkcp/source", ""},
	{"vddkcp/sink/qcow2", "sink sink/raw source source/qcow2"},
	{"vddkcp/sink/vmdk", "sink sink/raw source source/vmdk"},
	{"vddkcp/sink/", "sink source source/raw"},
	{"vddkcp/sink", "source"},
}

func TestImportsPointOneWay(t *testing.T) {
	list, err := exec.Command("go", "list", "-f", "{{.ImportPath}}: {{join .Imports \" \"}}", "vddkcp/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	rooms := 0
	for _, line := range strings.Split(strings.TrimSpace(string(list)), "\n") {
		room, imported, _ := strings.Cut(line, ": ")
		rooms++
		may := ""
		for _, rule := range imports {
			if room == rule.room || strings.HasSuffix(rule.room, "/") && strings.HasPrefix(room, rule.room) {
				may = rule.may
				break
			}
		}
		for _, path := range strings.Fields(imported) {
			name, ours := strings.CutPrefix(path, "vddkcp/")
			if !ours || strings.HasPrefix(name, "internal/") {
				continue
			}
			if !strings.Contains(" "+may+" ", " "+name+" ") {
				t.Errorf("%s imports %s; it may import: %s", room, path, may)
			}
		}
	}
	if rooms < 10 {
		t.Errorf("only %d rooms were looked at", rooms)
	}
}
