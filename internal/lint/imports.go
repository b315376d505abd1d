package main

import (
	"path"
	"strings"
)

// module is the path of the Go module of this repository, followed by a slash.
const module = "github.com/vddkcp/vddkcp/"

// imports are rules for the imports of packages. In a rule, the field pkg is the folder of a
// package, and the field allowed contains the packages that this package may import. If pkg ends
// in a slash, the rule is for the packages in all folders below it. If several rules match a
// package, the first one applies.
//
// Every package may import the packages below internal/. A package without a rule may import no
// other package of the module. Tests may import everything. CONTRIBUTING.md gives the reasons.
var imports = []struct{ pkg, allowed string }{
	{"cmd/vddkcp/internal/export", "nbd nbd/server source source/cow source/open"},
	{"cmd/vddkcp/internal/manual", ""},
	{"cmd/vddkcp", "cmd/vddkcp/internal/export cmd/vddkcp/internal/manual nbd nbd/client source source/open sink sink/open sink/raw transfer transfer/batch transfer/digest transfer/diskjob transfer/job transfer/journal transfer/machine transfer/metrics transfer/progress transfer/report nfc vddk vsphere vsphere/inventory"},
	{"transfer/batch", "transfer/progress transfer/report"},
	{"transfer/digest", ""},
	{"transfer/diskjob", "transfer transfer/batch transfer/job transfer/progress transfer/report"},
	{"transfer/job", "source source/open source/raw sink sink/open sink/raw transfer transfer/digest transfer/journal transfer/progress transfer/report"},
	{"transfer/journal", "transfer"},
	{"transfer/machine", "source source/open transfer transfer/job transfer/journal transfer/progress transfer/report vsphere/inventory"},
	{"transfer/progress", ""},
	{"transfer/metrics", "transfer/report"},
	{"transfer/report", "transfer/progress"},
	{"transfer", "source sink transfer/digest transfer/progress transfer/report"},
	{"nfc/nfctest", ""},
	{"nbd/client", "nbd sink source"},
	{"nbd/server", "nbd source"},
	{"nbd", ""},
	{"nfc/wire", ""},
	{"source/open", "nbd nbd/client source source/ova source/qcow2 source/raw source/vmdk vddk"},
	{"sink/open", "nbd nbd/client sink sink/qcow2 sink/raw sink/vmdk"},
	{"vddk", "source vddk/worker"},
	{"nfc", "nfc/wire source"},
	{"vsphere/inventory", ""},
	{"vsphere/vspheretest/serve", "vsphere/vspheretest"},
	{"vsphere/vspheretest", "nfc/nfctest vddk/testlib"},
	{"vsphere", "nfc vsphere/inventory"},
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

// lintImport checks that a Go file may import a package. The result describes the violation. It
// is "" if there is none.
func lintImport(file, imported string) string {
	name, ours := strings.CutPrefix(imported, module)
	if !ours || strings.HasPrefix(name, "internal/") || strings.HasSuffix(file, "_test.go") {
		return ""
	}
	pkg, allowed := path.Dir(file), ""
	for _, rule := range imports {
		if pkg == rule.pkg || strings.HasSuffix(rule.pkg, "/") && strings.HasPrefix(pkg, rule.pkg) {
			allowed = rule.allowed
			break
		}
	}
	if strings.Contains(" "+allowed+" ", " "+name+" ") {
		return ""
	}
	return pkg + " may not import " + name + "; it may import: " + allowed
}
