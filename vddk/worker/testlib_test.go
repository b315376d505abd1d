package worker_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/vddk/testlib"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// The worker violates no rule of the interface that the stand-in library checks.
func TestRulesOfTheLibrary(t *testing.T) {
	for version := 5; version <= 9; version++ {
		for _, name := range []string{"plain", "sanitized"} {
			t.Run(fmt.Sprintf("%d %s", version, name), func(t *testing.T) {
				lib := testlib.New(t, fmt.Sprintf("--version=%d", version))
				lib.Conf("hostile-log", "log-flood 300 4", "reorder 300", "user u", "password  a secret ", "snapshot snapshot-1",
					"vm moref=vm-1", "thumbprint AA:BB", "server esxi", "log-reads")
				size := int64(8<<20 + 512)
				disk := filepath.Join(t.TempDir(), "disk.raw")
				content := make([]byte, size)
				rand.NewChaCha8([32]byte{}).Read(content[1<<20 : 3<<20])
				if err := os.WriteFile(disk, content[:3<<20], 0o600); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(disk, size); err != nil {
					t.Fatal(err)
				}
				lib.AddDisk("[ds] vm/vm.vmdk", disk)
				c := worker.Config{Library: lib.SO(), Root: lib.Dir, Dir: filepath.Dir(lib.SO()), Version: version,
					Slots: 4, SlotSize: 256 << 10, Program: program(t), Log: (&lines{}).add}
				if name == "sanitized" {
					c.Program = sanitized(t)
				}
				ctx := deadline(t)
				p, o := open(t, c, worker.OpenRequest{Path: "[ds] vm/vm.vmdk", Server: "esxi", User: "u", Password: " a secret ",
					Thumbprint: "AA:BB", Snapshot: "snapshot-1", VMXSpec: "moref=vm-1", ReadOnly: true, Transports: "nbdssl"})
				if o.Capacity != uint64(size/512) || o.Transport != "nbdssl" {
					t.Errorf("%+v", o)
				}
				var wg sync.WaitGroup
				for slot := range 4 {
					wg.Go(func() {
						for off := int64(slot) * 256 << 10; off < size; off += 1 << 20 {
							n := min(256<<10, size-off)
							if err := p.Read(ctx, slot, uint64(off/512), int(n/512)); err != nil {
								t.Error(err)
							} else if !bytes.Equal(p.Slot(slot)[:n], content[off:off+n]) {
								t.Errorf("[%d, +%d) differs", off, n)
							}
						}
					})
				}
				if p.Has("VixDiskLib_QueryAllocatedBlocks") {
					blocks, err := p.Query(ctx, 0, 16384, 128)
					if err != nil || len(blocks) == 0 || blocks[0].Count >= 16384 {
						t.Errorf("%v, %v", blocks, err)
					}
				} else if version > 6 {
					t.Error("no allocation query")
				}
				wg.Wait()
				if err := p.Close(ctx); err != nil {
					t.Error(err)
				}
				if n := lib.Calls()["Read"] + lib.Calls()["ReadAsync"]; n != 33 || version > 5 && lib.Calls()["ReadAsync"] == 0 {
					t.Errorf("calls: %v", lib.Calls())
				}
				for _, call := range []string{"InitEx", "ConnectEx", "Open", "Close", "Disconnect", "Exit"} {
					if lib.Calls()[call] != 1 {
						t.Errorf("%s was called %d times", call, lib.Calls()[call])
					}
				}
			})
		}
	}
}

func TestWriteByTheRules(t *testing.T) {
	for version := 5; version <= 9; version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			lib := testlib.New(t, fmt.Sprintf("--version=%d", version))
			lib.Conf("reorder 300")
			disk := filepath.Join(t.TempDir(), "disk.raw")
			if err := os.WriteFile(disk, make([]byte, 4<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			lib.AddDisk("[ds] a.vmdk", disk)
			want := make([]byte, 4<<20)
			rand.NewChaCha8([32]byte{1}).Read(want)
			ctx := deadline(t)
			p, _ := open(t, worker.Config{Library: lib.SO(), Root: lib.Dir, Version: version, Slots: 4, SlotSize: 64 << 10, Program: program(t)},
				worker.OpenRequest{Path: "[ds] a.vmdk", Server: "esxi", User: "u", VMXSpec: "moref=vm-1", Thumbprint: "x"})
			var wg sync.WaitGroup
			for slot := range 4 {
				wg.Go(func() {
					for off := slot * 64 << 10; off < len(want); off += 256 << 10 {
						copy(p.Slot(slot), want[off:off+64<<10])
						if err := p.Write(ctx, slot, uint64(off/512), 128); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if p.Has("VixDiskLib_Flush") {
				if err := p.Flush(ctx); err != nil {
					t.Error(err)
				}
			}
			if err := p.Close(ctx); err != nil {
				t.Error(err)
			}
			if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the disk differs, %v", err)
			}
		})
	}
}
