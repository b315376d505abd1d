package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// upgradeFiles is the folder with the files that version 1 of vddkcp has written.
// testdata/upgrade/README.md says how they were made.
const upgradeFiles = "testdata/upgrade/1"

// upgradeCopy is a copy that is interrupted by one version of vddkcp and continued by another one.
// The names of its files are relative to a folder of its own.
type upgradeCopy struct {
	name    string
	args    []string // of both runs
	target  string
	journal string // of the interrupted copy
	point   string // at which the first run is killed
	keep    bool   // the unfinished target is one of the committed files
	// prepare writes the source and other files that exist before the copy.
	prepare func(t *testing.T, dir string)
}

// upgradeCopies are the copies whose journals are committed.
var upgradeCopies = []upgradeCopy{
	{
		name: "raw", args: []string{"--digest", "src.raw", "dst.raw"}, target: "dst.raw",
		journal: "dst.raw.partial.journal", point: "slot written:4", prepare: upgradeSource,
	},
	{
		name: "qcow2", args: []string{"--compress", "zstd", "--digest=sha256", "--journal", "elsewhere.journal", "src.raw", "dst.qcow2"},
		target: "dst.qcow2", journal: "elsewhere.journal", point: "slot written:4", keep: true, prepare: upgradePatterns,
	},
	{
		name: "overlay", args: []string{"--backing", "base.raw", "--backing-format", "raw", "src.raw", "dst.qcow2"},
		target: "dst.qcow2", journal: "dst.qcow2.partial.journal", point: "slot written:4", keep: true,
		prepare: func(t *testing.T, dir string) {
			upgradePatterns(t, dir)
			base := read(t, filepath.Join(dir, "src.raw"))
			clear(base[64<<10 : 1<<20])
			put(t, filepath.Join(dir, "base.raw"), string(base))
		},
	},
}

const upgradeSize = 2 << 20

// upgradeSource writes a disk of random data with a hole.
func upgradeSource(t *testing.T, dir string) {
	disk := content(t, filepath.Join(dir, "src.raw"), 26, upgradeSize)
	clear(disk[1<<20 : 1<<20+300<<10])
	put(t, filepath.Join(dir, "src.raw"), string(disk))
}

// upgradePatterns writes a disk of data that can be compressed well.
func upgradePatterns(t *testing.T, dir string) {
	disk := make([]byte, upgradeSize)
	for i := range disk {
		disk[i] = byte(i>>12) | 1
	}
	put(t, filepath.Join(dir, "src.raw"), string(disk))
}

// upgradeJobs are the jobs of a batch that was interrupted. The source of the second one is
// missing.
const upgradeJobs = `{"version": 1, "limits": {"total": 4}, "jobs": [
  {"name": "done", "source": "DIR/src/done.raw", "target": "DIR/out/done.raw", "labels": {"disk": "1"}},
  {"name": "failed", "source": "DIR/src/failed.raw", "target": "DIR/out/failed.raw"},
  {"name": "interrupted", "source": "DIR/src/interrupted.raw", "target": "DIR/out/interrupted.raw", "request_size": "64KiB", "rate_limit": "256KiB", "digest": "blksum"},
  {"name": "running", "source": "DIR/src/running.raw", "target": "DIR/out/running.qcow2", "request_size": "64KiB", "rate_limit": "256KiB"}
]}
`

// upgradeFolder is the folder DIR of the committed state file.
const upgradeFolder = "/tmp/vddkcp-upgrade"

// prepareUpgradeBatch writes the job file and the sources of a batch.
func prepareUpgradeBatch(t *testing.T, dir string) {
	put(t, filepath.Join(dir, "jobs.json"), strings.ReplaceAll(upgradeJobs, "DIR", dir))
	for _, folder := range []string{"src", "out"} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	content(t, filepath.Join(dir, "src/done.raw"), 40, 1<<20)
	content(t, filepath.Join(dir, "src/interrupted.raw"), 41, upgradeSize)
	upgradePatterns(t, filepath.Join(dir, "src"))
	if err := os.Rename(filepath.Join(dir, "src/src.raw"), filepath.Join(dir, "src/running.raw")); err != nil {
		t.Fatal(err)
	}
}

