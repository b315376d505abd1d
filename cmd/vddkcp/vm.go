package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// vmCommand is vddkcp vm, which copies all disks of a VM. docs/cli.md describes it.
type vmCommand struct {
	Machine string `arg:"" name:"VM" help:"The virtual machine: its name, its inventory path, moref=ID or uuid=UUID."`
	Dst     string `arg:"" name:"DST" optional:"" help:"Where to copy the disks: a folder that exists or that ends in a slash, or a template of the targets with {vm}, {n}, {key}, {label}, {folder} and {moref}. DST can be left out if --target names the target of every disk."`

	Disk     []string          `help:"Copy only this disk, which is named by its number or its label (repeatable)." placeholder:"N|LABEL" sep:"none" group:"VM:"`
	Skip     []string          `help:"Do not copy this disk (repeatable)." placeholder:"N|LABEL" sep:"none" group:"VM:"`
	Target   map[string]string `help:"Copy disk N to this address, such as a block device or an NBD URI (repeatable)." placeholder:"N=ADDRESS" mapsep:"none" group:"VM:"`
	Parallel int               `help:"Number of disks to copy at the same time (default 2)." default:"2" placeholder:"N" group:"VM:"`
	State    string            `help:"Path of the state file, which says how far the copy has come (default: NAME.vddkcp.json in the folder DST, or a file in the user's state folder)." placeholder:"FILE" type:"path" group:"VM:"`
	snapshotFlags
	copyFlags
}

// snapshotFlags say how the snapshot of a VM is made and removed.
type snapshotFlags struct {
	Quiesce          quiesceFlag   `help:"Quiesce the file systems of the guest for the snapshot. If that fails, the copy fails; with --quiesce=try it goes on without." group:"Snapshot:"`
	KeepSnapshot     bool          `help:"If the copy fails, keep the snapshot, so that --resume can continue the copy." group:"Snapshot:"`
	MinFree          bytesize.Size `help:"Stop if a datastore of the VM has less free space (default 10GiB): a snapshot grows, and a full datastore stops every VM on it." default:"10GiB" placeholder:"SIZE" group:"Snapshot:"`
	TaskTimeout      patience      `help:"How long to wait for a task of the server, such as the removal of a snapshot (default 6h)." default:"6h" placeholder:"TIME" group:"Snapshot:"`
	ForceConsolidate bool          `help:"Copy the VM even if its disks needed consolidation before. They are then consolidated at the end." group:"Snapshot:"`
}

// quiesceFlag is the value of --quiesce. The value is optional.
type quiesceFlag inventory.Quiesce

// IsBool tells kong that the flag may be given without a value.
func (*quiesceFlag) IsBool() bool { return true }

// Decode implements kong.MapperValue.
func (f *quiesceFlag) Decode(ctx *kong.DecodeContext) error {
	*f = quiesceFlag(inventory.MustQuiesce)
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return nil
	}
	switch value := fmt.Sprint(ctx.Scan.Pop().Value); value {
	case "true", "yes":
	case "false", "no":
		*f = quiesceFlag(inventory.NoQuiesce)
	case "try":
		*f = quiesceFlag(inventory.TryQuiesce)
	default:
		return fmt.Errorf("%q: want try, or no value", value)
	}
	return nil
}

// Validate checks combinations of flags. The package kong calls it.
func (c *vmCommand) Validate() error {
	for _, refused := range []struct {
		given     bool
		flag, why string
	}{
		{c.SingleLink, "--single-link", "the copy would have only what is in the last snapshot"},
		{c.Backing != "", "--backing", "a backing image belongs to one disk: copy the disk with vddkcp vm:VM#N DST"},
		{c.SourceFormat != "", "--source-format", "the disks of a VM are always raw"},
		{c.Snapshot != "", "--snapshot", "vddkcp makes a snapshot of the VM itself"},
		{c.VM != "", "--vm", "the VM is the first argument"},
		{c.Size != nil, "--size", "the server knows the sizes of the disks"},
		{c.Journal != "", "--journal", "a journal belongs to one disk: copy the disk with vddkcp vm:VM#N DST"},
	} {
		if refused.given {
			return fmt.Errorf("%s cannot be used for a whole VM: %s", refused.flag, refused.why)
		}
	}
	if c.Parallel < 1 || c.Parallel > 64 {
		return fmt.Errorf("--parallel: %d: want 1 to 64 disks", c.Parallel)
	}
	if c.Dst == "" && len(c.Target) == 0 {
		return errors.New("no target is given: want DST, or --target N=ADDRESS for every disk")
	}
	return c.copyFlags.Validate()
}

