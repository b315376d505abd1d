package main

import (
	"bytes"
	endian "encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// vmGuest is a VM that writes to its two disks all the time. Write number i goes to disk 1 before it goes
// to disk 2, so the two disks show whether they are of one instant.
type vmGuest struct {
	v      *vmTest
	base   [][]byte // content before the first write
	random [32]byte

	mu     sync.Mutex
	writes int // done so far
}

const vmGuestBlock = 4096

// block returns what write number i writes, and where.
func (g *vmGuest) block(i int) (p []byte, off int64) {
	seed := g.random
	endian.LittleEndian.PutUint64(seed[8:], uint64(i))
	p = make([]byte, vmGuestBlock)
	rand.NewChaCha8(seed).Read(p)
	endian.LittleEndian.PutUint64(p, uint64(i))
	return p, int64(endian.LittleEndian.Uint64(p[8:])%(vmDiskSize/vmGuestBlock)) * vmGuestBlock
}

// run writes until stop is closed.
func (g *vmGuest) run(stop <-chan struct{}) {
	pace := time.NewTicker(3 * time.Millisecond)
	defer pace.Stop()
	for {
		select {
		case <-stop:
			return
		case <-pace.C:
		}
		i := g.now() + 1
		p, off := g.block(i)
		g.v.server.Write(g.v.vm, 1, p, off)
		g.v.server.Write(g.v.vm, 2, p, off)
		g.mu.Lock()
		g.writes = i
		g.mu.Unlock()
	}
}

// now returns how many writes are done.
func (g *vmGuest) now() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.writes
}

// last returns the number of the last write that a copied disk has. It fails the test if the disk is
// not as it was after this write.
func (g *vmGuest) last(disk int, copied []byte) (last int) {
	g.v.Helper()
	writes := g.now()
	for at := 0; at < len(copied); at += vmGuestBlock {
		if i := int(endian.LittleEndian.Uint64(copied[at:])); i > last && i <= writes {
			if p, off := g.block(i); int(off) == at && bytes.Equal(p, copied[at:at+vmGuestBlock]) {
				last = i
			}
		}
	}
	want := bytes.Clone(g.base[disk])
	for i := 1; i <= last; i++ {
		p, off := g.block(i)
		copy(want[off:], p)
	}
	if !bytes.Equal(copied, want) {
		g.v.Errorf("disk %d of the copy is not as it was after write %d", disk+1, last)
	}
	return last
}

// chaosFaults are faults of the server that pass.
var chaosFaults = []vspheretest.Fault{
	{Cut: vspheretest.Before}, {Cut: vspheretest.After}, {Truncate: true}, {Status: 503}, {Status: 502},
	{Soap: &types.SystemError{}}, {Soap: &types.NotAuthenticated{}}, {Soap: &types.HostCommunication{}}, {Soap: &types.TaskInProgress{}},
	{Task: &types.SystemError{}}, {Task: &types.TaskInProgress{}}, {Task: &types.HostNotConnected{}}, {HangTask: true}, {Late: true}, {Hang: true},
}

// disturb makes calls to the server fail, and changes the server, until stop is closed.
func (v *vmTest) disturb(r *rand.Rand, p *vmProcess, stop <-chan struct{}) {
	methods := []string{"RetrievePropertiesEx", "CreateSnapshot_Task", "RemoveSnapshot_Task", "Login", "Logout", "CreateContainerView", "HasPrivilegeOnEntities", ""}
	for range r.IntN(3) {
		f := chaosFaults[r.IntN(len(chaosFaults))]
		f.Skip, f.Times = r.IntN(12), 1+r.IntN(2)
		v.server.On(methods[r.IntN(len(methods))], f)
	}
	events := []func(){
		v.server.CutConnections, v.server.Restart, p.loseConnection,
		func() { v.server.MoveHost(v.vm, []string{"esx1.test", "esx2.test"}[r.IntN(2)]) },
		func() { v.server.MoveDatastore(v.vm, []string{"ds1", "ds2"}[r.IntN(2)]) },
		func() { v.server.KeepFiles(v.vm) },
	}
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(50+r.IntN(400)) * time.Millisecond):
		}
		v.server.ClearFaults() // releases what hangs
		if r.IntN(2) == 0 {
			events[r.IntN(len(events))]()
		}
	}
}

// TestChaosOfVMs copies a VM again and again while its guest writes, and while the server fails at
// random. The copies are killed at random moments and continued. Each copy must have the disks of one
// instant, and nothing may be left on the server.
func TestChaosOfVMs(t *testing.T) {
	runs := needChaos(t)
	if runs == chaosRuns {
		runs = 6 // each copy takes many runs; make chaos asks for more
	}
	peer.Need(t, "qemu-img")
	govc := testTool(t, "govc")
	for first := range 3 {
		t.Run(fmt.Sprint(first), func(t *testing.T) {
			v := newVM(t, vspheretest.Datastore{Name: "ds2"})
			v.server.AddSnapshot("web01", "of the user", "")
			v.others = []string{"of the user"}
			g := &vmGuest{v: v, base: v.now(), random: [32]byte{byte(first)}}
			stop := make(chan struct{})
			var writing sync.WaitGroup
			writing.Go(func() { g.run(stop) })
			defer writing.Wait()
			defer close(stop)
			exits := map[int]int{}
			for run := first; run < runs && !t.Failed(); run += 3 {
				v.chaosRun(g, run, exits)
				if run+3 < runs && run%10 > 2 {
					continue
				}
				tree := govcOf(t, v, govc, "snapshot.tree", "-vm", "web01")
				if strings.Join(strings.Fields(tree), " ") != "of the user ." {
					t.Errorf("govc snapshot.tree shows:\n%s", tree)
				}
				if sessions := govcOf(t, v, govc, "session.ls"); strings.Count(strings.TrimSpace(sessions), "\n") != 1 || !strings.Contains(sessions, "govc") {
					t.Errorf("govc session.ls shows other sessions than its own:\n%s", sessions)
				}
				v.server.EndSessions()
			}
			t.Logf("exit statuses: %v", exits)
		})
	}
}

