// Command serve runs a simulated vCenter server, with which vddkcp can be tried without vSphere. It
// prints the flags for vddkcp and then obeys commands from standard input. Run it in the root
// directory of the repository:
//
//	make build
//	go run ./vsphere/vspheretest/serve [FILE]
//
// FILE describes the inventory, as package vspheretest says. The server ends with the signal SIGINT.
// Its disks are served by the stand-in for VDDK's library, which needs a C compiler.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
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
	calls := flag.Bool("calls", false, "log each call on standard error")
	flag.Parse()
	if err := run(flag.Arg(0), *calls); err != nil {
		fmt.Fprintln(os.Stderr, "serve:", err)
		os.Exit(1)
	}
}

func run(file string, calls bool) error {
	text := inventory
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		text = string(b)
	}
	options, err := vspheretest.Parse(text, func(image string) string { return image })
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	dir, err := os.MkdirTemp("", "vcenter-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	options.LibDir, options.Dir = filepath.Join(dir, "lib"), filepath.Join(dir, "images")
	if calls {
		options.Log = os.Stderr
	}
	if err := os.Mkdir(options.Dir, 0o755); err != nil {
		return err
	}
	if out, err := exec.Command("vddk/testlib/build", options.LibDir).CombinedOutput(); err != nil {
		return fmt.Errorf("building the stand-in library, in the root directory of the repository: %w\n%s", err, out)
	}
	s, err := vspheretest.Start(options)
	if err != nil {
		return err
	}
	defer s.Close()
	password := filepath.Join(dir, "password")
	if err := os.WriteFile(password, []byte(s.Password+"\n"), 0o600); err != nil {
		return err
	}
	fmt.Printf(`Flags for vddkcp:
  --server %s --port %d --user %s --password +%s --thumbprint %s --libdir %s
For govc:
  export GOVC_INSECURE=1 GOVC_URL='%s'
Commands are read from standard input; "help" lists them.
`, s.Host, s.Port, s.User, password, s.Thumbprint(), options.LibDir, s.URL)
	go obey(s, os.Stdin)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	<-stop
	return nil
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
