package batch_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

// testSpec returns a Spec with a flag of each type.
func testSpec() *batch.Spec {
	size := func(s string) error {
		_, err := bytesize.Parse(s)
		return err
	}
	path := func(a string) bool { return !strings.HasPrefix(a, "[") && !strings.Contains(a, ":") }
	return &batch.Spec{
		Fields: []batch.Field{
			{Name: "server", Type: batch.Text, Help: "Server."},
			{Name: "password", Type: batch.Text, Secret: true, Help: "Secret."},
			{Name: "compress", Type: batch.Text, Help: "Compression."},
			{Name: "format", Type: batch.Text, Enum: []string{"raw", "qcow2"}, Help: "Format."},
			{Name: "verify", Type: batch.Boolean, Help: "Verify."},
			{Name: "depth", Type: batch.Integer, Tuning: true, Help: "Depth."},
			{Name: "sparse", Type: batch.IntOrText, Check: size, Pattern: batch.SizePattern, Help: "Sparse."},
			{Name: "digest", Type: batch.BoolOrText, Enum: []string{"blksum", "sha256"}, Help: "Digest."},
			{Name: "allow_path", Type: batch.Array, Path: true, Help: "Allowed."},
			{Name: "journal", Type: batch.Text, Path: true, Help: "Journal."},
			{Name: "backing", Type: batch.Text, Help: "Backing."},
		},
		SourcePath: path, TargetPath: path,
		Files: func(a string) []string {
			if !path(a) {
				return nil
			}
			return []string{filepath.Clean(a), filepath.Clean(a) + ".partial"}
		},
		Check: func(j *batch.Job) error {
			if j.Text("format") == "raw" && j.Text("compress") != "" {
				return errors.New("--compress is not for raw disks")
			}
			if d := j.Text("depth"); d == "7" || d == "8" {
				return fmt.Errorf("--depth: %s: want an odd number of 1 or 3", d)
			}
			return nil
		},
	}
}

func load(text string) (*batch.File, error) {
	return batch.Load(strings.NewReader(text), "jobs.json", "/jobs", testSpec())
}

