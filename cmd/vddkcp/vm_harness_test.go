package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vmDiskSize is the size of each disk of the VM of a vmTest.
const vmDiskSize = 1 << 20

// vmPermits limits how many of the tests with a simulated server run at the same time.
var vmPermits = make(chan struct{}, 3)

// vmTest is a simulated server with the VM web01, and a folder to which vddkcp copies the VM.
type vmTest struct {
	*testing.T
	server *vspheretest.Server
	vm     string
	dir    string   // has the folder images, to which the VM is copied
	others []string // names of snapshots of the VM that are not vddkcp's
	random *rand.Rand
	binary string // that start runs; "": chaosBinary
}

// newVM starts a server with the VM web01, which has two disks. Further options change the server
// or add to its inventory. The test runs in parallel with others.
func newVM(t *testing.T, options ...vspheretest.Option) *vmTest {
	t.Helper()
	return newVMs(t, append([]vspheretest.Option{
		vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: vmDiskSize}, {Size: vmDiskSize}}},
	}, options...)...)
}

// newVMs starts a server with the given inventory.
func newVMs(t *testing.T, options ...vspheretest.Option) *vmTest {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("needs gcc")
	}
	t.Parallel()
	vmPermits <- struct{}{}
	t.Cleanup(func() { <-vmPermits })
	if err := installWorker(filepath.Dir(chaosBinary(t))); err != nil {
		t.Fatal(err)
	}
	server := vspheretest.New(t, append(options, vspheretest.WithLibrary())...)
	return &vmTest{T: t, server: server, vm: "web01", dir: t.TempDir(), random: newRandom()}
}

func newRandom() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// login returns the flags that name the server and the login.
func (v *vmTest) login() []string {
	flags := []string{
		"--server", v.server.Host, "--port", strconv.Itoa(int(v.server.Port)), "--user", v.server.User,
		"--thumbprint", v.server.Thumbprint(),
	}
	if v.server.Library == nil {
		return append(flags, "--via", "nfc")
	}
	return append(flags, "--libdir", v.server.Library.Dir)
}

// images returns the folder to which the VM is copied.
func (v *vmTest) images() string { return filepath.Join(v.dir, "images") + "/" }

// target returns the path of the file of a disk.
func (v *vmTest) target(n int) string {
	return filepath.Join(v.dir, "images", fmt.Sprintf("%s-disk%d.raw", v.vm, n))
}

// disks returns the number of disks of the VM.
func (v *vmTest) disks() int { return len(v.server.Files(v.vm)) }

// now returns the present content of the disks.
func (v *vmTest) now() (disks [][]byte) {
	v.Helper()
	for n := range v.disks() {
		disks = append(disks, read(v.T, v.server.Image(v.vm, n+1)))
	}
	return disks
}

// write changes all disks, as the guest does, and returns their content.
func (v *vmTest) write() [][]byte {
	v.Helper()
	for n := range v.disks() {
		block := make([]byte, 4096)
		for i := range block {
			block[i] = byte(v.random.Uint32())
		}
		v.server.Write(v.vm, n+1, block, int64(v.random.IntN(vmDiskSize/len(block)))*int64(len(block)))
	}
	return v.now()
}

// vmProcess is a running vddkcp.
type vmProcess struct {
	*vmTest
	cmd    *exec.Cmd
	args   []string
	stderr bytes.Buffer
	stdout bytes.Buffer
	ended  chan struct{}
	err    error
	stops  string // the folder of VDDKCP_STOP_AT
}

// start starts vddkcp vm for the VM, with further arguments and lines of the environment. It stops
// at the given points.
func (v *vmTest) start(stops, env []string, args ...string) *vmProcess {
	v.Helper()
	return v.startCommand(stops, env, append([]string{"vm", v.vm, v.images(), "--progress", "none"}, args...)...)
}

// startCommand starts a command of vddkcp with the flags of login.
func (v *vmTest) startCommand(stops, env []string, args ...string) *vmProcess {
	v.Helper()
	return v.startLine(stops, env, slices.Concat(args[:1], v.login(), args[1:])...)
}

