// Command vddkcp copies virtual disks. Its command line, output and exit statuses
// are described in docs/cli.md, which is a promise to users. This package turns
// flags into the options of other packages, and errors into messages and exit
// statuses.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/nearest"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/report"
)

type cli struct {
	Copy       copyCommand       `cmd:"" default:"withargs" group:"Copy:" help:"Copy one disk. This is the default command."`
	VMs        vmCommand         `cmd:"" name:"vm" group:"Copy:" help:"Copy all disks of a virtual machine, as they are at one instant."`
	RunJobs    batchCommand      `cmd:"" name:"run" group:"Copy:" help:"Run the copies that a job file lists."`
	Export     exportCommand     `cmd:"" group:"Serve:" help:"Serve disks over NBD until a signal stops the server."`
	Info       infoCommand       `cmd:"" group:"Look at a disk:" help:"Print the format, size, allocation, backing chain and identity of a disk."`
	Map        mapCommand        `cmd:"" group:"Look at a disk:" help:"Print the extents of a disk, as qemu-img map does."`
	Verify     verifyCommand     `cmd:"" group:"Look at a disk:" help:"Compare two disks, or one disk with a digest."`
	Ls         lsCommand         `cmd:"" name:"ls" group:"Servers and virtual machines:" help:"List the VMs of a vCenter server or ESXi host, and which of their disks can be copied."`
	Jobs       jobsCommand       `cmd:"" group:"Servers and virtual machines:" help:"Print a job file that copies the disks of VMs."`
	Check      checkCommand      `cmd:"" group:"Servers and virtual machines:" help:"Check whether a VM can be copied: connections, certificate, privileges, library."`
	Cleanup    cleanupCommand    `cmd:"" group:"Servers and virtual machines:" help:"List and remove snapshots that earlier runs of vddkcp have left."`
	Profile    profileCommand    `cmd:"" group:"Servers and virtual machines:" help:"Store, list and remove profiles: names for servers and their logins."`
	Thumbprint thumbprintCommand `cmd:"" group:"Servers and virtual machines:" help:"Print the thumbprints of a server's certificate, and whether it is trusted."`
	VDDK       vddkCommand       `cmd:"" name:"vddk" group:"This program:" help:"Print which VDDK library would be used, and which functions it has."`
	Completion completionCommand `cmd:"" group:"This program:" help:"Print a completion script for a shell."`
	Version    versionCommand    `cmd:"" group:"This program:" help:"Print the version."`
	Man        manCommand        `cmd:"" hidden:"" help:"Write the manual pages into a folder."`

	PrintVersion versionFlag `name:"version" help:"Print the version and exit."`

	Log logFlags `embed:"" group:"Log:"`
}

func newParser(c *cli, stdout, stderr io.Writer, exit func(int), options ...kong.Option) (*kong.Kong, error) {
	parser, err := kong.New(c, append(append(options, textMappers...),
		kong.Name("vddkcp"),
		kong.Description("Copies VMware virtual disks, out of vSphere or from files, to raw, qcow2, VMDK and NBD, fast and without losing a byte.\n\nvddkcp SRC DST copies the disk at SRC to DST. A new file gets the name DST only when it is whole."),
		kong.Writers(stdout, stderr),
		kong.Exit(exit),
		kong.Resolvers(flagsFirst),
		kong.Help(printHelp),
	)...)
	if err == nil {
		parser.Model.HelpFlag.Help = "Print help with examples and exit."
	}
	return parser, err
}

func main() { os.Exit(run(os.Args[1:])) }