// TestLoadTellsMistakes checks that Load reports all mistakes of a file together, each
// with its place.
func TestLoadTellsMistakes(t *testing.T) {
	const ok = `"source":"a","target":"b"`
	for _, c := range []struct {
		name, text string
		want       []string // "" + problems, without the file's name
	}{
		{"empty", " \n", []string{"1:1: empty: want a job file"}},
		{"trailing comma in an array", "{\"version\":1,\n\"jobs\":[{" + ok + "},]}", []string{"2:36: a comma before ]: JSON allows no comma after the last element"}},
		{"trailing comma in an object", "{\"version\":1,\n}", []string{"1:13: a comma before }: JSON allows no comma after the last element"}},
		{"comment", "{\n  // all of it\n}", []string{"2:3: a comment: JSON has no comments"}},
		{"hash comment", "# jobs\n{}", []string{"1:1: a comment: JSON has no comments"}},
		{"single quotes", "{'version':1}", []string{"1:2: a single quote: JSON strings are in double quotes"}},
		{"missing comma", `{"version":1 "jobs":[]}`, []string{"1:14: a comma is missing before this"}},
		{"cut off", `{"version":1,"jobs":[`, []string{"1:22: the file ends in the middle: a bracket, brace or quote is not closed"}},
		{"open string", "{\"version\":1,\"jobs\":[\"\n", []string{"1:23: a line break or another control character in a string: want \\n, \\t or \\u00XX"}},
		{"two values", `{} {}`, []string{"1:4: text after the end of the job file"}},
		{"byte order mark", "\ufeff{}", []string{"1:1: a byte order mark, which JSON does not allow: save the file as UTF-8 without it"}},
		{"UTF-16", "\xff\xfe{\x00}\x00", []string{"1:1: UTF-16: want UTF-8"}},
		{"UTF-16, big end first", "\xfe\xff\x00{\x00}", []string{"1:1: UTF-16: want UTF-8"}},
		{"UTF-16 without a mark", "\x00{\x00}", []string{"1:1: UTF-16: want UTF-8"}},
		{"nothing", "", []string{"1:1: empty: want a job file"}},
		{"two values in lines", "{}\n{}", []string{"2:1: text after the end of the job file"}},
		{"garbage", strings.Repeat("a", 10<<20), []string{"1:1: invalid character 'a' looking for beginning of value"}},
		{"deep garbage", strings.Repeat("[", 10<<20), []string{"1:10001: values are nested deeper than 16 levels"}},
		{"zeros behind it", "{}\x00\x00", []string{"1:3: a byte of value 0"}},
		{"a zero in it", "{\"version\":1,\x00}", []string{"1:14: a byte of value 0"}},
		{"a zero in a string", "{\"a\x00b\":1}", []string{"1:4: a byte of value 0"}},
		{"not UTF-8", "{\"\xff\":1}", []string{"1:3: not UTF-8"}},
		{"too deep", strings.Repeat("[", 30) + strings.Repeat("]", 30), []string{"1:17: values are nested deeper than 16 levels"}},
		{"an array", `[]`, []string{"1:1: want an object, found an array"}},
		{"nothing in it", `{}`, []string{`1:1: version: missing: want "version": 1`, "1:1: jobs: missing: want an array of jobs"}},
		{"version", `{"version":"1","jobs":[{` + ok + `}]}`, []string{"1:12: version: the version of a job file must be 1, because this vddkcp reads only version 1"}},
		{"no jobs", `{"version":1,"jobs":[]}`, []string{"1:21: jobs: the array is empty: want at least one job"}},
		{"jobs an object", `{"version":1,"jobs":{}}`, []string{"1:21: jobs: want an array, found an object"}},
		{"misspelt at the top", `{"version":1,"job":[],"jobs":[{` + ok + `}]}`, []string{`1:14: job: unknown field; did you mean "jobs"?`}},
		{"misspelt", "{\"version\":1,\"jobs\":[\n {" + ok + ", \"compres\":\"zlib\"}]}", []string{`2:30: jobs[0].compres: unknown field; did you mean "compress"?`}},
		{"dashes", `{"version":1,"jobs":[{` + ok + `,"allow-path":["x"]}]}`, []string{`1:49: jobs[0].allow-path: unknown field; did you mean "allow_path"?`}},
		{"misspelt in the defaults", `{"version":1,"defaults":{"verfy":true},"jobs":[{` + ok + `}]}`, []string{`1:26: defaults.verfy: unknown field; did you mean "verify"?`}},
		{"misspelt limit", `{"version":1,"limits":{"perhost":1},"jobs":[{` + ok + `}]}`, []string{`1:24: limits.perhost: unknown field; did you mean "per_host"?`}},
		{"odd name", `{"version":1,"a\nb":1,"jobs":[{` + ok + `}]}`, []string{`1:14: "a\nb": unknown field; did you mean "jobs"?`}},
		{"of the run", `{"version":1,"jobs":[{` + ok + `,"resume":true,"dry_run":true,"log_level":"debug"}]}`, []string{
			"1:49: jobs[0].resume: not a field of a job: --resume applies to the whole run",
			"1:63: jobs[0].dry_run: not a field of a job: use vddkcp run --check, which checks all jobs",
			"1:78: jobs[0].log_level: not a field of a job: the log flags of vddkcp run apply to all jobs; see --log-dir",
		}},
		{"wrong types", `{"version":1,"continue_on_error":1,"jobs":[{` + ok + `,"verify":"yes","depth":"4","format":1,"sparse":true,"digest":7,"allow_path":"x","labels":[],"host":null}]}`, []string{
			"1:34: continue_on_error: want a boolean, found a number",
			"1:80: jobs[0].verify: want true or false, found a string",
			"1:94: jobs[0].depth: want a whole number, found a string",
			"1:107: jobs[0].format: want a string, found a number",
			"1:118: jobs[0].sparse: want a whole number or a string, found a boolean",
			"1:132: jobs[0].digest: want true, false or a string, found a number",
			"1:147: jobs[0].allow_path: want an array of strings, found a string",
			"1:160: jobs[0].labels: want an object, found an array",
			"1:170: jobs[0].host: want a string, found null",
		}},
		{"no whole number", `{"version":1,"jobs":[{` + ok + `,"depth":1.5,"sparse":1e3}]}`, []string{
			"1:57: jobs[0].depth: 1.5: want a whole number", "1:70: jobs[0].sparse: 1e3: want a whole number",
		}},
		{"no size", `{"version":1,"limits":{"rate":"fast","nfc_buffer":0},"jobs":[{` + ok + `,"sparse":"4kb"}]}`, []string{
			`1:31: limits.rate: size "fast": want a whole number of bytes; write for example 512, 64KiB, 1MiB or 2GiB`,
			"1:51: limits.nfc_buffer: want more than 0, because no job can run with the limit 0",
			`1:98: jobs[0].sparse: size "4kb": unknown unit "kb"; write for example 512, 64KiB, 1MiB or 2GiB`,
		}},
		{"limits", `{"version":1,"limits":{"total":0,"rounds":-1,"per_host":"2"},"jobs":[{` + ok + `}]}`, []string{
			"1:32: limits.total: 0: want 1 to 1000", "1:43: limits.rounds: -1: want 0 to 100", "1:57: limits.per_host: want a whole number, found a string",
		}},
		{"huge and negative numbers", `{"version":1,"limits":{"total":99999999999999999999,"rate":"-5"},"jobs":[{` + ok + `,"sparse":123456789012345678901234567890},
			{"source":"a","target":"c","sparse":-4096,"depth":1e999}]}`, []string{
			"1:32: limits.total: 99999999999999999999: want 1 to 1000",
			`1:60: limits.rate: size "-5": want a whole number of bytes; write for example 512, 64KiB, 1MiB or 2GiB`,
			`1:110: jobs[0].sparse: the size "123456789012345678901234567890" is 8 EiB or more`,
			`2:40: jobs[1].sparse: size "-4096": want a whole number of bytes; write for example 512, 64KiB, 1MiB or 2GiB`,
			"2:54: jobs[1].depth: 1e999: want a whole number",
		}},
		{"long name", `{"version":1,"jobs":[{` + ok + `,"` + strings.Repeat("x", 1<<20) + `":1}]}`, []string{`1:49: jobs[0]."` + strings.Repeat("x", 64) + `": unknown field`}},
		{"no choice", `{"version":1,"jobs":[{` + ok + `,"format":"vhd","digest":"md5"}]}`, []string{
			`1:58: jobs[0].format: "vhd": want one of raw, qcow2`, `1:73: jobs[0].digest: "md5": want one of blksum, sha256`,
		}},
		{"empty", `{"version":1,"jobs":[{` + ok + `,"compress":"","name":"","before":[],"after":[""],"hook_timeout":"soon"}]}`, []string{
			"1:60: jobs[0].compress: the text is empty: leave the field out", "1:70: jobs[0].name: a name must have 1 to 1000 bytes",
			"1:82: jobs[0].before: want an array of strings: a program, and then its arguments", "1:93: jobs[0].after: want an array of strings: a program, and then its arguments",
			`1:113: jobs[0].hook_timeout: "soon": want a duration such as 90s or 15m`,
		}},
		{"code 0", `{"version":1,"jobs":[{"source":"a\u0000","target":"b"}]}`, []string{"1:32: jobs[0].source: the text contains a zero byte"}},
		{"missing", `{"version":1,"jobs":[{"source":"a"},7,{"target":"c","source":""}]}`, []string{
			"1:22: jobs[0].target: missing", "1:37: jobs[1]: want an object, found a number", "1:62: jobs[2].source: missing",
		}},
		{"twice in an object", `{"version":1,"version":1,"jobs":[{` + ok + `,"source":"c","labels":{"a":"1","a":"2"}}]}`, []string{
			"1:14: version: the field appears twice", "1:61: jobs[0].source: the field appears twice", "1:92: jobs[0].labels.a: the field appears twice",
		}},
		{"names", `{"version":1,"defaults":{"name":"x"},"jobs":[{"name":"é",` + ok + `},{"name":"é","source":"a","target":"c"}]}`, []string{
			"1:26: defaults.name: defaults cannot have a name: each job needs its own", `1:93: jobs[1].name: "é" is also the name of jobs[0]`,
		}},
		{"a number's name", `{"version":1,"jobs":[{"name":"1",` + ok + `},{"source":"a","target":"c"}]}`, []string{`1:61: jobs[1].name: "1" is also the name of jobs[0]`}},
		{"one target", `{"version":1,"jobs":[{` + ok + `},{"source":"a","target":"./x/../b"},{"source":"a","target":"b.partial"}]}`, []string{
			`1:73: jobs[1].target: "/jobs/./x/../b" is also the target of jobs[0]`, `1:108: jobs[2].target: "/jobs/b.partial" is also the target of jobs[0]`,
		}},
		{"source of another", `{"version":1,"jobs":[{"source":"c","target":"b"},{"source":"b","target":"d"}]}`, []string{
			`1:60: jobs[1].source: "/jobs/b" is the target of jobs[0], which may be written at the same time`,
		}},
		{"backing of another", `{"version":1,"jobs":[{"source":"a","target":"x/o","backing":"b"},{"source":"a","target":"o","backing":"/jobs/x/b"},{"source":"c","target":"x/b"}]}`, []string{
			`1:61: jobs[0].backing: "b" is the target of jobs[2], which may be written at the same time`,
			`1:103: jobs[1].backing: "/jobs/x/b" is the target of jobs[2], which may be written at the same time`,
		}},
		{"secrets", `{"version":1,"defaults":{"password":"-"},"jobs":[{` + ok + `,"password":"-7"},{"source":"a","target":"c","password":"+"}]}`, []string{
			"1:37: defaults.password: a job cannot read a secret from the terminal (-) or from a file descriptor (-FD): want +FILE, a file whose first line is the secret",
			"1:88: jobs[0].password: a job cannot read a secret from the terminal (-) or from a file descriptor (-FD): want +FILE, a file whose first line is the secret",
			"1:132: jobs[1].password: want the name of a file after +",
		}},
		{"as a whole", `{"version":1,"jobs":[{` + ok + `,"format":"raw","compress":"zlib"}]}`, []string{"1:22: jobs[0]: --compress is not for raw disks"}},
		{"a field as a whole", `{"version":1,"defaults":{"depth":8},"jobs":[{` + ok + `,"depth":7},{"source":"a","target":"c"}]}`, []string{
			"1:34: defaults.depth: 8: want an odd number of 1 or 3 (in jobs[1])", "1:80: jobs[0].depth: 7: want an odd number of 1 or 3"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := load(c.text)
			var bad *batch.FileError
			if !errors.As(err, &bad) {
				t.Fatalf("error %v, want a FileError", err)
			}
			var got []string
			for _, p := range bad.Problems {
				got = append(got, p.String())
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("problems\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(c.want, "\n\t"))
			}
			for _, p := range got {
				if !strings.Contains(err.Error(), "jobs.json:"+p) {
					t.Errorf("the message lacks %q: %s", p, err)
				}
			}
		})
	}
}

func TestLoadListsManyProblemsShortly(t *testing.T) {
	_, err := load(`{"version":1,"jobs":[` + strings.Repeat("1,", 999) + "1]}")
	if lines := strings.Split(err.Error(), "\n"); len(lines) != 202 || lines[0] != "jobs.json has 1000 problems:" || lines[201] != "and 800 more" {
		t.Errorf("%d lines: %s ... %s", len(lines), lines[0], lines[len(lines)-1])
	}
}

// TestLoadOfALongLine checks that finding the places of mistakes in a file of one line
// does not take longer than in a file of many lines.
func TestLoadOfALongLine(t *testing.T) {
	const n = 100000
	_, err := load(`{"version":1,"jobs":[` + strings.Repeat(`{"x":1},`, n) + `1]}`)
	var bad *batch.FileError
	if !errors.As(err, &bad) || len(bad.Problems) != 3*n+1 {
		t.Fatalf("%T with %d problems", err, len(bad.Problems))
	}
	if last := bad.Problems[3*n].String(); last != fmt.Sprintf("1:%d: jobs[%d]: want an object, found a number", 22+8*n, n) {
		t.Errorf("the last: %s", last)
	}
}

func TestLoadFillsIn(t *testing.T) {
	spec := testSpec()
	var checked []string
	check := spec.Check
	spec.Check = func(j *batch.Job) error {
		checked = append(checked, j.Name)
		return check(j)
	}
	f, err := batch.Load(strings.NewReader(`{
		"version": 1,
		"defaults": {"server": "vc", "password": "+pw", "verify": true, "labels": {"wave": "1", "site": "x"}, "hook_timeout": "5m", "sparse": "64KiB", "before": ["true"]},
		"limits": {"total": 2, "per_server": 8, "per_host": 1, "nfc_buffer": "16MiB", "connections": 10, "rate": "5MiB/s", "rounds": 3},
		"continue_on_error": false,
		"jobs": [
			{"source": "[ds] a/a.vmdk", "target": "out/a.qcow2", "host": "esxi1", "compress": "+x"},
			{"name": "b/ü", "source": "b.vmdk", "target": "/b.raw", "server": "vc2", "verify": false, "sparse": 4096, "labels": {"wave": "2"},
			 "hook_timeout": "1s", "before": ["x", "y z"], "digest": true, "password": "plain", "allow_path": ["d", "/e"], "journal": "j"}
		]}`), "jobs.json", "/jobs", spec)
	if err != nil {
		t.Fatal(err)
	}
	if want := (batch.Limits{Total: 2, PerServer: 8, PerHost: 1, NFCBuffer: 16 << 20, Connections: 10, Rate: 5 << 20, Rounds: 3}); f.Limits != want || f.ContinueOnError {
		t.Errorf("limits %+v, continue %v", f.Limits, f.ContinueOnError)
	}
	values := func(j *batch.Job) map[string][]string {
		m := map[string][]string{}
		for _, v := range j.Values {
			m[v.Field.Name] = v.Texts
		}
		return m
	}
	a, b := f.Jobs[0], f.Jobs[1]
	if got := values(a); !reflect.DeepEqual(got, map[string][]string{"server": {"vc"}, "password": {"+/jobs/pw"}, "compress": {"+x"}, "verify": {"true"}, "sparse": {"64KiB"}}) {
		t.Errorf("values %v", got)
	}
	if a.Name != "0" || a.Source != "[ds] a/a.vmdk" || a.Target != "/jobs/out/a.qcow2" || a.HostKey() != "host esxi1" || a.HookTimeout != 5*time.Minute ||
		!reflect.DeepEqual(a.Labels(), map[string]string{"wave": "1", "site": "x"}) || !slices.Equal(a.Before, []string{"true"}) {
		t.Errorf("job %+v", a)
	}
	if got := values(b); !reflect.DeepEqual(got, map[string][]string{"server": {"vc2"}, "password": {"plain"}, "verify": {"false"}, "sparse": {"4096"},
		"digest": {"true"}, "allow_path": {"/jobs/d", "/e"}, "journal": {"/jobs/j"}}) {
		t.Errorf("values %v", got)
	}
	if b.Name != "b/ü" || b.Source != "/jobs/b.vmdk" || b.Target != "/b.raw" || b.HostKey() != "server vc2" || b.HookTimeout != time.Second ||
		!reflect.DeepEqual(b.Labels(), map[string]string{"wave": "2", "site": "x"}) || !slices.Equal(b.Before, []string{"x", "y z"}) {
		t.Errorf("job %+v", b)
	}
	if len(f.Warnings) != 1 || !strings.HasPrefix(f.Warnings[0], "jobs[1].password: the secret is in plain text") || strings.Contains(f.Warnings[0], "plain:") {
		t.Errorf("warnings %q", f.Warnings)
	}
	if !slices.Equal(checked, []string{"0", "b/ü"}) {
		t.Errorf("checked as a whole: %q", checked)
	}
}

func TestFingerprintIsOfWhatDecides(t *testing.T) {
	print := func(fields string) string {
		t.Helper()
		f, err := load(`{"version":1,"jobs":[{"source":"a","target":"b"` + fields + `}]}`)
		if err != nil {
			t.Fatal(err)
		}
		return f.Jobs[0].Fingerprint()
	}
	plain := print("")
	for _, same := range []string{`,"password":"x"`, `,"depth":9`, `,"labels":{"a":"b"}`, `,"host":"h"`, `,"before":["x"]`, `,"name":"n"`} {
		if print(same) != plain {
			t.Errorf("%s makes another target", same)
		}
	}
	for _, other := range []string{`,"verify":true`, `,"server":"s"`, `,"allow_path":["x"]`} {
		if print(other) == plain {
			t.Errorf("%s makes the same target", other)
		}
	}
}

func TestSelect(t *testing.T) {
	var jobs []string
	for i := range 12 {
		jobs = append(jobs, fmt.Sprintf(`{"name":"n%d","source":"a","target":"t%d","labels":{"wave":"%d","odd":"%v"}}`, i, i, i%3, i%2 == 1))
	}
	f, err := load(`{"version":1,"jobs":[` + strings.Join(jobs, ",") + `]}`)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		s    batch.Selection
		want string // the names, or an error
	}{
		{batch.Selection{}, "n0 n1 n2 n3 n4 n5 n6 n7 n8 n9 n10 n11"},
		{batch.Selection{Names: []string{"n7", "n2"}}, "n2 n7"},
		{batch.Selection{Labels: map[string]string{"wave": "1", "odd": "true"}}, "n1 n7"},
		{batch.Selection{Names: []string{"n1"}, Labels: map[string]string{"wave": "0"}}, "none of the jobs with the given names has all given labels"},
		{batch.Selection{Names: []string{"x"}}, `no job is called "x"`},
		{batch.Selection{Labels: map[string]string{"wave": ""}}, "none of the 12 jobs of the file has all given labels"},
	} {
		got := ""
		selected, err := f.Select(c.s)
		for _, j := range selected {
			got += " " + j.Name
		}
		if got = strings.TrimSpace(got); err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%+v: %s, want %s", c.s, got, c.want)
		}
	}
	// Shards split the jobs, and each has some.
	seen := map[string]int{}
	for i := range 3 {
		selected, err := f.Select(batch.Selection{Shard: i, Shards: 3})
		if err != nil || len(selected) == 0 {
			t.Errorf("shard %d: %d jobs, %v", i, len(selected), err)
		}
		for _, j := range selected {
			seen[j.Name]++
		}
	}
	for _, j := range f.Jobs {
		if seen[j.Name] != 1 {
			t.Errorf("%s is in %d shards", j.Name, seen[j.Name])
		}
	}
	// printf web01-0 | sha256sum | cut -c1-8 is what other programs count.
	if got := batch.Shard("web01-0", 1<<32); got != 0xb0a069c4 {
		t.Errorf("Shard of web01-0 is %#x", got)
	}
	for _, bad := range []string{"", "1", "4/4", "-1/4", "a/b", "1/0", "0/4/2"} {
		if _, _, err := batch.ParseShard(bad); err == nil {
			t.Errorf("ParseShard(%q) takes it", bad)
		}
	}
	if i, n, err := batch.ParseShard("3/4"); i != 3 || n != 4 || err != nil {
		t.Errorf("ParseShard: %d of %d, %v", i, n, err)
	}
}

