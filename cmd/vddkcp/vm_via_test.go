package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// newNFC starts a server with the VM web01, which has two disks, without a VDDK library. The flags of
// login have --via nfc.
func newNFC(t *testing.T, options ...vspheretest.Option) *vmTest {
	t.Helper()
	t.Parallel()
	vmPermits <- struct{}{}
	t.Cleanup(func() { <-vmPermits })
	server := vspheretest.New(t, append([]vspheretest.Option{
		vspheretest.WithNFC(), vspheretest.Datastore{Name: "ds2"},
		vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: vmDiskSize}, {Size: vmDiskSize}}},
	}, options...)...)
	v := &vmTest{T: t, server: server, vm: "web01", dir: t.TempDir(), random: newRandom()}
	if err := os.Mkdir(v.images(), 0o755); err != nil {
		t.Fatal(err)
	}
	return v
}

// moref returns the value of --vm for the VM.
func (v *vmTest) moref() string { return "moref=" + v.server.Find(v.vm).Value }

// path returns the path of a file in the folder of the test.
func (v *vmTest) path(name string) string { return filepath.Join(v.dir, name) }

// runs runs a command of vddkcp, and checks its exit status.
func (v *vmTest) runs(want int, args ...string) *vmProcess {
	v.Helper()
	p := v.startCommand(nil, nil, args...)
	v.exits(want, p)
	return p
}

// holds checks the content of a file.
func (v *vmTest) holds(name string, want []byte) {
	v.Helper()
	if got := read(v.T, v.path(name)); !bytes.Equal(got, want) {
		v.Errorf("%s does not have the content of the disk", name)
	}
}

// reportOf returns the report of a copy.
func (v *vmTest) reportOf(name string) (r report.Report) {
	v.Helper()
	if err := json.Unmarshal(read(v.T, v.path(name)), &r); err != nil {
		v.Fatal(err)
	}
	return r
}

// session matches the secret of a ticket that package nfctest gives.
var session = regexp.MustCompile(`[0-9a-f]{52}`)

// ticketIn returns the secret of a ticket in a text, or "". A text may also have the bytes of messages
// in hexadecimal digits, most of which are zeros.
func ticketIn(text string) string {
	for _, found := range session.FindAllString(text, -1) {
		if !strings.Contains(found, "00000000") {
			return found
		}
	}
	return ""
}

// TestVMViaNFC copies all disks of a VM that runs, without a library.
func TestVMViaNFC(t *testing.T) {
	for _, transport := range []string{"nfcssl", "nfc"} {
		t.Run(transport, func(t *testing.T) {
			v := newNFC(t)
			then := v.now()
			args := []string{"--report", "report.json", "--nfc-trace", "trace", "-v"}
			if transport == "nfc" {
				args = append(args, "--transports", "nbd:nbdssl")
			}
			if transport == "nfc" { // a trace replaces a file that everybody can read
				if err := errors.Join(os.WriteFile(v.path("trace"), []byte("old trace"), 0o600), os.Chmod(v.path("trace"), 0o666)); err != nil {
					t.Fatal(err)
				}
			}
			r := v.copies(args...)
			v.published(then)
			if n := strings.Count(r.stderr, "via nfc: asked for (--via)\n"); n != 1 {
				t.Errorf("%d lines about the way, want 1\n%s", n, r.stderr)
			}
			if warned := strings.Contains(r.stderr, "warning: --transports nbd: "); warned != (transport == "nfc") {
				t.Errorf("a warning about encryption: %t", warned)
			}
			report := v.report()
			if report.Via != "nfc" || report.Reason != "asked for (--via)" || report.NFCQuirks != "" {
				t.Errorf("%+v", report.Way)
			}
			for _, d := range report.Rounds[0].Disks {
				if d.Way != report.Way || d.Transport != transport || d.Connections != 1 {
					t.Errorf("%+v", d)
				}
			}
			trace := read(t, v.path("trace"))
			if info, err := os.Stat(v.path("trace")); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%v, %v", info.Mode(), err)
			}
			if !bytes.Contains(trace, []byte("SESSION ***")) || bytes.Contains(trace, []byte("old trace")) {
				t.Errorf("the trace has no session:\n%.2000s", trace)
			}
			for what, text := range map[string]string{"trace": string(trace), "output": r.stderr, "report": string(read(t, v.path("report.json")))} {
				if ticket := ticketIn(text); ticket != "" || strings.Contains(text, v.server.Password) {
					t.Errorf("the %s has a secret: %q", what, ticket)
				}
			}
		})
	}
}

