package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	testscript.Main(testMain{m}, map[string]func(){"vddkcp": func() {
		systemConfig = cmp.Or(os.Getenv("TEST_SYSTEM_CONFIG"), systemConfig) // scripts set it
		main()
	}})
}

// testMain removes what the tests built.
type testMain struct{ *testing.M }

func (m testMain) Run() int {
	defer removeBinary()
	// The servers and profiles of the developer must not become part of the tests.
	for _, name := range append([]string{"VDDKCP_PASSWORD", "VDDKCP_COOKIE"}, connectionVariables...) {
		os.Unsetenv(name)
	}
	// Programs inherit ignored signals: nohup ignores SIGHUP, and a shell ignores
	// SIGINT for its background jobs. A signal that has a handler here has its default
	// action in the programs that the tests start.
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	return m.M.Run()
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Condition: func(condition string) (bool, error) {
			if condition != "ipv6" {
				return false, fmt.Errorf("no condition is called %s", condition)
			}
			l, err := net.Listen("tcp", "[::1]:0")
			if err == nil {
				l.Close()
			}
			return err == nil, nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":    cmdExits,
			"holes":    cmdHoles,
			"server":   cmdServer,
			"standin":  cmdStandIn,
			"terminal": cmdTerminal,
			"testtool": cmdTestTool,
			"vc":       cmdVC,
			"vcenter":  cmdVcenter,
		},
		Setup: setupVcenter,
	})
}

// cmdExits runs a program and demands an exit status: exits N PROGRAM ARGS...
func cmdExits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits N PROGRAM ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	status := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		status = exit.ExitCode()
	}
	if status != want {
		ts.Fatalf("exit status %d, want %d", status, want)
	}
}

// cmdHoles demands that a file has holes, or, negated, none.
func cmdHoles(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] holes FILE")
	}
	var st unix.Stat_t
	ts.Check(unix.Stat(ts.MkAbs(args[0]), &st))
	if allocated := st.Blocks * 512; (allocated < st.Size) == neg {
		ts.Fatalf("%s: %d of %d bytes are allocated", args[0], allocated, st.Size)
	}
}

// TestEveryFlagIsTestedAndDocumented checks that each flag is in a test script and in
// docs/cli.md.
func TestEveryFlagIsTestedAndDocumented(t *testing.T) {
	var c cli
	parser, err := newParser(&c, os.Stdout, os.Stderr, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	contract, err := os.ReadFile("../../docs/cli.md")
	if err != nil {
		t.Fatal(err)
	}
	var scripts strings.Builder
	files, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(text), "\n") {
			if strings.Contains(line, "vddkcp ") {
				scripts.WriteString(line + "\n")
			}
		}
	}
	seen := 0
	err = kong.Visit(parser.Model, func(node kong.Visitable, next kong.Next) error {
		if flag, ok := node.(*kong.Flag); ok {
			seen++
			name := "--" + flag.Name
			if !hasWord(scripts.String(), name) && (flag.Short == 0 || !hasWord(scripts.String(), "-"+string(flag.Short))) {
				t.Errorf("%s is used in no script of testdata/script", name)
			}
			if !hasWord(string(contract), name) && !hasWord(string(contract), "-"+string(flag.Short)) {
				t.Errorf("%s is not in docs/cli.md", name)
			}
			if flag.Help == "" {
				t.Errorf("%s has no help", name)
			}
		}
		return next(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen < 10 {
		t.Errorf("only %d flags were looked at", seen)
	}
}

// hasWord reports whether text has a flag's name that is not the start of a longer one.
func hasWord(text, name string) bool {
	for {
		i := strings.Index(text, name)
		if i < 0 {
			return false
		}
		text = text[i+len(name):]
		if text == "" || !strings.ContainsRune("-abcdefghijklmnopqrstuvwxyz", rune(text[0])) {
			return true
		}
	}
}