// The function run executes the command line and returns the exit status of the program.
func run(args []string) int {
	// If the process that reads from a pipe has ended, a write to the pipe must fail
	// with an error message instead of ending the program silently. Go returns EPIPE
	// from writes to standard output only if the program has asked for SIGPIPE.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	secrets, servers := extractSecrets(), new(servers)
	cleanEnvironment()
	service := newService()

	var c cli
	exited, status := false, 0
	parser, err := newParser(&c, textOutput, errorOutput, func(code int) { exited, status = true, code }, kong.Bind(secrets, servers))
	if err != nil {
		panic(err) // the declaration of a flag is invalid, which every test detects
	}
	if len(args) > 0 && args[0] == completeWord {
		return printCompletions(textOutput, parser.Model, args[1:])
	}
	asJSON := wantsJSON(args)
	if err := refuseReserved(args); err != nil {
		return fail(errorOutput, asJSON, err)
	}
	if err := refuseMisspelt(parser.Model, args); err != nil {
		return fail(errorOutput, asJSON, err)
	}
	if args, err = rewriteNBDKit(parser.Model, args); err != nil {
		return fail(errorOutput, asJSON, err)
	}
	if args, err = rewriteWords(parser.Model, args); err != nil {
		return fail(errorOutput, asJSON, err)
	}
	parsed, err := parser.Parse(args)
	if exited { // help
		return status
	}
	if err != nil {
		return fail(errorOutput, asJSON, usage.WithHint(aboutVariable(err), "run vddkcp --help for the list of commands, or vddkcp COMMAND --help for the flags of a command"))
	}
	commands, notice := new(spawned), new(stopping)
	notice.over(errorOutput, asJSON, nil)
	ctx, stop := withSignals(context.Background(), notice.say, func() {
		commands.kill()
		servers.abandon(messages(errorOutput, asJSON))
	})
	defer stop()
	parsed.BindTo(ctx, (*context.Context)(nil))
	parsed.Bind(&c.Log, parsed.Model, commands, notice, service)
	err = parsed.Run()
	left := servers.close(c.Log.warn)
	if err == nil {
		err = left
	} else if left != nil {
		fail(errorOutput, asJSON, left)
	}
	if err != nil {
		var reported *reportedError
		if errors.As(err, &reported) {
			return report.Of(err).Exit
		}
		return fail(errorOutput, asJSON, err)
	}
	return 0
}

// refuseReserved returns an error if the first word is the name of a command that is
// planned for a later version. Without this error, this version would take the word for
// SRC and copy a file of that name.
func refuseReserved(args []string) error {
	reserved := []string{
		"warm", "vddk-worker",
	}
	if len(args) > 0 && slices.Contains(reserved, args[0]) {
		return usage.New(fmt.Sprintf("this version of vddkcp has no command %q", args[0]), "for a file of that name write ./"+args[0])
	}
	return nil
}

// otherNames maps commands of other programs to the commands of vddkcp that do the
// same.
var otherNames = map[string]string{
	"batch": "run", "cmp": "verify", "clone": "copy", "compare": "verify", "convert": "copy", "cp": "copy", "diff": "verify", "serve": "export",
}

// refuseMisspelt returns an error if the first operand looks like a misspelt command.
// Without this error, the word would be taken for SRC. If there is a file of that name,
// refuseMisspelt returns nil, because the word may be SRC.
func refuseMisspelt(app *kong.Application, args []string) error {
	word := ""
	if line := splitLine(app, args); line != nil && !line.chosen && len(line.operands) > 0 {
		word = line.operands[0]
	} else if line == nil && len(args) > 0 {
		word = args[0] // the line has a flag that copy does not have
	}
	if word == "" || strings.Trim(strings.ToLower(word), "abcdefghijklmnopqrstuvwxyz-") != "" || word[0] == '-' || commandNamed(app, word) != nil {
		return nil
	}
	if _, err := os.Lstat(word); err == nil {
		return nil
	}
	if strings.ToLower(word) == "help" {
		return usage.New("there is no command and no file called "+word, "run vddkcp --help, or vddkcp COMMAND --help")
	}
	var names []string
	for _, c := range app.Children {
		if !c.Hidden {
			names = append(names, c.Name)
		}
	}
	name, ok := nearest.Near(strings.ToLower(word), names)
	if other := otherNames[strings.ToLower(word)]; other != "" {
		name, ok = other, true
	}
	if !ok {
		return nil
	}
	return usage.New(fmt.Sprintf("there is no command and no file called %s; did you mean %s?", word, name), "for a file of that name write ./"+word)
}