// TestVMViaNFCQuirks checks that VDDKCP_NFC is read only with NFC, and that the user sees it.
func TestVMViaNFCQuirks(t *testing.T) {
	v := newNFC(t)
	then := v.now()
	quirks := []string{"VDDKCP_NFC=token=plaintext,maxread=64KiB"}
	r := v.exits(0, v.startCommand(nil, quirks, "copy", "vm:web01#1", "q.raw", "--report", "q.json"))
	v.holds("q.raw", then[0])
	v.says(r, "warning: VDDKCP_NFC changes the protocol: token=plaintext,maxread=64KiB")
	if report := v.reportOf("q.json"); report.NFCQuirks != "token=plaintext,maxread=64KiB" || len(report.Warnings) == 0 {
		t.Errorf("%+v", report)
	}
	r = v.exits(2, v.startCommand(nil, []string{"VDDKCP_NFC=speed=high"}, "copy", "vm:web01#1", "r.raw"))
	v.says(r, `VDDKCP_NFC: "speed=high": want KEY=VALUE`)
	v.left(0)
}

// TestVMViaNFCCommands reads a disk of a VM with each command.
func TestVMViaNFCCommands(t *testing.T) {
	v := newNFC(t)
	then, image := v.now(), v.server.Image("web01", 1)
	v.runs(0, "copy", "vm:web01#1", "1.qcow2", "--verify", "--digest=sha256", "--compression", "zlib", "--depth", "2", "--request-size", "4KiB")
	v.runs(0, "verify", "vm:web01#1", "1.qcow2")
	v.runs(0, "verify", "1.qcow2", "vm:web01#1", "--compression", "none", "--nfc-buffers", "64KiBx2")
	v.runs(3, "verify", "vm:web01#2", image)
	p := v.runs(0, "map", "vm:web01#1", "--json")
	if text := p.stdout.String(); text != fmt.Sprintf(`[{ "start": 0, "length": %d, "depth": 0, "present": true, "zero": false, "data": true}]`+"\n", vmDiskSize) {
		t.Error(text)
	}
	v.runs(0, "export", "vm:web01#1", "--run", fmt.Sprintf("%s verify $uri %s", chaosBinary(t), image))
	if _, err := exec.LookPath("qemu-img"); err == nil {
		v.runs(0, "export", "vm:web01#1", "--run", "qemu-img compare -f raw -F raw $uri "+image)
		v.runs(0, "export", "vm:web01#2", "--cow", "--run", "qemu-io -f raw -c 'write -P 7 0 64k' $uri")
	}
	p = v.runs(0, "check", "web01", "--read") // that the name of the host cannot be resolved is a warning
	if text := p.stdout.String(); !strings.Contains(text, "read             ok       disk 2 (Hard disk 2) can be read") || strings.Contains(text, "library") {
		t.Error(text)
	}
	v.left(0)
	if !bytes.Equal(v.now()[0], then[0]) {
		t.Error("the disk has changed")
	}
}

// TestVMViaNFCInfo checks what info says about the ways in which a disk on a server can be read.
func TestVMViaNFCInfo(t *testing.T) {
	v := newNFC(t)
	v.server.PowerOff("web01")
	for _, address := range []string{"vm:web01#1", v.server.Files("web01")[0]} {
		args := []string{"info", address}
		if !strings.HasPrefix(address, "vm:") {
			args = append(args, "--vm", v.moref())
		}
		text := v.runs(0, args...).stdout.String()
		for _, want := range []string{"\nvia vddk:         not available: no VDDK library found", "\nvia nfc:          available, asked for (--via): experimental\n"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q:\n%s", address, want, text)
			}
		}
		var info imageInfo
		if err := json.Unmarshal(v.runs(0, append(args, "--json")...).stdout.Bytes(), &info); err != nil {
			t.Fatal(err)
		}
		if len(info.Ways) != 2 || info.Ways[0].Available || !info.Ways[1].Available || info.Ways[1].Chosen == "" || info.VirtualSize != vmDiskSize || info.Allocated != unknownSize {
			t.Errorf("%s: %+v", address, info)
		}
	}
}

