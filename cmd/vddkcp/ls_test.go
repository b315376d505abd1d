package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// someVMs are VMs with every verdict, and with names that are hard to print.
func someVMs() []*inventory.VM {
	disk := func(n int, v inventory.Verdict, reason string) inventory.Disk {
		return inventory.Disk{N: n, Label: "Hard disk " + string(rune('0'+n)), Size: int64(n) << 30, Datastore: "ds [1]", Verdict: v, Reason: reason}
	}
	lost := &inventory.VM{Name: "lost", Path: "/DC0/vm/lost", Power: inventory.Off}
	lost.Verdict, lost.Reason = inventory.Never, "the server does not show the VM's configuration"
	return []*inventory.VM{
		{Name: "web01", Path: "/DC0/vm/web01", Power: inventory.On, Host: "esx1", Guest: "debian11_64Guest",
			Disks: []inventory.Disk{disk(1, inventory.Running, ""), disk(2, inventory.Running, "over nbdssl only")}},
		{Name: "Büro/数\nx", Path: "/DC0/vm/Büro%2f数\nx", Power: inventory.On, Host: "esx2",
			Disks: []inventory.Disk{disk(1, inventory.Running, ""), disk(2, inventory.WhenOff, "independent"), disk(3, inventory.Never, "a LUN"), disk(4, inventory.Never, "a LUN")}},
		{Name: "twin", Path: "/DC0/vm/a/twin", Power: inventory.Off, Disks: []inventory.Disk{disk(1, inventory.WhenOff, "independent")}},
		{Name: "twin", Path: "/DC0/vm/b/twin", Power: inventory.Suspended, Disks: []inventory.Disk{disk(1, inventory.WhenOff, "independent")}},
		{Name: "empty", Power: inventory.Off},
		lost,
	}
}

func TestPrintVMs(t *testing.T) {
	var out bytes.Buffer
	if err := printVMs(&out, someVMs()); err != nil {
		t.Fatal(err)
	}
	want := `NAME            POWER      HOST  GUEST             DISKS  SIZE      COPY
web01           on         esx1  debian11_64Guest  2      3.0 GiB   now
"Büro/数\nx"     on         esx2  -                 4      10.0 GiB  disk 1 now; disk 2 when off: independent; disks 3, 4 never: a LUN
/DC0/vm/a/twin  off        -     -                 1      1.0 GiB   now
/DC0/vm/b/twin  suspended  -     -                 1      1.0 GiB   when off: independent
empty           off        -     -                 0      0 B       no disks
lost            off        -     -                 0      0 B       never: the server does not show the VM's configuration
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

func TestPrintDisks(t *testing.T) {
	var out bytes.Buffer
	if err := printDisks(&out, someVMs()[:2]); err != nil {
		t.Fatal(err)
	}
	want := `NAME         DISK  LABEL        SIZE     DATASTORE  COPY      REASON
web01        1     Hard disk 1  1.0 GiB  ds [1]     now       -
web01        2     Hard disk 2  2.0 GiB  ds [1]     now       over nbdssl only
"Büro/数\nx"  1     Hard disk 1  1.0 GiB  ds [1]     now       -
"Büro/数\nx"  2     Hard disk 2  2.0 GiB  ds [1]     when off  independent
"Büro/数\nx"  3     Hard disk 3  3.0 GiB  ds [1]     never     a LUN
"Büro/数\nx"  4     Hard disk 4  4.0 GiB  ds [1]     never     a LUN
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// TestPrintVMsJSON compares the JSON that is printed VM by VM with that of the whole list.
func TestPrintVMsJSON(t *testing.T) {
	some := someVMs()
	some[0].Snapshots = []inventory.Node{{Name: "<&>", Moref: "snapshot-1", Created: time.Unix(0, 0).UTC()}}
	some[0].NICs = []inventory.NIC{{MAC: "00:50:56:00:00:01"}}
	for _, vms := range [][]*inventory.VM{{}, some[:1], some} {
		whole := struct {
			VMs []*inventory.VM `json:"vms"`
		}{[]*inventory.VM{}}
		for _, vm := range vms {
			whole.VMs = append(whole.VMs, withoutNull(vm))
		}
		var got, want bytes.Buffer
		if err := printVMsJSON(&got, vms); err != nil {
			t.Fatal(err)
		}
		if err := printJSON(&want, whole); err != nil {
			t.Fatal(err)
		}
		if got.String() != want.String() {
			t.Errorf("got\n%s\nwant\n%s", got.String(), want.String())
		}
		if strings.Contains(got.String(), "null") {
			t.Errorf("null in\n%s", got.String())
		}
	}
}
