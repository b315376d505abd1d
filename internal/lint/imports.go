package main

import (
	"path"
	"strings"
)

// module is the path of the module, with a slash.
const module = "github.com/vddkcp/vddkcp/"

// imports says which packages of the module a package may import, by the first
// rule that matches its folder. A rule whose folder ends in a slash is for every
// folder below. A package without a rule may import only what is below internal/,
// which every package may. Tests may import anything. CONTRIBUTING.md has the
// reasons.
var imports = []struct{ pkg, may string }{
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

// lintImport returns what is wrong with an import of a Go file, or "".
func lintImport(file, imported string) string {
	name, ours := strings.CutPrefix(imported, module)
	if !ours || strings.HasPrefix(name, "internal/") || strings.HasSuffix(file, "_test.go") {
		return ""
	}
	pkg, may := path.Dir(file), ""
	for _, rule := range imports {
		if pkg == rule.pkg || strings.HasSuffix(rule.pkg, "/") && strings.HasPrefix(pkg, rule.pkg) {
			may = rule.may
			break
		}
	}
	if strings.Contains(" "+may+" ", " "+name+" ") {
		return ""
	}
	return pkg + " may not import " + name + "; it may import: " + may
}
