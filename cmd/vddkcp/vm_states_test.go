package main

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vmPoint is a point of the code at which a copy of a VM is interrupted.
type vmPoint struct {
	name     string
	state    string // according to the state file
	snapshot bool   // on the server
	named    int    // files that have their final names
	// fresh says that another run begins with a new snapshot, since there is none to continue with.
	fresh bool
	// signal is the exit status after SIGTERM.
	signal int
}

// vmPoints are points in all states of the table in docs/cli.md.
var vmPoints = []vmPoint{
	{"machine-new", "", false, 0, true, 143},
	{"machine-snapshot", "snapshot", false, 0, true, 143},
	{"machine-snapshot-made", "snapshot", true, 0, false, 143},
	{"machine-copy", "copy", true, 0, false, 143},
	{"checkpoint:1", "copy", true, 0, false, 143},
	{"slot written:2", "copy", true, 0, false, 143},
	{"machine-whole:1", "copy", true, 0, false, 143},
	{"held:1", "copy", true, 0, false, 143},
	{"machine-whole:2", "copy", true, 0, false, 143},
	{"machine-copied", "copied", true, 0, false, 143},
	{"machine-publish", "publish", false, 0, false, 143},
	{"rename:1", "publish", false, 0, false, 0},
	{"renamed:1", "publish", false, 1, false, 0},
	{"machine-published:1", "publish", false, 1, false, 0},
	{"rename:2", "publish", false, 1, false, 0},
	{"machine-published:2", "publish", false, 2, false, 0},
	{"machine-done", "done", false, 2, false, 0},
}

func vmStates(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("runs vddkcp for each state of a copy")
	}
}

// TestVMIsKilled kills a copy of a VM in every state. A later run completes the copy, and nothing is
// left on the server.
func TestVMIsKilled(t *testing.T) {
	vmStates(t)
	for _, point := range vmPoints {
		for _, resume := range []bool{true, false} {
			name := point.name + "/again"
			if resume {
				name = point.name + "/resume"
			}
			t.Run(name, func(t *testing.T) {
				v := newVM(t)
				then := v.now()
				v.start(nil, []string{"VDDKCP_KILL_AT=" + point.name}).killed()
				snapshots := 0
				if point.snapshot {
					snapshots = 1
				}
				v.left(snapshots)
				step, recorded := v.state()
				if names := v.ours(); step != point.state || len(names) > 0 && recorded != names[0] {
					t.Errorf("the state is %q with the snapshot %q, want %q and %q", step, recorded, point.state, names)
				}
				if n := v.named(); n != point.named {
					t.Errorf("%d files have their names, want %d", n, point.named)
				}
				now := v.write()
				switch {
				case resume && !point.fresh:
					v.copies("--resume")
					v.published(then)
				case resume:
					v.copies("--resume")
					v.published(now)
				case v.hasFiles():
					v.says(v.exits(1, v.start(nil, nil)), "already exists")
					v.left(snapshots) // --resume needs it
					v.copies("--force")
					v.published(now)
				default:
					v.copies()
					v.published(now)
				}
			})
		}
	}
}

// TestVMIsTerminated sends SIGTERM to a copy of a VM in every state. The copy ends in order and
// removes its snapshot, and a later run completes the copy.
func TestVMIsTerminated(t *testing.T) {
	vmStates(t)
	for _, point := range vmPoints {
		for _, keep := range []bool{false, true} {
			name := point.name + "/once"
			if keep {
				name = point.name + "/keep-snapshot"
			}
			t.Run(name, func(t *testing.T) {
				v := newVM(t)
				then := v.now()
				args := []string{"--parallel", "1", "--rate-limit", "4MiB", "--request-size", "64KiB"}
				if keep {
					args = append(args, "--keep-snapshot")
				}
				p := v.start([]string{point.name, "signal"}, nil, args...)
				release := p.at(point.name)
				p.terminate()
				release()
				r := v.exits(point.signal, p)
				if point.signal == 0 {
					v.published(then)
					return
				}
				v.says(r, "stopped by SIGTERM")
				// The disks are not all copied yet, so the snapshot is needed.
				kept := keep && point.state == "copy" && point.name != "machine-whole:2" || keep && point.name == "machine-snapshot-made"
				snapshots := 0
				if kept {
					snapshots = 1
					v.says(r, v.ours()[0], "run again with --resume to continue")
				}
				v.left(snapshots)
				if n := v.named(); n != 0 {
					t.Errorf("%d files have their names", n)
				}
				now := v.write()
				v.copies("--resume")
				switch {
				case kept, point.state == "copied", point.state == "publish", point.name == "machine-whole:2":
					v.published(then)
				default:
					v.published(now)
				}
			})
		}
	}
}

