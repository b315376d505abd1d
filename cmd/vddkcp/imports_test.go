package main

import (
	"os/exec"
	"strings"
	"testing"
)

// Which rooms a room may import, by the first rule that matches it. What is
// not named here may import internal/ only. CONTRIBUTING.md has the reasons.
var imports = []struct{ room, may string }{
	{"github.com/vddkcp/vddkcp/cmd/vddkcp", "nbd nbd/client nbd/server source source/cow source/open source/raw sink sink/open sink/raw transfer transfer/batch transfer/digest transfer/journal transfer/progress vddk"},
	{"github.com/vddkcp/vddkcp/transfer/batch", "transfer"},
	{"github.com/vddkcp/vddkcp/transfer/digest", ""},
	{"github.com/vddkcp/vddkcp/transfer/journal", "transfer"},
	{"github.com/vddkcp/vddkcp/transfer/progress", ""},
	{"github.com/vddkcp/vddkcp/transfer", "source sink transfer/digest transfer/progress"},
	{"github.com/vddkcp/vddkcp/nbd/client", "nbd sink source"},
	{"github.com/vddkcp/vddkcp/nbd/server", "nbd source"},
	{"github.com/vddkcp/vddkcp/nbd", ""},
	{"github.com/vddkcp/vddkcp/source/open", "nbd nbd/client source source/ova source/qcow2 source/raw source/vmdk vddk"},
	{"github.com/vddkcp/vddkcp/sink/open", "nbd nbd/client sink sink/qcow2 sink/raw sink/vmdk"},
	{"github.com/vddkcp/vddkcp/vddk", "source vddk/worker"},
	{"github.com/vddkcp/vddkcp/internal/image", "source"},
	{"github.com/vddkcp/vddkcp/internal/lifecycle", "sink"},
	{"github.com/vddkcp/vddkcp/source/", "source"},
	{"github.com/vddkcp/vddkcp/source", ""},
	{"github.com/vddkcp/vddkcp/sink/qcow2", "sink sink/raw source source/qcow2"},
	{"github.com/vddkcp/vddkcp/sink/vmdk", "sink sink/raw source source/vmdk"},
	{"github.com/vddkcp/vddkcp/sink/", "sink source source/raw"},
	{"github.com/vddkcp/vddkcp/sink", "source"},
}

func TestImportsPointOneWay(t *testing.T) {
	list, err := exec.Command("go", "list", "-f", "{{.ImportPath}}: {{join .Imports \" \"}}", "github.com/vddkcp/vddkcp/...").Output()
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
			name, ours := strings.CutPrefix(path, "github.com/vddkcp/vddkcp/")
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
