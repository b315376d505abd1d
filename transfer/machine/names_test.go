package machine_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

func TestCleanName(t *testing.T) {
	for name, want := range map[string]string{
		"web01": "web01", "Büro Köln": "Büro Köln", "数据库": "数据库", "a/b": "a_b", "a%2fb": "a%2fb", `a\b`: `a\b`,
		`"q" 'p'`: `"q" 'p'`, "[x] (1)": "[x] (1)", "a\x00b\nc\td\x7fe\u0085": "a_b_c_d_e_", "\xff": "_",
		".hidden": "_hidden", "..": "_.", ".": "_", "-rf": "_rf", "a.-": "a.-", "": "_", "/": "_", " x ": " x ",
	} {
		if got := machine.CleanName(name); got != want {
			t.Errorf("%q: %q, want %q", name, got, want)
		}
	}
}

func TestTemplate(t *testing.T) {
	vm := func(name string) *inventory.VM {
		v := &inventory.VM{Name: name, Moref: "vm-16"}
		v.Folder = "prod/we%2fb"
		return v
	}
	disk := &inventory.Disk{N: 2, Key: 2001, Label: "Hard disk 2"}
	for _, c := range []struct {
		template, vm string
		want         string
	}{
		{"/images/{vm}-disk{n}.raw", "web01", "/images/web01-disk2.raw"},
		{"{vm}.{key}.{label}.{folder}.{moref}", "web01", "web01.2001.Hard disk 2.prod_we%2fb.vm-16"},
		{"/images/{folder}/{vm}/{n}", "a/b", "/images/prod_we%2fb/a_b/2"},
		{"/images/{vm}", "../../etc/passwd", "/images/_._.._etc_passwd"},
		{"/images/{vm}", "..", "/images/_."},
		{"{vm}-{n}", "-rf", "_rf-2"},
		{"{vm}-{n}", "Büro", "Büro-2"},
		{"/dev/vg0/{vm}-{n}", "web01", "/dev/vg0/web01-2"},
		// The name of a VM never makes another kind of address of a path.
		{"{vm}", "null:", "./null:"},
		{"{vm}", "vm:web01", "./vm:web01"},
		{"{vm}.vmdk", "[ds] x", "./[ds] x.vmdk"},
		{"{vm}", "file:x", "./file:x"},
		{"{vm}x{n}", "nbd://h", "./nbd:__hx2"},
		{"{vm}", "{n}", "{n}"},
		// In a URI the names are escaped.
		{"nbd://nas/{vm}-{n}", "a/b ?#%", "nbd://nas/a%2Fb%20%3F%23%25-2"},
		{"null:", "web01", "null:"},
		{"/images/fixed.raw", "web01", "/images/fixed.raw"},
		{"/images/a}b{", "web01", "/images/a}b{"},
	} {
		tmpl, err := machine.ParseTemplate(c.template)
		if err != nil {
			t.Errorf("%s: %v", c.template, err)
			continue
		}
		got, err := tmpl.Target(vm(c.vm), disk)
		if err != nil || got != c.want {
			t.Errorf("%s for %q: %q, %v; want %q", c.template, c.vm, got, err, c.want)
		}
	}
}

func TestParseTarget(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.Mkdir("a{x}b", 0o755); err != nil {
		t.Fatal(err)
	}
	vm, disk := &inventory.VM{Name: "web01"}, &inventory.Disk{N: 2}
	for _, c := range []struct{ text, format, want, folder string }{
		{"/", "", "/web01-disk2.raw", "/"},
		{"a{x}b", "qcow2", "a{x}b/web01-disk2.qcow2", "a{x}b/"},
		{"a{x}b//", "vmdk", "a{x}b/web01-disk2.vmdk", "a{x}b/"},
		{"missing/", "raw", "missing/web01-disk2.raw", "missing/"},
		{"missing/{vm}/", "", "missing/web01/web01-disk2.raw", ""},
		{"missing", "qcow2", "missing", ""},
		{"nbd://h/{n}", "", "nbd://h/2", ""},
		{"nbd://h/", "", "nbd://h/web01-disk2.raw", ""},
	} {
		tmpl, err := machine.ParseTarget(c.text, c.format)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		if got, err := tmpl.Target(vm, disk); err != nil || got != c.want || tmpl.Folder() != c.folder {
			t.Errorf("%s: %q in %q, %v; want %q in %q", c.text, got, tmpl.Folder(), err, c.want, c.folder)
		}
	}
	if _, err := machine.ParseTarget("a{x}c/", ""); err == nil {
		t.Error("a{x}c/: no error")
	}
}

