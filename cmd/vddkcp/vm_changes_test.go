package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// midway starts a copy, which stops when it has copied a part of the first disk.
func (v *vmTest) midway(args ...string) (p *vmProcess, release func()) {
	v.Helper()
	args = append([]string{"--parallel", "1", "--connections", "1", "--request-size", "64KiB", "--rate-limit", "1MiB", "--report", "report.json"}, args...)
	p = v.start([]string{"checkpoint:1", "machine-whole:2"}, nil, args...)
	return p, p.at("checkpoint:1")
}

// loseConnection kills the process that reads the disk. The connection of VDDK is lost then.
func (p *vmProcess) loseConnection() {
	p.Helper()
	for _, pid := range children(p.T, p.cmd.Process.Pid) {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// reopened checks that a disk was opened again after the connection was lost.
func (v *vmTest) reopened() {
	v.Helper()
	if opened := v.server.Library.Calls()["Open"]; opened <= int64(v.disks()) {
		v.Errorf("VDDK has opened disks %d times, so none was opened again", opened)
	}
}

// TestVMChangesWhileCopied changes the server and the VM while the VM is copied, and cuts the
// connection of VDDK. The copy goes on with the present host, files and session.
func TestVMChangesWhileCopied(t *testing.T) {
	vmStates(t)
	for _, c := range []struct {
		name   string
		change func(v *vmTest)
		logins int
		says   string
	}{
		{"nothing", func(*vmTest) {}, 1, ""},
		{"session ended", func(v *vmTest) { v.server.EndSessions() }, 2, ""},
		{"server restarted", func(v *vmTest) { v.server.Restart() }, 2, ""},
		{"another host", func(v *vmTest) { v.server.MoveHost("web01", "esx2.test") }, 1, ""},
		{"another datastore", func(v *vmTest) { v.server.MoveDatastore("web01", "ds2") }, 1, ""},
		{"another host and session", func(v *vmTest) {
			v.server.MoveHost("web01", "esx2.test")
			v.server.MoveDatastore("web01", "ds2")
			v.server.EndSessions()
		}, 2, ""},
		{"renamed", func(v *vmTest) {
			v.server.Rename("web01", "web02")
			v.vm = "web02"
		}, 1, ""},
		{"powered off", func(v *vmTest) { v.server.PowerOff("web01") }, 1, ""},
		{"suspended", func(v *vmTest) { v.server.Suspend("web01") }, 1, ""},
		{"question", func(v *vmTest) { v.server.Question("web01", "Has the VM been moved?") }, 1, "Has the VM been moved?"},
		{"another snapshot", func(v *vmTest) {
			v.server.AddSnapshot("web01", "before the update", "")
			v.others = append(v.others, "before the update")
		}, 1, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVM(t, vspheretest.Datastore{Name: "ds2"}, vspheretest.Configure(func(o *vspheretest.Options) { o.StrictLogin = true }))
			then := v.now()
			p, release := v.midway()
			v.write()
			c.change(v)
			p.loseConnection()
			release()
			p.at("machine-whole:2")()
			r := v.exits(0, p)
			v.vm = "web01" // the names of the files
			if c.name == "renamed" {
				v.server.Rename("web02", "web01")
			}
			v.published(then)
			v.reopened()
			v.says(r, c.says)
			if logins := v.server.Calls()["Login"]; logins != c.logins {
				t.Errorf("%d logins, want %d\n%s", logins, c.logins, r.stderr)
			}
		})
	}
}

// TestVMIsSpoiledWhileCopied changes the server and the VM in ways that end a copy. Nothing counts as
// complete that may be a mixture of old and new data.
func TestVMIsSpoiledWhileCopied(t *testing.T) {
	vmStates(t)
	for _, c := range []struct {
		name      string
		change    func(v *vmTest)
		exit      int
		says      []string
		snapshots int  // of vddkcp that are left
		again     bool // the copy can be made now
		same      bool // it is then continued, and the content is that before the change
	}{
		{name: "snapshot removed", exit: 1, says: []string{"the snapshot is gone"}, again: true,
			change: func(v *vmTest) { v.server.RemoveSnapshotBehindBack("web01", "") }},
		{name: "reverted", exit: 1, says: []string{"the snapshot is gone"}, again: true,
			change: func(v *vmTest) {
				v.server.Revert("web01", "clean")
				v.server.RemoveSnapshotBehindBack("web01", v.ours()[0])
			}},
		{name: "VM destroyed", exit: 1, says: []string{"the VM is gone"},
			change: func(v *vmTest) { v.server.Destroy("web01") }},
		{name: "datastore full", exit: 75, says: []string{`the datastore ds1 has 1.0 GiB of free space, less than --min-free 10.0 GiB`},
			change: func(v *vmTest) { v.server.FillDatastore("ds1", 1<<30) }},
		{name: "certificate", exit: 75, snapshots: 1, again: true, same: true,
			change: func(v *vmTest) { v.server.RenewCertificate() }},
		{name: "password", exit: 75, says: []string{"the user name or the password is wrong"}, snapshots: 1, again: true, same: true,
			change: func(v *vmTest) {
				v.server.On("Login", vspheretest.Fault{Soap: &types.InvalidLogin{}})
				v.server.EndSessions()
			}},
		{name: "server lost", exit: 75, snapshots: 1, again: true, same: true,
			change: func(v *vmTest) { v.server.Stop() }},
	} {
		for _, lost := range []bool{true, false} {
			if !lost && c.name == "datastore full" {
				continue // the disks are copied, and the snapshot is removed at once
			}
			name := c.name + "/at the end"
			if lost {
				name = c.name + "/connection lost"
			}
			t.Run(name, func(t *testing.T) {
				v := newVMs(t, vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: vmDiskSize}, {Size: vmDiskSize}}, Snapshots: []string{"clean"}})
				v.others = []string{"clean"}
				old := v.server.Thumbprint()
				v.write()
				then := v.now()
				args := []string{"--retry-timeout", "2s", "--task-timeout", "2s"}
				p, release := v.midway(args...)
				if !lost {
					release()
					release = p.at("machine-whole:2")
				}
				now := v.write()
				c.change(v)
				if lost {
					p.loseConnection()
					os.Remove(filepath.Join(p.stops, "machine-whole:2"))
				}
				release()
				r := v.exits(c.exit, p)
				v.says(r, c.says...)
				if c.name == "certificate" {
					v.says(r, old, v.server.Thumbprint(), "compare the new thumbprint with the one that the server itself shows")
				}
				v.server.Resume()
				v.server.ClearFaults()
				if logins := v.server.Calls()["Login"]; c.name == "password" && logins != 2 {
					t.Errorf("%d logins, want a good and a refused one\n%s", logins, r.stderr)
				}
				if c.snapshots > 0 {
					v.server.EndSessions()
				}
				if c.name == "VM destroyed" {
					if sessions := v.server.Sessions(); len(sessions) > 0 {
						t.Errorf("sessions are left: %v", sessions)
					}
					return
				}
				if c.name == "snapshot removed" {
					v.others = nil
				}
				v.left(c.snapshots)
				if n := v.named(); n > 0 {
					t.Errorf("%d files have their names", n)
				}
				if step, _ := v.state(); (step == "copy") != c.same {
					t.Errorf("the state is %q", step)
				}
				for _, name := range v.ours() {
					if !slices.Contains(v.report().Left, name) || !strings.Contains(r.stderr, name) {
						t.Errorf("the snapshot %s is not named in the report %q and in the output:\n%s", name, v.report().Left, r.stderr)
					}
				}
				if !c.again {
					v.server.FillDatastore("ds1", 1<<40)
				}
				if c.name == "reverted" {
					now = v.now()
				}
				v.copies("--resume")
				if c.same {
					v.published(then)
				} else {
					v.published(now)
				}
			})
		}
	}
}
