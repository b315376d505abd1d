package main

import (
	"bytes"
	"compress/gzip"
	endian "encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// upgraded returns a committed file of version 1. A file that was saved with compression is
// unpacked.
func upgraded(t *testing.T, name string) []byte {
	t.Helper()
	path := filepath.Join(upgradeFiles, name)
	packed, err := os.Open(path + ".gz")
	if err != nil {
		return read(t, path)
	}
	defer packed.Close()
	z, err := gzip.NewReader(packed)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// graft replaces a value of a committed file by the value that belongs to the files of this test,
// such as an inode number. All other bytes of the file stay as they are. Both values must have the
// same form, because a version with another form could not continue the work of the old version.
func graft(t *testing.T, text []byte, was, is string) []byte {
	t.Helper()
	if a, b := formOf(was), formOf(is); a != b {
		t.Errorf("version 1 has written %q, and the present version would write %q", was, is)
	}
	return bytes.ReplaceAll(text, quoted(t, was), quoted(t, is))
}

// formOf returns a text without the numbers that differ between two files, snapshots or sessions.
func formOf(text string) string {
	if filepath.IsAbs(text) {
		return "path/" + filepath.Base(text)
	}
	return numbers.ReplaceAllString(text, "0")
}

var numbers = regexp.MustCompile(`[0-9a-f]{4,}|[0-9a-f]*[0-9][0-9a-f]*`)

func quoted(t *testing.T, text string) []byte {
	t.Helper()
	q, err := json.Marshal(text)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// identityOf returns the identity of a raw file.
func identityOf(t *testing.T, path string) string {
	t.Helper()
	d, err := raw.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	id, _, err := d.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// eachSlot changes the payload of each slot of a file of two slots, as docs/journal.md and
// docs/cow.md describe them. The parameter head is the number of bytes before the checksum.
func eachSlot(t *testing.T, file []byte, slot, head int, change func(payload []byte) []byte) {
	t.Helper()
	for at := range 2 {
		b := file[at*slot : (at+1)*slot]
		if bytes.Count(b[:head], []byte{0}) == head {
			continue // the slot was never written
		}
		payload := b[head+4:][:endian.LittleEndian.Uint32(b[20:])]
		if castagnoli(b[:head], payload) != endian.LittleEndian.Uint32(b[head:]) {
			t.Fatal("the checksum of the committed file is wrong")
		}
		payload = change(bytes.Clone(payload))
		clear(b[head:])
		endian.LittleEndian.PutUint32(b[20:], uint32(len(payload)))
		endian.LittleEndian.PutUint32(b[head:], castagnoli(b[:head], payload))
		copy(b[head+4:], payload)
	}
}

// castagnoli returns the CRC-32C of all parts together.
func castagnoli(parts ...[]byte) (sum uint32) {
	for _, p := range parts {
		sum = crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), p)
	}
	return sum
}

// oldJournal is what the tests need of a committed journal.
type oldJournal struct {
	Source, Identity string
	Offset           int
	Backing          *struct{ Path, Identity string }
}

// graftJournal makes a committed journal one of the given source, and of the given target if it is
// not "". It returns the journal and the greatest offset in it.
func graftJournal(t *testing.T, file []byte, source func(was string) string, target, backing string) ([]byte, int) {
	t.Helper()
	newest := 0
	eachSlot(t, file, 128<<10, 32, func(payload []byte) []byte {
		var j oldJournal
		if err := json.Unmarshal(payload, &j); err != nil {
			t.Fatal(err)
		}
		newest = max(newest, j.Offset)
		payload = graft(t, payload, j.Source, source(j.Source))
		if target != "" {
			payload = graft(t, payload, j.Identity, fileid.MarkOf(target))
		}
		if backing != "" {
			payload = graft(t, payload, j.Backing.Path, backing)
			payload = graft(t, payload, j.Backing.Identity, identityOf(t, backing))
		}
		return payload
	})
	return file, newest
}

// isFile returns a function for graftJournal for a source that is a raw file.
func isFile(t *testing.T, path string) func(string) string {
	return func(string) string { return identityOf(t, path) }
}

// partOf writes an unfinished raw target: the first n bytes of a disk, followed by a hole.
func partOf(t *testing.T, path string, disk []byte, n int) {
	t.Helper()
	put(t, path, string(disk[:n]))
	if err := os.Truncate(path, int64(len(disk))); err != nil {
		t.Fatal(err)
	}
}

// inFolder runs vddkcp in a folder, and checks its exit status.
func inFolder(t *testing.T, dir string, status int, args ...string) result {
	t.Helper()
	cmd := command(t, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(dir, "state"), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"),
		"PATH="+filepath.Dir(cmd.Path)+":"+os.Getenv("PATH"))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	r := ended(t, cmd, cmd.Run(), &stderr)
	if r.exit != status {
		t.Fatalf("vddkcp %s: exit status %d, want %d\n%s", strings.Join(args, " "), r.exit, status, r.stderr)
	}
	return r
}

// resumedFrom checks the offset at which a copy continued.
func resumedFrom(t *testing.T, path string, want int) {
	t.Helper()
	var r report.Report
	if err := json.Unmarshal(read(t, path), &r); err != nil {
		t.Fatal(err)
	}
	if want == 0 || r.ResumedFrom != int64(want) {
		t.Errorf("resumed from byte %d, want %d", r.ResumedFrom, want)
	}
}

// TestUpgradeCopy continues copies that version 1 has begun.
func TestUpgradeCopy(t *testing.T) {
	for _, c := range upgradeCopies {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			c.prepare(t, dir)
			src, partial := filepath.Join(dir, "src.raw"), filepath.Join(dir, c.target+".partial")
			target, backing := "", ""
			if c.keep {
				put(t, partial, string(upgraded(t, c.name+"/"+c.target+".partial")))
			}
			if c.name == "overlay" {
				target, backing = partial, filepath.Join(dir, "base.raw")
			}
			journal, offset := graftJournal(t, upgraded(t, c.name+"/"+c.journal), isFile(t, src), target, backing)
			if !c.keep {
				partOf(t, partial, read(t, src), offset)
			}
			put(t, filepath.Join(dir, c.journal), string(journal))
			inFolder(t, dir, 0, append([]string{"copy", "--resume", "--verify", "--progress", "none", "--report", "r.json"}, c.args...)...)
			resumedFrom(t, filepath.Join(dir, "r.json"), offset)
			inFolder(t, dir, 0, "verify", "src.raw", c.target)
			leavesNothing(t, partial)
		})
	}
}

