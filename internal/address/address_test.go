package address_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nbd"
)

// TestParse has, for each address, what it is as a disk that is read and as a
// target: a value, or a part of the error.
func TestParse(t *testing.T) {
	appliance := func(text, path, choice string) any {
		return func(t *testing.T, a address.Address) {
			got, ok := a.(address.Appliance)
			if !ok || got.Path != path || got.Choice != choice || got.IsWhole() != (text == path) {
				t.Errorf("%q: %T %+v, want the disk %q of %q", text, a, a, choice, path)
			}
		}
	}
	uri := func(want nbd.URI) any {
		return func(t *testing.T, a address.Address) {
			got, ok := a.(address.NBD)
			if !ok || got.URI.Host != want.Host || got.URI.Socket != want.Socket || got.URI.Export != want.Export {
				t.Errorf("%T %+v, want %+v", a, a, want)
			}
		}
	}
	vm := func(name, disk string) any {
		return func(t *testing.T, a address.Address) {
			if got, ok := a.(address.VM); !ok || got.Name != name || got.Disk != disk || !address.IsRemote(a) {
				t.Errorf("%T %+v, want the disk %q of the VM %q", a, a, disk, name)
			}
		}
	}
	const readOnly = "does not write them"
	for _, c := range []struct {
		text         string
		disk, target any // an Address, a check, or a string that the error has
	}{
		{"disk.img", address.Path("disk.img"), address.Path("disk.img")},
		{"/dev/sdb", address.Path("/dev/sdb"), address.Path("/dev/sdb")},
		{"./-", address.Path("./-"), address.Path("./-")},
		{"a:b", address.Path("a:b"), address.Path("a:b")},
		{"line\nend '\"", address.Path("line\nend '\""), address.Path("line\nend '\"")},
		{"", "the address of the disk is empty", "the address of the target is empty"},
		{"-", "standard input is a stream, which this command cannot use as a disk", address.Stream{}},
		{"null:", address.Path("null:"), address.Null{}},
		{"./null:", address.Path("./null:"), address.Path("./null:")},

		{"x.ova", appliance("x.ova", "x.ova", ""), address.Path("x.ova")},
		{"x.OVF", appliance("x.OVF", "x.OVF", ""), address.Path("x.OVF")},
		{"a/x.ova#1", appliance("a/x.ova#1", "a/x.ova", "1"), address.Path("a/x.ova#1")},
		{"x.ovf#", appliance("x.ovf#", "x.ovf", ""), address.Path("x.ovf#")},
		{"x.ova#a#b", appliance("x.ova#a#b", "x.ova", "a#b"), address.Path("x.ova#a#b")},
		{"x#1.ova", appliance("x#1.ova", "x#1.ova", ""), address.Path("x#1.ova")},
		{"a.ova#1/x.ova", appliance("a.ova#1/x.ova", "a.ova#1/x.ova", ""), address.Path("a.ova#1/x.ova")},
		{"a.ova#1.ova#2", appliance("a.ova#1.ova#2", "a.ova#1.ova", "2"), address.Path("a.ova#1.ova#2")},
		{"x.vmdk", address.Path("x.vmdk"), address.Path("x.vmdk")},
		{"x.ova.gz", address.Path("x.ova.gz"), address.Path("x.ova.gz")},
		{"ova", address.Path("ova"), address.Path("ova")},
		{"x.vmdk#1", address.Path("x.vmdk#1"), address.Path("x.vmdk#1")},
		{"#", address.Path("#"), address.Path("#")},
		{"x.ova/disk.vmdk", address.Path("x.ova/disk.vmdk"), address.Path("x.ova/disk.vmdk")},
		{"x#.ova/1", address.Path("x#.ova/1"), address.Path("x#.ova/1")},

		{"[ds] vm/vm.vmdk", address.Datastore{Store: "ds", Path: "vm/vm.vmdk"}, readOnly},
		{"[ds (3)] a [b]/c;'\"ö.vmdk ", address.Datastore{Store: "ds (3)", Path: "a [b]/c;'\"ö.vmdk "}, readOnly},
		{"[a [b]] c", address.Datastore{Store: "a [b]", Path: "c"}, readOnly},
		{"[ds] vm] x/y.vmdk", address.Datastore{Store: "ds", Path: "vm] x/y.vmdk"}, readOnly},
		{"[ds] a\nb", address.Datastore{Store: "ds", Path: "a\nb"}, readOnly},
		{"[ds] x.ova", address.Datastore{Store: "ds", Path: "x.ova"}, readOnly},
		{"vddk:/vm.vmdk", address.VDDK{Path: "/vm.vmdk"}, readOnly},
		{"vddk:[ds] x.vmdk", address.VDDK{Path: "[ds] x.vmdk"}, readOnly},
		{"vddk:", address.VDDK{}, readOnly},
		{"vm.vmdk", address.Path("vm.vmdk"), address.Path("vm.vmdk")},
		{"[ds]", address.Path("[ds]"), address.Path("[ds]")},
		{"[ds] ", address.Path("[ds] "), address.Path("[ds] ")},
		{"[] x", address.Path("[] x"), address.Path("[] x")},
		{"[ds]vm.raw", address.Path("[ds]vm.raw"), address.Path("[ds]vm.raw")},
		{"[ds]vm.vmdk", `needs a space after the ]`, `needs a space after the ]`},
		{"./[ds] x", address.Path("./[ds] x"), address.Path("./[ds] x")},
		{"/vddk:x", address.Path("/vddk:x"), address.Path("/vddk:x")},

		{"vm:web01", vm("web01", ""), readOnly},
		{"vm:web01#2", vm("web01", "2"), readOnly},
		{"vm:a b#Hard disk 1", vm("a b", "Hard disk 1"), readOnly},
		{"vm:/DC0/vm/a%2fb/web#1", vm("/DC0/vm/a%2fb/web", "1"), readOnly},
		{"vm:moref=vm-16#1", vm("moref=vm-16", "1"), readOnly},
		{"vm:uuid=420a#1", vm("uuid=420a", "1"), readOnly},
		{"vm:a#b#1", vm("a#b", "1"), readOnly},
		{"vm:a%23b", vm("a#b", ""), readOnly},
		{"vm:%23#%23", vm("#", "#"), readOnly},
		{"vm:a%2523b", vm("a%2523b", ""), readOnly},
		{"vm:x.ova#1", vm("x.ova", "1"), readOnly},
		{"vm:[ds] x", vm("[ds] x", ""), readOnly},
		{"vm:", "the name of the VM is missing", "the name of the VM is missing"},
		{"vm:#1", "the name of the VM is missing", "the name of the VM is missing"},
		{"vm:web01#", "the number or label of the disk is missing", "the number or label of the disk is missing"},
		{"./vm:x", address.Path("./vm:x"), address.Path("./vm:x")},
		{"VM:x", address.Path("VM:x"), address.Path("VM:x")},
		{"vm", address.Path("vm"), address.Path("vm")},

		{"nbd://host", uri(nbd.URI{Host: "host"}), uri(nbd.URI{Host: "host"})},
		{"NBDS://[::1]:1/a%2fb", uri(nbd.URI{Host: "::1", Export: "a/b"}), uri(nbd.URI{Host: "::1", Export: "a/b"})},
		{"nbd+unix:///e?socket=/s%201", uri(nbd.URI{Socket: "/s 1", Export: "e"}), uri(nbd.URI{Socket: "/s 1", Export: "e"})},
		{"nbd://", "no host", "no host"},
		{"nbd+unix:///e", "without a socket", "without a socket"},
		{"nbd+vsock://1", "vsock is not supported", "vsock is not supported"},
		{"./nbd://host", address.Path("./nbd://host"), address.Path("./nbd://host")},

		{"server=host", "server= is a parameter", address.Path("server=host")},
		{"password=secret", "password= is a parameter", address.Path("password=secret")},
		{"https://host/x", "web servers", "web servers"},
		{"json:{}", "protocols of qemu", "protocols of qemu"},
		{"any://x", "no address of vddkcp", "no address of vddkcp"},
	} {
		for role, want := range map[address.Role]any{address.Disk: c.disk, address.Source: c.disk, address.Target: c.target} {
			if c.text == "-" && role == address.Source {
				want = address.Stream{}
			}
			a, err := address.Parse(c.text, role)
			if part, fails := want.(string); fails {
				if !errors.As(err, new(*usage.Error)) || a != nil || !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "secret") {
					t.Errorf("%q as %d: %v, %v; want a usage error with %q", c.text, role, a, err, part)
				}
				continue
			}
			if err != nil || a.String() != c.text {
				t.Errorf("%q as %d: %v, %v", c.text, role, a, err)
				continue
			}
			if check, ok := want.(func(*testing.T, address.Address)); ok {
				check(t, a)
			} else if a != want {
				t.Errorf("%q as %d: %T %+v, want %T %+v", c.text, role, a, a, want, want)
			}
		}
	}
}