// TestSchemaIsStrict checks that the schema accepts what Load accepts, and refuses
// unknown fields and wrong types.
func TestSchemaIsStrict(t *testing.T) {
	schema := decode(t, batch.Schema(testSpec()))
	for text, want := range map[string]bool{
		`{"version":1,"jobs":[{"source":"a","target":"b"}]}`:                                                     true,
		`{"version":1,"defaults":{"source":"a"},"jobs":[{"target":"b"}]}`:                                        true,
		`{"version":1,"limits":{"rate":"5MiB","total":3},"jobs":[{"source":"a","target":"b","sparse":"64KiB"}]}`: true,
		`{"version":1,"jobs":[{"source":"a","target":"b","digest":true,"labels":{"a":"b"},"allow_path":["x"]}]}`: true,
		`{"version":1,"jobs":[{"source":"a"}]}`:                                                                  false,
		`{"version":2,"jobs":[{"source":"a","target":"b"}]}`:                                                     false,
		`{"version":1,"jobs":[]}`: false,
		`{"version":1,"jobs":[{"source":"a","target":"b","compres":"x"}]}`:            false,
		`{"version":1,"jobs":[{"source":"a","target":"b","format":"vhd"}]}`:           false,
		`{"version":1,"jobs":[{"source":"a","target":"b","verify":"yes"}]}`:           false,
		`{"version":1,"jobs":[{"source":"a","target":"b","before":[]}]}`:              false,
		`{"version":1,"jobs":[{"source":"a","target":"b","before":[1]}]}`:             false,
		`{"version":1,"limits":{"rate":"fast"},"jobs":[{"source":"a","target":"b"}]}`: false,
		`{"version":1,"limits":{"total":0},"jobs":[{"source":"a","target":"b"}]}`:     false,
		`{"version":1,"jobs":[{"source":"a","target":"b","sparse":"64 KiB"}]}`:        false,
		`{"version":1,"jobs":[{"source":"a","target":"b","hook_timeout":"soon"}]}`:    false,
		`{"version":1,"defaults":{"name":"n"},"jobs":[{"source":"a","target":"b"}]}`:  false,
		`{"version":1,"jobs":[{"source":"a","target":"b","labels":{"a":1}}]}`:         false,
		`{"version":1,"jobs":[{"source":"a","target":"b","depth":1.5}]}`:              false,
		`{"jobs":[{"source":"a","target":"b"}]}`:                                      false,
	} {
		problem := validate(schema, schema, decode(t, []byte(text)), "")
		if (problem == "") != want {
			t.Errorf("%s: %q by the schema, want valid %v", text, problem, want)
		}
		if _, err := load(text); (err == nil) != want {
			t.Errorf("%s: %v by Load, want valid %v", text, err, want)
		}
	}
}

func decode(t *testing.T, text []byte) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