// TestVMIsTerminatedTwice sends two signals to a copy of a VM in every state, the second one while the
// server removes the snapshot. The copy then ends at once and names the snapshot, which a later run
// removes.
func TestVMIsTerminatedTwice(t *testing.T) {
	vmStates(t)
	for _, point := range vmPoints {
		if !point.snapshot {
			continue // TestVMIsTerminated: nothing is removed that a second signal could interrupt
		}
		t.Run(point.name, func(t *testing.T) {
			v := newVM(t)
			then := v.now()
			removal := v.server.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true})
			p := v.start([]string{point.name, "signal"}, nil, "--parallel", "1", "--rate-limit", "4MiB", "--request-size", "64KiB")
			release := p.at(point.name)
			p.terminate()
			release()
			p.arrives(removal)
			p.cmd.Process.Signal(syscall.SIGINT)
			r := v.exits(130, p)
			names := v.ours()
			if len(names) != 1 || !strings.Contains(r.stderr, names[0]) || !strings.Contains(r.stderr, "vddkcp cleanup --remove --older-than 0s web01") {
				t.Errorf("the snapshots %q are left; the output is:\n%s", names, r.stderr)
			}
			v.server.EndSessions()
			removal.Remove()
			v.left(0) // the server goes on with the removal
			now := v.write()
			v.copies("--resume")
			if point.name == "machine-copied" || point.name == "machine-whole:2" {
				v.published(then)
			} else {
				v.published(now)
			}
		})
	}
}

// vmCalls are calls of the server, in the order in which a copy makes them, that last long enough for
// an interruption.
var vmCalls = []struct {
	name, method string
	fault        vspheretest.Fault
	state        string // according to the state file
	snapshots    int    // on the server in the end, after the copy was killed
	fresh        bool   // another run then begins with a new snapshot
	signal       int    // the exit status after SIGTERM
	twice        int    // the exit status after SIGTERM and SIGINT; 0: SIGTERM alone ends the copy at once
}{
	{"find", "RetrievePropertiesEx", vspheretest.Fault{Hang: true}, "", 0, true, 143, 0},
	{"snapshot not begun", "CreateSnapshot_Task", vspheretest.Fault{Hang: true}, "snapshot", 0, true, 143, 130},
	{"snapshot", "CreateSnapshot_Task", vspheretest.Fault{HangTask: true}, "snapshot", 1, false, 143, 130},
	{"snapshot made", "CreateSnapshot_Task", vspheretest.Fault{Late: true}, "snapshot", 1, false, 143, 130},
	{"removal not begun", "RemoveSnapshot_Task", vspheretest.Fault{Hang: true}, "copied", 1, false, 143, 130},
	{"removal", "RemoveSnapshot_Task", vspheretest.Fault{HangTask: true}, "copied", 0, false, 143, 130},
	{"removed", "RemoveSnapshot_Task", vspheretest.Fault{Late: true}, "copied", 0, false, 143, 130},
	{"logout", "Logout", vspheretest.Fault{Hang: true}, "done", 0, false, 0, 130},
}

// TestVMIsInterruptedInCalls kills a copy of a VM, or sends one or two signals to it, while the server
// works on a call. A later run completes the copy, and nothing is left on the server.
func TestVMIsInterruptedInCalls(t *testing.T) {
	vmStates(t)
	for _, call := range vmCalls {
		start := func(t *testing.T) (v *vmTest, p *vmProcess, rule *vspheretest.Rule, then [][]byte) {
			v = newVM(t)
			then = v.now()
			call.fault.Times = 1
			rule = v.server.On(call.method, call.fault)
			p = v.start([]string{"signal"}, []string{"VDDKCP_POLL=100ms"})
			p.arrives(rule)
			return v, p, rule, then
		}
		resume := func(v *vmTest, then [][]byte, fresh bool) {
			now := v.write()
			v.copies("--resume")
			if fresh {
				v.published(now)
			} else {
				v.published(then)
			}
		}
		t.Run(call.name+"/kill", func(t *testing.T) {
			v, p, rule, then := start(t)
			p.cmd.Process.Kill()
			<-p.ended
			if !call.fault.Hang { // else the server drops the call
				rule.Remove()
			}
			p.killed()
			v.left(call.snapshots)
			if step, _ := v.state(); step != call.state {
				t.Errorf("the state is %q, want %q", step, call.state)
			}
			resume(v, then, call.fresh)
		})
		if call.fault.HangTask {
			t.Run(call.name+"/kill, resume before the end", func(t *testing.T) {
				v, p, rule, then := start(t)
				p.cmd.Process.Kill()
				<-p.ended
				v.server.EndSessions()
				again := v.start(nil, nil, "--resume")
				again.eventually("it waits for the task", func() bool { return len(v.server.Sessions()) > 0 })
				rule.Remove()
				v.exits(0, again)
				v.published(then)
			})
		}
		t.Run(call.name+"/signal", func(t *testing.T) {
			v, p, rule, then := start(t)
			p.terminate()
			rule.Remove()
			v.exits(call.signal, p)
			v.left(0)
			resume(v, then, call.state == "" || call.state == "snapshot")
		})
		if call.twice == 0 {
			continue
		}
		t.Run(call.name+"/two signals", func(t *testing.T) {
			v, p, rule, then := start(t)
			_, name := v.state()
			p.terminate()
			p.cmd.Process.Signal(syscall.SIGINT)
			r := v.exits(call.twice, p)
			if named := name != "" && strings.Contains(r.stderr, name); named != (call.state == "snapshot" || call.state == "copied") {
				t.Errorf("the snapshot %q is named: %v\n%s", name, named, r.stderr)
			}
			if !call.fault.Hang {
				rule.Remove()
			}
			v.server.Settle()
			v.server.EndSessions()
			v.left(call.snapshots)
			resume(v, then, call.fresh)
		})
	}
}

