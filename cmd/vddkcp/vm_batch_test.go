package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vmFarm is a server with many VMs that have two disks each, and a job file of all their disks.
type vmFarm struct {
	*vmTest
	names []string
	jobs  string // path of the job file
}

func newFarm(t *testing.T, n int) *vmFarm {
	t.Helper()
	f := &vmFarm{}
	var options []vspheretest.Option
	for i := range n {
		name := fmt.Sprintf("vm%02d", i)
		f.names = append(f.names, name)
		host := fmt.Sprintf("esx%d.test", 1+i%2)
		options = append(options, vspheretest.VM{Name: name, Host: host, Disks: []vspheretest.Disk{{Size: 256 << 10}, {Size: 256 << 10}}, Snapshots: []string{"of the user"}})
	}
	f.vmTest = newVMs(t, options...)
	f.jobs = filepath.Join(f.dir, "jobs.json")
	if err := os.Mkdir(f.images(), 0o755); err != nil {
		t.Fatal(err)
	}
	p := f.startCommand(nil, nil, "jobs", "vm*", "--target", f.images())
	f.exits(0, p)
	if err := os.WriteFile(f.jobs, p.stdout.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	var file struct{ Jobs []struct{ Host string } }
	if err := json.Unmarshal(p.stdout.Bytes(), &file); err != nil || len(file.Jobs) != 2*n {
		t.Fatalf("%d jobs, want %d: %v", len(file.Jobs), 2*n, err)
	}
	for _, job := range file.Jobs {
		if !strings.HasPrefix(job.Host, "esx") {
			t.Errorf("the host of a job is %q", job.Host)
		}
	}
	return f
}

// start starts vddkcp run with the job file.
func (f *vmFarm) start(args ...string) *vmProcess {
	f.Helper()
	return f.startLine(nil, nil, append([]string{"run", f.jobs, "--progress", "none"}, args...)...)
}

// ours returns how many snapshots of vddkcp there are, and checks those of the users.
func (f *vmFarm) ours() (n int) {
	f.Helper()
	for _, vm := range f.names {
		names := f.server.SnapshotNames(vm)
		if !slices.Contains(names, "of the user") {
			f.Errorf("%s has the snapshots %q", vm, names)
		}
		n += len(names) - 1
	}
	return n
}

// published checks that all disks are copied, and that nothing is left on the server.
func (f *vmFarm) published() {
	f.Helper()
	f.server.Settle()
	if n := f.ours(); n > 0 {
		f.Errorf("%d snapshots are left", n)
	}
	if sessions := f.server.Sessions(); len(sessions) > 0 {
		f.Errorf("sessions are left: %v", sessions)
	}
	for _, vm := range f.names {
		for n := 1; n <= 2; n++ {
			got, err := os.ReadFile(filepath.Join(f.images(), fmt.Sprintf("%s-disk%d.raw", vm, n)))
			if err != nil || !bytes.Equal(got, read(f.T, f.server.Image(vm, n))) {
				f.Errorf("disk %d of %s differs from its copy: %v", n, vm, err)
			}
		}
	}
	entries, err := os.ReadDir(f.images())
	if err != nil || len(entries) != 2*len(f.names) {
		f.Errorf("%d files, want %d: %v", len(entries), 2*len(f.names), entries)
	}
}

// TestVMBatch copies the disks of 30 VMs, and kills the batch in between.
func TestVMBatch(t *testing.T) {
	vmStates(t)
	f := newFarm(t, 30)
	before := f.server.Calls()
	f.exits(0, f.start("--check"))
	if made := f.server.Calls()["CreateSnapshot_Task"]; made > 0 {
		t.Errorf("run --check has made %d snapshots", made)
	}
	if logins := f.server.Calls()["Login"] - before["Login"]; logins != 1 {
		t.Errorf("run --check has logged in %d times", logins)
	}

	// From now on, the sessions that are open are counted at each call.
	f.server.EndSessions()
	most := 0
	f.server.On("CreateSnapshot_Task", vspheretest.Fault{Do: func() { most = max(most, len(f.server.Sessions())) }})
	tenth := f.server.On("CreateSnapshot_Task", vspheretest.Fault{Skip: 10, Times: 1})
	p := f.start("--parallel", "4")
	p.arrives(tenth)
	p.kill()
	if f.ours() == 0 {
		t.Error("no snapshot is left after the batch was killed: the test shows nothing")
	}
	before = f.server.Calls()
	f.exits(0, f.start("--resume", "--parallel", "4"))
	f.published()
	if logins := f.server.Calls()["Login"] - before["Login"]; logins != 1 || most > 1 {
		t.Errorf("%d logins, and up to %d sessions at the same time; want 1", logins, most)
	}
	t.Logf("%d snapshots of 30 VMs", f.server.Calls()["CreateSnapshot_Task"])
	f.exits(0, f.start("--resume"))
	f.published()
}

// TestVMBatchIsTerminated sends one or two signals to a batch.
func TestVMBatchIsTerminated(t *testing.T) {
	vmStates(t)
	f := newFarm(t, 6)
	second := f.server.On("CreateSnapshot_Task", vspheretest.Fault{Skip: 2, Times: 1})
	p := f.start("--parallel", "2")
	p.arrives(second)
	p.cmd.Process.Signal(syscall.SIGTERM)
	f.exits(143, p)
	if n := f.ours(); n > 0 || len(f.server.Sessions()) > 0 {
		t.Errorf("%d snapshots are left, and the sessions %v", n, f.server.Sessions())
	}
	removal := f.server.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true})
	p = f.start("--resume", "--parallel", "2")
	p.arrives(removal)
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.cmd.Process.Signal(syscall.SIGINT)
	r := f.wait(p)
	if r.exit != 130 && r.exit != 143 { // the order in which a process gets two signals is not defined
		t.Errorf("exit status %d\n%s", r.exit, r.stderr)
	}
	for _, vm := range f.names {
		for _, name := range f.server.SnapshotNames(vm) {
			if strings.HasPrefix(name, "vddkcp-") {
				f.says(r, name, "vddkcp cleanup --remove --older-than 0s "+vm)
			}
		}
	}
	removal.Remove()
	f.server.EndSessions()
	f.exits(0, f.start("--resume"))
	f.published()
}