// TestUpgradeCopyToNBD continues a copy to an NBD export. Its journal is in the folder for states.
func TestUpgradeCopyToNBD(t *testing.T) {
	dir := t.TempDir()
	upgradeSource(t, dir)
	src := filepath.Join(dir, "src.raw")
	const name = "nbd_unix_____socket_nbd.sock-7ca0afe75e28a2f4.journal"
	journal, offset := graftJournal(t, upgraded(t, "nbd/"+name), isFile(t, src), "", "")
	put(t, filepath.Join(dir, "state/vddkcp", name), string(journal))
	partOf(t, filepath.Join(dir, "disk.raw"), read(t, src), offset)
	inFolder(t, dir, 0, "export", "--rw", "disk.raw", "--listen", "unix:nbd.sock", "--run",
		"vddkcp copy --resume --progress none --report r.json src.raw '"+upgradeURI+"'")
	resumedFrom(t, filepath.Join(dir, "r.json"), offset)
	if !bytes.Equal(read(t, src), read(t, filepath.Join(dir, "disk.raw"))) {
		t.Error("the target is not the source")
	}
}

// upgradeJobsIn returns the jobs of a job file, by their names.
func upgradeJobsIn(t *testing.T, path string) map[string]*batch.Job {
	t.Helper()
	parser, err := newJobParser(new(servers))
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.jobsFile(t.Context(), path, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	jobs := map[string]*batch.Job{}
	for _, j := range file.Jobs {
		jobs[j.Name] = j
	}
	return jobs
}

// TestUpgradeBatch continues a batch that version 1 has begun. One of its jobs is done, one has
// failed, one was interrupted, and one was killed, which is recorded only in the file of changes.
func TestUpgradeBatch(t *testing.T) {
	dir := t.TempDir()
	prepareUpgradeBatch(t, dir)
	text := read(t, filepath.Join(dir, "jobs.json"))
	put(t, filepath.Join(dir, "jobs.json"), strings.ReplaceAll(string(text), `, "rate_limit": "256KiB"`, ""))
	out := func(name string) string { return filepath.Join(dir, "out", name) }
	src := func(name string) string { return filepath.Join(dir, "src", name+".raw") }
	put(t, out("done.raw"), string(read(t, src("done"))))
	put(t, out("running.qcow2.partial"), string(upgraded(t, "batch/running.qcow2.partial")))
	offsets := map[string]int{}
	for name, journal := range map[string]string{"interrupted": "interrupted.raw.partial.journal", "running": "running.qcow2.partial.journal"} {
		file, offset := graftJournal(t, upgraded(t, "batch/"+journal), isFile(t, src(name)), "", "")
		put(t, out(journal), string(file))
		offsets[name] = offset
	}
	partOf(t, out("interrupted.raw.partial"), read(t, src("interrupted")), offsets["interrupted"])
	// The fingerprints depend on the folder of the disks.
	old := filepath.Join(t.TempDir(), "jobs.json")
	put(t, old, string(upgraded(t, "batch/jobs.json")))
	were, are := upgradeJobsIn(t, old), upgradeJobsIn(t, filepath.Join(dir, "jobs.json"))
	var began map[string]string
	for _, name := range []string{"jobs.state.json", "jobs.state.json.changes"} {
		state := bytes.ReplaceAll(upgraded(t, "batch/"+name), []byte(upgradeFolder+"/"), []byte(dir+"/"))
		for _, job := range were {
			if !strings.Contains(string(state), `"fingerprint":"`+job.Fingerprint()) && (job.Name == "running" || name == "jobs.state.json") {
				t.Errorf("the job %s has the fingerprint %s, which is not that of version 1", job.Name, job.Fingerprint())
			}
			state = bytes.ReplaceAll(state, []byte(job.Fingerprint()), []byte(are[job.Name].Fingerprint()))
		}
		if name == "jobs.state.json" {
			began = startsIn(t, state)
		}
		put(t, filepath.Join(dir, name), string(state))
	}
	inFolder(t, dir, 4, "run", "jobs.json", "--resume", "--progress", "none", "--report", "r.json")
	var r batch.Report
	if err := json.Unmarshal(read(t, filepath.Join(dir, "r.json")), &r); err != nil {
		t.Fatal(err)
	}
	if r.Counts.Done != 3 || r.Counts.Failed != 1 || len(r.Jobs) != 4 {
		t.Errorf("the batch ended with %+v", r.Counts)
	}
	for _, j := range r.Jobs {
		attempts := map[string]int{"done": 1, "failed": 2, "interrupted": 2, "running": 3}[j.Name]
		if j.Attempts != attempts || j.ResumedFrom != int64(offsets[j.Name]) {
			t.Errorf("job %s: %d attempts, resumed from byte %d, want %d and %d", j.Name, j.Attempts, j.ResumedFrom, attempts, offsets[j.Name])
		}
		if again := j.Started.Format("2006-01-02T15:04:05.999999999Z") != began[j.Name]; again != (j.Name != "done") {
			t.Errorf("job %s: started %v, and was started %v by version 1", j.Name, j.Started, began[j.Name])
		}
	}
	inFolder(t, dir, 0, "verify", src("interrupted"), out("interrupted.raw"))
	inFolder(t, dir, 0, "verify", src("running"), out("running.qcow2"))
}

// startsIn returns when the jobs of a state file were started.
func startsIn(t *testing.T, text []byte) map[string]string {
	t.Helper()
	var state struct {
		Jobs []struct {
			Name   string
			Report struct{ Started string }
		}
	}
	if err := json.Unmarshal(text, &state); err != nil {
		t.Fatal(err)
	}
	starts := map[string]string{}
	for _, j := range state.Jobs {
		starts[j.Name] = j.Report.Started
	}
	return starts
}

// TestUpgradeLayer continues a layer of export --cow that version 1 has begun.
func TestUpgradeLayer(t *testing.T) {
	peer.Need(t, "qemu-io")
	dir := t.TempDir()
	upgradePatterns(t, dir)
	want := read(t, filepath.Join(dir, "src.raw"))
	layer := upgraded(t, "cow/layer")
	eachSlot(t, layer, 32<<10, 24, func(payload []byte) []byte {
		var h struct{ Source string }
		if err := json.Unmarshal(payload, &h); err != nil {
			t.Fatal(err)
		}
		return graft(t, payload, h.Source, identityOf(t, filepath.Join(dir, "src.raw")))
	})
	put(t, filepath.Join(dir, "layer"), string(layer))
	inFolder(t, dir, 0, "export", "--cow=layer", "src.raw", "--run", `vddkcp copy --progress none "$uri" first.raw && qemu-io -f raw -c "write -P 7 1500000 512" "$uri"`)
	inFolder(t, dir, 0, "export", "--cow=layer", "src.raw", "--run", `vddkcp copy --progress none "$uri" second.raw`)
	for i := range 50000 {
		want[100000+i] = 5
	}
	clear(want[1<<20:][:128<<10])
	if !bytes.Equal(read(t, filepath.Join(dir, "first.raw")), want) {
		t.Error("the disk does not have the writes of version 1")
	}
	for i := range 512 {
		want[1500000+i] = 7
	}
	if !bytes.Equal(read(t, filepath.Join(dir, "second.raw")), want) {
		t.Error("the disk does not have the later writes")
	}
}

// TestUpgradeReports reads the reports of version 1. Programs of users read reports too, so the
// present reports must still have all their fields.
func TestUpgradeReports(t *testing.T) {
	for name, r := range map[string]any{"copy.json": new(report.Report), "vm.json": new(machine.Report), "batch0.json": new(batch.Report), "batch1.json": new(batch.Report)} {
		text := upgraded(t, "reports/"+name)
		if err := json.Unmarshal(text, r); err != nil {
			t.Fatal(err)
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var was, is any
		if json.Unmarshal(text, &was) != nil || json.Unmarshal(again, &is) != nil {
			t.Fatal("a report is no JSON")
		}
		contains(t, name, is, was)
	}
	dir := t.TempDir()
	for _, name := range []string{"copy.json", "vm.json", "batch0.json", "batch1.json"} {
		put(t, filepath.Join(dir, "reports", name), string(upgraded(t, "reports/"+name)))
	}
	inFolder(t, dir, 0, "run", "--merge-reports", "reports", "--report", "all.json", "--report", "all.html")
	var all batch.Report
	if err := json.Unmarshal(read(t, filepath.Join(dir, "all.json")), &all); err != nil {
		t.Fatal(err)
	}
	var jobs []string
	for _, j := range all.Jobs {
		jobs = append(jobs, fmt.Sprintf("%s %s %s %d", j.Name, j.Status, filepath.Base(j.Target), j.BytesWritten))
	}
	if want := []string{"a ok a.raw 2097152", "b ok b.qcow2 2097152", "c ok c.vmdk 2097152"}; !reflect.DeepEqual(jobs, want) {
		t.Errorf("the merged report has the jobs %q, want %q", jobs, want)
	}
	if page := string(read(t, filepath.Join(dir, "all.html"))); !strings.Contains(page, "b.qcow2") {
		t.Error("the page does not have the job b")
	}
}

// contains checks that the value is has all that the value was has.
func contains(t *testing.T, path string, is, was any) {
	t.Helper()
	switch was := was.(type) {
	case map[string]any:
		is, ok := is.(map[string]any)
		if !ok {
			t.Errorf("%s is no object any more", path)
		}
		for name, value := range was {
			if now, ok := is[name]; ok {
				contains(t, path+"."+name, now, value)
			} else {
				t.Errorf("%s.%s: the present report does not have this field of version 1", path, name)
			}
		}
	case []any:
		is, ok := is.([]any)
		if !ok || len(is) != len(was) {
			t.Fatalf("%s is no array of %d elements any more", path, len(was))
		}
		for i := range was {
			contains(t, fmt.Sprintf("%s[%d]", path, i), is[i], was[i])
		}
	default:
		if !reflect.DeepEqual(is, was) {
			t.Errorf("%s is %v, and was %v in the report of version 1", path, is, was)
		}
	}
}

// TestUpgradeConfiguration reads the profiles that version 1 has stored.
func TestUpgradeConfiguration(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "config/vddkcp/config.json"), string(upgraded(t, "config/config.json")))
	var stored struct {
		Servers map[string]map[string]any
	}
	if err := json.Unmarshal(upgraded(t, "config/config.json"), &stored); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "profile", "list", "--json")
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var profiles []map[string]any
	if err := json.Unmarshal(out, &profiles); err != nil {
		t.Fatal(err)
	}
	vc1 := stored.Servers["vc1"]
	if len(profiles) != 1 || profiles[0]["name"] != "vc1" || profiles[0]["server"] != vc1["server"] || profiles[0]["port"] != vc1["port"] || profiles[0]["user"] != vc1["user"] {
		t.Errorf("the profiles are %s, want %v", out, vc1)
	}
}

