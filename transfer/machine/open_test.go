package machine_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/machine"
)

func TestOpen(t *testing.T) {
	f := newFake(t, 64*kib, 64*kib)
	spec := f.spec(t.TempDir())
	spec.Only = []string{"Hard disk 2"}
	d, err := machine.Open(t.Context(), spec, nil)
	if err != nil || len(f.names()) != 1 {
		t.Fatalf("snapshots %v, error %v", f.names(), err)
	}
	got := make([]byte, 64*kib)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, f.live[1]) {
		t.Errorf("reading: %v", err)
	}
	if err := d.Close(); err != nil || len(f.names()) != 0 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
	f.before = func(call string) error {
		if call == "open" {
			return errServer
		}
		return nil
	}
	if _, err := machine.Open(t.Context(), spec, nil); err == nil || len(f.names()) != 0 {
		t.Errorf("snapshots %v, error %v", f.names(), err)
	}
}

// TestOpenContinues opens a disk of a snapshot that an earlier process has left.
func TestOpenContinues(t *testing.T) {
	f := newFake(t, 64*kib)
	spec := f.spec(t.TempDir())
	keep := true
	spec.Keep = func() bool { return keep }
	identity := func(spec machine.Spec) string {
		t.Helper()
		d, err := machine.Open(t.Context(), spec, nil)
		if err != nil {
			t.Fatal(err)
		}
		identified, ok := source.Ability[source.Identified](d)
		if !ok {
			t.Fatal("the disk has no identity")
		}
		id, proof, err := identified.Identity(t.Context())
		if err != nil || proof != "snapshot" {
			t.Errorf("proof %q, error %v", proof, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		return id
	}
	first := identity(spec)
	names := f.names()
	if len(names) != 1 || machine.SnapshotIn(first) != names[0] {
		t.Fatalf("snapshots %q, identity %s", names, first)
	}
	// A single link of the disk has another content, in the same snapshot.
	spec.Continue = first
	single, err := machine.Open(t.Context(), spec, &sourceopen.Opener{SingleLink: true})
	if err != nil {
		t.Fatal(err)
	}
	identified, _ := source.Ability[source.Identified](single)
	if id, _, err := identified.Identity(t.Context()); err != nil || id == first || machine.SnapshotIn(id) != names[0] {
		t.Errorf("a single link has the identity %s, and the disk has %s; error %v", id, first, err)
	}
	if err := single.Close(); err != nil {
		t.Error(err)
	}
	spec.Continue = ""
	if _, err := machine.Open(t.Context(), spec, nil); err == nil || len(f.names()) != 1 {
		t.Errorf("another snapshot was made beside %q: error %v", f.names(), err)
	}
	for _, id := range []string{"file:1:2:3", strings.Replace(first, ":5000-1:", ":5000-9:", 1)} {
		spec.Continue = id
		if _, err := machine.Open(t.Context(), spec, nil); err == nil || !strings.Contains(err.Error(), "not one of the VM") || len(f.names()) != 1 {
			t.Errorf("continuing %s: snapshots %q, error %v", id, f.names(), err)
		}
	}
	spec.Continue = first
	f.before = func(call string) error {
		if call == "open" {
			return errServer
		}
		return nil
	}
	keep = false
	if _, err := machine.Open(t.Context(), spec, nil); err == nil || len(f.names()) != 1 {
		t.Errorf("after a failure to open the disk, the snapshots are %q, error %v", f.names(), err)
	}
	f.before = nil
	if again := identity(spec); again != first || len(f.names()) != 0 {
		t.Errorf("identity %s, want %s; snapshots %q, want none", again, first, f.names())
	}
	if _, err := machine.Open(t.Context(), spec, nil); err == nil || !strings.Contains(err.Error(), "is gone") || len(f.names()) != 0 {
		t.Errorf("without the snapshot: error %v, snapshots %q", err, f.names())
	}
	for _, id := range []string{"", "file:1:vddkcp-0123456789abcdef", "vsphere:a:b:c:1:2", "vsphere:a:b:c:1:2:vddkcp-1"} {
		if name := machine.SnapshotIn(id); name != "" {
			t.Errorf("identity %q has the snapshot %q", id, name)
		}
	}
}
