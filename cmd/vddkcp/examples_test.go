package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

const examples = "../../examples"

// TestShippedSchemaIsThatOfTheFlags checks that the schema file agrees with the current
// flags.
func TestShippedSchemaIsThatOfTheFlags(t *testing.T) {
	_, spec := jobSpec(t)
	shipped, err := os.ReadFile(filepath.Join(examples, "jobs.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(shipped, batch.Schema(spec)) {
		t.Error("examples/jobs.schema.json is not what vddkcp run --schema prints")
	}
	var schema struct {
		Defs map[string]struct{ Properties map[string]any } `json:"$defs"`
	}
	if err := json.Unmarshal(shipped, &schema); err != nil {
		t.Fatal(err)
	}
	var c cli
	line, err := newParser(&c, os.Stdout, os.Stderr, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	flags := 0
	for _, f := range commandNamed(line.Model, "copy").Flags {
		if slices.Contains(notJobFields, f.Name) {
			continue
		}
		flags++
		if schema.Defs["job"].Properties[strings.ReplaceAll(f.Name, "-", "_")] == nil {
			t.Errorf("--%s of copy is no field of a job", f.Name)
		}
	}
	if flags < 40 {
		t.Errorf("only %d flags were looked at", flags)
	}
}

// TestFieldsAreFlags checks that fields of the schema accept the same values as the
// flags.
func TestFieldsAreFlags(t *testing.T) {
	for fields, want := range map[string]string{ // "": it is taken
		`"request_size":"64KiB","depth":8,"connections":"auto","retries":"unlimited"`:     "",
		`"request_size":65536,"connections":4,"retries":0,"rate_limit":"5MiB/s"`:          "",
		`"digest":true,"verify":false,"allow_path":["/a=b","c d"],"nfc_buffers":"1MiBx4"`: "",
		`"digest":"sha256","debug":["vddk.stats=1","vddk.extents=0"],"port":443`:          "",
		`"user":"-x","password":"a=b --c","thumbprint":"'\"${x}"`:                         "",
		`"connections":99`:             `jobs[0].connections: "99": want a number of connections from 1 to 64, or auto`,
		`"retry_timeout":"soon"`:       `jobs[0].retry_timeout: "soon": want a duration such as 90s or 15m`,
		`"depth":1000`:                 "jobs[0].depth: 1000: want 1 to 256",
		`"depth":99999999999999999999`: "jobs[0].depth: ",
		`"port":70000`:                 `jobs[0].port: "70000": want a port`,
		`"sparse":100`:                 "jobs[0].sparse: 100 bytes: want a multiple of 512",
		`"debug":["vddk.nothing=1"]`:   `jobs[0].debug[0]: "vddk.nothing": want vddk.KEY=0|1`,
		`"nfc_buffers":"1MiB"`:         `jobs[0].nfc_buffers: "1MiB": want SIZExCOUNT`,
		`"reflink":"perhaps"`:          `jobs[0].reflink: "perhaps": want one of auto, always, never`,
		`"source_format":""`:           "jobs[0].source_format: ",
		`"backing_format":"raw"`:       "jobs[0].backing_format: this flag needs --backing",
		`"password":"-"`:               "jobs[0].password: a job cannot read a secret from the terminal (-)",
		`"help":true`:                  "jobs[0].help: unknown field",
		`"src":"x"`:                    "jobs[0].src: unknown field",
	} {
		parser, spec := jobSpec(t)
		text := `{"version":1,"jobs":[{"source":"a","target":"b",` + fields + `}]}`
		file, err := batch.Load(strings.NewReader(text), "jobs.json", t.TempDir(), spec)
		switch {
		case want == "" && err != nil:
			t.Errorf("%s: %v", fields, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %s", fields, err, want)
		case err == nil:
			for _, v := range file.Jobs[0].Values {
				for _, text := range v.Texts {
					if n, err := strconv.Atoi(text); err == nil && n < v.Field.Least || !regexp.MustCompile(v.Field.Pattern).MatchString(text) {
						t.Errorf("%s: %q is taken, and not by the schema", v.Field.Name, text)
					}
				}
			}
			if !strings.Contains(fields, `"user"`) {
				break
			}
			c, err := parser.command(file.Jobs[0])
			if err != nil {
				t.Fatal(err)
			}
			if c.User != "-x" || c.Password.value != "a=b --c" || c.Password.form != inJobFile || c.Thumbprint != `'"${x}` {
				t.Errorf("odd values became %+v", c.vddkFlags)
			}
		}
	}
}

// TestExampleJobFiles checks that all job files in examples/ can be loaded.
func TestExampleJobFiles(t *testing.T) {
	found := 0
	err := filepath.WalkDir(examples, func(path string, _ os.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".json" || filepath.Base(path) == "jobs.schema.json" {
			return err
		}
		found++
		parser, err := newJobParser(new(servers))
		if err != nil {
			return err
		}
		file, err := parser.jobsFile(t.Context(), path, func(string) {})
		if err != nil {
			t.Error(err)
		} else if len(file.Warnings) > 0 {
			t.Errorf("%s: %v", path, file.Warnings)
		}
		return nil
	})
	if err != nil || found == 0 {
		t.Errorf("%d job files, %v", found, err)
	}
}

// standInServer is a stand-in for the library with the disks of a server.
func standInServer(t *testing.T, disks ...string) (lib string) {
	t.Helper()
	peer.Need(t, "gcc")
	lib = filepath.Join(t.TempDir(), "lib")
	if err := compile("../../vddk/testlib/build", lib); err != nil {
		t.Fatal(err)
	}
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	if err := installWorker(filepath.Dir(program)); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(lib, "vddktest.conf"), "user backup@vsphere.local\npassword geheim\nport 1\nthumbprint "+pairs(strings.Repeat("AB", 20))+"\n")
	for i, disk := range disks {
		put(t, filepath.Join(lib, "disks", disk), strings.Repeat(string(rune('a'+i)), 1<<20))
	}
	return lib
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestExampleManyVMs runs the job file for many VMs with the stand-in for VDDK, another
// server and other directories.
func TestExampleManyVMs(t *testing.T) {
	peer.Need(t, "qemu-img", "logger")
	lib := standInServer(t, "ds1/web01/web01.vmdk", "ds2/web01/web01_1.vmdk", "ds1/web02/web02.vmdk", "ds2/db01/db01.vmdk", "ds2/db01/db01_1.vmdk")
	dir := t.TempDir()
	text, err := os.ReadFile(filepath.Join(examples, "many-vms.json"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(examples, "password-file.sh"), filepath.Join(dir, "etc/password"))
	cmd.Stdin = strings.NewReader("geheim\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if fi, err := os.Stat(filepath.Join(dir, "etc/password")); err != nil || fi.Mode() != 0o600 {
		t.Errorf("password file: %v, %v", fi, err)
	}
	ours := strings.NewReplacer("/etc/vddkcp/password", filepath.Join(dir, "etc/password"), "/images/", dir+"/", "vc.example.com",
		"localhost", `"verify": true`, `"verify": true, "port": 1, "libdir": "`+lib+`", "connections": 1`).Replace(string(text))
	put(t, filepath.Join(dir, "jobs.json"), ours)
	report := filepath.Join(dir, "report.json")
	for _, wave := range []string{"1", "2"} {
		out, err := command(t, "run", filepath.Join(dir, "jobs.json"), "--label", "wave="+wave, "--report", report, "--progress", "none").CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	for target, disk := range map[string]string{"web01-0.qcow2": "ds1/web01/web01.vmdk", "db01-1.raw": "ds2/db01/db01_1.vmdk"} {
		peer.Run(t, "qemu-img", "compare", "-F", "raw", filepath.Join(dir, target), filepath.Join(lib, "disks", disk))
	}
	text, err = os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	var r batch.Report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if r.Counts != (batch.Counts{Done: 2}) || r.Jobs[0].Labels["vm"] != "db01" || r.Jobs[0].Digest == nil || r.Jobs[0].Verify.Status != "ok" {
		t.Errorf("report %s", text)
	}
	if strings.Contains(string(text), "geheim") {
		t.Error("the report has the password")
	}
}

func TestExampleOneVM(t *testing.T) {
	peer.Need(t, "qemu-img", "gcc")
	lib := standInServer(t, "ds1/web01/web01.vmdk", "ds1/web01/web01_1.vmdk")
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put(t, filepath.Join(dir, "pw"), "geheim\n")
	cmd := exec.Command(filepath.Join(examples, "one-vm.sh"), dir, "[ds1] web01/web01.vmdk", "[ds1] web01/web01_1.vmdk")
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"),
		"VDDKCP_FLAGS=--server localhost --port 1 --user backup@vsphere.local --password=+"+dir+"/pw --vm moref=12 --thumbprint "+
			pairs(strings.Repeat("AB", 20))+" --libdir "+lib)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"web01", "web01_1"} {
		peer.Run(t, "qemu-img", "compare", "-F", "raw", filepath.Join(dir, name+".qcow2"), filepath.Join(lib, "disks/ds1/web01", name+".vmdk"))
	}
}

// TestUnits checks that vddkcp accepts the command of the unit in the packages, and systemd the
// unit and its timer.
func TestUnits(t *testing.T) {
	unit := filepath.Join(examples, "systemd/vddkcp-run@.service")
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(text), "ExecStart=/usr/bin/vddkcp ")
	line, _, _ = strings.Cut(line, " $RUN_FLAGS\n")
	var c cli
	parser, err := newParser(&c, os.Stdout, os.Stderr, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parser.Parse(strings.Fields(line)); err != nil || len(c.RunJobs.Report) != 2 || !c.RunJobs.Resume {
		t.Errorf("%s: %v", line, err)
	}
	peer.Need(t, "systemd-analyze")
	timer := strings.TrimSuffix(unit, ".service") + ".timer"
	every, err := os.ReadFile(timer)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	put(t, filepath.Join(dir, filepath.Base(unit)), strings.ReplaceAll(string(text), "/usr/bin/vddkcp", "/bin/true"))
	put(t, filepath.Join(dir, filepath.Base(timer)), string(every))
	// The man pages need not be installed, and systemd may find faults in units of this machine.
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", filepath.Join(dir, "vddkcp-run@wave1.timer"), filepath.Join(dir, "vddkcp-run@wave1.service")).CombinedOutput()
	if strings.Contains(string(out), "vddkcp-run@") {
		t.Errorf("systemd-analyze: %v\n%s", err, out)
	}
}
