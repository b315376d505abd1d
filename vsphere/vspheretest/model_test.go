package vspheretest_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// Whatever snapshots are made, removed and reverted to, the file of each one has the content at the
// time when it was made, and the library has the files that the server names and no others.
func TestSnapshotModel(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: 512, Zero: true}}})
	c := connect(t, s)
	vm := s.Find("web01")
	read := func(file string) string {
		t.Helper()
		text, err := os.ReadFile(s.Library.Disk(file))
		if err != nil {
			t.Fatal(err)
		}
		return string(text[:8])
	}
	content := read(s.Files("web01")[0]) // of the VM
	frozen := map[types.ManagedObjectReference]string{}
	const seed = 1
	r := rand.New(rand.NewPCG(seed, 0))
	var log []string // what happened, for errors
	for i := range 150 {
		list := s.Snapshots("web01")
		var picked vspheretest.Snapshot
		if len(list) > 0 {
			picked = list[r.IntN(len(list))]
		}
		switch n := r.IntN(8); {
		case n < 3:
			content = fmt.Sprintf("%08d", i)
			s.Write("web01", 1, []byte(content), 0)
			log = append(log, "write "+content)
		case n < 5 && len(list) < 12 || len(list) == 0:
			ref := s.AddSnapshot("web01", fmt.Sprintf("s%d", i), "")
			frozen[ref] = content
			log = append(log, fmt.Sprintf("snapshot s%d", i))
		case n == 5:
			s.Revert("web01", picked.Name)
			content = frozen[picked.Ref]
			log = append(log, "revert to "+picked.Name)
		default:
			if r.IntN(4) == 0 {
				s.KeepFiles("web01")
			}
			children := r.IntN(4) == 0
			log = append(log, fmt.Sprint("remove ", picked.Name, children))
			if _, err := methods.RemoveSnapshot_Task(t.Context(), c.Client, &types.RemoveSnapshot_Task{This: picked.Ref, RemoveChildren: children}); err != nil {
				t.Fatal(err)
			}
			s.Settle()
			if children {
				j := slices.Index(list, picked) + 1
				for ; j < len(list) && list[j].Depth > picked.Depth; j++ {
					delete(frozen, list[j].Ref)
				}
			}
			delete(frozen, picked.Ref)
		}
		if r.IntN(10) == 0 {
			if _, err := methods.ConsolidateVMDisks_Task(t.Context(), c.Client, &types.ConsolidateVMDisks_Task{This: vm}); err != nil {
				t.Fatal(err)
			}
			s.Settle()
			log = append(log, "consolidate")
		}
		want := map[string]bool{}
		if got := read(s.Files("web01")[0]); got != content {
			t.Fatalf("the VM has %q, want %q; after %q", got, content, log)
		}
		if n := len(s.Snapshots("web01")); n != len(frozen) {
			t.Fatalf("%d snapshots, want %d; after %q", n, len(frozen), log)
		}
		for ref, text := range frozen {
			disks, err := snapshotDisks(t, c, ref)
			if err != nil {
				t.Fatal(err)
			}
			if got := read(disks[0][0]); got != text {
				t.Fatalf("a snapshot has %q, want %q; after %q", got, text, log)
			}
			want[disks[0][0]] = true
		}
		var properties mo.VirtualMachine
		if err := c.RetrieveOne(t.Context(), vm, []string{"layoutEx.file"}, &properties); err != nil {
			t.Fatal(err)
		}
		for _, f := range properties.LayoutEx.File {
			if f.Type == "diskDescriptor" {
				want[f.Name] = true
			}
		}
		links, err := filepath.Glob(filepath.Join(s.Library.Dir, "disks", "*", "*", "*"))
		if err != nil || len(links) != len(want) {
			t.Fatalf("files of the library %q, want %v; after %q", links, want, log)
		}
	}
}