func TestTemplateErrors(t *testing.T) {
	for template, want := range map[string]string{
		"/images/{nmae}":    "{nmae} is not a placeholder; did you mean",
		"/images/{}":        "{} is not a placeholder",
		"":                  "the address of the target is empty",
		"-":                 "cannot be written to standard output",
		"vm:{vm}":           "does not write them there",
		"[ds] {vm}/x.vmdk":  "does not write them there",
		"https://h/{vm}":    "does not read from web servers or write to them",
		"nbd:///{vm}":       "no host",
		"s3://bucket/{vm}#": "object stores",
	} {
		if _, err := machine.ParseTemplate(template); !errors.As(err, new(*usage.Error)) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want a usage error with %q", template, err, want)
		}
	}
}

// TestLongNames checks that long names are shortened at the boundary of a character, and that
// different names stay different.
func TestLongNames(t *testing.T) {
	disk := &inventory.Disk{N: 2, Label: strings.Repeat("ü", 120)}
	tmpl, err := machine.ParseTemplate("/images/{vm}/{vm} {label}-{n}.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, end := range []string{"a", "b", "ab", "äö"} {
		long := strings.Repeat("数", 100) + end
		got, err := tmpl.Target(&inventory.VM{Name: long}, disk)
		if err != nil {
			t.Fatal(err)
		}
		names := strings.Split(got, "/")
		for _, name := range names {
			if len(name) > machine.MaxName || strings.ToValidUTF8(name, "") != name {
				t.Errorf("%q has %d bytes", name, len(name))
			}
		}
		if n := len(names[3]); n < machine.MaxName-8 || !strings.HasSuffix(got, "-2.qcow2") || !strings.Contains(names[3], "数~") || !strings.Contains(names[3], "ü~") {
			t.Errorf("%q has %d bytes, want nearly %d", names[3], n, machine.MaxName)
		}
		if seen[got] {
			t.Errorf("%q is the target of two VMs", got)
		}
		seen[got] = true
	}

	// A name of exactly the greatest length stays as it is.
	tmpl, err = machine.ParseTemplate("{vm}.raw")
	if err != nil {
		t.Fatal(err)
	}
	for n, same := range map[int]bool{machine.MaxName - 4: true, machine.MaxName - 3: false} {
		name := strings.Repeat("a", n)
		if got, err := tmpl.Target(&inventory.VM{Name: name}, disk); err != nil || (got == name+".raw") != same || len(got) > machine.MaxName {
			t.Errorf("%d bytes: %q, %v", n, got, err)
		}
	}

	tmpl, err = machine.ParseTemplate(strings.Repeat("x", 220) + "{vm}")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := tmpl.Target(&inventory.VM{Name: strings.Repeat("a", 20)}, disk); !errors.As(err, new(*usage.Error)) {
		t.Errorf("%q, %v; want a usage error", got, err)
	}
}

func TestCheckTargets(t *testing.T) {
	a, b := &inventory.VM{Name: "web/01", Moref: "vm-1"}, &inventory.VM{Name: "web\n01", Moref: "vm-2"}
	one, two := &inventory.Disk{N: 1}, &inventory.Disk{N: 2}
	if err := machine.CheckTargets([]machine.Target{
		{a, one, "/x/1"}, {a, two, "/x/2"}, {b, one, "null:"}, {b, two, "null:"}, {b, two, "nbd://h/1"}, {b, two, "nbd://h/2"},
	}); err != nil {
		t.Errorf("different targets: %v", err)
	}
	err := machine.CheckTargets([]machine.Target{
		{a, one, "/x/web_01"}, {a, two, "/x/2"}, {b, one, "/x//web_01"}, {b, two, "/x/2.partial"}, {a, one, "nbd://h/1"}, {b, two, "nbd://h/1"},
	})
	if !errors.As(err, new(*usage.Error)) {
		t.Fatalf("%v, want a usage error", err)
	}
	want := `several disks would be copied to the same file:
  "/x/web_01": disk 1 of the VM "web/01" (vm-1), disk 1 of the VM "web\n01" (vm-2)
  "/x/2.partial": disk 2 of the VM "web/01" (vm-1), disk 2 of the VM "web\n01" (vm-2)
  "nbd://h/1": disk 1 of the VM "web/01" (vm-1), disk 2 of the VM "web\n01" (vm-2)`
	if got := printable.Error(err); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestCheckTargetsLinks checks targets that are the same file under different names.
func TestCheckTargetsLinks(t *testing.T) {
	dir, vm := t.TempDir(), &inventory.VM{Name: "web01", Moref: "vm-1"}
	file, link, other := filepath.Join(dir, "file"), filepath.Join(dir, "link"), filepath.Join(dir, "other")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink("file", link), os.WriteFile(other, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for second, same := range map[string]bool{file: true, link: true, other: false} {
		err := machine.CheckTargets([]machine.Target{{vm, &inventory.Disk{N: 1}, file}, {vm, &inventory.Disk{N: 2}, second}})
		if (err != nil) != same {
			t.Errorf("%s: error %v", second, err)
		}
	}
}