// maker makes the committed files with an old binary.
type maker struct {
	*testing.T
	binary string // of vddkcp, built with the tag killpoints
	to     string
}

// TestMakeUpgradeFiles makes the committed files of a version. It is skipped unless the environment
// variable TEST_UPGRADE_BINARY has the path of a vddkcp of that version, which was built with the
// tag killpoints, and TEST_UPGRADE_FILES the folder for the files.
func TestMakeUpgradeFiles(t *testing.T) {
	m := maker{t, os.Getenv("TEST_UPGRADE_BINARY"), os.Getenv("TEST_UPGRADE_FILES")}
	if m.binary == "" || m.to == "" {
		t.Skip("needs TEST_UPGRADE_BINARY and TEST_UPGRADE_FILES")
	}
	for _, c := range upgradeCopies {
		m.copy(&c)
	}
	m.nbd()
	m.batch()
	m.cow()
	m.reports()
	m.machine("vm", "slot written:4")
	m.machine("vm-held", "machine-whole:2")
}

// run runs the old binary in a folder. If the variable VDDKCP_KILL_AT is among the environment, the
// process must be killed, and otherwise it must end with the given status.
func (m *maker) run(dir string, status int, env []string, args ...string) {
	m.Helper()
	cmd := exec.Command(m.binary, args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "VDDKCP_CHECKPOINT_EVERY=1us", "XDG_STATE_HOME="+filepath.Join(dir, "state"), "PATH="+filepath.Dir(m.binary)+":"+os.Getenv("PATH")), env...)
	out, err := cmd.CombinedOutput()
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	killed := strings.HasPrefix(strings.Join(env, " "), "VDDKCP_KILL_AT=")
	if killed != ws.Signaled() || !killed && ws.ExitStatus() != status {
		m.Fatalf("vddkcp %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// save stores a file. Binary files are compressed.
func (m *maker) save(path, name string) {
	m.Helper()
	text := read(m.T, path)
	if bytes.IndexByte(text, 0) >= 0 {
		var packed bytes.Buffer
		z, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if _, err := z.Write(text); err != nil {
			m.Fatal(err)
		}
		if err := z.Close(); err != nil {
			m.Fatal(err)
		}
		text, name = packed.Bytes(), name+".gz"
	}
	put(m.T, filepath.Join(m.to, name), string(text))
}

func (m *maker) copy(c *upgradeCopy) {
	dir := m.TempDir()
	c.prepare(m.T, dir)
	m.run(dir, 0, []string{"VDDKCP_KILL_AT=" + c.point}, append([]string{"copy", "--progress", "none", "--request-size", "64KiB", "--rate-limit", "4MiB"}, c.args...)...)
	m.save(filepath.Join(dir, c.journal), c.name+"/"+c.journal)
	if c.keep {
		m.save(filepath.Join(dir, c.target+".partial"), c.name+"/"+c.target+".partial")
	}
}

// upgradeURI is the NBD target of a copy. Its socket is relative to the folder of the copy.
const upgradeURI = "nbd+unix:///?socket=nbd.sock"

func (m *maker) nbd() {
	dir := m.TempDir()
	upgradeSource(m.T, dir)
	put(m.T, filepath.Join(dir, "disk.raw"), string(make([]byte, upgradeSize)))
	m.run(dir, 0, nil, "export", "--rw", "disk.raw", "--listen", "unix:nbd.sock", "--run",
		fmt.Sprintf("VDDKCP_KILL_AT='slot written:5' vddkcp copy --progress none --request-size 64KiB --rate-limit 4MiB src.raw '%s'; test $? = 137", upgradeURI))
	found, err := filepath.Glob(filepath.Join(dir, "state/vddkcp/*.journal"))
	if err != nil || len(found) != 1 {
		m.Fatalf("%d journals, want 1: %v", len(found), err)
	}
	m.save(found[0], "nbd/"+filepath.Base(found[0]))
}

func (m *maker) batch() {
	dir := upgradeFolder
	if err := os.RemoveAll(dir); err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { os.RemoveAll(dir) })
	prepareUpgradeBatch(m.T, dir)
	// The first run is stopped by SIGTERM, and the second one is killed.
	cmd := exec.Command("timeout", "--foreground", "--preserve-status", "-s", "TERM", "2", m.binary, "run", "jobs.json", "--progress", "none")
	cmd.Dir = dir
	if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 143 {
		m.Fatalf("exit status %d, want 143\n%s", cmd.ProcessState.ExitCode(), out)
	}
	m.run(dir, 0, []string{"VDDKCP_KILL_AT=slot written:1"}, "run", "jobs.json", "--progress", "none", "--resume", "--only", "running")
	for _, name := range []string{"jobs.json", "jobs.json.state.json", "jobs.state.json", "jobs.state.json.changes", "out/interrupted.raw.partial.journal", "out/running.qcow2.partial.journal", "out/running.qcow2.partial"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			m.save(filepath.Join(dir, name), "batch/"+filepath.Base(name))
		}
	}
}