// TestUpgradeVM continues copies of a VM that version 1 has begun.
func TestUpgradeVM(t *testing.T) {
	for name, point := range map[string]string{"vm": "slot written:4", "vm-held": "machine-whole:2"} {
		t.Run(name, func(t *testing.T) {
			v := newNFC(t)
			then := v.now()
			// This run only makes the snapshot on the simulated server. Its files are replaced.
			v.start(nil, []string{"VDDKCP_KILL_AT=" + point}, append([]string{"--rate-limit", "1MiB"}, upgradeVMFlags...)...).killed()
			state := filepath.Join(v.images(), "web01.vddkcp.json")
			text := upgraded(t, name+"/web01.vddkcp.json")
			was, is := leaves(t, text), leaves(t, read(t, state))
			for path, value := range was {
				if now := is[path]; now != value {
					text = graft(t, text, value, now)
				}
			}
			put(t, state, string(text))
			offset := 0
			if name == "vm" {
				journal := "web01-disk1.raw.partial.journal"
				var file []byte
				file, offset = graftJournal(t, upgraded(t, name+"/"+journal), func(old string) string {
					return strings.ReplaceAll(old, was[".snapshot"], is[".snapshot"])
				}, "", "")
				put(t, filepath.Join(v.images(), journal), string(file))
				partOf(t, v.target(1)+".partial", then[0], offset)
			}
			v.write()
			v.copies("--resume", "--report", "report.json")
			v.published(then)
			if r := v.report(); name == "vm" && r.Rounds[0].Disks[0].ResumedFrom != int64(offset) {
				t.Errorf("resumed from byte %d, want %d", r.Rounds[0].Disks[0].ResumedFrom, offset)
			}
		})
	}
}

// leaves returns the texts in a JSON object, by their paths.
func leaves(t *testing.T, text []byte) map[string]string {
	t.Helper()
	var tree any
	if err := json.Unmarshal(text, &tree); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		switch value := value.(type) {
		case map[string]any:
			for name, v := range value {
				walk(path+"."+name, v)
			}
		case []any:
			for i, v := range value {
				walk(fmt.Sprintf("%s[%d]", path, i), v)
			}
		case string:
			all[path] = value
		}
	}
	walk("", tree)
	return all
}
