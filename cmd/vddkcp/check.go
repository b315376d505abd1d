package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

type checkCommand struct {
	VM          string   `arg:"" optional:"" name:"VM" help:"The VM to check: a name, a path in the inventory, moref=ID or uuid=UUID. Without VM, only the server and the VDDK library are checked."`
	Role        bool     `help:"Print a role with the least privileges that vddkcp needs. No server is contacted."`
	Read        bool     `help:"Also read a sector of each disk of VM. For this, a running VM gets a snapshot, which is removed at once."`
	JSON        bool     `name:"json" help:"Print JSON."`
	NFCHostPort portFlag `name:"nfchostport" help:"Port of the ESXi host for the disk data (default 902)." env:"VDDKCP_NFCHOSTPORT" placeholder:"PORT" group:"VDDK:"`
	Transports  string   `help:"Transport modes to try, in order, separated by colons: file, san, hotadd, nbdssl, nbd." placeholder:"LIST" group:"VDDK:"`
	LibDir      string   `name:"libdir" help:"The VDDK library: the folder of the distribution, its folder lib64, or the file of the library itself." env:"VDDKCP_LIBDIR" placeholder:"DIR" type:"path" group:"VDDK:"`
	viaFlags
	serverFlags
}

func (c *checkCommand) Run(ctx context.Context, logs *logFlags, servers *servers) error {
	if c.Role {
		return c.printRole(ctx)
	}
	if c.Read && c.VM == "" {
		return usage.Errorf("check: --read needs the name of a VM")
	}
	flags := c.flags(servers)
	if err := flags.choose(reads{}, address.VM{Name: c.VM}); err != nil {
		return err
	}
	outputs := new(outputs)
	outputs.add("--nfc-trace", c.NFCTrace)
	return c.withLog(logs, outputs, func(log *slog.Logger) error {
		options, err := c.options(ctx, log)
		if err != nil {
			return fmt.Errorf("check: %w", err)
		}
		if err := c.check(ctx, options, flags, log); err != nil {
			return fmt.Errorf("check: %w", err)
		}
		return nil
	})
}

func (c *checkCommand) printRole(ctx context.Context) (err error) {
	if c.VM != "" || c.Read {
		return usage.Errorf("check: --role prints a role for all VMs: leave out the name of the VM and --read")
	}
	if c.JSON {
		err = printJSON(standardOutput(ctx), leastRole())
	} else {
		err = leastRole().printText(standardOutput(ctx))
	}
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	return nil
}

// The method flags returns the flags for opening disks.
func (c *checkCommand) flags(servers *servers) *sourceFlags {
	return &sourceFlags{
		vddkFlags: vddkFlags{serverFlags: c.serverFlags, viaFlags: c.viaFlags, NFCHostPort: c.NFCHostPort, Transports: c.Transports, LibDir: c.LibDir},
		servers:   servers,
	}
}

// The method check runs all checks and prints their results. Text is printed result by result,
// because some checks take long.
func (c *checkCommand) check(ctx context.Context, options vsphere.Options, flags *sourceFlags, log *slog.Logger) error {
	r, err := c.resolve()
	if err != nil {
		return err
	}
	libDir, nfcPort := flags.connects(r)
	c.logProvenance(log)
	checks := &serverChecks{
		options: options, thumbprintFrom: c.login.origin("thumbprint"), vmName: c.VM, read: c.Read, overNFC: flags.chosen.nfc, clear: flags.clear(),
		libDir: libDir, nfcPort: cmp.Or(nfcPort, defaultNFCPort), log: log, progress: new(nfcProgress),
	}
	flags.step = checks.progress.begin
	checks.probe = func(ctx context.Context, vm *vsphere.VM) (*nfc.Probed, error) {
		options, err := flags.nfcOptions(c.opener(flags, log))
		if err != nil {
			return nil, err
		}
		return nfc.Probe(ctx, vm, options)
	}
	checks.open = func(ctx context.Context, vm *vsphere.VM, d *inventory.Disk) (source.Disk, error) {
		return c.openDisk(ctx, &vmSource{servers: flags.servers, session: checks.session, vm: vm, flags: flags}, d, log)
	}
	defer checks.close()
	out := standardOutput(ctx)
	var failed error
	results, err := runChecks(ctx, checks.steps(), func(r checkResult) {
		if !c.JSON {
			failed = cmp.Or(failed, printCheck(out, r))
		}
	})
	if c.JSON {
		failed = printJSON(out, results)
	}
	return cmp.Or(err, failed, checkStatus(results))
}