// TestVMStartsOverAndIsKilled kills a copy that has started over before it has come to the second disk,
// of which an earlier copy has left a part. The next run must not mix the two copies.
func TestVMStartsOverAndIsKilled(t *testing.T) {
	vmStates(t)
	for _, inPlace := range []bool{false, true} {
		t.Run(map[bool]string{false: "files", true: "exports"}[inPlace], func(t *testing.T) {
			v := newVM(t)
			args := []string{"--request-size", "64KiB", "--state", filepath.Join(v.dir, "state.json")}
			if inPlace {
				peer.Need(t, "nbdkit")
				for n := 1; n <= 2; n++ {
					uri, _ := chaosTargets[1].start(t, t.TempDir(), vmDiskSize)
					args = append(args, fmt.Sprintf("--target=%d=%s", n, uri))
				}
			}
			v.server.Library.Conf("fault ReadAsync sectors=last global do=fail code=13")
			v.exits(75, v.start(nil, nil, append(args, "--keep-snapshot", "--retries", "0")...))
			v.left(1)
			v.server.Library.Reset()
			then := v.write()
			v.start(nil, []string{"VDDKCP_KILL_AT=checkpoint:1"}, append(args, "--force", "--parallel", "1")...).killed()
			v.left(1)
			v.write()
			v.copies(append(args, "--resume")...)
			v.left(0)
			for i, content := range then {
				path := v.target(i + 1)
				if inPlace {
					path = filepath.Join(filepath.Dir(strings.TrimPrefix(args[4+i], fmt.Sprintf("--target=%d=nbd+unix:///?socket=", i+1))), "target")
				}
				if !bytes.Equal(read(t, path), content) {
					t.Errorf("disk %d differs from its copy", i+1)
				}
			}
		})
	}
}

// TestVMIsKilledBeforeConsolidation kills a copy when its snapshot is removed, but the disks are not
// consolidated yet. A later run consolidates them, although there is no snapshot any more.
func TestVMIsKilledBeforeConsolidation(t *testing.T) {
	vmStates(t)
	for _, stopped := range []bool{false, true} {
		for _, args := range [][]string{{"--resume"}, {"--force"}} {
			t.Run(map[bool]string{false: "copied", true: "stopped"}[stopped]+args[0], func(t *testing.T) {
				v := newVM(t)
				then := v.now()
				v.server.KeepFiles("web01")
				call := v.server.On("ConsolidateVMDisks_Task", vspheretest.Fault{Hang: true, Times: 1})
				var p *vmProcess
				if stopped {
					var release func()
					p, release = v.midway()
					p.cmd.Process.Signal(syscall.SIGTERM)
					release()
				} else {
					p = v.start(nil, nil)
				}
				p.arrives(call)
				p.kill()
				if names := v.ours(); len(names) > 0 || !v.server.NeedsConsolidation("web01") {
					t.Errorf("the snapshots are %q; want none, and disks that need consolidation", names)
				}
				now := v.write()
				v.copies(args...)
				if stopped || args[0] == "--force" {
					v.published(now)
				} else {
					v.published(then)
				}
			})
		}
	}
	// Disks that needed consolidation before are left alone.
	t.Run("before", func(t *testing.T) {
		v := newVM(t)
		v.server.NeedConsolidation("web01")
		v.start(nil, []string{"VDDKCP_KILL_AT=machine-copied"}, "--force-consolidate").killed()
		v.server.RemoveSnapshotBehindBack("web01", v.ours()[0])
		v.copies("--resume")
		v.left(0)
	})
}