// startLine starts vddkcp with exactly the given arguments.
func (v *vmTest) startLine(stops, env []string, args ...string) *vmProcess {
	v.Helper()
	dir, err := os.MkdirTemp(v.dir, "stops")
	if err != nil {
		v.Fatal(err)
	}
	for _, point := range stops {
		if err := syscall.Mkfifo(filepath.Join(dir, point), 0o600); err != nil {
			v.Fatal(err)
		}
	}
	p := &vmProcess{vmTest: v, args: args, ended: make(chan struct{}), stops: dir}
	p.cmd = exec.Command(v.program(), p.args...)
	p.cmd.Dir = v.dir
	p.cmd.Env = append(append(os.Environ(),
		"VDDKCP_PASSWORD="+v.server.Password, "VDDKCP_POLL=10ms", "VDDKCP_WATCH=20ms", "VDDKCP_CHECKPOINT_EVERY=1us",
		"VDDKCP_STOP_AT="+dir, "XDG_STATE_HOME="+filepath.Join(v.dir, "state")), env...)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	if err := p.cmd.Start(); err != nil {
		v.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	v.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
	})
	return p
}

// program returns the path of the vddkcp that the test runs.
func (v *vmTest) program() string {
	v.Helper()
	if v.binary != "" {
		return v.binary
	}
	return chaosBinary(v.T)
}

// run runs vddkcp vm for the VM.
func (v *vmTest) run(args ...string) result {
	v.Helper()
	return v.start(nil, nil, args...).wait()
}

// copies runs vddkcp vm, which must succeed.
func (v *vmTest) copies(args ...string) result {
	v.Helper()
	return v.exits(0, v.start(nil, nil, args...))
}

// exits waits for the end of a process and checks its exit status.
func (v *vmTest) exits(want int, p *vmProcess) result {
	v.Helper()
	r := p.wait()
	if r.exit != want {
		v.Fatalf("vddkcp %s: exit status %d, want %d\n%s", strings.Join(p.args, " "), r.exit, want, r.stderr)
	}
	return r
}

// wait waits for the end of the process.
func (p *vmProcess) wait() result {
	p.Helper()
	<-p.ended
	return ended(p.T, p.cmd, p.err, &p.stderr)
}

// at waits until the process has reached a point at which it stops. The process goes on when the
// function is called that at returns.
func (p *vmProcess) at(point string) (release func()) {
	p.Helper()
	path := filepath.Join(p.stops, point)
	opened := make(chan *os.File)
	go func() {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			panic(err)
		}
		opened <- f
	}()
	select {
	case f := <-opened:
		os.Remove(path) // the process does not stop there again
		return func() { f.Close() }
	case <-p.ended:
		if f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil { // wakes the goroutine
			(<-opened).Close()
			f.Close()
		}
		p.Fatalf("vddkcp %s has not come to %s: %v\n%s", strings.Join(p.args, " "), point, p.err, &p.stderr)
		return nil
	}
}

// arrives waits until a fault has happened to a call of the process.
func (p *vmProcess) arrives(rule *vspheretest.Rule) {
	p.Helper()
	select {
	case <-rule.Arrived():
	case <-p.ended:
		select {
		case <-rule.Arrived():
		default:
			p.Fatalf("vddkcp %s has not made the call: %v\n%s", strings.Join(p.args, " "), p.err, &p.stderr)
		}
	}
}

// terminate sends SIGTERM to the process, which must stop at the point "signal", and returns when
// it has noticed the signal.
func (p *vmProcess) terminate() {
	p.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.at("signal")()
}

// kill kills the process, and ends its session as the server does after some time.
func (p *vmProcess) kill() {
	p.Helper()
	p.cmd.Process.Kill()
	p.killed()
}

// killed waits until the process was killed, and ends its session as the server does after some
// time.
func (p *vmProcess) killed() {
	p.Helper()
	<-p.ended
	if status, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		p.Fatalf("vddkcp %s was not killed: %v\n%s", strings.Join(p.args, " "), p.err, &p.stderr)
	}
	p.server.Settle()
	p.server.EndSessions()
}

