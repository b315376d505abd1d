package main

import (
	"bytes"
	endian "encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// says checks that a run ended as expected and printed some texts.
func (r result) says(t *testing.T, status int, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if r.exit != status || !strings.Contains(r.stderr, text) {
			t.Errorf("exit status %d, want %d and %q\n%s", r.exit, status, text, r.stderr)
		}
	}
}

// ofVersion gives each slot of a journal or a layer another version. The checksums are correct.
func ofVersion(t *testing.T, file []byte, slot, head int, version uint32) {
	t.Helper()
	eachSlot(t, file, slot, head, func(payload []byte) []byte { return payload })
	for at := range 2 {
		if b := file[at*slot:]; b[16] != 0 {
			endian.LittleEndian.PutUint32(b[16:], version)
			endian.LittleEndian.PutUint32(b[head:], castagnoli(b[:head], b[head+4:][:endian.LittleEndian.Uint32(b[20:])]))
		}
	}
}

// TestNewerJournal checks what happens with the journal of a newer vddkcp: --resume changes
// nothing, and --force starts over.
func TestNewerJournal(t *testing.T) {
	c := upgradeCopies[0]
	dir := t.TempDir()
	c.prepare(t, dir)
	journal := upgraded(t, c.name+"/"+c.journal)
	ofVersion(t, journal, 128<<10, 32, 3)
	put(t, filepath.Join(dir, c.journal), string(journal))
	partOf(t, filepath.Join(dir, c.target+".partial"), read(t, filepath.Join(dir, "src.raw")), 1<<20)
	partial := read(t, filepath.Join(dir, c.target+".partial"))
	args := append([]string{"copy", "--progress", "none"}, c.args...)

	for _, flags := range [][]string{{"--resume"}, {"--resume", "--force"}, {"--resume", "--dry-run"}} {
		inFolder(t, dir, 2, append(args, flags...)...).says(t, 2,
			"dst.raw.partial.journal: the journal has the format version 3, but this vddkcp reads only version 2",
			"hint: use the newer vddkcp that wrote the file, or run again with --force and without --resume")
	}
	inFolder(t, dir, 1, args...).says(t, 1, "dst.raw.partial")
	if !bytes.Equal(read(t, filepath.Join(dir, c.journal)), journal) || !bytes.Equal(read(t, filepath.Join(dir, c.target+".partial")), partial) {
		t.Error("the unfinished target or its journal has changed")
	}
	inFolder(t, dir, 0, append(args, "--force")...)
	inFolder(t, dir, 0, "verify", "src.raw", "dst.raw")
	leavesNothing(t, filepath.Join(dir, c.journal))
}

// TestNewerLayer checks that vddkcp never overwrites the layer of a newer version.
func TestNewerLayer(t *testing.T) {
	dir := t.TempDir()
	upgradePatterns(t, dir)
	layer := upgraded(t, "cow/layer")
	ofVersion(t, layer, 32<<10, 24, 2)
	put(t, filepath.Join(dir, "layer"), string(layer))
	inFolder(t, dir, 2, "export", "--cow=layer", "src.raw", "--run", "true").says(t, 2,
		"layer: the layer has the format version 2, but this vddkcp reads only version 1",
		"hint: use the newer vddkcp that wrote the file, or give another file for the layer, because vddkcp never overwrites a layer")

	unknown := upgraded(t, "cow/layer")
	eachSlot(t, unknown, 32<<10, 24, func(payload []byte) []byte { return bytes.Replace(payload, []byte("{"), []byte(`{"new":1,`), 1) })
	put(t, filepath.Join(dir, "unknown"), string(unknown))
	inFolder(t, dir, 1, "export", "--cow=unknown", "src.raw", "--run", "true").says(t, 1,
		`unknown field "new"`, "hint: if a newer vddkcp wrote the layer, use that vddkcp")
	if !bytes.Equal(read(t, filepath.Join(dir, "layer")), layer) || !bytes.Equal(read(t, filepath.Join(dir, "unknown")), unknown) {
		t.Error("a layer has changed")
	}
}

