package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vmKinds are the ways in which a call to the server fails.
var vmKinds = []struct {
	name  string
	fault vspheretest.Fault
}{
	{"fault", vspheretest.Fault{Soap: &types.SystemError{}}},
	{"failed task", vspheretest.Fault{Task: &types.SystemError{}}},
	{"no answer", vspheretest.Fault{Hang: true}},
	{"task without end", vspheretest.Fault{HangTask: true}},
	{"late answer", vspheretest.Fault{Late: true}},
	{"HTTP 503", vspheretest.Fault{Status: 503}},
	{"lost call", vspheretest.Fault{Cut: vspheretest.Before}},
	{"lost answer", vspheretest.Fault{Cut: vspheretest.After}},
	{"half an answer", vspheretest.Fault{Truncate: true}},
}

// vmMethods are the calls that a copy of a VM makes. The faults begin at a point of the copy.
var vmMethods = []struct{ name, point, method string }{
	{"connect", "", "RetrieveServiceContent"},
	{"login", "", "Login"},
	{"list", "", "CreateContainerView"},
	{"names", "", "RetrievePropertiesEx"},
	{"end of the list", "", "DestroyView"},
	{"describe", "machine-new", "RetrievePropertiesEx"},
	{"look for snapshots", "machine-snapshot", "RetrievePropertiesEx"},
	{"snapshot", "", "CreateSnapshot_Task"},
	{"describe the snapshot", "machine-snapshot-made", "RetrievePropertiesEx"},
	{"copy", "machine-copy", "RetrievePropertiesEx"},
	{"check at the end", "machine-whole:2", "RetrievePropertiesEx"},
	{"look for the snapshot", "machine-copied", "RetrievePropertiesEx"},
	{"remove", "", "RemoveSnapshot_Task"},
	{"consolidate", "", "ConsolidateVMDisks_Task"},
	{"logout", "", "Logout"},
}

// vmExit returns the exit status of a copy of which one call fails once, or each time.
func vmExit(name, method, kind string, once bool) int {
	executed := kind == "late answer" || kind == "lost answer" || kind == "half an answer"
	switch task := strings.HasSuffix(method, "_Task"); {
	case method == "RetrieveServiceContent" || method == "Login":
		return 1 // the name of the server may be wrong
	case method == "DestroyView" || method == "Logout":
		return 0
	case task && executed:
		return 0 // the effect is seen
	case kind == "task without end" && name == "snapshot":
		return 75
	case kind == "task without end":
		return 5
	case name == "snapshot" && (kind == "fault" || kind == "failed task"):
		return 1
	case once:
		return 0
	case name == "remove" || name == "consolidate" || name == "look for the snapshot":
		return 5
	case kind == "fault" && name != "describe the snapshot" && name != "copy" && name != "check at the end":
		return 1
	}
	return 75 // among these are failures after which the snapshot can't be removed either
}

// vmSessions returns how many sessions a copy may leave on the server of which a call fails.
func vmSessions(method, kind string, once bool) int {
	switch executed := kind == "late answer" || kind == "lost answer" || kind == "half an answer"; {
	case method == "Login" && executed: // nobody knows the cookie
		return 1
	case method == "Logout" && !executed && (!once || kind == "fault"):
		return 1
	}
	return 0
}

// TestVMWithFaults copies a VM while one call to the server, or all calls of one kind, fail in some
// way. After that, vddkcp has either copied the VM or says that it has failed, and nothing of it is on
// the server that it does not name. A later run completes the copy.
func TestVMWithFaults(t *testing.T) {
	vmStates(t)
	for _, m := range vmMethods {
		for _, kind := range vmKinds {
			task := strings.HasSuffix(m.method, "_Task")
			if !task && (kind.fault.Task != nil || kind.fault.HangTask) {
				continue
			}
			if m.method == "RetrievePropertiesEx" && (kind.fault.Cut == vspheretest.After || kind.fault.Late) {
				continue // it makes no difference whether a call that reads is executed
			}
			for _, once := range []bool{true, false} {
				if !once && kind.name != "fault" && kind.name != "no answer" && kind.name != "lost call" && !task && chaosSetting("VDDKCP_CHAOS", 0) < 100 {
					continue // the other kinds of lost calls have the same result
				}
				name := fmt.Sprintf("%s/%s/always", m.name, kind.name)
				if once {
					name = fmt.Sprintf("%s/%s/once", m.name, kind.name)
				}
				t.Run(name, func(t *testing.T) {
					v := newVM(t)
					then := v.now()
					r := v.runWithFault(m.point, m.method, kind.fault, once)
					names, sessions := v.ours(), len(v.server.Sessions())
					step, _ := v.state()
					if want := vmExit(m.name, m.method, kind.name, once); r.exit != want {
						t.Errorf("exit status %d, want %d\n%s", r.exit, want, r.stderr)
					}
					if want := vmSessions(m.method, kind.name, once); sessions > want {
						t.Errorf("%d sessions are left, want %d\n%s", sessions, want, r.stderr)
					}
					if strings.Contains(r.stderr, v.server.Password) {
						t.Errorf("the password is in the output:\n%s", r.stderr)
					}
					if rep := v.report(); rep.Exit != r.exit || len(names) > 0 && !slices.Equal(rep.Left, names) {
						t.Errorf("the report has the exit status %d and the snapshots %q, want %d and %q\n%s", rep.Exit, rep.Left, r.exit, names, r.stderr)
					}
					v.server.EndSessions()
					if r.exit == 0 {
						v.published(then)
						return
					}
					now := v.write()
					v.copies("--resume")
					if step == "copied" || step == "publish" || step == "done" || len(names) > 0 {
						v.published(then)
					} else {
						v.published(now)
					}
				})
			}
		}
	}
}

// runWithFault runs vddkcp vm. From the given point on, the first call of a method fails, or all calls
// of this method.
func (v *vmTest) runWithFault(point, method string, fault vspheretest.Fault, once bool) result {
	v.Helper()
	if method == "ConsolidateVMDisks_Task" {
		v.server.KeepFiles(v.vm)
	}
	args := []string{"--report", "report.json", "--parallel", "1"}
	if fault.Hang || fault.Late {
		args = append(args, "--timeout", "1s")
	}
	if once {
		fault.Times = 1
	} else {
		args = append(args, "--retry-timeout", "2s")
	}
	if !once || fault.HangTask {
		args = append(args, "--task-timeout", "3s")
	}
	if point == "" {
		v.server.On(method, fault)
		defer v.server.Settle()
		defer v.server.ClearFaults()
		return v.run(args...)
	}
	p := v.start([]string{point}, nil, args...)
	release := p.at(point)
	v.server.On(method, fault)
	defer v.server.Settle()
	defer v.server.ClearFaults()
	release()
	return p.wait()
}