// ours returns the names of the snapshots that vddkcp has made, and checks that the other snapshots
// of the VM are as they were.
func (v *vmTest) ours() (names []string) {
	v.Helper()
	var others []string
	for _, name := range v.server.SnapshotNames(v.vm) {
		if strings.HasPrefix(name, "vddkcp-") {
			names = append(names, name)
		} else {
			others = append(others, name)
		}
	}
	if !slices.Equal(others, v.others) {
		v.Errorf("the other snapshots are %q, and were %q", others, v.others)
	}
	return names
}

// left checks how many snapshots of vddkcp the VM has, and that no session is open.
func (v *vmTest) left(snapshots int) {
	v.Helper()
	v.server.Settle()
	if names := v.ours(); len(names) != snapshots {
		v.Errorf("the snapshots %q are left, want %d", names, snapshots)
	}
	if snapshots == 0 && v.server.NeedsConsolidation(v.vm) {
		v.Error("the disks of the VM need consolidation")
	}
	if sessions := v.server.Sessions(); len(sessions) > 0 {
		v.Errorf("sessions are left: %v", sessions)
	}
}

// published checks that the copy is complete, that it has the given content, and that nothing is
// left of its making.
func (v *vmTest) published(want [][]byte) {
	v.Helper()
	v.left(0)
	for i, content := range want {
		got, err := os.ReadFile(v.target(i + 1))
		if err != nil {
			v.Error(err)
		} else if !bytes.Equal(got, content) {
			v.Errorf("disk %d differs from its copy", i+1)
		}
	}
	v.onlyFiles(len(want))
	if step, name := v.state(); step != "done" || name != "" {
		v.Errorf("the state is %q with the snapshot %q, want done without a snapshot", step, name)
	}
}

// onlyFiles checks that the folder of the copy has n targets and a state file.
func (v *vmTest) onlyFiles(n int) {
	v.Helper()
	entries, err := os.ReadDir(v.images())
	if err != nil {
		v.Fatal(err)
	}
	for _, e := range entries {
		if name := e.Name(); !strings.HasSuffix(name, ".raw") && !strings.HasSuffix(name, ".vddkcp.json") {
			v.Errorf("%s is left", name)
		}
	}
	if len(entries) != n+1 {
		v.Errorf("%d files, want %d: %v", len(entries), n+1, entries)
	}
}

// named returns how many targets have their final names.
func (v *vmTest) named() (n int) {
	for i := range v.disks() {
		if _, err := os.Lstat(v.target(i + 1)); err == nil {
			n++
		}
	}
	return n
}

// hasFiles reports whether the VM was copied in part.
func (v *vmTest) hasFiles() bool {
	files, err := filepath.Glob(filepath.Join(v.images(), "*.raw*"))
	if err != nil {
		v.Fatal(err)
	}
	return len(files) > 0
}

// state returns what the state file says: how far the copy has come, and its snapshot. Both are ""
// without a state file.
func (v *vmTest) state() (step, snapshot string) {
	v.Helper()
	text, err := os.ReadFile(filepath.Join(v.images(), v.vm+".vddkcp.json"))
	if os.IsNotExist(err) {
		return "", ""
	}
	if err != nil {
		v.Fatal(err)
	}
	var s struct{ State, Snapshot string }
	if err := json.Unmarshal(text, &s); err != nil {
		v.Fatalf("%v\n%s", err, text)
	}
	return s.State, s.Snapshot
}

// report returns the report of a run with --report report.json.
func (v *vmTest) report() machine.Report {
	v.Helper()
	var r machine.Report
	text := read(v.T, filepath.Join(v.dir, "report.json"))
	if err := json.Unmarshal(text, &r); err != nil {
		v.Fatalf("%v\n%s", err, text)
	}
	return r
}

// says checks that a run has printed a text.
func (v *vmTest) says(r result, texts ...string) {
	v.Helper()
	for _, text := range texts {
		if !strings.Contains(r.stderr, text) {
			v.Errorf("the output has no %q:\n%s", text, r.stderr)
		}
	}
}

// eventually waits until a condition holds, while the process runs.
func (p *vmProcess) eventually(what string, condition func() bool) {
	p.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-p.ended:
			if !condition() {
				p.Fatalf("vddkcp %s has ended before %s: %v\n%s", strings.Join(p.args, " "), what, p.err, &p.stderr)
			}
		}
	}
}