// chaosRun makes one copy, however often it is killed.
func (v *vmTest) chaosRun(g *vmGuest, run int, exits map[int]int) {
	v.Helper()
	r := rand.New(rand.NewPCG(uint64(run), 3))
	format := []string{"raw", "qcow2"}[run%2]
	if err := os.RemoveAll(v.images()); err != nil {
		v.Fatal(err)
	}
	from := g.now()
	resume := false
	var history []string
	for attempt := 0; ; attempt++ {
		args := []string{"--format", format, "--rate-limit", "1MiB", "--request-size", "64KiB", "--retry-timeout", "20s", "--timeout", "5s", "--task-timeout", "1m",
			"--parallel", fmt.Sprint(1 + r.IntN(2))}
		switch {
		case attempt > 0 && (resume || r.IntN(3) > 0):
			args = append(args, "--resume")
		case attempt > 0 && r.IntN(2) == 0:
			args = append(args, "--force")
		}
		if r.IntN(3) == 0 {
			args = append(args, "--keep-snapshot")
		}
		status, output := v.chaosAttempt(r, attempt < 5, args)
		exits[status]++
		history = append(history, fmt.Sprintf("%s: exit status %d\n%s", strings.Join(args, " "), status, output))
		resume = strings.Contains(output, "already exists")
		if strings.Contains(output, "goroutine ") || status == 2 || !slices.Contains([]int{-1, 0, 1, 5, 75, 130, 143}, status) {
			v.Fatalf("run %d: exit status %d\n%s", run, status, strings.Join(history, "\n"))
		}
		if status == 5 {
			r := v.exits(0, v.start(nil, nil, "--format", format, "--resume"))
			history = append(history, r.stderr)
			status = 0
		}
		if status == 0 {
			break
		}
		if attempt > 20 {
			v.Fatalf("run %d does not come to an end:\n%s", run, strings.Join(history, "\n"))
		}
	}
	v.left(0)
	var copied [2][]byte
	for n := range copied {
		path := strings.TrimSuffix(v.target(n+1), "raw") + format
		if format == "qcow2" {
			raw := filepath.Join(v.dir, "copied.raw")
			peer.Run(v.T, "qemu-img", "convert", "-O", "raw", path, raw)
			path = raw
		}
		copied[n] = read(v.T, path)
	}
	if one, two := g.last(0, copied[0]), g.last(1, copied[1]); one-two < 0 || one-two > 1 || one < from-1 {
		v.Errorf("the disks of the copy are as they were after the writes %d and %d, want an instant after write %d", one, two, from)
	}
	if v.Failed() {
		v.Logf("run %d:\n%s", run, strings.Join(history, "\n"))
	}
}

// chaosAttempt runs vddkcp vm once. If hostile is true, the server fails at random, and vddkcp may be
// killed or interrupted.
func (v *vmTest) chaosAttempt(r *rand.Rand, hostile bool, args []string) (status int, output string) {
	v.Helper()
	p := v.start(nil, nil, args...)
	if !hostile {
		status := p.wait()
		return status.exit, status.stderr
	}
	stop := make(chan struct{})
	var disturbing sync.WaitGroup
	others := rand.New(rand.NewPCG(r.Uint64(), 4))
	disturbing.Go(func() { v.disturb(others, p, stop) })
	killed := false
	select {
	case <-p.ended:
	case <-time.After(time.Duration(r.IntN(1000)) * time.Millisecond):
		switch r.IntN(4) {
		case 0, 1:
			p.cmd.Process.Kill()
			killed = true
		case 2:
			p.cmd.Process.Signal(syscall.SIGTERM)
		case 3:
			p.cmd.Process.Signal(syscall.SIGTERM)
			select {
			case <-p.ended:
			case <-time.After(time.Duration(r.IntN(300)) * time.Millisecond):
				p.cmd.Process.Signal(syscall.SIGINT)
				killed = true
			}
		}
	}
	<-p.ended
	close(stop)
	disturbing.Wait()
	v.server.ClearFaults()
	v.server.Settle()
	if killed || len(v.server.Sessions()) > 0 { // a login or logout whose answer was lost
		v.server.EndSessions()
	}
	end := p.wait()
	return end.exit, end.stderr
}

// govcOf runs govc against the server of a test and returns its output.
func govcOf(t *testing.T, v *vmTest, govc string, args ...string) string {
	t.Helper()
	c := exec.Command(govc, args...)
	c.Env = append(os.Environ(), "GOVC_URL="+v.server.URL.String(), "GOVC_INSECURE=1")
	out, err := c.CombinedOutput()
	if err != nil {
		t.Fatalf("govc %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}