// TestNewerBatch checks that a batch does not begin with the state file of a newer version.
func TestNewerBatch(t *testing.T) {
	dir := t.TempDir()
	prepareUpgradeBatch(t, dir)
	state := filepath.Join(dir, "jobs.state.json")
	put(t, state, `{"version": 2, "jobs": {"done": {}}}`)
	for _, flags := range [][]string{{"--resume"}, {}} {
		inFolder(t, dir, 2, append([]string{"run", "jobs.json", "--progress", "none"}, flags...)...).says(t, 2,
			"jobs.state.json: the state file has the format version 2, but this vddkcp reads only version 1",
			"hint: use the newer vddkcp that wrote the file, or start the batch from the beginning with another state file (--state)")
	}
	if text := read(t, state); string(text) != `{"version": 2, "jobs": {"done": {}}}` {
		t.Errorf("the state file has changed: %s", text)
	}
	inFolder(t, dir, 4, "run", "jobs.json", "--progress", "none", "--only", "done,failed", "--state", "other.json")

	put(t, filepath.Join(dir, "reports/new.json"), `{"version": 2, "counts": 7, "jobs": 7}`)
	inFolder(t, dir, 2, "run", "--merge-reports", "reports").says(t, 2,
		"new.json: the report has the format version 2, but this vddkcp reads only version 1", "remove the report from the folder")
}

// TestNewerStateOfVM checks what happens with the state file of a newer vddkcp: vm changes nothing,
// and with --force it starts over as soon as the snapshot of the earlier run is removed.
func TestNewerStateOfVM(t *testing.T) {
	v := newNFC(t)
	v.start(nil, []string{"VDDKCP_KILL_AT=slot written:2"}, upgradeVMFlags...).killed()
	path := filepath.Join(v.images(), "web01.vddkcp.json")
	newer := bytes.Replace(read(t, path), []byte(`"version": 1`), []byte(`"version": 2`), 1)
	put(t, path, string(newer))
	for _, flags := range [][]string{{"--resume"}, {}, {"--dry-run"}} {
		v.says(v.exits(2, v.start(nil, nil, flags...)),
			"web01.vddkcp.json: the state file has the format version 2, but this vddkcp reads only version 1",
			"hint: use the newer vddkcp that wrote the file, or start over with --force; vddkcp cleanup then lists the snapshot")
	}
	if !bytes.Equal(read(t, path), newer) {
		t.Error("the state file has changed")
	}
	v.left(1)
	v.says(v.start(nil, nil, "--force").wait(), "warning: state file", "the disks are copied from the beginning", v.ours()[0])
	v.exits(0, v.startCommand(nil, nil, "cleanup", "web01", "--older-than", "0s", "--remove"))
	v.left(0)
	now := v.write()
	v.copies("--force")
	v.published(now)
}

// TestUnknownFields checks that fields which a newer version adds without another version number
// are ignored in journals and state files.
func TestUnknownFields(t *testing.T) {
	c := upgradeCopies[0]
	dir := t.TempDir()
	c.prepare(t, dir)
	src := filepath.Join(dir, "src.raw")
	journal, offset := graftJournal(t, upgraded(t, c.name+"/"+c.journal), isFile(t, src), "", "")
	more := []byte(`{"later": {"a": [1]}, `)
	eachSlot(t, journal, 128<<10, 32, func(payload []byte) []byte { return bytes.Replace(payload, []byte("{"), more, 1) })
	put(t, filepath.Join(dir, c.journal), string(journal))
	partOf(t, filepath.Join(dir, c.target+".partial"), read(t, src), offset)
	inFolder(t, dir, 0, append([]string{"copy", "--resume", "--progress", "none", "--report", "r.json"}, c.args...)...)
	resumedFrom(t, filepath.Join(dir, "r.json"), offset)

	put(t, filepath.Join(dir, "jobs.json"), `{"version": 1, "jobs": [{"name": "one", "source": "src.raw", "target": "one.raw"}]}`)
	inFolder(t, dir, 0, "run", "jobs.json", "--progress", "none")
	state := filepath.Join(dir, "jobs.state.json")
	text := bytes.ReplaceAll(read(t, state), []byte(`{"`), append(bytes.Clone(more), `"`...))
	put(t, state, string(text))
	if err := os.Remove(src); err != nil {
		t.Fatal(err)
	}
	inFolder(t, dir, 0, "run", "jobs.json", "--progress", "none", "--resume")
}

// TestUnknownFieldsInStateOfVM does the same with the state file of a copy of a VM.
func TestUnknownFieldsInStateOfVM(t *testing.T) {
	v := newNFC(t)
	then := v.now()
	v.start(nil, []string{"VDDKCP_KILL_AT=slot written:2"}, upgradeVMFlags...).killed()
	path := filepath.Join(v.images(), "web01.vddkcp.json")
	put(t, path, string(bytes.ReplaceAll(read(t, path), []byte("{"), []byte(`{"later": {"a": [1]}, `))))
	v.write()
	v.copies("--resume")
	v.published(then)
}