func TestVDDKFile(t *testing.T) {
	for text, want := range map[string]string{
		"[ds] vm/vm.vmdk": "[ds] vm/vm.vmdk", "vddk:/vm.vmdk": "/vm.vmdk", "vddk:": "", "vddk:[ds] x": "[ds] x",
	} {
		a, err := address.Parse(text, address.Disk)
		if err != nil {
			t.Fatal(err)
		}
		if file, ok := address.VDDKFile(a); !ok || file != want || !address.IsRemote(a) || address.ForVDDK(text) != a {
			t.Errorf("%q: %q, %v; want %q", text, file, ok, want)
		}
	}
	for _, text := range []string{"vm.vmdk", "x.ova", "nbd://host"} {
		a, err := address.Parse(text, address.Disk)
		if err != nil {
			t.Fatal(err)
		}
		_, remote := a.(address.NBD)
		if file, ok := address.VDDKFile(a); ok || address.IsRemote(a) != remote {
			t.Errorf("%q: %q", text, file)
		}
		if got := address.ForVDDK(text); got != (address.VDDK{Path: text}) {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestApplianceString(t *testing.T) {
	for want, a := range map[string]address.Appliance{
		"x.ova": {Path: "x.ova"}, "x.ova#2": {Path: "x.ova", Choice: "2"},
	} {
		if a.String() != want {
			t.Errorf("%+v: %q, want %q", a, a.String(), want)
		}
	}
}

func TestVMString(t *testing.T) {
	for want, a := range map[string]address.VM{
		"vm:web01": {Name: "web01"}, "vm:web01#2": {Name: "web01", Disk: "2"},
		"vm:a%23b%23#%23": {Name: "a#b#", Disk: "#"}, "vm:a%2523b": {Name: "a%23b"}, "vm:50%": {Name: "50%"},
	} {
		if a.String() != want {
			t.Errorf("%+v: %q, want %q", a, a.String(), want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		for _, role := range []address.Role{address.Disk, address.Source, address.Target} {
			a, err := address.Parse(text, role)
			if (a == nil) != (err != nil) {
				t.Fatalf("%q as %d: %v, %v", text, role, a, err)
			}
			if err != nil {
				if !errors.As(err, new(*usage.Error)) {
					t.Fatalf("%q as %d: a %T", text, role, err)
				}
				continue
			}
			if a.String() != text {
				t.Fatalf("%q as %d is shown as %q", text, role, a)
			}
			switch a.(type) {
			case address.Appliance, address.Datastore, address.VDDK, address.VM:
				if role == address.Target {
					t.Fatalf("%q is a target: %T", text, a)
				}
			case address.Null:
				if role != address.Target {
					t.Fatalf("%q is a source: %T", text, a)
				}
			case address.Stream:
				if role == address.Disk {
					t.Fatalf("%q is a disk: %T", text, a)
				}
			}
			// The way out that every error names.
			if b, err := address.Parse("./"+text, role); text != "" && err != nil && b == nil {
				t.Fatalf("./%q as %d: %v", text, role, err)
			}
		}
	})
}