func (c *vmCommand) Run(ctx context.Context, logs *logFlags, notice *stopping, service *service) error {
	style, asJSON := logs.style(c.Progress)
	display := progress.NewBatchDisplay(displayTo(style), 0)
	notice.over(display, asJSON, readsOf(display))
	if err := c.choose(c.reads(), address.VM{Name: c.Machine}); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	outputs := new(outputs)
	if targets, err := c.targets(); err == nil {
		outputs.folder = targets.folder()
	}
	outputs.add("--report", c.Report)
	outputs.add("--metrics", c.Metrics)
	outputs.add("--log-file", logs.LogFile)
	outputs.add("--nfc-trace", c.NFCTrace)
	outputs.addOwn("--state", c.State)
	c.protectSecrets(outputs)
	if err := outputs.check(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	log, closeLog, err := logs.open(display, asJSON)
	if err != nil {
		return usage.Wrap(err)
	}
	var r *machine.Report
	// A password is asked for before the display draws over the prompt.
	if _, err = c.connection(ctx, func(message string) { log.Warn(message) }); err == nil {
		watched := newCopyWatch("vm", c.Metrics)
		end := watched.watch(ctx, log, service, display)
		err = shown(display, func() (err error) {
			if r, err = c.copyVM(ctx, log, display, outputs, watched); report.Of(err).Done() && !c.DryRun {
				display.End(closingOfVM(r))
			}
			return err
		})
		err = errors.Join(err, end(err))
	}
	// An output that was refused may be the report, or another one that is the same file.
	if c.Report != "" && !errors.As(err, new(*outputError)) {
		if r == nil {
			r = machine.NewReport(c.Machine)
			r.EndWith(err)
		}
		r.Way = c.chosen.report()
		err = errors.Join(err, r.Write(c.Report))
	}
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err != nil {
		err = fmt.Errorf("vm %s: %w", printable.Name(c.Machine), err)
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	return nil
}

// closingOfVM returns the last line of the copy of a VM that is done.
func closingOfVM(r *machine.Report) string {
	end, disks := progress.Closing{Took: time.Duration(r.Seconds * float64(time.Second)), Verified: true}, 0
	for _, round := range r.Rounds {
		for _, d := range round.Disks {
			if d == nil {
				continue
			}
			of := closingOf(d)
			disks, end.Copied, end.Shared, end.Places = disks+1, end.Copied+of.Copied, end.Shared+of.Shared, end.Places+of.Places
			end.Verified = end.Verified && of.Verified
		}
	}
	end.Verified = end.Verified && disks > 0
	return fmt.Sprintf("%s: %s, %s", printable.Name(r.VM), plural(disks, "disk", "disks"), end)
}

// The method copyVM copies the VM. With --dry-run it only prints what a copy would do.
func (c *vmCommand) copyVM(ctx context.Context, log *slog.Logger, display *progress.BatchDisplay, outputs *outputs, watched *copyWatch) (*machine.Report, error) {
	targets, err := c.targets()
	if err != nil {
		return nil, err
	}
	o := c.sessionOptions(log)
	o.taskTimeout = time.Duration(c.TaskTimeout)
	v, err := c.findVM(ctx, c.Machine, o)
	if err != nil {
		return nil, err
	}
	spec := v.spec(c.Machine, log)
	c.snapshotFlags.apply(&spec)
	spec.Only, spec.Skip, spec.Parallel = c.Disk, c.Skip, c.Parallel
	spec.Resume, spec.Force = c.Resume, c.Force
	spec.Targets = func(vm *inventory.VM, disks []inventory.Disk) ([]string, error) {
		display.ShowVM(vm.Name, len(disks))
		addresses, err := targets.of(vm, disks)
		for i, target := range addresses {
			outputs.protectTarget("the target of "+disks[i].Title(), addressOrPath(target, address.Target))
		}
		return addresses, err
	}
	folder := targets.folder()
	spec.State = func(vm *inventory.VM, disks []inventory.Disk, addresses []string) (string, error) {
		path, err := c.statePath(vm, disks, addresses, folder)
		if err == nil && c.State == "" {
			outputs.addLater("the state file", path)
		}
		return path, errors.Join(err, outputs.check())
	}
	limit := c.limiter()
	spec.Job = func(*inventory.Disk, string) job.Spec {
		copy := copyCommand{copyFlags: c.copyFlags}
		s := copy.spec()
		s.Limit, s.Log = limit, log
		return s
	}
	spec.Phase = func(p machine.Phase, percent int) { display.Phase(c.Machine, string(p), percent) }
	spec.Begin = func(d *inventory.Disk, _ string) (*progress.Counters, func(error)) {
		counters := new(progress.Counters)
		watched.add(counters)
		done := display.StartDisk(c.Machine, d.N, address.VM{Name: c.Machine, Disk: strconv.Itoa(d.N)}.String(), counters)
		return counters, func(err error) {
			done()
			display.Ended(outcomeWord(report.Of(err).Status))
		}
	}
	if c.DryRun {
		_, missing := os.Stat(folder)
		spec.NewFolder = folder != "" && errors.Is(missing, fs.ErrNotExist)
		p, err := machine.Plan(ctx, spec)
		if err == nil {
			err = c.printPlan(p)
		}
		return p.Report, err
	}
	if folder != "" {
		if err := os.MkdirAll(folder, 0o777); err != nil {
			return nil, err
		}
	}
	return machine.Run(ctx, spec)
}

// The method limiter returns the limit of --rate-limit for all disks together, or nil.
func (c *copyFlags) limiter() *transfer.Limiter {
	if c.RateLimit <= 0 {
		return nil
	}
	return transfer.NewLimiter(int64(c.RateLimit))
}

// The method apply sets the fields of a Spec that the flags describe.
func (f *snapshotFlags) apply(spec *machine.Spec) {
	spec.Quiesce, spec.KeepSnapshot, spec.MinFree = inventory.Quiesce(f.Quiesce), f.KeepSnapshot, int64(f.MinFree)
	spec.ForceConsolidate = f.ForceConsolidate
}

// vmTargets are the targets of the disks of a VM.
type vmTargets struct {
	template *machine.Template // nil without DST
	disks    map[string]string // the targets of disks, by their numbers or labels
}

func (c *vmCommand) targets() (*vmTargets, error) {
	t := &vmTargets{disks: c.Target}
	for name, text := range c.Target {
		a, err := address.Parse(text, address.Target)
		if err != nil {
			return nil, fmt.Errorf("--target %s: %w", name, err)
		}
		if _, ok := a.(address.Stream); ok {
			return nil, usage.New(fmt.Sprintf("--target %s: the disks of a VM cannot be written to standard output", name), "to write one disk to standard output, use vddkcp vm:VM#N -")
		}
	}
	if c.Dst == "" {
		return t, nil
	}
	var err error
	t.template, err = machine.ParseTarget(c.Dst, c.Format)
	return t, err
}

// The method folder returns the folder DST, or "" if DST is not a folder.
func (t *vmTargets) folder() string {
	if t.template == nil {
		return ""
	}
	return t.template.Folder()
}

// The method of returns the target of each disk.
func (t *vmTargets) of(vm *inventory.VM, disks []inventory.Disk) (addresses []string, err error) {
	unused := map[string]bool{}
	for name := range t.disks {
		unused[name] = true
	}
	var all []machine.Target
	for i := range disks {
		d := &disks[i]
		name := strconv.Itoa(d.N)
		target, ok := t.disks[name]
		if !ok {
			name = d.Label
			target, ok = t.disks[name]
		}
		delete(unused, name)
		if !ok && t.template == nil {
			return nil, usage.Errorf("%s has no target: add --target %d=ADDRESS, or name a folder DST", d.Title(), d.N)
		}
		if !ok {
			if target, err = t.template.Target(vm, d); err != nil {
				return nil, err
			}
		}
		addresses = append(addresses, target)
		all = append(all, machine.Target{VM: vm, Disk: d, Address: target})
	}
	for name := range unused {
		return nil, usage.New(fmt.Sprintf("--target %s: no disk of the VM that is copied has this number or label", printable.Name(name)), "the disks are "+inventory.ListDisks(disks))
	}
	return addresses, machine.CheckTargets(all)
}

// The method statePath returns the path of the state file: in the folder DST if it is a folder,
// otherwise in the user's state folder.
func (c *vmCommand) statePath(vm *inventory.VM, disks []inventory.Disk, targets []string, folder string) (string, error) {
	switch {
	case c.State != "":
		return c.State, nil
	case folder != "":
		return stateInFolder(folder, vm)
	}
	return hiddenState(vm, disks, targets)
}

// stateInFolder returns the path of the state file in the folder of the targets. A long name of the
// VM is shortened, as in the names of the targets.
func stateInFolder(dir string, vm *inventory.VM) (string, error) {
	t, err := machine.ParseTemplate("{vm}.vddkcp.json")
	if err != nil {
		return "", err
	}
	name, err := t.Target(vm, &inventory.Disk{})
	return filepath.Join(dir, name), err
}

// hiddenState returns the path of a state file in the user's state folder. It depends on the VM
// and on the targets of the disks.
func hiddenState(vm *inventory.VM, disks []inventory.Disk, targets []string) (string, error) {
	hash := sha256.New()
	for i, target := range targets {
		switch a := addressOrPath(target, address.Target).(type) {
		case address.Path:
			if abs, err := filepath.Abs(string(a)); err == nil {
				target = abs
			}
		case address.Null, address.Stream: // several disks may have this target
			target = fmt.Sprintf("%s %d", target, disks[i].Key)
		}
		fmt.Fprintf(hash, "%q\n", target)
	}
	path, err := journal.DefaultPath("vm")
	if err != nil {
		return "", err
	}
	name := machine.CleanName(cmp.Or(vm.InstanceUUID, vm.Moref)) + "-" + hex.EncodeToString(hash.Sum(nil)[:8]) + ".json"
	return filepath.Join(filepath.Dir(path), name), nil
}

// The method printPlan prints what a copy would do.
func (c *vmCommand) printPlan(p *machine.Planned) error {
	var b strings.Builder
	fmt.Fprintf(&b, "vm: %s (%s, %s)\npower: %s\nstate file: %s\n", printable.Name(p.VM.Name), printable.Name(p.VM.Path), printable.Name(p.VM.Moref), p.VM.Power, printable.Name(p.State))
	for i := range p.Disks {
		d := &p.Disks[i]
		fmt.Fprintf(&b, "%s: %d bytes (%s): %s -> %s\n", d.Title(), d.Size, bytesize.Format(d.Size), printable.Name(d.File), printable.Name(p.Targets[i]))
	}
	b.WriteString(c.planLines())
	_, err := textOutput.Write([]byte(b.String()))
	return err
}

// The method copyDiskOfVM copies one disk of a VM, whose address is the source of a copy.
func (c *copyCommand) copyDiskOfVM(ctx context.Context, a address.VM, spec job.Spec) (*report.Report, error) {
	m, err := c.specOfVM(ctx, a, spec)
	if err != nil {
		r := report.New(c.Src, c.Dst)
		r.Way = c.chosen.report()
		r.EndWith(err)
		return r, err
	}
	of, err := machine.Run(ctx, m)
	r := ofOneDisk(c.Src, c.Dst, of, err)
	r.Way = c.chosen.report()
	return r, err
}

// The method planDiskOfVM checks the copy of one disk of a VM. It makes no snapshot. How much data
// the disk has is therefore not known, and its size stands for that.
func (c *copyCommand) planDiskOfVM(ctx context.Context, a address.VM, spec job.Spec) (*job.Planned, error) {
	planned := &job.Planned{Report: report.New(c.Src, c.Dst)}
	m, err := c.specOfVM(ctx, a, spec)
	if err == nil {
		var p *machine.Planned
		if p, err = machine.Plan(ctx, m); err != nil {
			err = fmt.Errorf("copy %s: %w", c.Src, err)
		} else {
			planned.Size = p.Disks[0].Size
			planned.Data, planned.Need, planned.Extents = planned.Size, planned.Size, 1
			planned.Target = job.TargetOf(spec)
		}
	}
	if end := planned.Report.EndWith(err); end.Done() {
		planned.Report.End(report.StatusSkipped, 0)
	}
	return planned, err
}

// stateBeside returns the path of the state file of the copy of one disk to a file.
func stateBeside(target string) string { return target + ".vddkcp.json" }

// The method specOfVM finds the VM that the address a names on the server, and returns the Spec of
// a copy of one of its disks. The parameter copied describes the copy of that disk.
func (c *copyCommand) specOfVM(ctx context.Context, a address.VM, copied job.Spec) (spec machine.Spec, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy %s: %w", c.Src, err)
		}
	}()
	o := c.sessionOptions(copied.Log)
	o.taskTimeout = time.Duration(c.TaskTimeout)
	v, err := c.findVM(ctx, a.Name, o)
	if err != nil {
		return spec, err
	}
	spec = v.spec(a.Name, copied.Log)
	if spec.Only, err = v.oneDisk(ctx, a); err != nil {
		return spec, err
	}
	c.snapshotFlags.apply(&spec)
	spec.Single, spec.Resume, spec.Force = true, copied.Resume, copied.Force
	spec.Targets = func(*inventory.VM, []inventory.Disk) ([]string, error) { return []string{copied.Target}, nil }
	spec.State = func(vm *inventory.VM, disks []inventory.Disk, targets []string) (string, error) {
		if copied.WritesFile() {
			return stateBeside(targets[0]), nil
		}
		return hiddenState(vm, disks, targets)
	}
	spec.Job = func(*inventory.Disk, string) job.Spec { return copied }
	spec.Begin = func(*inventory.Disk, string) (*progress.Counters, func(error)) {
		return copied.Counters, func(error) {}
	}
	return spec, nil
}

// ofOneDisk returns the report of the copy of one disk of a VM, as a copy of a disk at another
// address has it.
func ofOneDisk(src, dst string, m *machine.Report, err error) *report.Report {
	r := report.New(src, dst)
	if len(m.Rounds) > 0 && m.Rounds[0].Disks[0] != nil {
		r = m.Rounds[0].Disks[0]
	}
	r.Source, r.Target, r.Started = src, dst, m.Started
	r.Warnings = append(r.Warnings, m.Warnings...)
	r.EndWith(err)
	return r
}