func (f *vmFarm) wait(p *vmProcess) result { return p.wait() }

// TestVMBatchLeaves checks the exit status of a batch that is done, but cannot remove a snapshot.
func TestVMBatchLeaves(t *testing.T) {
	vmStates(t)
	for _, how := range []string{"resume", "cleanup"} {
		t.Run(how, func(t *testing.T) {
			f := newFarm(t, 3)
			f.server.On("RemoveSnapshot_Task", vspheretest.Fault{VM: "vm01", Soap: &types.NoPermission{PrivilegeId: "VirtualMachine.State.RemoveSnapshot"}})
			r := f.exits(5, f.start("--report", "report.json"))
			var left string
			for _, name := range f.server.SnapshotNames("vm01")[1:] {
				left = name
			}
			f.says(r, left)
			made := f.server.Calls()["CreateSnapshot_Task"]
			f.exits(5, f.start("--resume"))
			if how == "cleanup" {
				f.server.ClearFaults()
				f.exits(0, f.startCommand(nil, nil, "cleanup", "--remove", "--older-than", "0s", "vm01"))
			}
			f.server.ClearFaults()
			f.exits(0, f.start("--resume"))
			f.published()
			if now := f.server.Calls()["CreateSnapshot_Task"]; now != made {
				t.Errorf("%d snapshots were made when nothing was to be copied", now-made)
			}
		})
	}
}