// reportedError is an error that was already shown to the user.
type reportedError struct{ error }

func (e *reportedError) Unwrap() error { return e.error }

// signalError is the cause of a context that ended because of a signal.
type signalError struct{ signal syscall.Signal }

// Signal returns the signal, for callers that pass it on to another process.
func (e *signalError) Signal() syscall.Signal { return e.signal }

func (e *signalError) Error() string { return fmt.Sprintf("stopped by %s", signalName(e.signal)) }

// ExitStatus returns the exit status for the error. Package report calls this method.
func (e *signalError) ExitStatus() int { return exit.Signal + int(e.signal) }

func signalName(s syscall.Signal) string {
	switch s {
	case syscall.SIGHUP:
		return "SIGHUP"
	case syscall.SIGINT:
		return "SIGINT"
	}
	return "SIGTERM"
}

// The constant echo is a duration. A signal that arrives twice within this duration counts
// only once. timeout(1) and other programs send a signal twice: to the process and then to
// its process group.
const echo = 250 * time.Millisecond

// withSignals returns a context that the first SIGHUP, SIGINT or SIGTERM ends, with a *signalError
// as its cause. Before that, it calls the function atFirst. A second SIGINT or SIGTERM calls the
// function beforeExit and ends the process at once. However, a signal that only repeats the first
// one within a quarter of a second (the constant echo) is ignored. A second SIGHUP has no effect,
// because a terminal that closes sends several, and systemd sends one after its SIGTERM. If SIGHUP
// is ignored when the program starts, as under nohup(1), it stays ignored.
func withSignals(parent context.Context, atFirst, beforeExit func()) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	wanted := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		wanted = append(wanted, syscall.SIGHUP)
	}
	signal.Notify(signals, wanted...)
	go func() {
		first, ok := <-signals
		if !ok {
			return
		}
		begun := time.Now()
		atFirst()
		cancel(&signalError{first.(syscall.Signal)})
		killpoint.At("signal")
		for second := range signals {
			if second == syscall.SIGHUP || second == first && time.Since(begun) < echo {
				continue
			}
			restoreTerminal()
			beforeExit()
			os.Exit(exit.Signal + int(second.(syscall.Signal)))
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(signals)
		cancel(nil)
	}
}

// The function fail writes an error to w, as text or as JSON, and returns the exit status
// that belongs to the error.
func fail(w io.Writer, asJSON bool, err error) int { return failJob(w, asJSON, "", err) }

// The function failJob is like the function fail, but it also writes the name of the job of
// a batch in which the error occurred. An empty name means that the error belongs to no
// job.
func failJob(w io.Writer, asJSON bool, job string, err error) int {
	end := report.Of(err)
	if asJSON {
		text, marshalled := json.Marshal(struct {
			Type  string `json:"type"`
			Job   string `json:"job,omitempty"`
			Error string `json:"error"`
			Hint  string `json:"hint"`
			Exit  int    `json:"exit"`
		}{"error", job, err.Error(), end.Hint, end.Exit})
		if marshalled == nil {
			fmt.Fprintf(w, "%s\n", text)
			return end.Exit
		}
	}
	message := fmt.Sprintf("vddkcp: %s\n", printable.Error(err))
	if job != "" { // the batch goes on, so the time is of interest
		message = fmt.Sprintf("%svddkcp: job %s: %s\n", stamp(), printable.Name(job), printable.Error(err))
	}
	if end.Hint != "" {
		message += "hint: " + printable.Line(end.Hint) + "\n"
	}
	io.WriteString(w, message)
	return end.Exit
}
