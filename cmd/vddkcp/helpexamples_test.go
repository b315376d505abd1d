package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/manual"
	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// TestEveryCommandHasExamples checks that the help of each command ends with two or three examples,
// and that its lines fit on terminals of 80 and 40 columns.
func TestEveryCommandHasExamples(t *testing.T) {
	var c cli
	parser, err := newParser(&c, io.Discard, io.Discard, func(int) {})
	if err != nil {
		t.Fatal(err)
	}
	book := newManual(parser.Model)
	used := 0
	err = kong.Visit(parser.Model, func(node kong.Visitable, next kong.Next) error {
		if app, ok := node.(*kong.Application); ok {
			node = app.Node
		}
		command, ok := node.(*kong.Node)
		if !ok || command.Hidden {
			return nil
		}
		examples := manual.Of(helpExamples, command.Path())
		used += len(examples)
		if group := command.Parent != nil && len(command.Children) > 0; group != (len(examples) == 0) || len(examples) == 1 || len(examples) > 3 {
			t.Errorf("the command %q has %d examples", command.FullPath(), len(examples))
		}
		for _, width := range []int{80, 40} {
			text := book.Help(command, width)
			if _, end, found := strings.Cut(text, "\nExamples:\n"); !found || strings.Contains(end, "\n\n\n") || !strings.HasPrefix(end, "  ") {
				t.Errorf("the help of %s does not end with examples:\n%s", command.FullPath(), text)
			}
			for _, line := range strings.Split(text, "\n") {
				// A line with only one word, and an example, is never broken.
				if len(line) > width && strings.Contains(strings.TrimSpace(line), " ") && !strings.HasPrefix(line, "    ") {
					t.Errorf("%s: a line is longer than %d columns: %s", command.FullPath(), width, line)
				}
			}
		}
		return next(nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	contract := string(read(t, "../../docs/cli.md"))
	for _, s := range exitStatuses {
		if !strings.Contains(contract, "\n| "+s.Status+" | ") {
			t.Errorf("docs/cli.md does not have the exit status %s", s.Status)
		}
	}
	if used != len(helpExamples) {
		t.Errorf("%d of %d examples belong to a command", used, len(helpExamples))
	}
}

// exampleServer is the name of the server in the examples.
const exampleServer = "vc.example.com"

// TestHelpExamples runs each example of the help as it is, in a folder that has the files which the
// examples name. Its configuration file has the profile vc1 for a simulated server.
func TestHelpExamples(t *testing.T) {
	if testing.Short() {
		t.Skip("runs every example")
	}
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	v := newVM(t, vspheretest.Host{Name: "127.0.0.1"})
	if err := installWorker(filepath.Dir(program)); err != nil {
		t.Fatal(err)
	}
	prepared := &exampleFolder{T: t, server: v, dir: t.TempDir(), program: program}
	prepared.fill()
	for _, e := range helpExamples {
		t.Run(strings.ReplaceAll(e.Line, "/", "_"), func(t *testing.T) {
			f := &exampleFolder{T: t, server: v, dir: t.TempDir(), program: program}
			if err := os.CopyFS(f.dir, os.DirFS(prepared.dir)); err != nil {
				t.Fatal(err)
			}
			switch {
			case e.Command == "profile add":
				f.remove("home/.config/vddkcp/config.json")
				f.onTerminal(f.inPrivateHosts(e.Line))
				if text := read(t, filepath.Join(f.dir, "home/.config/vddkcp/config.json")); !bytes.Contains(text, []byte(exampleServer)) {
					t.Errorf("the profile was not stored:\n%s", text)
				}
			case strings.Contains(e.Line, exampleServer):
				f.succeeds(f.inPrivateHosts(e.Line))
			case e.Command == "export" && !strings.Contains(e.Line, "--run"):
				f.serves(e.Line)
			default:
				if strings.Contains(e.Line, "qemu-img") {
					peer.Need(t, "qemu-img")
				}
				f.succeeds(f.shell(e.Line))
			}
		})
	}
}

// exampleFolder is the folder in which an example runs.
type exampleFolder struct {
	*testing.T
	server  *vmTest
	dir     string
	program string
}

// fill makes the files that examples name.
func (f *exampleFolder) fill() {
	f.Helper()
	for _, dir := range []string{"images", "home/.config/vddkcp", "home/.config/fish/completions"} {
		if err := os.MkdirAll(filepath.Join(f.dir, dir), 0o700); err != nil {
			f.Fatal(err)
		}
	}
	disk := make([]byte, 1<<20)
	f.server.fill(disk[:1<<19])
	f.write("disk.raw", disk)
	f.write("copy.sha256", fmt.Appendf(nil, "sha256:%x\n", sha256.Sum256(disk)))
	f.succeeds(f.shell("vddkcp disk.raw web01.vmdk && vddkcp disk.raw disk.qcow2 && vddkcp disk.raw copy.qcow2"))
	f.write("appliance.ova", appliance(f.T, read(f.T, filepath.Join(f.dir, "web01.vmdk")), len(disk)))
	f.write("jobs.json", []byte(`{"version": 1, "jobs": [
		{"name": "web01", "source": "web01.vmdk", "target": "images/web01.qcow2", "labels": {"wave": "1"}},
		{"name": "db 1", "source": "disk.qcow2", "target": "images/db1.raw"}
	]}`))
	f.write("vc1.password", []byte(f.server.server.Password+"\n"))
	f.write("vc1.sha256", []byte(f.server.server.Thumbprint()+"\n"))
	s := f.server.server
	config, err := json.Marshal(map[string]any{"servers": map[string]any{"vc1": map[string]any{
		"server": s.Host, "port": s.Port, "user": s.User, "password": "+" + filepath.Join(f.dir, "vc1.password"), "thumbprint": s.Thumbprint(), "libdir": s.Library.Dir, "nfchostport": s.Port, // the host has no other port
	}}})
	if err != nil {
		f.Fatal(err)
	}
	f.write("home/.config/vddkcp/config.json", config)
}

func (v *vmTest) fill(p []byte) {
	for i := range p {
		p[i] = byte(v.random.Uint32())
	}
}

func (f *exampleFolder) write(name string, content []byte) {
	f.Helper()
	if err := os.WriteFile(filepath.Join(f.dir, name), content, 0o600); err != nil {
		f.Fatal(err)
	}
}

func (f *exampleFolder) remove(name string) {
	f.Helper()
	if err := os.Remove(filepath.Join(f.dir, name)); err != nil {
		f.Fatal(err)
	}
}

// appliance returns an OVA with one disk.
func appliance(t *testing.T, vmdk []byte, capacity int) []byte {
	t.Helper()
	ovf := fmt.Sprintf(`<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
<References><File ovf:href="disk1.vmdk" ovf:id="file1"/></References>
<DiskSection><Disk ovf:capacity="%d" ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/></DiskSection>
</Envelope>`, capacity)
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, file := range []struct {
		name    string
		content []byte
	}{{"appliance.ovf", []byte(ovf)}, {"disk1.vmdk", vmdk}} {
		err := w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o600, Size: int64(len(file.content)), Format: tar.FormatUSTAR})
		if err == nil {
			_, err = w.Write(file.content)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// shell returns a command that runs a line as a user types it.
func (f *exampleFolder) shell(line string) *exec.Cmd { return f.command("bash", "-c", line) }

func (f *exampleFolder) command(name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	f.Cleanup(cancel)
	c := exec.CommandContext(ctx, name, args...)
	c.Dir = f.dir
	c.Env = append(os.Environ(), "PATH="+filepath.Dir(f.program)+":"+os.Getenv("PATH"), "HOME="+filepath.Join(f.dir, "home"),
		"XDG_CONFIG_HOME=", "XDG_STATE_HOME=", "VDDKCP_LIBDIR="+f.server.server.Library.Dir)
	return c
}

// inPrivateHosts returns a command that runs a line where the name of the server in the examples
// leads to the simulated server. For this, the command gets its own /etc/hosts, and port 443 of an
// address of this machine is passed on to the server.
func (f *exampleFolder) inPrivateHosts(line string) *exec.Cmd {
	f.Helper()
	peer.NeedRoot(f.T)
	address := fmt.Sprintf("127.%d.%d.%d", 1+os.Getpid()>>16&0x3f, os.Getpid()>>8&0xff, os.Getpid()&0xff)
	l, err := net.Listen("tcp", address+":443")
	if err != nil {
		f.Fatal(err)
	}
	s := f.server.server
	stop := forward(l, net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port))))
	f.Cleanup(stop)
	f.write("hosts", []byte(address+" "+exampleServer+"\n"))
	return f.command("unshare", "--mount", "sh", "-c", `mount --bind hosts /etc/hosts && exec bash -c "$1"`, "sh", line)
}

// forward passes connections on to an address until the function is called that it returns.
func forward(l net.Listener, to string) (stop func()) {
	var running sync.WaitGroup
	running.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer from.Close()
				c, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				running.Go(func() {
					io.Copy(from, c)
					from.Close()
				})
				io.Copy(c, from)
				c.Close()
			})
		}
	})
	return func() {
		l.Close()
		running.Wait()
	}
}