// TestVMExport serves a disk of a VM. The snapshot is there for as long as the disk is served.
func TestVMExport(t *testing.T) {
	vmStates(t)
	peer.Need(t, "qemu-img", "qemu-io")
	serve := func(t *testing.T, stops []string, args ...string) (v *vmTest, p *vmProcess, then [][]byte, uri string) {
		v = newVM(t)
		then = v.now()
		socket := filepath.Join(v.dir, "socket")
		p = v.startCommand(stops, nil, append([]string{"export", "vm:web01#2", "--listen", "unix:" + socket}, args...)...)
		p.eventually("it listens", func() bool { _, err := os.Stat(socket); return err == nil })
		v.write()
		if names := v.ours(); len(names) != 1 {
			t.Errorf("the snapshots are %q, want one", names)
		}
		return v, p, then, "nbd+unix:///?socket=" + socket
	}
	same := func(t *testing.T, content []byte, image string) {
		t.Helper()
		want := filepath.Join(t.TempDir(), "want.raw")
		if err := os.WriteFile(want, content, 0o600); err != nil {
			t.Fatal(err)
		}
		peer.Run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", want, image)
	}
	t.Run("signal", func(t *testing.T) {
		v, p, then, uri := serve(t, nil)
		same(t, then[1], uri)
		p.cmd.Process.Signal(syscall.SIGTERM)
		v.exits(0, p)
		v.left(0)
	})
	t.Run("two signals", func(t *testing.T) {
		v, p, _, _ := serve(t, []string{"signal"})
		removal := v.server.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true})
		p.terminate()
		p.arrives(removal)
		p.cmd.Process.Signal(syscall.SIGINT)
		v.says(v.exits(130, p), v.ours()[0], "vddkcp cleanup --remove --older-than 0s web01")
		removal.Remove()
		v.server.EndSessions()
		v.left(0)
	})
	t.Run("kill", func(t *testing.T) {
		v, p, _, _ := serve(t, nil)
		p.kill()
		v.left(1)
		v.says(v.exits(0, v.startCommand(nil, nil, "cleanup", "--remove", "--older-than", "0s", "web01")), v.ours()...)
		v.left(0)
	})
	t.Run("not removed", func(t *testing.T) {
		v, p, _, _ := serve(t, nil)
		v.server.On("RemoveSnapshot_Task", vspheretest.Fault{Soap: &types.NoPermission{}})
		p.cmd.Process.Signal(syscall.SIGTERM)
		v.says(v.exits(5, p), v.ours()[0])
		v.left(1)
	})
	t.Run("moved", func(t *testing.T) {
		v, p, then, uri := serve(t, nil)
		v.server.EndSessions()
		v.server.MoveHost("web01", "esx2.test")
		p.loseConnection()
		same(t, then[1], uri)
		p.cmd.Process.Signal(syscall.SIGTERM)
		v.exits(0, p)
		v.left(0)
	})
	t.Run("run", func(t *testing.T) {
		v := newVM(t)
		out := filepath.Join(v.dir, "out.raw")
		v.exits(0, v.startCommand(nil, nil, "export", "vm:web01#2", "--run", "qemu-img convert -f raw -O raw \"$uri\" "+out))
		same(t, v.now()[1], out)
		v.left(0)
		v.exits(7, v.startCommand(nil, nil, "export", "vm:web01#2", "--run", "exit 7"))
		v.left(0)
	})
	t.Run("cow", func(t *testing.T) {
		v := newVM(t)
		then := v.now()
		v.exits(0, v.startCommand(nil, nil, "export", "vm:web01#2", "--cow", "--run", `qemu-io -f raw -c "write -P 7 0 64k" -c "read -P 7 0 64k" "$uri" >&2`))
		same(t, then[1], v.server.Image("web01", 2))
		v.left(0)
	})
	t.Run("rw", func(t *testing.T) {
		v := newVM(t)
		v.says(v.exits(2, v.startCommand(nil, nil, "export", "vm:web01#2", "--rw", "--run", "true")), "vm:web01#2 cannot be written to")
		v.left(0)
		if made := v.server.Calls()["CreateSnapshot_Task"]; made > 0 {
			t.Errorf("%d snapshots were made", made)
		}
	})
	t.Run("pin", func(t *testing.T) {
		// A killed export and one that was stopped leave the snapshot to the next one, even if the
		// VM has been written meanwhile. The snapshot goes with the file.
		pin := filepath.Join(t.TempDir(), "pin")
		v, p, then, uri := serve(t, nil, "--pin", pin)
		snapshot := v.ours()[0]
		again := func() {
			v.write()
			p = v.startCommand(nil, nil, "export", "vm:web01#2", "--pin", pin, "--listen", "unix:"+filepath.Join(v.dir, "socket"))
			p.eventually("it serves", func() bool { return exec.Command("qemu-img", "info", "-f", "raw", uri).Run() == nil })
			same(t, then[1], uri)
		}
		p.kill()
		again()
		p.cmd.Process.Signal(syscall.SIGTERM)
		v.exits(0, p)
		v.left(1)
		again()
		if names := v.ours(); len(names) != 1 || names[0] != snapshot {
			t.Errorf("the snapshots are %q, want %s", names, snapshot)
		}
		if err := os.Remove(pin); err != nil {
			t.Fatal(err)
		}
		p.cmd.Process.Signal(syscall.SIGTERM)
		v.exits(0, p)
		v.left(0)
	})
	t.Run("pin without its snapshot", func(t *testing.T) {
		pin := filepath.Join(t.TempDir(), "pin")
		v, p, _, _ := serve(t, nil, "--pin", pin)
		p.kill()
		v.exits(0, v.startCommand(nil, nil, "cleanup", "--remove", "--older-than", "0s", "web01"))
		v.left(0)
		v.says(v.exits(2, v.startCommand(nil, nil, "export", "vm:web01#2", "--pin", pin, "--run", "true")), "is gone")
		v.left(0)
	})
	t.Run("pin of another disk", func(t *testing.T) {
		// A refused export leaves no new snapshot, and does not say that a snapshot was removed.
		v := newVM(t)
		pin, raw := filepath.Join(t.TempDir(), "pin"), v.server.Image("web01", 1)
		v.exits(0, v.startCommand(nil, nil, "export", raw, "--pin", pin, "--run", "true"))
		v.says(v.exits(2, v.startCommand(nil, nil, "export", "vm:web01#2", "--pin", pin, "--run", "true")), "not one of the VM")
		v.left(0)
	})
	t.Run("two disks", func(t *testing.T) {
		v := newVM(t)
		out := filepath.Join(v.dir, "out")
		v.exits(0, v.startCommand(nil, nil, "export", "--export", "a=vm:web01#1", "--export", "b=vm:web01#2", "--run",
			fmt.Sprintf(`for n in a b; do qemu-img convert -f raw -O raw "nbd+unix:///$n?socket=$unixsocket" %s$n || exit 1; done`, out)))
		same(t, v.now()[0], out+"a")
		same(t, v.now()[1], out+"b")
		v.left(0)
	})
}

