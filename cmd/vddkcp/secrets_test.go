package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// TestSecretsStayInside checks that no process has the password in its arguments or
// environment during a copy, and that no log or report contains it.
func TestSecretsStayInside(t *testing.T) {
	peer.Need(t, "gcc")
	const marker = "m4rk3r-0f-a-secret"
	dir := t.TempDir()
	lib := filepath.Join(dir, "lib")
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
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	thumbprint := pairs(strings.Repeat("AB", 20))
	write(filepath.Join(lib, "vddktest.conf"), "user u\npassword "+marker+"\ncookie "+marker+"-c\nport 1\nthumbprint "+thumbprint+"\nhostile-log\nlog-reads\nfault ReadAsync at=1 do=hang\n")
	write(filepath.Join(lib, "disks/ds/a.vmdk"), strings.Repeat("x", 1<<20))
	write(filepath.Join(dir, "pw"), marker+"\n")
	report := filepath.Join(dir, "report.json")
	write(filepath.Join(dir, "config/vddkcp/config.json"), `{"servers": {
		"plain": {"server": "localhost", "password": "`+marker+`", "cookie": "`+marker+`-c"},
		"file": {"server": "localhost", "user": "u", "password": "+../../pw"}}}`)
	config := "XDG_CONFIG_HOME=" + filepath.Join(dir, "config")
	for name, c := range map[string]struct{ flag, env string }{
		"a file":      {"--password=+" + filepath.Join(dir, "pw"), ""},
		"environment": {"--retries=0", "VDDKCP_PASSWORD=" + marker},
		"a profile":   {"--profile=plain", config},
		"its file":    {"--profile=file", config},
		"a cookie":    {"--password=+" + filepath.Join(dir, "pw"), "VDDKCP_COOKIE=" + marker + "-c"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := command(t, "--force", "[ds] a.vmdk", filepath.Join(dir, "out.raw"), "-v", "--report", report, "--libdir", lib, "--server", "localhost", "--port", "1",
				"--user", "u", "--vm", "moref=1", "--thumbprint", thumbprint, "--connections", "1", "--progress", "none", c.flag)
			if cmd.Env = os.Environ(); c.env != "" {
				cmd.Env = append(cmd.Env, c.env)
			}
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var log strings.Builder
			scanned := false
			lines := bufio.NewScanner(stderr)
			lines.Buffer(nil, 1<<20)
			for lines.Scan() {
				fmt.Fprintln(&log, lines.Text())
				if !scanned && strings.Contains(lines.Text(), "plan") { // it is open, and soon hangs
					scanned = true
					workers := findSecret(t, marker, cmd.Process.Pid)
					if workers == 0 {
						t.Error("no worker was seen")
					}
					cmd.Process.Signal(syscall.SIGTERM)
				}
			}
			if err := lines.Err(); err != nil {
				t.Error(err)
			}
			cmd.Wait()
			if got := cmd.ProcessState.ExitCode(); !scanned || got != 143 {
				t.Errorf("looked into it: %v; exit status %d, want 143", scanned, got)
			}
			text, err := os.ReadFile(report)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(log.String()+string(text), marker) {
				t.Errorf("the log or the file contains the secret:\n%s\n%s", log.String(), text)
			}
			if t.Failed() {
				t.Log(log.String())
			}
		})
	}
}

// findSecret searches the arguments and the environment of each process for marker,
// except for the environment of the process that got the password there. It returns the
// number of workers of that process.
func findSecret(t *testing.T, marker string, given int) (workers int) {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processes {
		arguments, _ := os.ReadFile(p + "/cmdline") // it may be gone
		environment, _ := os.ReadFile(p + "/environ")
		if strings.Contains(string(arguments), marker) {
			t.Errorf("%s: %q", p, arguments)
		}
		if p != "/proc/"+strconv.Itoa(given) && strings.Contains(string(environment), marker) {
			t.Errorf("%s: the environment of %q has it", p, arguments)
		}
		stat, _ := os.ReadFile(p + "/stat")
		_, after, _ := strings.Cut(string(stat), ") ")
		if fields := strings.Fields(after); len(fields) > 1 && fields[1] == strconv.Itoa(given) {
			workers++
		}
	}
	return workers
}

