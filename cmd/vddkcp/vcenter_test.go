package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vcenterKey is the key of the *simulated of a script.
type vcenterKey struct{}

// simulated is the simulated vCenter server of a script; nil: it was not started.
type simulated struct{ server *vspheretest.Server }

// setupVcenter lets a script start a simulated vCenter server.
func setupVcenter(env *testscript.Env) error {
	v := &simulated{}
	env.Values[vcenterKey{}] = v
	t := env.T()
	env.Defer(func() {
		if v.server == nil {
			return
		}
		v.server.Close()
		broken, err := os.ReadFile(filepath.Join(env.WorkDir, "vcenter", "lib", "vddktest.broken"))
		if err == nil {
			t.Log("rules of VDDK were violated:\n" + string(broken))
			t.FailNow()
		}
	})
	return nil
}

// cmdVcenter starts a simulated vCenter server that runs until the end of the script, with VDDK's
// stand-in for its disks: vcenter [FILE]. FILE describes the inventory, as vspheretest.Parse says;
// without it there is a VM web01 with two disks. The variables of the environment VC_HOST, VC_PORT,
// VC_USER, VC_PASSWORD_FILE, VC_THUMBPRINT and VC_LIBDIR say how to reach the server, GOVC_URL and
// GOVC_INSECURE tell govc. The script fails at its end if a rule of VDDK was violated.
func cmdVcenter(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 1 {
		ts.Fatalf("usage: vcenter [FILE]")
	}
	description := "vm web01 disks=2 size=8MiB"
	if len(args) == 1 {
		description = ts.ReadFile(args[0])
	}
	options, err := vspheretest.Parse(description, ts.MkAbs)
	ts.Check(err)
	work := filepath.Join(ts.Getenv("WORK"), "vcenter")
	options.LibDir, options.Dir = filepath.Join(work, "lib"), filepath.Join(work, "images")
	ts.Check(os.MkdirAll(options.Dir, 0o755))
	installStandIn(ts, options.LibDir)
	s, err := vspheretest.Start(options)
	ts.Check(err)
	ts.Value(vcenterKey{}).(*simulated).server = s
	password := filepath.Join(work, "password")
	ts.Check(os.WriteFile(password, []byte(s.Password+"\n"), 0o600))
	for _, kv := range [][2]string{
		{"VC_HOST", s.Host}, {"VC_PORT", strconv.Itoa(int(s.Port))}, {"VC_USER", s.User}, {"VC_PASSWORD_FILE", password},
		{"VC_THUMBPRINT", s.Thumbprint()}, {"VC_LIBDIR", options.LibDir}, {"GOVC_URL", s.URL.String()}, {"GOVC_INSECURE", "1"},
	} {
		ts.Setenv(kv[0], kv[1])
	}
}

// standInFile is where the library is in the folder of the stand-in.
const standInFile = "lib64/libvixDiskLib.so.8"

// installStandIn makes a folder with VDDK's stand-in and an empty script for it, and puts the worker
// program next to vddkcp.
func installStandIn(ts *testscript.TestScript, dir string) {
	ts.Check(installWorker(vddkcpDir(ts)))
	built := filepath.Join(vddkcpDir(ts), "standin")
	ts.Check(buildStandIn(built))
	library := filepath.Join(built, standInFile)
	to := filepath.Join(dir, standInFile)
	ts.Check(os.MkdirAll(filepath.Dir(to), 0o755))
	if os.Link(library, to) != nil { // the folders may be on different file systems
		text, err := os.ReadFile(library)
		ts.Check(err)
		ts.Check(os.WriteFile(to, text, 0o755))
	}
	ts.Check(os.WriteFile(filepath.Join(dir, "vddktest.conf"), nil, 0o644))
}

// buildStandIn builds VDDK's stand-in in a folder, unless it exists.
func buildStandIn(dir string) error {
	installing.Lock()
	defer installing.Unlock()
	if _, err := os.Stat(filepath.Join(dir, standInFile)); err == nil {
		return nil
	}
	return compile("../../vddk/testlib/build", dir)
}

// cmdVC acts on the simulated vCenter server: vc COMMAND [ARGS...]. The commands are those of
// vspheretest.Server.Command, whose output "stdout" examines, and:
//
//	vc wait METHOD                wait until the newest fault for METHOD has happened
//	vc image VM N VARIABLE        set a variable to the path of the image of a disk
//	vc moref VM VARIABLE          set a variable to the VM's managed object reference
//	vc renew-certificate VARIABLE set a variable to the new thumbprint
func cmdVC(ts *testscript.TestScript, neg bool, args []string) {
	s := ts.Value(vcenterKey{}).(*simulated).server
	if s == nil {
		ts.Fatalf("vc: no server runs; start one with vcenter")
	}
	if len(args) == 2 && args[0] == "wait" {
		waitFault(ts, s, args[1])
		return
	}
	variable := ""
	if arguments := map[string]int{"image": 2, "moref": 1, "renew-certificate": 0}; len(args) > 0 {
		if n, ok := arguments[args[0]]; ok && len(args) == n+2 {
			args, variable = args[:n+1], args[n+1]
		}
	}
	output, err := s.Command(args...)
	if (err != nil) != neg {
		ts.Fatalf("vc: %v", err)
	}
	if variable != "" {
		ts.Setenv(variable, strings.TrimSpace(output))
	}
	fmt.Fprint(ts.Stdout(), output)
}

// waitFault waits until the newest fault for a method has happened. The script fails if all its
// programs in the background have ended before.
func waitFault(ts *testscript.TestScript, s *vspheretest.Server, method string) {
	rule := s.Rule(method)
	if rule == nil {
		ts.Fatalf("vc wait %s: no fault for it was set with vc fault", method)
	}
	check := time.NewTicker(time.Second)
	defer check.Stop()
	for {
		select {
		case <-rule.Arrived():
			return
		case <-check.C:
			runs := false
			for _, cmd := range ts.BackgroundCmds() {
				runs = runs || syscall.Kill(cmd.Process.Pid, 0) == nil
			}
			if !runs {
				select {
				case <-rule.Arrived():
					return
				default:
				}
				ts.Fatalf("vc wait %s: no program runs in the background that could call it", method)
			}
		}
	}
}