// TestVMViaNFCFiles reads disks that are named by their files.
func TestVMViaNFCFiles(t *testing.T) {
	v := newNFC(t)
	frozen := v.now()
	file := v.server.Files("web01")[1]
	snapshot := v.server.AddSnapshot("web01", "twice", "").Value
	v.server.AddSnapshot("web01", "twice", "") // names of snapshots need not be unique
	later := v.write()
	of := func(args ...string) []string { return append(args, "--vm", v.moref()) }

	v.runs(0, of("copy", file, "frozen.raw", "--snapshot", snapshot, "--report", "r.json")...)
	v.holds("frozen.raw", frozen[1])
	r := v.reportOf("r.json")
	if r.Via != "nfc" || r.Transport != "nfcssl" {
		t.Errorf("%+v", r)
	}
	v.runs(0, of("copy", v.server.Files("web01")[1], "same.raw", "--snapshot", snapshot)...)
	v.holds("same.raw", frozen[1])

	p := v.startCommand(nil, nil, of("copy", v.server.Files("web01")[1], "running.raw")...)
	v.says(v.exits(1, p), "hint: the VM is not powered off: name a snapshot with --snapshot, or read vm:web01#2, for which vddkcp makes one")
	p = v.startCommand(nil, nil, of("copy", "[ds1] other/other.vmdk", "other.raw")...)
	v.says(v.exits(1, p), "no disk of the VM web01 has the file [ds1] other/other.vmdk\n", "hint: the files of the disks are: ")
	p = v.startCommand(nil, nil, of("copy", "[ds1] other/other.vmdk", "other.raw", "--snapshot", snapshot)...)
	v.says(v.exits(1, p), "no disk of the snapshot twice of the VM web01")
	p = v.startCommand(nil, nil, of("copy", file, "other.raw", "--snapshot", "snapshot-99")...)
	v.says(v.exits(1, p), "the snapshot is gone")

	v.server.PowerOff("web01")
	v.runs(0, of("copy", v.server.Files("web01")[1], "off.raw")...)
	v.holds("off.raw", later[1])
	v.runs(0, of("export", v.server.Files("web01")[0], "--run", fmt.Sprintf("%s verify $uri %s", chaosBinary(t), v.server.Image("web01", 1)))...)
	v.runs(0, of("export", "--export-pattern", "[ds1] *", "--run", fmt.Sprintf("%s info \"nbd+unix:///$(echo '%s' | sed 's| |%%20|g')?socket=$unixsocket\"", chaosBinary(t), v.server.Files("web01")[0]))...)
	if n := v.server.NFC("").Stats().Open; n != 0 {
		t.Errorf("%d connections are open", n)
	}
}

// TestVMViaNFCMoves moves a VM to another datastore, and to another host, in the middle of a copy, and
// cuts the connections of the host.
func TestVMViaNFCMoves(t *testing.T) {
	for _, source := range []string{"vm", "file", "host"} {
		t.Run(source, func(t *testing.T) {
			v := newNFC(t)
			then := v.now()
			args := []string{"copy", "vm:web01#2", "moved.raw"}
			if source == "file" {
				args = []string{"copy", v.server.Files("web01")[1], "moved.raw", "--vm", v.moref(), "--snapshot", v.server.AddSnapshot("web01", "user", "").Value}
				v.others = []string{"user"}
			}
			p := v.startCommand([]string{"checkpoint:1"}, nil, append(args, "--report", "r.json", "--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB")...)
			release := p.at("checkpoint:1")
			v.server.MoveDatastore("web01", "ds2")
			if source == "host" {
				v.server.MoveHost("web01", "esx2.test")
			}
			v.server.NFC("esx1.test").Cut()
			release()
			v.exits(0, p)
			if n := v.server.NFC("esx2.test").Stats().Tickets; n > 0 != (source == "host") {
				t.Errorf("%d tickets for the other host", n)
			}
			v.holds("moved.raw", then[1])
			if r := v.reportOf("r.json"); r.Retries == 0 {
				t.Errorf("%+v", r)
			}
			v.left(0)
		})
	}
}