// TestWordAfterPlusIsNotShown checks that a word after + that names no file is not
// printed, because it may be the password itself.
func TestWordAfterPlusIsNotShown(t *testing.T) {
	const word = "Hidden-w0rd"
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Mkdir(in(word+"-folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, field, value string) string {
		t.Helper()
		text := fmt.Sprintf(`{"version":1,"jobs":[{"source":"[ds] a.vmdk","target":"%s","server":"h","user":"u","vm":"moref=1","thumbprint":"%s","libdir":"%s",%q:%q}]}`,
			in("out.raw"), strings.Repeat("ab", 20), dir, field, value)
		if err := os.WriteFile(in(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return in(name)
	}
	remote := []string{"--server", "h", "--user", "u", "--vm", "moref=1", "--thumbprint", strings.Repeat("ab", 20), "--libdir", dir, "-v"}
	state := []string{"--state", in("state.json"), "--report", in("r.json"), "--report", in("r.html"), "--log-dir", in("logs"), "-v"}
	for name, args := range map[string][]string{
		"password":          append([]string{"copy", "[ds] a.vmdk", "null:", "--password", "+" + word, "--report", in("r.json"), "--log-file", in("log")}, remote...),
		"with =":            append([]string{"copy", "[ds] a.vmdk", "null:", "--password=+" + word, "--report", in("r.json")}, remote...),
		"JSON":              append([]string{"copy", "[ds] a.vmdk", "null:", "--password=+" + word, "--progress", "json", "--log-file", in("log"), "--log-format", "json"}, remote...),
		"cookie":            append([]string{"copy", "[ds] a.vmdk", "null:", "--cookie", "+" + word, "--report", in("r.json")}, remote...),
		"a folder":          append([]string{"info", "[ds] a.vmdk", "--password", "+" + in(word+"-folder")}, remote...),
		"a file in no file": append([]string{"map", "[ds] a.vmdk", "--password", "+/dev/null/" + word}, remote...),
		"verify":            append([]string{"verify", "[ds] a.vmdk", "/dev/null", "--cookie", "+" + word}, remote...),
		"export":            append([]string{"export", "[ds] a.vmdk", "--password", "+" + word}, remote...),
		"nbdkit's words":    {"copy", "libdir=" + dir, "server=h", "user=u", "vm=moref=1", "thumbprint=" + strings.Repeat("ab", 20), "password=+" + word, "[ds] a.vmdk", "null:"},
		"a batch":           append([]string{"run", write("jobs.json", "password", "+"+word)}, state...),
		"a batch's cookie":  append([]string{"run", write("cookie.json", "cookie", "+"+word)}, state...),
		"a check":           {"run", write("check.json", "password", "+"+word), "--check", "-v"},
		"a wrong word":      {"run", write("fd.json", "password", "-"+word)},
		"a wrong kind":      {"run", write("kind.json", "passwort", "+"+word)},
		"a misspelt flag":   append([]string{"copy", "[ds] a.vmdk", "null:", "--pasword=+" + word}, remote...),
		"a misspelt key":    {"copy", "server=h", "pasword=+" + word, "[ds] a.vmdk", "null:"},
		"no file at all":    append([]string{"copy", "[ds] a.vmdk", "null:", "--password", "+"}, remote...),
	} {
		t.Run(name, func(t *testing.T) {
			out, err := command(t, args...).CombinedOutput()
			if err == nil {
				t.Fatalf("it succeeded\n%s", out)
			}
			if strings.Contains(string(out), word) {
				t.Errorf("shown:\n%s", out)
			}
			for _, pattern := range []string{"state.json*", "r.*", "log", "logs/*"} {
				files, _ := filepath.Glob(in(pattern))
				for _, file := range files {
					text, err := os.ReadFile(file)
					if err != nil || strings.Contains(string(text), word) {
						t.Errorf("%s: %v\n%s", file, err, text)
					}
					if info, err := os.Stat(file); err != nil || !strings.Contains(file, "log") && info.Mode().Perm() != 0o600 {
						t.Errorf("%s: mode %v, %v; want 0600", file, info.Mode(), err)
					}
					os.Remove(file)
				}
			}
		})
	}
}