func (f *exampleFolder) succeeds(c *exec.Cmd) {
	f.Helper()
	if out, err := c.CombinedOutput(); err != nil {
		f.Fatalf("%s: %v\n%s", c.Args, err, out)
	}
}

// serves runs an export until it listens on the socket of the line, and stops it as a user does.
func (f *exampleFolder) serves(line string) {
	f.Helper()
	_, socket, found := strings.Cut(line, "--listen unix:")
	if !found {
		f.Fatalf("the test does not know when %s listens", line)
	}
	c := f.shell("exec " + line)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Start(); err != nil {
		f.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			f.Fatalf("%s has ended: %v\n%s", line, err, &out)
		case <-tick.C:
			connection, err := net.Dial("unix", filepath.Join(f.dir, socket))
			if err != nil {
				continue
			}
			connection.Close()
			c.Process.Signal(syscall.SIGTERM)
			if err := <-ended; err != nil {
				f.Errorf("%s: %v\n%s", line, err, &out)
			}
			return
		}
	}
}

// onTerminal runs a command on a terminal, and answers what it asks.
func (f *exampleFolder) onTerminal(c *exec.Cmd) {
	f.Helper()
	answers := map[string]string{
		"Trust this certificate? (yes or no): ": "yes",
		"user name: ":                           f.server.server.User,
		"file that has the password in its first line (empty: type the password, which is stored in " + filepath.Join(f.dir, "home/.config/vddkcp/config.json") + "): ": "",
		"(empty: store none): ":      f.server.server.Password,
		"config.json? (yes or no): ": "yes",
	}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	terminal, err := startOnTerminal(c)
	if err != nil {
		f.Fatal(err)
	}
	defer terminal.Close()
	var shown strings.Builder
	piece := make([]byte, 4096)
	for {
		n, err := terminal.Read(piece)
		shown.Write(piece[:n])
		for prompt, text := range answers {
			if strings.HasSuffix(shown.String(), prompt) {
				shown.WriteString("[answer]\n")
				io.WriteString(terminal, text+"\n")
			}
		}
		if errors.Is(err, unix.EIO) { // the command has ended
			break
		}
		if err != nil {
			f.Fatal(err)
		}
	}
	if err := c.Wait(); err != nil {
		f.Fatalf("%s: %v\n%s%s", c.Args, err, &shown, &out)
	}
}
