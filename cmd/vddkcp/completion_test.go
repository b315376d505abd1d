package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// completionFolder makes a folder with files, and a folder home with the profile vc1.
func completionFolder(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range map[string]string{
		"my disk.vmdk":                    "",
		"jobs.json":                       `{"version": 1, "defaults": {"labels": {"site": "hq"}}, "jobs": [{"name": "web01", "labels": {"wave": "1"}}, {"name": "db 1"}, {}, {"name": ` + strconv.Quote(oddName) + `}]}`,
		"home/.config/vddkcp/config.json": `{"servers": {"vc1": {"server": "vc.example.com"}, "lab": {"server": "esxi.lab"}}}`,
		"reports/night.html":              "",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestCompleteWords(t *testing.T) {
	dir := completionFolder(t)
	t.Setenv("HOME", filepath.Join(dir, "home"))
	t.Setenv("XDG_CONFIG_HOME", "")
	t.Chdir(dir)
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		// Commands, and the default command without its name.
		"ve":                        "files  verify version",
		"m":                         "files  map", // not the hidden command
		"profile ":                  "none  add list remove",
		"--log-level debug ver":     "files  verify version",
		"my.vmdk ":                  "files ",
		"my.vmdk n":                 "files  null:",
		"a b ":                      "none ",
		"--preallocation ":          "none  off falloc full",
		"-- ver":                    "files ",
		"verify -- --s":             "files ",
		"completion ":               "none  bash zsh fish",
		"thumbprint ":               "none ",
		"ls ":                       "none ",
		"vm web01 ":                 "files ",
		"run ":                      "files ",
		"profile remove ":           "none  lab vc1",
		"profile add ":              "none ",
		"profile remove vc1 ":       "none ",
		"copy --resu":               "none  --resume",
		"info --resu":               "none ", // not a flag of this command
		"map --js":                  "none  --json",
		"profile add vc1 --ye":      "none  --yes",
		"no-such-command --ye":      "none ",
		"--frobnicate --ver":        "none  --version --verbose --verify",
		"copy --format=q":           "none  --format=qcow2",
		"copy --format q":           "none  qcow2",
		"copy --frobnicate=q":       "none ",
		"copy --digest=":            "none  --digest=blksum --digest=sha256",
		"copy --digest m":           "files ", // the value must follow an equals sign
		"copy --report x":           "files ",
		"copy --report=x":           "files --report=",
		"run --log-dir ":            "folders ",
		"run --log-dir=":            "folders --log-dir=",
		"ls --profile ":             "none  lab vc1",
		"ls --profile=l":            "none  --profile=lab",
		"ls --password +":           "files +",
		"ls --password=+x":          "files --password=+",
		"ls --password x":           "none ",
		"export --export db=x":      "files db=",
		"export --export=db=x":      "files --export=db=",
		"export --listen u":         "none  unix:",
		"export --listen unix:/":    "files unix:",
		"copy -D ":                  "none  vddk.diskinfo=1 vddk.extents=1 vddk.datapath=1 vddk.stats=1",
		"copy -vD vddk.s":           "none  vddk.stats=1",
		"run jobs.json --only ":     "none  2|db 1|" + oddName + "|web01",
		"run jobs.json --only d":    "none  db 1",
		"run jobs.json --only=a,w":  "none  --only=a,web01",
		"run jobs.json --label ":    "none  site=hq wave=1",
		"run none.json --only ":     "none ",
		"run . --only ":             "none ",
		"run --only ":               "none ",
		"run --check jobs.json -vx": "none ",
	} {
		words := strings.Split(line, " ")
		var out strings.Builder
		if status := printCompletions(&out, parser.Model, append([]string{"bash"}, words...)); status != 0 {
			t.Errorf("%q: status %d", line, status)
		}
		lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
		var got []string
		for _, l := range lines[1:] {
			word, _, _ := strings.Cut(l, "\t")
			got = append(got, word)
		}
		kind, list, _ := strings.Cut(want, " ")
		prefix, list, _ := strings.Cut(list, " ")
		wanted := strings.Fields(list)
		if strings.Contains(list, "|") {
			wanted = strings.Split(list, "|")
		} else if list == "db 1" {
			wanted = []string{list}
		}
		if lines[0] != kind+" "+prefix || !slices.Equal(got, wanted) {
			t.Errorf("%q: %q with %q, want %q", line, lines[0], got, want)
		}
	}
}

func TestUnquote(t *testing.T) {
	for word, want := range map[string]string{
		`a\ b`: "a b", `'a b'`: "a b", `"a b"`: "a b", `"a b`: "a b", `'a`: "a", `a'\'b`: `a\b`, `"\a\""`: `\a"`, `a\`: "a", `--x='a b`: "--x=a b",
	} {
		if got := unquote(word); got != want {
			t.Errorf("%s: %q, want %q", word, got, want)
		}
	}
}

// oddName is the name of a job with all characters that shells replace.
const oddName = "odd $(touch made) `touch made`'\\\"x"

// typed are lines as a user types them before the key TAB, with the words that the shell then has.
var typed = []struct {
	line string
	want []string
}{
	{`ru`, []string{"run"}},
	{`my`, []string{"my disk.vmdk"}},
	{`info my\ d`, []string{"info", "my disk.vmdk"}},
	{`info "my d`, []string{"info", "my disk.vmdk"}},
	{`verify -- my`, []string{"verify", "--", "my disk.vmdk"}},
	{`copy 'vm:web01#1' my`, []string{"copy", "vm:web01#1", "my disk.vmdk"}},
	{`copy vm:web01 my`, []string{"copy", "vm:web01", "my disk.vmdk"}},
	{`copy nbd://localhost/a --preallocation=fu`, []string{"copy", "nbd://localhost/a", "--preallocation=full"}},
	{`map nbd://localhost/a --js`, []string{"map", "nbd://localhost/a", "--json"}},
	{`copy --preallocation fu`, []string{"copy", "--preallocation", "full"}},
	{`copy --report=my`, []string{"copy", "--report=my disk.vmdk"}},
	{`copy --report my`, []string{"copy", "--report", "my disk.vmdk"}},
	{`run jobs.json --log-dir=rep`, []string{"run", "jobs.json", "--log-dir=reports"}},
	{`run jobs.json --only d`, []string{"run", "jobs.json", "--only", "db 1"}},
	{`run jobs.json --only "d`, []string{"run", "jobs.json", "--only", "db 1"}},
	{`run jobs.json --only o`, []string{"run", "jobs.json", "--only", oddName}}, // no shell runs a part of a name
	{`run jobs.json --only "o`, []string{"run", "jobs.json", "--only", oddName}},
	{`run jobs.json --only 'o`, []string{"run", "jobs.json", "--only", oddName}},
	{`run jobs.json --only=web01,d`, []string{"run", "jobs.json", "--only=web01,db 1"}},
	{`run jobs.json --label wa`, []string{"run", "jobs.json", "--label", "wave=1"}},
	{`ls --profile v`, []string{"ls", "--profile", "vc1"}},
	{`profile remove v`, []string{"profile", "remove", "vc1"}},
	{`export --listen unix:my`, []string{"export", "--listen", "unix:my disk.vmdk"}},
	{`ls --password=+my`, []string{"ls", "--password=+my disk.vmdk"}},
	{`ls --password +my`, []string{"ls", "--password", "+my disk.vmdk"}},
	{`ls my`, []string{"ls", "my"}}, // the name of a VM, and no file
	{`copy 'a b.raw' --resu`, []string{"copy", "a b.raw", "--resume"}},
}

// TestCompletionInShells types lines on a terminal on which a shell runs, with the key TAB at the
// end, and compares the words that the shell then has.
func TestCompletionInShells(t *testing.T) {
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	for shell, setup := range map[string]struct {
		args []string
		line string
	}{
		"bash": {[]string{"--norc", "--noprofile", "-i"}, "source <(vddkcp completion bash)"},
		"zsh":  {[]string{"-f", "-i"}, "bindkey -e; autoload -Uz compinit; compinit -u -D; source <(vddkcp completion zsh)"},
		"fish": {[]string{"--no-config", "--private", "-i"}, "set -g fish_autosuggestion_enabled 0; vddkcp completion fish | source"},
	} {
		t.Run(shell, func(t *testing.T) {
			peer.Need(t, shell)
			dir := completionFolder(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			// The terminal is file descriptor 3.
			cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `exec "$0" "$@" <&3 >&3 2>&3 3>&-`, shell}, setup.args...)...)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"), "HOME="+filepath.Join(dir, "home"),
				"XDG_CONFIG_HOME=", "TERM=xterm", "INPUTRC=/dev/null", "HISTFILE=", "LC_ALL=C.UTF-8")
			terminal, err := startOnTerminal(cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				cmd.Process.Kill()
				cmd.Wait()
				terminal.Close()
			}()
			if err := unix.IoctlSetWinsize(int(terminal.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 500}); err != nil {
				t.Fatal(err)
			}
			var shown strings.Builder
			// enter types a line that prints the given text, and waits for the text.
			enter := func(keys, text string) {
				t.Helper()
				if _, err := io.WriteString(terminal, keys+"\n"); err != nil {
					t.Fatal(err)
				}
				from := shown.Len()
				b := make([]byte, 4096)
				for !strings.Contains(shown.String()[from:], text) {
					n, err := terminal.Read(b)
					shown.Write(b[:n])
					if err != nil && !(errors.Is(err, unix.EIO) && n > 0) {
						t.Fatalf("%v\n%s", err, &shown)
					}
				}
			}
			enter(setup.line+"; echo set'up'", "setup")
			for i, c := range typed {
				out := filepath.Join(dir, fmt.Sprintf("out%d", i))
				// Ctrl+A and Ctrl+E go to the beginning and the end of the line. The line then
				// writes its own words into a file.
				enter(fmt.Sprintf("vddkcp %s\t\x01printf '%%s\\n' \x05 >%s; echo don'e'%d.", c.line, out, i), fmt.Sprintf("done%d.", i))
				// zsh removes the slash after the name of a folder if a blank follows.
				got := strings.Split(strings.TrimSuffix(strings.TrimSuffix(string(read(t, out)), "\n"), "/"), "\n")
				if want := append([]string{"vddkcp"}, c.want...); !slices.Equal(got, want) {
					t.Errorf("%s: %q, want %q", c.line, got, want)
				}
			}
			if t.Failed() {
				t.Logf("%q", shown.String())
			}
		})
	}
}
