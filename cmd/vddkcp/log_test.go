package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"
)

// TestEveryErrorIsJSON runs every command so that it fails, with --log-format json. Every line on
// standard error must be JSON, and one of them an error.
func TestEveryErrorIsJSON(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	disk, jobs := write("disk.raw", strings.Repeat("x", 4096)), write("jobs.json", `{"version":1,"jobs":[{"name":"a","source":"/nowhere","target":"`+dir+`/a.raw"}]}`)
	wrong := write("wrong.json", `{"version":1,"jobs":[{"nome":"a"}]}`)
	gone := filepath.Join(dir, "gone")
	server := []string{"--server", "127.0.0.1:1", "--user", "u", "--password", "+" + write("password", "p\n"), "--thumbprint", strings.Repeat("ab", 20)}
	tested := map[string]bool{}
	for _, words := range []string{
		"copy " + gone + " x", "copy " + disk + " " + dir + "/t.raw --verify --digest=md5", "copy", "copy " + disk, "copy " + disk + " x --nothing", "copy [ds] " + disk,
		disk + " " + disk, "exprot x", "warm x", "vm web01 " + dir, "vm web01", "export " + gone, "export", "export " + disk + " --listen nowhere",
		"run " + jobs, "run " + jobs + " --check", "run " + wrong, "run " + gone, "info " + gone, "map " + gone, "verify " + gone + " " + disk, "verify " + disk,
		"verify --digest " + strings.Repeat("0", 64) + " " + disk,
		"ls", "jobs web01", "check web01", "cleanup web01", "vddk --libdir " + gone, "thumbprint 127.0.0.1:1",
		"profile add x --yes", "profile list x", "profile remove x", "completion nosuchshell", "version x", "man " + gone + "/x",
	} {
		args := strings.Fields(words)
		tested[args[0]] = true
		variants := [][]string{append(slices.Clone(args), "--log-format", "json"), append(slices.Clone(args), "--log-format=json", "-v")}
		if slices.Contains([]string{"ls", "vm", "jobs", "check", "cleanup"}, args[0]) {
			variants = append(variants, append(append(slices.Clone(args), server...), "--log-format", "json"))
		}
		for _, args := range variants {
			cmd := command(t, args...)
			cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_STATE_HOME="+dir)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			r := ended(t, cmd, cmd.Run(), &stderr)
			if r.exit == 0 {
				t.Errorf("%s: it did not fail", strings.Join(args, " "))
				continue
			}
			if types := onlyJSON(t, r.stderr); types["error"] == 0 {
				t.Errorf("%s: no error:\n%s", strings.Join(args, " "), r.stderr)
			}
		}
	}
	parser, err := newParser(new(cli), nil, nil, nil, kong.Bind(new(secretEnvironment), new(servers)))
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range parser.Model.Children {
		if !tested[node.Name] {
			t.Errorf("no error of the command %s is tested", node.Name)
		}
	}
}

func TestWantsJSON(t *testing.T) {
	for line, want := range map[string]bool{
		"":                               false,
		"a b --log-format json":          true,
		"a b --log-format=json":          true,
		"a b --log-format text":          false,
		"a b --log-format":               false,
		"a b -- --log-format json":       false,
		"--log-format json --log-file=x": false,
		"--log-file x --progress json":   true,
		"--progress=json":                true,
		"--progress bar":                 false,
	} {
		if got := wantsJSON(strings.Fields(line)); got != want {
			t.Errorf("%q: %v, want %v", line, got, want)
		}
	}
}

// TestTimesInLogs checks that lines of a log have the time in front, because the standard error of
// a test is no terminal, and that errors and hints keep their form.
func TestTimesInLogs(t *testing.T) {
	const stamped = `(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d) `
	var out bytes.Buffer
	slog.New(newPlainHandler(&out, slog.LevelInfo)).Warn("look")
	if !regexp.MustCompile(stamped + "vddkcp: warning: look\n$").MatchString(out.String()) {
		t.Errorf("%q", out.String())
	}
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.vmdk") // no VMDK, so there is a warning
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	r := vddkcp(t, disk, filepath.Join(dir, "disk.raw"))
	for _, want := range []string{"vddkcp: warning: .*has the name of a VMDK", "\\S+disk.raw: 1.0 MiB in "} {
		if r.exit != 0 || !regexp.MustCompile(stamped+want).MatchString(r.stderr) {
			t.Errorf("exit status %d: %s\nwant %s", r.exit, r.stderr, want)
		}
	}
	r = vddkcp(t, disk, filepath.Join(dir, "disk.raw"))
	if !strings.Contains("\n"+r.stderr, "\nvddkcp: copy ") {
		t.Errorf("an error: %s", r.stderr)
	}
}

// TestErrorJournal checks that lines have no time if the journal of systemd reads them.
func TestErrorJournal(t *testing.T) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(os.Stderr.Fd()), &stat); err != nil {
		t.Fatal(err)
	}
	for stream, want := range map[string]bool{"": false, "0:0": false, fmt.Sprintf("%d:%d", stat.Dev, stat.Ino): true} {
		t.Setenv("JOURNAL_STREAM", stream)
		if got := errorJournal(); got != want || want && stamp() != "" {
			t.Errorf("JOURNAL_STREAM %q: %v, stamp %q", stream, got, stamp())
		}
	}
}