// openDisk opens a disk of a VM for reading, if necessary of a snapshot. All disks share the snapshot.
func (c *checkCommand) openDisk(ctx context.Context, v *vmSource, d *inventory.Disk, log *slog.Logger) (source.Disk, error) {
	spec := v.spec(c.VM, log)
	spec.Single, spec.Only = true, []string{strconv.Itoa(d.N)}
	return machine.Open(ctx, spec, c.opener(v.flags, log))
}

// The method opener returns an Opener that logs to log.
func (c *checkCommand) opener(flags *sourceFlags, log *slog.Logger) *sourceopen.Opener {
	o := flags.opener()
	o.VDDK.Options.Log, o.VDDK.Options.Warn = log, func(message string) { log.Warn(message) }
	return o
}

// checkResult is the result of one check, as vddkcp check prints it. If OK is true and Hint is not
// empty, a copy can work, but the user should know the detail.
type checkResult struct {
	Check  string `json:"check"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Hint   string `json:"hint"`

	notRun bool // because a check failed that this one needs
}

// checkStep is a step of vddkcp check. Its function run returns one or more results. A result
// without a name gets the name of the step. When the limit is over, the context of run ends.
type checkStep struct {
	name  string
	needs []string // names of steps before this one; unless all their results are OK, run is not called
	limit time.Duration
	run   func(ctx context.Context) []checkResult
}

// runChecks runs the steps in their order, and calls the function show with each result. If ctx
// ends, it returns the cause, and the results until then.
func runChecks(ctx context.Context, steps []checkStep, show func(checkResult)) ([]checkResult, error) {
	results := []checkResult{}
	failed := map[string]bool{}
	for _, step := range steps {
		var found []checkResult
		if i := slices.IndexFunc(step.needs, func(name string) bool { return failed[name] }); i >= 0 {
			found = []checkResult{{Detail: fmt.Sprintf("not checked, because the check %q has failed", step.needs[i]), notRun: true}}
		} else {
			found = step.runWithLimit(ctx)
			if err := context.Cause(ctx); err != nil {
				return results, err
			}
		}
		for _, r := range found {
			if r.Check == "" {
				r.Check = step.name
			}
			failed[step.name] = failed[step.name] || !r.OK
			results = append(results, r)
			show(r)
		}
	}
	return results, nil
}

func (s *checkStep) runWithLimit(ctx context.Context) []checkResult {
	ctx, cancel := context.WithTimeoutCause(ctx, s.limit, fmt.Errorf("no answer within %s", shortDuration(s.limit)))
	defer cancel()
	return s.run(ctx)
}

// These functions return the result of a step that has one result.

func checkOK(format string, args ...any) []checkResult {
	return []checkResult{{OK: true, Detail: fmt.Sprintf(format, args...)}}
}

func checkWarning(hint, format string, args ...any) []checkResult {
	return []checkResult{{OK: true, Detail: fmt.Sprintf(format, args...), Hint: hint}}
}

func checkFailed(hint, format string, args ...any) []checkResult {
	return []checkResult{{Detail: fmt.Sprintf(format, args...), Hint: hint}}
}

// checkError returns the result of a step that failed with an error. If the time limit of the step
// is over, the result says so instead.
func checkError(ctx context.Context, err error) []checkResult {
	if cause := context.Cause(ctx); cause != nil {
		return checkFailed("", "%v", cause)
	}
	return checkFailed(hinted.Of(err), "%v", err)
}

// printCheck prints a result for people.
func printCheck(out io.Writer, r checkResult) error {
	word := "FAILED"
	switch {
	case r.notRun:
		word = "-"
	case r.OK && r.Hint != "":
		word = "WARNING"
	case r.OK:
		word = "ok"
	}
	text := fmt.Sprintf("%-15s  %-7s  %s\n", printable.Name(r.Check), word, printable.Line(r.Detail))
	if r.Hint != "" {
		text += strings.Repeat(" ", 26) + "hint: " + printable.Line(r.Hint) + "\n"
	}
	_, err := io.WriteString(out, text)
	return err
}

// checksFailedError says that something will not work. The results themselves were printed.
type checksFailedError struct{ failed, all int }

func (e *checksFailedError) Error() string {
	return fmt.Sprintf("%d of %d checks did not succeed", e.failed, e.all)
}

// checkStatus returns a *checksFailedError if a result is not OK.
func checkStatus(results []checkResult) error {
	e := &checksFailedError{all: len(results)}
	for _, r := range results {
		if !r.OK {
			e.failed++
		}
	}
	if e.failed > 0 {
		return e
	}
	return nil
}