// TestVMViaNFCLosesSnapshot removes the snapshot in the middle of a copy whose connection is lost.
func TestVMViaNFCLosesSnapshot(t *testing.T) {
	v := newNFC(t)
	p := v.startCommand([]string{"checkpoint:1"}, nil, "copy", "vm:web01#2", "lost.raw", "--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB")
	release := p.at("checkpoint:1")
	v.server.RemoveSnapshotBehindBack("web01", "")
	v.server.NFC("").Cut()
	release()
	v.says(v.exits(1, p), "the snapshot is gone")
	if _, err := os.Stat(v.path("lost.raw")); err == nil {
		t.Error("a file has the name of the target")
	}
	v.left(0)
}

// TestVMViaNFCResumes kills a copy and continues it.
func TestVMViaNFCResumes(t *testing.T) {
	slow := []string{"--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB"}
	t.Run("vm", func(t *testing.T) {
		v := newNFC(t)
		then := v.now()
		p := v.start([]string{"checkpoint:2"}, nil, append(slow, "--parallel", "1")...)
		p.at("checkpoint:2")
		p.kill()
		v.write()
		v.copies("--resume")
		v.published(then)
	})
	t.Run("file", func(t *testing.T) {
		v := newNFC(t)
		then := v.now()
		v.others = []string{"user"}
		args := []string{"copy", v.server.Files("web01")[0], "file.raw", "--vm", v.moref(), "--snapshot", v.server.AddSnapshot("web01", "user", "").Value}
		for range 2 {
			p := v.startCommand([]string{"checkpoint:2"}, nil, append(append(args, slow...), "--resume")...)
			p.at("checkpoint:2")
			p.kill()
		}
		v.write()
		v.server.MoveDatastore("web01", "ds2")
		p := v.startCommand(nil, nil, append(args, "--resume")...)
		v.says(v.exits(75, p), "no disk of the snapshot user of the VM web01 has the file")
		args[1] = v.server.Files("web01")[0]
		v.runs(0, append(args, "--resume", "--report", "r.json")...)
		v.holds("file.raw", then[0])
		if r := v.reportOf("r.json"); r.ResumedFrom == 0 || r.ResumeProof != "snapshot" {
			t.Errorf("%+v", r)
		}
		v.left(0)
	})
	t.Run("snapshot removed", func(t *testing.T) {
		v := newNFC(t)
		args := []string{"copy", v.server.Files("web01")[0], "file.raw", "--vm", v.moref(), "--snapshot", v.server.AddSnapshot("web01", "user", "").Value}
		p := v.startCommand([]string{"checkpoint:2"}, nil, append(args, slow...)...)
		p.at("checkpoint:2")
		p.kill()
		v.server.RemoveSnapshotBehindBack("web01", "user")
		p = v.startCommand(nil, nil, append(args, "--resume")...)
		v.says(v.exits(2, p), "the snapshot is gone")
	})
}

// TestVMViaBoth continues copies in the other way than that in which they began.
func TestVMViaBoth(t *testing.T) {
	vmStates(t)
	for _, first := range []string{"vddk", "nfc"} {
		t.Run(first, func(t *testing.T) {
			v := newVM(t)
			then := v.now()
			second := map[string]string{"vddk": "nfc", "nfc": "vddk"}[first]
			start := func(via string, stops []string, args ...string) *vmProcess {
				login := slices.DeleteFunc(v.login(), func(s string) bool { return s == "--libdir" || s == v.server.Library.Dir })
				env := []string{"VDDKCP_LIBDIR=" + v.server.Library.Dir, "VDDKCP_VIA=" + via}
				return v.startLine(stops, env, append(append(args, login...), "--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB")...)
			}
			vm := []string{"vm", "web01", v.images(), "--parallel", "1", "--resume"}
			p := start(first, []string{"checkpoint:2"}, vm...)
			p.at("checkpoint:2")
			p.kill()
			v.write()
			v.exits(0, start(second, nil, append(vm, "--report", "report.json")...))
			v.published(then)
			if r := v.report(); r.Via != second || r.Rounds[0].Disks[0].ResumedFrom == 0 {
				t.Errorf("%+v, %+v", r.Way, r.Rounds[0].Disks[0])
			}

			v.others = []string{"user"}
			file := []string{"copy", v.server.Files("web01")[0], "file.raw", "--vm", v.moref(), "--snapshot", v.server.AddSnapshot("web01", "user", "").Value, "--resume"}
			p = start(first, []string{"checkpoint:2"}, file...)
			p.at("checkpoint:2")
			p.kill()
			v.exits(2, start(second, nil, file...))
			v.exits(0, start(first, nil, file...))
			v.left(0)
		})
	}
}

