package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// checkVM says which VM was found.
func checkVM(vm *inventory.VM) []checkResult {
	what := "VM"
	if vm.Template {
		what = "template"
	}
	state := "suspended"
	switch vm.Power {
	case inventory.On:
		state = "powered on"
	case inventory.Off:
		state = "powered off"
	}
	return checkOK("%s is the %s %s on the host %s, %s", printable.Name(vm.Path), what, printable.Name(vm.Moref), printable.Name(vm.Host), state)
}

// checkDisks says of each disk whether it can be copied now.
func checkDisks(vm *inventory.VM) []checkResult {
	if len(vm.Disks) == 0 {
		reason := "no disks"
		if vm.Verdict == inventory.Never {
			reason = vm.Reason
		}
		return checkFailed("", "no disk can be copied: %s", reason)
	}
	var results []checkResult
	for i := range vm.Disks {
		d := &vm.Disks[i]
		r := checkResult{Check: fmt.Sprintf("disk %d", d.N), OK: d.Verdict.CopyableIn(vm.Power)}
		r.Detail = fmt.Sprintf("%s, %s on the datastore %s, ", printable.Name(d.Label), bytesize.Format(d.Size), printable.Name(d.Datastore))
		switch {
		case r.OK:
			r.Detail += "can be copied"
		case d.Verdict == inventory.WhenOff:
			r.Detail += "can be copied only while the VM is off"
			r.Hint = fmt.Sprintf("power the VM off, or copy the other disks with --skip %d", d.N)
		default:
			r.Detail += "cannot be copied"
			r.Hint = fmt.Sprintf("copy the other disks with --skip %d", d.N)
		}
		if d.Reason != "" {
			r.Detail += ": " + d.Reason
		}
		results = append(results, r)
	}
	return results
}

// checkTracking says whether changed blocks are tracked. A copy does not need that.
func checkTracking(vm *inventory.VM) []checkResult {
	var without []string // disks that should be tracked and are not
	for i := range vm.Disks {
		if d := &vm.Disks[i]; d.ChangeID == "" && d.Verdict == inventory.Running {
			without = append(without, d.Title())
		}
	}
	switch {
	case !vm.Tracking.Supported:
		return checkOK("the VM does not support change tracking (virtual hardware %s); copies of whole disks do not need it", printable.Name(vm.Version))
	case !vm.Tracking.Enabled:
		return checkOK("change tracking is supported, and off; copies of whole disks do not need it")
	case len(without) > 0:
		return checkOK("change tracking is on, but the server has no change ID of %s", strings.Join(without, ", "))
	}
	return checkOK("change tracking is on")
}

// checkSnapshots says which snapshots the VM has.
func checkSnapshots(vm *inventory.VM) []checkResult {
	for _, n := range vm.Snapshots {
		if n.Mark != nil {
			busy := &inventory.BusyError{VM: vm.Name, Name: n.Name, Mark: n.Mark}
			return checkFailed(busy.Hint(), "%v", busy)
		}
	}
	switch {
	case vm.ConsolidationNeeded:
		return checkFailed("consolidate the disks in the vSphere client, or copy with --force-consolidate", "the disks of the VM need to be consolidated: files of removed snapshots are left")
	case len(vm.Snapshots) == 0:
		return checkOK("the VM has no snapshots")
	}
	return checkOK("the VM has %s, which a copy does not change", plural(len(vm.Snapshots), "snapshot", "snapshots"))
}

// checkQuestion says whether the VM waits for an answer.
func checkQuestion(vm *inventory.VM) []checkResult {
	if vm.Question == "" {
		return checkOK("the VM does not wait for an answer")
	}
	return checkFailed("answer the question in the vSphere client", "the VM waits for an answer: %s", vm.Question)
}

// snapshotSpace is the free space in bytes that a datastore should have while a snapshot stands.
const snapshotSpace = 10 << 30

// checkSpace says how much space the datastores of the VM have for a snapshot.
func checkSpace(vm *inventory.VM) []checkResult {
	if len(vm.Stores) == 0 {
		return checkFailed("", "the server does not show the datastores of the VM")
	}
	var results []checkResult
	for _, s := range vm.Stores {
		r := checkResult{Detail: fmt.Sprintf("%s (%s) has %s of free space", printable.Name(s.Name), printable.Name(s.Type), bytesize.Format(s.Free))}
		switch {
		case s.Free < 0:
			r.Detail = fmt.Sprintf("%s (%s) is not accessible", printable.Name(s.Name), printable.Name(s.Type))
		case s.Free < snapshotSpace:
			r.Detail += fmt.Sprintf(", and a snapshot should have %s", bytesize.Format(snapshotSpace))
			r.Hint = "free some space: while a VM has a snapshot, all that it writes needs space, and a full datastore stops all VMs on it"
		default:
			r.OK = true
		}
		results = append(results, r)
	}
	return results
}

// usesOf returns for what a copy of the VM needs privileges.
func usesOf(vm *inventory.VM) []inventory.Use {
	uses := []inventory.Use{inventory.UseSnapshot, inventory.UseVDDK}
	if slices.ContainsFunc(vm.Disks, func(d inventory.Disk) bool { return d.Encrypted }) {
		uses = append(uses, inventory.UseEncrypted)
	}
	return uses
}

// checkLacking says which privileges the user lacks.
func checkLacking(lacking []inventory.Lacking) []checkResult {
	if len(lacking) == 0 {
		return checkOK("the user has all privileges that a copy needs")
	}
	var results []checkResult
	for _, l := range lacking {
		on := string(l.On)
		if l.Object != "" {
			on += " " + printable.Name(l.Object)
		}
		results = append(results, checkResult{
			Detail: fmt.Sprintf("the user lacks %s on the %s, for %s", l.ID, on, l.For),
			Hint:   "give the user the role that vddkcp check --role prints",
		})
	}
	return results
}

// releases are the releases of vSphere in their order. A VDDK library supports the hosts of its own
// release and of the two releases before.
var releases = []string{"6.0", "6.5", "6.7", "7.0", "8.0", "9.0"}

const supportedReleases = 3

// checkVersions compares the release of the library with that of the host. The version of the
// library is only the number before the point.
func checkVersions(library int, host string) []checkResult {
	at := slices.IndexFunc(releases, func(r string) bool { return host == r || strings.HasPrefix(host, r+".") })
	newest := -1
	for i, r := range releases {
		if strings.HasPrefix(r, fmt.Sprint(library)+".") {
			newest = i
		}
	}
	switch {
	case host == "":
		return checkOK("the version of the host is unknown")
	case at < 0 || newest < 0:
		return checkOK("VDDK %d and ESXi %s: whether VMware supports them together is unknown to vddkcp", library, printable.Name(host))
	case at > newest:
		return checkWarning(fmt.Sprintf("use VDDK %s", releases[at]), "VDDK %d is older than ESXi %s, and may not work with it", library, host)
	case newest-at >= supportedReleases:
		return checkWarning(fmt.Sprintf("use VDDK %s", releases[at+supportedReleases-1]), "VDDK %d does not support ESXi %s, and may not work with it", library, host)
	}
	return checkOK("VDDK %d supports ESXi %s", library, host)
}