// TestVMIsRead checks that commands that only read a disk leave no snapshot, whatever happens.
func TestVMIsRead(t *testing.T) {
	vmStates(t)
	for _, command := range []string{"map", "verify"} {
		for _, how := range []string{"done", "signal", "kill", "not removed"} {
			t.Run(command+"/"+how, func(t *testing.T) {
				v := newVM(t)
				args := []string{command, "vm:web01#1"}
				if command == "verify" {
					args = append(args, v.server.Image("web01", 1))
				}
				made := v.server.On("CreateSnapshot_Task", vspheretest.Fault{Times: 1})
				switch how {
				case "not removed":
					v.server.On("RemoveSnapshot_Task", vspheretest.Fault{Soap: &types.NoPermission{}})
				case "signal", "kill":
					v.server.Library.Conf("fault Open do=hang")
				}
				p := v.startCommand(nil, nil, args...)
				p.arrives(made)
				switch how {
				case "done":
					v.exits(0, p)
					v.left(0)
				case "not removed":
					v.says(v.exits(5, p), v.ours()...)
					v.left(1)
				case "signal":
					p.eventually("it opens the disk", func() bool { return v.server.Library.Calls()["Open"] > 0 })
					p.cmd.Process.Signal(syscall.SIGTERM)
					v.exits(143, p)
					v.left(0)
				case "kill":
					p.eventually("it opens the disk", func() bool { return v.server.Library.Calls()["Open"] > 0 })
					p.kill()
					v.left(1)
					v.exits(0, v.startCommand(nil, nil, "cleanup", "--remove", "--older-than", "0s"))
					v.left(0)
				}
			})
		}
	}
}
