package main

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/vddkcp/vddkcp/"

// Which rooms a room may import, by the first rule that matches it. What is
// not named here may import internal/ only. CONTRIBUTING.md has the reasons.
var imports = []struct{ room, may string }{
	{"cmd/vddkcp/internal/export", "nbd nbd/server source source/cow source/open"},
	{"cmd/vddkcp", "cmd/vddkcp/internal/export nbd nbd/client source source/open sink sink/open sink/raw transfer transfer/batch transfer/digest transfer/job transfer/journal transfer/progress transfer/report vddk"},
	{"transfer/batch", "transfer/report"},
	{"transfer/digest", ""},
	{"transfer/job", "source source/open source/raw sink sink/open sink/raw transfer transfer/digest transfer/journal transfer/progress transfer/report"},
	{"transfer/journal", "transfer"},
	{"transfer/progress", ""},
	{"transfer/report", "transfer/progress"},
	{"transfer", "source sink transfer/digest transfer/progress transfer/report"},
	{"nbd/client", "nbd sink source"},
	{"nbd/server", "nbd source"},
	{"nbd", ""},
	{"source/open", "nbd nbd/client source source/ova source/qcow2 source/raw source/vmdk vddk"},
	{"sink/open", "nbd nbd/client sink sink/qcow2 sink/raw sink/vmdk"},
	{"vddk", "source vddk/worker"},
	{"internal/address", "nbd"},
	{"internal/image", "source"},
	{"internal/lifecycle", "sink"},
	{"source/", "source"},
	{"source", ""},
	{"sink/qcow2", "sink sink/raw source source/qcow2"},
	{"sink/vmdk", "sink sink/raw source source/vmdk"},
	{"sink/", "sink source source/raw"},
	{"sink", "source"},
}

func TestImportsPointOneWay(t *testing.T) {
	list, err := exec.Command("go", "list", "-f", "{{.ImportPath}}: {{join .Imports \" \"}}", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	rooms := 0
	for _, line := range strings.Split(strings.TrimSpace(string(list)), "\n") {
		room, imported, _ := strings.Cut(line, ": ")
		room = strings.TrimPrefix(room, module)
		rooms++
		may := ""
		for _, rule := range imports {
			if room == rule.room || strings.HasSuffix(rule.room, "/") && strings.HasPrefix(room, rule.room) {
				may = rule.may
				break
			}
		}
		for _, path := range strings.Fields(imported) {
			name, ours := strings.CutPrefix(path, module)
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