func (m *maker) cow() {
	dir := m.TempDir()
	upgradePatterns(m.T, dir)
	m.run(dir, 0, nil, "export", "--cow=layer", "src.raw", "--run",
		`qemu-io -f raw -c "write -P 5 100000 50000" -c "write -z 1M 128k" -c flush "$uri"`)
	m.save(filepath.Join(dir, "layer"), "cow/layer")
}

func (m *maker) reports() {
	dir := m.TempDir()
	upgradePatterns(m.T, dir)
	m.run(dir, 0, nil, "copy", "--progress", "none", "--verify", "--digest", "--report", "copy.json", "src.raw", "dst.raw")
	for shard, text := range []string{
		`{"version": 1, "jobs": [{"name": "a", "source": "src.raw", "target": "a.raw", "labels": {"team": "x"}}, {"name": "b", "source": "none", "target": "b.raw"}]}`,
		`{"version": 1, "jobs": [{"name": "b", "source": "src.raw", "target": "b.qcow2"}, {"name": "c", "source": "src.raw", "target": "c.vmdk"}]}`,
	} {
		jobs, to := fmt.Sprintf("jobs%d.json", shard), fmt.Sprintf("batch%d.json", shard)
		put(m.T, filepath.Join(dir, jobs), text)
		m.run(dir, 4*(1-shard), nil, "run", jobs, "--progress", "none", "--report", to)
		m.save(filepath.Join(dir, to), "reports/"+to)
	}
	m.save(filepath.Join(dir, "copy.json"), "reports/copy.json")
}

// machine makes the files of a copy of a VM that is killed at a point.
func (m *maker) machine(name, point string) {
	m.Run(name, func(t *testing.T) {
		v := newNFC(t)
		v.binary = m.binary
		v.start(nil, []string{"VDDKCP_KILL_AT=" + point}, append([]string{"--rate-limit", "1MiB"}, upgradeVMFlags...)...).killed()
		of := maker{t, m.binary, m.to}
		of.save(filepath.Join(v.images(), "web01.vddkcp.json"), name+"/web01.vddkcp.json")
		journals, err := filepath.Glob(filepath.Join(v.images(), "*.journal"))
		if err != nil {
			t.Fatal(err)
		}
		for _, journal := range journals {
			of.save(journal, name+"/"+filepath.Base(journal))
		}
		if name != "vm" {
			return
		}
		v.exits(0, v.startLine(nil, []string{"XDG_CONFIG_HOME=" + v.path("config")}, "profile", "add", "vc1", "--server", v.server.Host,
			"--port", strconv.Itoa(int(v.server.Port)), "--user", v.server.User, "--thumbprint", v.server.Thumbprint(), "--via", "nfc", "--yes"))
		of.save(v.path("config/vddkcp/config.json"), "config/config.json")
		v.copies("--resume", "--report", "report.json")
		of.save(v.path("report.json"), "reports/vm.json")
	})
}

// upgradeVMFlags make the copy of a VM take the same checkpoints each time.
var upgradeVMFlags = []string{"--parallel", "1", "--request-size", "64KiB", "--connections", "1"}
