package main

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// jobVMs are VMs with names that need care, some of them with disks that cannot be copied.
func jobVMs() []*inventory.VM {
	vm := func(path, name, moref string, disks ...inventory.Disk) *inventory.VM {
		v := &inventory.VM{Path: path, Name: name, Moref: moref, Power: inventory.On, Host: "esx1", Disks: disks}
		v.Folder = "prod"
		return v
	}
	disk := func(n int, v inventory.Verdict) inventory.Disk {
		return inventory.Disk{N: n, Label: "Hard disk", Key: int32(1999 + n), Datastore: "ds1", Size: 1 << 30, Verdict: v, Reason: "a reason"}
	}
	return []*inventory.VM{
		vm("/DC0/vm/y/twin", "twin", "vm-4", disk(1, inventory.Running)),
		vm("/DC0/vm/x/twin", "twin", "vm-3", disk(1, inventory.Running)),
		vm("/DC0/vm/web01", "web01", "vm-1", disk(1, inventory.Running), disk(2, inventory.Never), disk(3, inventory.Running)),
		vm("/DC0/vm/a%2fb, c", "a/b, c", "vm-2", disk(1, inventory.Running)),
		vm("/DC0/vm/off", "off", "vm-5", disk(1, inventory.WhenOff)),
		vm("/DC0/vm/empty", "empty", "vm-6"),
		vm("/DC0/vm/uuid=1", "uuid=1", "vm-7", disk(1, inventory.Running)),
	}
}

func TestJobsOf(t *testing.T) {
	template, err := machine.ParseTarget("images/{moref}-{n}.qcow2", "")
	if err != nil {
		t.Fatal(err)
	}
	list, err := jobsOf(jobVMs(), "", template)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, j := range list.jobs {
		got = append(got, j.Name+" | "+j.Source+" | "+j.Target)
	}
	want := []string{
		"a_b_ c-disk1 | vm:moref=vm-2#1 | images/vm-2-1.qcow2",
		"uuid=1-disk1 | vm:moref=vm-7#1 | images/vm-7-1.qcow2",
		"web01-disk1 | vm:web01#1 | images/vm-1-1.qcow2",
		"web01-disk3 | vm:web01#3 | images/vm-1-3.qcow2",
		"twin-disk1 | vm:moref=vm-3#1 | images/vm-3-1.qcow2",
		"twin-vm-4-disk1 | vm:moref=vm-4#1 | images/vm-4-1.qcow2",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if list.vms != 5 || list.size != 6<<30 || list.missing != 2 {
		t.Errorf("%d VMs, %d bytes, %d disks are missing", list.vms, list.size, list.missing)
	}
	skipped := []string{
		"VM /DC0/vm/empty: the VM has no disks",
		"VM /DC0/vm/off: disk 1 (Hard disk) can be copied only while the VM is off: a reason",
		"VM /DC0/vm/web01: disk 2 (Hard disk) cannot be copied: a reason",
	}
	if !slices.Equal(list.skipped, skipped) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(list.skipped, "\n"), strings.Join(skipped, "\n"))
	}

	// If the pattern is a path, another VM may have the same name.
	for pattern, source := range map[string]string{"web*": "vm:web01#1", "/DC0/vm/web01": "vm:moref=vm-1#1", "moref=vm-1": "vm:moref=vm-1#1"} {
		list, err := jobsOf(jobVMs()[2:3], pattern, template)
		if err != nil || list.jobs[0].Source != source {
			t.Errorf("%s: %+v, %v; want the source %s", pattern, list, err, source)
		}
	}
	// The order of the server does not matter.
	vms := jobVMs()
	slices.Reverse(vms)
	if other, err := jobsOf(vms, "", template); err != nil || !slices.EqualFunc(other.jobs, list.jobs, func(a, b diskJob) bool { return a.Target == b.Target && a.Name == b.Name }) {
		t.Errorf("in another order: %+v, %v", other, err)
	}
}

// TestJobFileIsValid checks that vddkcp run accepts the job file.
func TestJobFileIsValid(t *testing.T) {
	template, err := machine.ParseTarget("images/{moref}-{n}.qcow2", "")
	if err != nil {
		t.Fatal(err)
	}
	list, err := jobsOf(jobVMs(), "", template)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	defaults := jobDefaults{Server: "vc.test", Port: 8443, User: "backup", Thumbprint: strings.Repeat("ab", 20)}
	if err := printJSON(&text, jobFile{1, defaults, list.jobs}); err != nil {
		t.Fatal(err)
	}
	_, spec := jobSpec(t)
	f, err := batch.Load(&text, "jobs.json", t.TempDir(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if j := f.Jobs[2]; len(f.Jobs) != 6 || j.Text("server") != "vc.test" || j.Text("port") != "8443" || j.Source != "vm:web01#1" || j.Host != "esx1" {
		t.Errorf("%d jobs, %+v", len(f.Jobs), j)
	}
	if jobs, err := f.Select(batch.Selection{Labels: map[string]string{"vm": "web01", "folder": "prod", "datastore": "ds1", "host": "esx1", "power": "on"}}); err != nil || len(jobs) != 2 {
		t.Errorf("%d jobs have the labels of web01, %v", len(jobs), err)
	}
}

// TestJobDefaults checks that a job file names the profile instead of what the profile has.
func TestJobDefaults(t *testing.T) {
	vc1 := &profile.Profile{Name: "vc1", Server: "vc", User: "u", Port: 8443, Thumbprint: "ab", Password: profile.Secret{File: "pw"}}
	for _, c := range []struct {
		r      settled
		want   jobDefaults
		secret bool
	}{
		{settled{server: "vc", user: "u"}, jobDefaults{Server: "vc", User: "u"}, false},
		{settled{server: "vc", user: "u", port: 443, thumbprint: "ab"}, jobDefaults{Server: "vc", User: "u", Thumbprint: "ab"}, false},
		{settled{server: "vc", port: 8443}, jobDefaults{Server: "vc", Port: 8443}, false},
		{settled{server: "vc", user: "u", port: 8443, thumbprint: "ab", profile: vc1}, jobDefaults{Profile: "vc1"}, true},
		{settled{server: "vc", user: "other", port: 443, thumbprint: "cd", profile: vc1}, jobDefaults{Profile: "vc1", User: "other", Port: 443, Thumbprint: "cd"}, false},
		{settled{server: "vc", user: "u", profile: &profile.Profile{Name: "p", User: "u"}}, jobDefaults{Profile: "p"}, false},
	} {
		got := c.r.jobDefaults()
		if got != c.want || got.hasSecret(c.r.profile) != c.secret {
			t.Errorf("%+v: %+v, want %+v", c.r, got, c.want)
		}
	}
}

func TestJobsOfErrors(t *testing.T) {
	template, err := machine.ParseTarget("images/{vm}-{n}", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jobsOf(jobVMs(), "", template); !errors.As(err, new(*usage.Error)) || !strings.Contains(err.Error(), `"images/twin-1": disk 1 of the VM "twin" (vm-3), disk 1 of the VM "twin" (vm-4)`) {
		t.Errorf("%v, want a usage error that lists the disks", err)
	}
	if list, err := jobsOf(jobVMs()[4:6], "", template); err == nil || len(list.skipped) != 2 {
		t.Errorf("%+v, %v; want an error and the reasons", list, err)
	}
}