// TestVMViaNFCBatch runs a job file whose jobs share a session, a snapshot and the host's memory.
func TestVMViaNFCBatch(t *testing.T) {
	v := newNFC(t, vspheretest.VM{Name: "db01", Disks: []vspheretest.Disk{{Size: vmDiskSize}}})
	v.server.PowerOff("db01")
	then := v.now()
	p := v.runs(0, "jobs", "web01", "--target", v.images())
	jobs := p.stdout.String()
	if !strings.Contains(jobs, `"via": "nfc"`) {
		t.Error(jobs)
	}
	file := v.server.Files("db01")[0]
	jobs = strings.Replace(jobs, `"jobs": [`, fmt.Sprintf(`"jobs": [{"name": "db01", "source": %q, "target": %q, "vm": "moref=%s"}, {"name": "local", "source": %q, "target": %q},`,
		file, v.path("db01.raw"), v.server.Find("db01").Value, v.server.Image("db01", 1), v.path("local.raw")), 1)
	if err := os.WriteFile(v.path("jobs.json"), []byte(jobs), 0o600); err != nil {
		t.Fatal(err)
	}
	before := v.server.Calls()
	r := v.exits(0, v.startLine(nil, nil, "run", v.path("jobs.json"), "--progress", "none", "--report", "batch.json"))
	for i := range then {
		v.holds(fmt.Sprintf("images/web01-disk%d.raw", i+1), then[i])
	}
	v.holds("db01.raw", read(t, v.server.Image("db01", 1)))
	calls := v.server.Calls()
	if logins := calls["Login"] - before["Login"]; logins != 1 {
		t.Errorf("%d logins, want 1", logins)
	}
	if n := strings.Count(r.stderr, "via nfc: asked for (the field via of the job)"); n != 1 {
		t.Errorf("%d lines about the way, want 1\n%s", n, r.stderr)
	}
	var batch struct {
		Jobs []struct {
			Name string
			report.Way
		}
	}
	if err := json.Unmarshal(read(t, v.path("batch.json")), &batch); err != nil || len(batch.Jobs) != 4 {
		t.Fatalf("%v, %+v", err, batch)
	}
	for _, job := range batch.Jobs {
		if want := map[bool]string{true: "", false: "nfc"}[job.Name == "local"]; job.Via != want {
			t.Errorf("%s: %+v", job.Name, job.Way)
		}
	}
	if err := os.Remove(v.target(1)); err != nil {
		t.Fatal(err)
	}
	v.exits(0, v.startLine(nil, nil, "run", v.path("jobs.json"), "--progress", "none", "--check", "--only", "web01-disk1"))
	v.left(0)
}

// TestVMViaNFCExportLost cuts the connection of an export again and again.
func TestVMViaNFCExportLost(t *testing.T) {
	v := newNFC(t)
	cuts := v.server.NFC("").On(nfctest.Fault{Step: nfctest.StepRead, Skip: 3, Times: 2, Kind: nfctest.Reset})
	v.runs(0, "export", "vm:web01#1", "--request-size", "64KiB", "--run", fmt.Sprintf("%s verify $uri %s", chaosBinary(t), v.server.Image("web01", 1)))
	if cuts.Hits() == 0 {
		t.Error("no connection was cut")
	}
	v.left(0)
}
