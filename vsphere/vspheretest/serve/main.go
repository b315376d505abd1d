// Command serve runs a simulated vCenter server, with which vddkcp can be tried without vSphere. It
// prints the flags for vddkcp and then obeys commands from standard input. Run it in the root
// directory of the repository:
//
//	make build
//	go run ./vsphere/vspheretest/serve [FLAGS] [FILE]
//
// FILE describes the inventory, as package vspheretest says. The server ends with the signal
// SIGINT.
//
// With the flag -run COMMAND, the server does not print flags and reads no commands. It runs
// COMMAND in a shell whose environment variables tell vddkcp and govc where the server is, and ends
// when COMMAND ends.
//
// The disks are served by the stand-in for VDDK's library, which needs a C compiler, and over NFC
// by stand-ins for the ESXi hosts. With the flag -nfc, no library is built. The flags whose names
// begin with "nfc-" change the hosts; they replace a line "nfc" of FILE.
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// inventory is what the server has without a FILE.
const inventory = `
vm web01 folder=prod disks=2 size=64MiB
vm db01 folder=prod disks=1 size=256MiB tracking
vm 'old server' power=off disks=1 size=16MiB
disk db01 size=8MiB mode=independent_persistent
snapshot db01 'before the update'
`

func main() {
	var o options
	flag.BoolVar(&o.calls, "calls", false, "log each call on standard error")
	flag.StringVar(&o.command, "run", "", "run this `COMMAND` in a shell, with the server in its environment, and end with it")
	flag.BoolVar(&o.nfc, "nfc", false, "serve the disks only over NFC, without a library for VDDK")
	for key, usage := range map[string]string{
		"profile":     "the version of the `HOSTS`: esxi8, esxi703, esxi70, esxi67 or esxi60",
		"latency":     "the hosts delay each answer by this `TIME`, such as 20ms",
		"memory":      "the `SIZE` of the memory of a host for the buffers of clients, such as 48MiB",
		"connections": "the largest `NUMBER` of connections of a host",
		"fragment":    "the largest `SIZE` of a part of an answer, such as 64KiB",
	} {
		flag.Func("nfc-"+key, usage, func(value string) error {
			o.hosts = append(o.hosts, key+"="+value)
			return nil
		})
	}
	flag.Parse()
	o.file = flag.Arg(0)
	if err := o.run(); err != nil {
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
			os.Exit(exit.ExitCode()) // the status of the command of -run
		}
		fmt.Fprintln(os.Stderr, "serve:", err)
		os.Exit(1)
	}
}

type options struct {
	file    string
	calls   bool
	nfc     bool
	command string   // "": serve until SIGINT
	hosts   []string // words of a line "nfc"
}

// inventory returns the options that the file and the flags describe.
func (o *options) inventory() (vspheretest.Options, error) {
	text := inventory
	if o.file != "" {
		b, err := os.ReadFile(o.file)
		if err != nil {
			return vspheretest.Options{}, err
		}
		text = string(b)
	}
	abs := func(image string) string { return image }
	result, err := vspheretest.Parse(text, abs)
	if err != nil {
		return result, fmt.Errorf("%s: %w", o.file, err)
	}
	if len(o.hosts) > 0 {
		hosts, err := vspheretest.Parse("nfc "+strings.Join(o.hosts, " "), abs)
		if err != nil {
			return result, fmt.Errorf("the flags for NFC: %w", err)
		}
		result.NFC = hosts.NFC
	}
	return result, nil
}

func (o *options) run() error {
	options, err := o.inventory()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "vcenter-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	options.Dir = filepath.Join(dir, "images")
	if o.calls {
		options.Log = os.Stderr
	}
	if err := os.Mkdir(options.Dir, 0o755); err != nil {
		return err
	}
	how := " --via nfc"
	if !o.nfc {
		options.LibDir = filepath.Join(dir, "lib")
		how = " --libdir " + options.LibDir
		if out, err := exec.Command("vddk/testlib/build", options.LibDir).CombinedOutput(); err != nil {
			return fmt.Errorf("building the stand-in library, in the root directory of the repository: %v\n%s", err, out)
		}
	}
	s, err := vspheretest.Start(options)
	if err != nil {
		return err
	}
	defer s.Close()
	if o.command != "" {
		return runCommand(o.command, s, options.LibDir)
	}
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, []byte(s.Password+"\n"), 0o600); err != nil {
		return err
	}
	fmt.Printf(`Flags for vddkcp:
  --server %s --port %d --user %s --password +%s --thumbprint %s%s
For govc:
  export GOVC_INSECURE=1 GOVC_URL='%s'
Commands are read from standard input; "help" lists them.
`, s.Host, s.Port, s.User, password, s.Thumbprint(), how, s.URL)
	go obey(s, os.Stdin)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	<-stop
	return nil
}

// runCommand runs a command in a shell. Environment variables tell the command where the server is.
// libDir is the folder of the stand-in library; "": disks are read over NFC.
func runCommand(command string, s *vspheretest.Server, libDir string) error {
	c := exec.Command("/bin/sh", "-c", command)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	inherited := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "VDDKCP_") })
	c.Env = append(inherited, "VDDKCP_SERVER="+s.Host, fmt.Sprintf("VDDKCP_PORT=%d", s.Port), "VDDKCP_USER="+s.User,
		"VDDKCP_PASSWORD="+s.Password, "VDDKCP_THUMBPRINT="+s.Thumbprint(), "GOVC_INSECURE=1", "GOVC_URL="+s.URL.String())
	if libDir != "" {
		c.Env = append(c.Env, "VDDKCP_LIBDIR="+libDir)
	} else {
		c.Env = append(c.Env, "VDDKCP_VIA=nfc")
	}
	// A SIGINT of the terminal is for the command, which may be a shell that a person types in. An
	// ignored signal would also be ignored by the command, so the signal has a channel.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	return c.Run()
}

// obey runs the commands that r has, one per line.
func obey(s *vspheretest.Server, r io.Reader) {
	for in := bufio.NewScanner(r); in.Scan(); {
		words, err := vspheretest.Words(in.Text())
		if err != nil {
			fmt.Println(err)
			continue
		}
		if len(words) == 0 {
			continue
		}
		if words[0] == "help" {
			fmt.Print(vspheretest.Usage())
			continue
		}
		output, err := s.Command(words...)
		if err != nil {
			fmt.Println(err)
		}
		fmt.Print(output)
	}
}
